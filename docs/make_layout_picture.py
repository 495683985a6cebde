"""Draws the package's folders and the imports between them, from the source itself.

    python docs/make_layout_picture.py            # writes docs/images/layout.png and layout.txt
    python docs/make_layout_picture.py --check    # fails if a folder or an arrow has changed

The text file holds the same as the picture, so that the check compares no pixels. It ignores the
numbers: a picture with a line more or less is still right about the architecture.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "gradient_accumulator_tf"
TABLE, PICTURE = DOCS / "images" / "layout.txt", DOCS / "images" / "layout.png"


class Folder(NamedTuple):
    """A folder of the package, or a module beside the folders.

    Attributes:
        modules: Number of its modules, without `__init__.py`.
        lines: Number of its lines of code, without comments, docstrings and empty lines.
        imports: Dict by folder of how many imports of its modules these modules have.
        public: Whether the package offers a name from here to its users.
    """

    modules: int
    lines: int
    imports: dict
    public: bool


# Reading.


def imported_modules(tree, package):
    """Set of the modules of the package that a module's syntax tree imports, as "cycle.losses"."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.module == package:
            found |= {alias.name for alias in node.names}
        elif node.module and node.module.startswith(f"{package}."):
            found.add(node.module.removeprefix(f"{package}."))
    return found


def lines_of_code(source, tree):
    """Number of lines that hold code: no comments, docstrings or empty lines."""
    empty = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] not in empty:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def read(package=PACKAGE):
    """Dict of `Folder` by name."""
    modules, lines, imports = Counter(), Counter(), {}
    offered = imported_modules(ast.parse((package / "__init__.py").read_text()), package.name)
    public = {module.split(".")[0] for module in offered if not module.startswith("_")}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        source = path.read_text()
        tree = ast.parse(source)
        modules[name] += path.name != "__init__.py"
        lines[name] += lines_of_code(source, tree)
        counts = imports.setdefault(name, Counter())
        for module in sorted(imported_modules(tree, package.name)):
            imported = module.split(".")[0]
            if imported != name:
                counts[imported] += 1
    return {
        name: Folder(modules[name], lines[name], dict(counts), name in public)
        for name, counts in imports.items()
    }


def floors(folders):
    """Dict by folder of its floor: one above the highest floor that it imports from.

    Raises:
        ValueError: If folders import one another in a circle.
    """
    found = {}

    def floor(name, above):
        if name in above:
            circle = " imports ".join([*above[above.index(name) :], name])
            raise ValueError(f"Folders must not import one another in a circle: {circle}.")
        if name not in found:
            below = [floor(other, [*above, name]) for other in folders[name].imports]
            found[name] = 1 + max(below, default=-1)
        return found[name]

    for name in folders:
        floor(name, [])
    return found


# Writing.


def from_the_top(folders):
    """List of the names, from the highest floor to the lowest."""
    levels = floors(folders)
    return sorted(folders, key=lambda name: (-levels[name], name))


def table(folders):
    """The picture as text: a line for each folder, from the highest floor to the lowest."""
    levels, lines = floors(folders), []
    for name in from_the_top(folders):
        folder = folders[name]
        imports = [f"{other} ({n})" for other, n in sorted(folder.imports.items())]
        lines.append(
            f"floor {levels[name]}: {name}, {folder.modules} modules, {folder.lines} lines of "
            f"code, imports {', '.join(imports) or 'nothing'}"
        )
    return "\n".join(lines) + "\n"


def is_current(folders, text):
    """Whether a table has these folders and arrows, whatever its numbers."""

    def architecture(table):
        return re.sub(r" \(\d+\)|, \d+ modules, \d+ lines of code", "", table)

    return architecture(table(folders)) == architecture(text)


STEP, HEIGHT, WIDTH = 0.5, 0.55, 1.95  # inches: to the next column and row, and of a box
BLUE, GREY, LINE, BAND = "#0b6e99", "#5f6b76", "#9aa7b3", "#f1f4f7"
IN_BOX = {"ha": "center", "va": "center", "color": "white", "zorder": 3}


def draw(folders, path):
    """Draws boxes down a staircase, with the imports of each on its row.

    Every box has a column, at its right end. Every folder above that imports from it has a number
    where its row meets this column. So no arrow passes through a box.
    """
    from matplotlib.figure import Figure

    names = from_the_top(folders)
    column = {name: 0.75 + WIDTH + STEP * i for i, name in enumerate(names)}
    row = {name: HEIGHT * (len(names) - i - 0.5) for i, name in enumerate(names)}
    size = column[names[-1]] + 0.3, HEIGHT * len(names)
    figure = Figure(figsize=size)
    axes = figure.add_axes([0, 0, 1, 1], xlim=(0, size[0]), ylim=(0, size[1]))
    axes.set_axis_off()
    draw_floors(axes, floors(folders), row, size[0])
    for name in names:
        above = [row[other] for other in names if name in folders[other].imports]
        if above:
            draw_arrow(axes, column[name], max(above), row[name] + 0.36 * HEIGHT)
        draw_imports(axes, folders[name].imports, column, column[name], row[name])
        draw_box(axes, name, folders[name], column[name] + 0.15, row[name])
    # Without matplotlib's version, so that equal pictures are equal files.
    figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_floors(axes, levels, row, width):
    for level in range(max(levels.values()) + 1):
        rows = [row[name] for name in levels if levels[name] == level]
        bottom, top = min(rows) - HEIGHT / 2, max(rows) + HEIGHT / 2
        if level % 2 == 0:
            axes.fill_between([0, width], bottom, top, color=BAND, linewidth=0, zorder=0)
        axes.text(0.08, (bottom + top) / 2, f"floor {level}", va="center", fontsize=7, color=GREY)


def draw_arrow(axes, x, top, bottom):
    style = {"arrowstyle": "-|>", "color": LINE, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, bottom), (x, top), arrowprops=style, zorder=1)


def draw_imports(axes, imports, column, left, y):
    from matplotlib.patches import Circle

    right = max((column[other] for other in imports), default=left)
    axes.plot([left, right], [y, y], color=LINE, linewidth=1, zorder=1)
    for other, count in imports.items():
        circle = Circle((column[other], y), 0.125, facecolor="white", edgecolor=BLUE, zorder=2)
        axes.add_patch(circle)
        axes.text(column[other], y, count, ha="center", va="center_baseline", fontsize=7, zorder=3)


def draw_box(axes, name, folder, right, y):
    from matplotlib.patches import FancyBboxPatch

    box = FancyBboxPatch(
        (right - WIDTH, y - 0.36 * HEIGHT),
        WIDTH,
        0.72 * HEIGHT,
        boxstyle="round,pad=0,rounding_size=0.06",
        color=BLUE if folder.public else GREY,
        zorder=2,
    )
    axes.add_patch(box)
    modules = f"{folder.modules} modules, " if folder.modules > 1 else ""
    x = right - WIDTH / 2
    axes.text(x, y + 0.085, name, fontsize=9, fontweight="bold", **IN_BOX)
    axes.text(x, y - 0.1, f"{modules}{folder.lines:,} lines", fontsize=7, **IN_BOX)


def main(argv=None):
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare")
    args = parser.parse_args(argv)
    folders = read()
    if not args.check:
        TABLE.write_text(table(folders))
        draw(folders, PICTURE)
    elif not is_current(folders, TABLE.read_text()):
        print(
            f"{PICTURE.relative_to(DOCS.parent)} shows other folders or imports than the package "
            "has. Run: make picture",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
