"""Sphinx's settings: the guides are Markdown, the API reference is made from docstrings."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from sphinx.errors import ExtensionError

import gradient_accumulator_tf as package

project = "gradient_accumulator_tf"
copyright = "the gradient_accumulator_tf authors"
version = release = package.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "markdown_docstrings",  # beside this file; calls napoleon
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_sphinx = False

# Formulas and outputs are indented or fenced without a language.
highlight_language = "text"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# The docstrings say the types, with shapes and units.
autodoc_typehints = "none"
autodoc_default_options = {
    "members": True,
    # Keras calls these, users do not.
    "exclude-members": ", ".join(
        [
            "build, call, compile_from_config, compute_mask, compute_output_shape",
            "finalize_variable_values, from_config, get_config",
            "load_own_variables, save_own_variables, variables",
            "make_train_function, train_step",
            "on_epoch_begin, on_epoch_end, on_train_batch_end",
        ]
    ),
}

# A reference that leads nowhere is an error.
nitpicky = True
# Python's documentation is not here to link to, and is not fetched.
nitpick_ignore = [
    ("py:exc", name)
    for name in (
        "NotImplementedError",
        "RuntimeError",
        "TypeError",
        "ValueError",
        "tf.errors.InvalidArgumentError",
    )
]


def check_public_names(app, env):
    """Fails the build if a public name has no entry in the API reference, or no docstring."""
    entries = env.domains["py"].objects
    missing = []
    for name in package.__all__:
        if name == "__version__":
            continue
        entry = entries.get(f"{package.__name__}.{name}")
        if entry is None or entry.docname != "api":
            missing.append(f"{name} has no entry in docs/api.md")
        if not getattr(package, name).__doc__:
            missing.append(f"{name} has no docstring")
    if missing:
        raise ExtensionError("Public names must be documented: " + "; ".join(missing) + ".")


def setup(app):
    """Called by Sphinx."""
    app.connect("env-check-consistency", check_public_names)
