"""The folders of the package, and which of them may import which."""

import ast
from pathlib import Path

import pytest

import gradient_accumulator_tf

PACKAGE = Path(gradient_accumulator_tf.__file__).parent
# From the bottom up: each imports only from itself and from those before it.
FLOORS = [
    "_installation",
    "_checks",
    "_arguments",
    "_keras",
    "replicated",
    "cycle",
    "optimizers",
    "batch_norm",
    "stages",
    "gradient_checkpointing",
    "models",
    "equivalence",
]


def imported_floors(source, package="gradient_accumulator_tf"):
    """The names right below the package that a module's source imports; "__init__" is all of it."""
    parent, _, own = package.rpartition(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == parent:
            yield from ("__init__" for alias in node.names if alias.name == own)
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            yield node.module.removeprefix(f"{package}.").split(".")[0]


@pytest.mark.fast
def test_every_module_imports_downwards_only():
    places = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.iterdir()}
    assert places - {"__init__", "__pycache__", "py.typed"} == set(FLOORS)
    upwards = []
    for path in PACKAGE.rglob("*.py"):
        floor = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if floor == "__init__":
            continue
        for imported in imported_floors(path.read_text()):
            if imported not in FLOORS[: FLOORS.index(floor) + 1]:
                upwards.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not upwards


# The modules of `_keras`, likewise.
KERAS_FLOORS = [
    "training",
    "layers",
    "optimizers",
    "execution",
    "graphs",
    "layer_pairs",
    "model_copies",
    "optimizer_copies",
    "substitutions",
    "substitutes",
    "patches",
    "wrapping",
]


@pytest.mark.fast
def test_modules_of_keras_import_each_other_downwards_only():
    folder, upwards = PACKAGE / "_keras", []
    places = {path.name.removesuffix(".py") for path in folder.iterdir()}
    assert places - {"__init__", "__pycache__"} == set(KERAS_FLOORS)
    for path in folder.rglob("*.py"):
        floor = path.relative_to(folder).parts[0].removesuffix(".py")
        if floor == "__init__":
            continue
        for imported in imported_floors(path.read_text(), "gradient_accumulator_tf._keras"):
            if imported not in KERAS_FLOORS[: KERAS_FLOORS.index(floor) + 1]:
                upwards.append(f"{path.relative_to(folder)} imports {imported}")
    assert not upwards


@pytest.mark.fast
def test_an_import_upwards_is_seen():
    source = "from gradient_accumulator_tf import _keras\n"
    source += "def f():\n    from gradient_accumulator_tf.models.twin import make_twin\n"
    assert list(imported_floors(source)) == ["_keras", "models"]
    # Within `_keras` modules import each other, not all of it.
    source += "from gradient_accumulator_tf._keras.layers import sublayers\n"
    assert list(imported_floors(source, f"{PACKAGE.name}._keras")) == ["__init__", "layers"]


@pytest.mark.fast
def test_completion_offers_the_public_names_only():
    assert dir(gradient_accumulator_tf) == sorted(gradient_accumulator_tf.__all__)
