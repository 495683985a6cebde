"""The picture of the package's folders in docs/design.md is of the package as it is."""

import importlib.util
import re
from pathlib import Path

import matplotlib.image
import pytest

ROOT = Path(__file__).parent.parent


def _picture_maker():
    path = ROOT / "docs" / "make_layout_picture.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = _picture_maker()


def _package(folder, sources):
    """A package of these sources by path, and a script beside it."""
    package = folder / "package"
    for name, source in {"__init__.py": "", **sources}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


@pytest.mark.fast
def test_the_picture_shows_the_present_folders_and_imports(capsys):
    assert maker.main(["--check"]) == 0, capsys.readouterr().err


THREE = {
    "__init__.py": "from package import _low\nfrom package.top.a import A\n",
    "top/__init__.py": "",
    "top/a.py": '"""Text\nof two lines."""\n\n# why\nfrom package import _low\n'
    "def f():\n    from package.middle import g, h\n    from package.top.b import i\n",
    "top/b.py": "from package.middle import g\n",
    "middle.py": "import os\nfrom package._low import x\nfrom package_of_others import _low\n",
    "_low.py": "x = 1\n",
}


def test_reads_imports_wherever_they_stand(tmp_path):
    folders = maker.read(_package(tmp_path, THREE))
    assert folders == {
        "top": maker.Folder(2, 5, {"_low": 1, "middle": 2}, public=True),
        "middle": maker.Folder(1, 3, {"_low": 1}, public=False),
        "_low": maker.Folder(1, 1, {}, public=False),
    }
    assert maker.floors(folders) == {"top": 2, "middle": 1, "_low": 0}


def test_a_circle_of_imports_is_refused(tmp_path):
    circle = {**THREE, "_low.py": "def f():\n    from package.top import a\n"}
    with pytest.raises(ValueError, match=r"circle: _low imports top imports _low"):
        maker.table(maker.read(_package(tmp_path, circle)))


@pytest.mark.parametrize(
    ("path", "source", "current"),
    [
        ("top/c.py", "from package.middle import g\n" * 3, True),  # a number, but no arrow
        ("middle.py", "import os\n", False),
        ("top/c.py", "from package import new\n", False),
        ("new.py", "", False),
    ],
)
def test_a_changed_arrow_or_folder_is_seen(path, source, current, tmp_path):
    before = maker.table(maker.read(_package(tmp_path, THREE)))
    new = {"new.py": ""} if "new" in source else {}
    changed = maker.read(_package(tmp_path, {**THREE, **new, path: source}))
    assert maker.is_current(changed, before) == current


def test_draws_the_same_file_each_time(tmp_path):
    folders = maker.read(_package(tmp_path, THREE))
    for name in ("one.png", "two.png"):
        maker.draw(folders, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert matplotlib.image.imread(tmp_path / "one.png").std() > 0


@pytest.mark.fast
def test_the_page_names_files_that_exist():
    page = (ROOT / "docs" / "design.md").read_text()
    # Paths are below the package, or below the root: `cycle/losses.py`, `tests/oracle.py`.
    named = set(re.findall(r"`([\w./]+(?:\.py|\.md|\.cfg|/))`", page))
    assert len(named) > 30
    package = ROOT / "gradient_accumulator_tf"
    assert [n for n in sorted(named) if not any((p / n).exists() for p in (package, ROOT))] == []
