"""The documentation: it builds without a warning, is complete, and its examples run."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import gradient_accumulator_tf as package

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMES = [name for name in package.__all__ if name != "__version__"]


def _build(docs, output):
    """Builds the documentation as `make docs` does, in a process of its own."""
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    pytest.importorskip("myst_parser", reason="the docs extra is not installed")
    pytest.importorskip("furo", reason="the docs extra is not installed")
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", docs, output],
        cwd=ROOT,  # which is then on the path
        capture_output=True,
        text=True,
    )


@pytest.fixture
def docs_copy(tmp_path):
    return shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("_*"))


def test_the_documentation_builds_without_a_warning(docs_copy, tmp_path):
    run = _build(docs_copy, tmp_path / "html")
    assert run.returncode == 0, run.stderr
    api = (tmp_path / "html" / "api.html").read_text()
    assert all(f'id="gradient_accumulator_tf.{name}"' in api for name in NAMES)


def test_an_undocumented_public_name_fails_the_build(docs_copy, tmp_path):
    api = docs_copy / "api.md"
    api.write_text(api.read_text().replace(".. autoclass:: ThroughputLogger", ""))
    conf = docs_copy / "conf.py"
    added = "package.__all__.append('Silent')\npackage.Silent = type('Silent', (), {})\n"
    conf.write_text(f"{conf.read_text()}\n\n{added}")
    run = _build(docs_copy, tmp_path / "html")
    assert run.returncode != 0
    assert "ThroughputLogger has no entry in docs/api.md" in run.stderr
    assert "Silent has no entry in docs/api.md" in run.stderr
    assert "Silent has no docstring" in run.stderr


@pytest.mark.fast
def test_every_page_is_in_a_toctree():
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    listed = {line for tree in trees for line in tree.split("\n") if re.fullmatch(r"\w+", line)}
    assert listed == {page.stem for page in PAGES} - {"index"}


@pytest.mark.fast
@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in PAGES)])
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text()):
        assert "://" in target or (ROOT / page).parent.joinpath(target).exists(), target


def _docstrings():
    for name in NAMES:
        public = getattr(package, name)
        yield name, public.__doc__
        for attribute, value in vars(public).items() if inspect.isclass(public) else ():
            yield f"{name}.{attribute}", getattr(value, "__doc__", None)


def _examples():
    for name, docstring in _docstrings():
        blocks = re.findall(r"```python\n(.*?)```", inspect.cleandoc(docstring or ""), re.DOTALL)
        if blocks:
            yield pytest.param("\n".join(blocks), id=name)


@pytest.mark.parametrize("example", list(_examples()))
def test_docstring_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"keras": keras, "np": np, "tf": tf, "__name__": "example"}
    namespace.update((name, getattr(package, name)) for name in NAMES)
    exec(compile(example, "example", "exec"), namespace)
