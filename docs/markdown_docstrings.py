"""Sphinx extension: docstrings are written in Markdown, autodoc reads reStructuredText.

Converted are what the package's docstrings hold: code spans, links, fenced code, tables, and
indented formulas. Sections (`Args:` and the like) are then converted by napoleon.
"""

import inspect
import re

from sphinx.ext.napoleon import Config, GoogleDocstring

import gradient_accumulator_tf as package

NAPOLEON = Config(napoleon_use_ivar=True, napoleon_custom_sections=[("Reference", "References")])

SECTION = re.compile(r"[A-Z]\w+:$")
CODE_SPAN = re.compile(r"(`[^`]+`)")
LINK = re.compile(r"\[([^\]]+)\]\(\s*([^)\s]+)\)")


def indent_of(line):
    return len(line) - len(line.lstrip())


def inline(text):
    """Code spans and links; a public name in a code span becomes a reference to its entry."""
    parts = CODE_SPAN.split(text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = LINK.sub(r"`\1 <\2>`__", part)
        elif part[1:-1] in package.__all__:
            parts[i] = f":py:obj:`~{package.__name__}.{part[1:-1]}`"
        else:
            parts[i] = f"`{part}`"
    return "".join(parts)


def directive(name, body, indent, options=()):
    """Lines of a directive: what it is called, and its body below it."""
    margin = " " * indent
    options = [f"{margin}    {option}" for option in options]
    body = [f"{margin}    {line}" if line else "" for line in body]
    return ["", f"{margin}.. {name}", *options, "", *body, ""]


def table(lines, indent):
    """A Markdown table as a `list-table`."""
    rows = [[inline(c.strip()) for c in line.strip().strip("|").split("|")] for line in lines]
    body = []
    for row in [rows[0], *rows[2:]]:  # the second line is the rule below the header
        body += [("* - " if j == 0 else "  - ") + cell for j, cell in enumerate(row)]
    return directive("list-table::", body, indent, [":header-rows: 1"])


def converted(lines):
    """The lines of a docstring in reStructuredText."""
    result, text, in_section = [], [], False

    def end_text():
        result.extend(inline("\n".join(text)).split("\n") if text else [])
        text.clear()

    i = 0
    while i < len(lines):
        line = lines[i]
        indent = indent_of(line)
        if line and indent == 0:
            in_section = bool(SECTION.match(line))
        first = i
        if line.strip().startswith("```"):
            i += 1
            while lines[i].strip() != "```":
                i += 1
            end_text()
            body = [lines[j][indent:] for j in range(first + 1, i)]
            result += directive(f"code-block:: {line.strip()[3:] or 'text'}", body, indent)
            i += 1
        elif line.strip().startswith("|"):
            while i < len(lines) and lines[i].strip().startswith("|"):
                i += 1
            end_text()
            result += table(lines[first:i], indent)
        elif indent >= 4 and not in_section and first > 0 and not lines[first - 1].strip():
            while i < len(lines) and (indent_of(lines[i]) >= 4 or not lines[i].strip()):
                i += 1
            end_text()
            body = [line[4:] for line in lines[first:i]]
            result += directive("code-block:: text", body, 0)
        else:
            text.append(line)
            i += 1
    end_text()
    return result


def convert(app, what, name, obj, options, lines):
    """Converts a docstring in place."""
    # Napoleon takes what is before a colon in a property's first line for a type.
    what = "method" if what == "property" else what
    docstring = GoogleDocstring(converted(lines), NAPOLEON, app, what, name, obj, options)
    lines[:] = docstring.lines()


def constructor(app, what, name, obj, options, signature, return_annotation):
    """A class's own arguments; autodoc would show those of Keras's `__new__`."""
    if what == "class":
        return str(inspect.signature(obj)), return_annotation


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", convert)
    app.connect("autodoc-process-signature", constructor)
    return {"parallel_read_safe": True}
