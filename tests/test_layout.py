"""The folders of the package, and which of them may import which."""

import ast
from pathlib import Path

import gradient_accumulator_tf

PACKAGE = Path(gradient_accumulator_tf.__file__).parent
# From the bottom up: each imports only from itself and from those before it.
FLOORS = [
    "_installation",
    "_checks",
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


def imported_floors(source):
    """The names right below the package that a module's source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "gradient_accumulator_tf":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            package, *rest = node.module.split(".")
            if package == "gradient_accumulator_tf":
                yield rest[0]


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


def test_an_import_upwards_is_seen():
    source = "from gradient_accumulator_tf import _keras\n"
    source += "def f():\n    from gradient_accumulator_tf.models.twin import make_twin\n"
    assert list(imported_floors(source)) == ["_keras", "models"]


def test_completion_offers_the_public_names_only():
    assert dir(gradient_accumulator_tf) == sorted(gradient_accumulator_tf.__all__)
