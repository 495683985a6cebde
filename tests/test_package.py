"""The package as it is imported: its public names, and where it must refuse to be."""

import configparser
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import tensorflow as tf

import gradient_accumulator_tf
from gradient_accumulator_tf import _installation

ROOT = Path(__file__).parent.parent


@pytest.mark.fast
def test_public_names_have_docstrings():
    for name in gradient_accumulator_tf.__all__:
        assert name == "__version__" or getattr(gradient_accumulator_tf, name).__doc__, name


@pytest.mark.parametrize("backend", ["jax", "torch", "numpy"])
def test_another_keras_backend_is_refused_with_the_remedy(backend):
    run = subprocess.run(
        [sys.executable, "-c", "import gradient_accumulator_tf"],
        env={**os.environ, "KERAS_BACKEND": backend},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert re.search(
        rf"ImportError: .*Received: the {backend} backend.*KERAS_BACKEND=tensorflow", run.stderr
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    "package, version, message",
    [
        ("keras", "2.15.0", "needs Keras 3.*Received: keras 2.15.0.*pip install"),
        ("keras", "3.7.0", r"needs keras 3.8 or newer\. Received: keras 3.7.0"),
        ("tensorflow", "2.15.1", r"needs tensorflow 2.16 or newer\. Received: tensorflow 2.15.1"),
    ],
)
def test_older_versions_are_refused(monkeypatch, package, version, message):
    from gradient_accumulator_tf._installation import check_installation

    module = keras if package == "keras" else sys.modules["tensorflow"]
    monkeypatch.setattr(module, "__version__", version)
    with pytest.raises(ImportError, match=message):
        check_installation()


@pytest.mark.fast
def test_the_metadata_has_the_supported_versions():
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    required = metadata["options"]["install_requires"].split()
    for package, oldest, newest in (
        ("tensorflow", _installation.OLDEST_TENSORFLOW, _installation.NEWEST_TENSORFLOW),
        ("keras", _installation.OLDEST_KERAS, _installation.NEWEST_KERAS),
    ):
        bounds = f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
        assert f"{package}{bounds}" in required


def _snippets():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for i, block in enumerate(blocks):
            yield pytest.param(block, id=f"{page.name}-{i}")


@pytest.mark.parametrize("snippet", list(_snippets()))
def test_snippets_run(snippet, capsys, monkeypatch):
    # Strategies made one after the other in one process share the keys of collectives.
    no_collectives = {"cross_device_ops": tf.distribute.ReductionToOneDevice()}
    strategy = functools.partial(tf.distribute.MirroredStrategy, **no_collectives)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", strategy)
    exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})
