# SPDX-License-Identifier: MIT
"""Sphinx configuration; `make docs` builds the site into build/docs and fails on every warning."""

import sys
from pathlib import Path

from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import tables  # noqa: E402

import internimage  # noqa: E402

project = "internimage"
copyright = "the internimage developers"
release = version = internimage.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = f"internimage {release}"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]

# ---- Markdown

myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3  # links such as training.md#many-gpus
# tables that are made from the code, so that they cannot differ from it; {{ name }} on a page shows one
myst_substitutions = {
    "models": tables.models(),
    "recipes": tables.recipes(),
    "recipe_settings": tables.recipe_settings(),
    "recipe_files": tables.recipe_files(),
    "commands": tables.commands(),
}

# ---- API reference

napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes"]
default_role = "code"  # docstrings have single backticks around code, as Markdown does
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False  # torch's docstring of `forward` says nothing about ours
autodoc_preserve_defaults = True
add_module_names = False
maximum_signature_line_length = 90
python_use_unqualified_type_names = True
# types of other packages: their inventories would have to be downloaded
nitpick_ignore_regex = [
    ("py:.*", r"(torch|timm|numpy|np|PIL|collections|pathlib|typing|argparse|nn|Path|Tensor|optional|dtype)(\..*)?"),
]


def _warn_undocumented(name: str) -> None:
    logging.getLogger(__name__).warning("'%s' is public and has no docstring", name)


def _check_docstring(app, what, name, obj, options, lines) -> None:
    """Warn about a public function or class without a docstring."""
    if not any(line.strip() for line in lines):
        _warn_undocumented(name)


# methods of torch.nn.Module, which the "Shapes" of a class describe, and an annotation for TorchScript
_DESCRIBED_BY_THEIR_CLASS = {"forward", "extra_repr", "center_feature_scale"}


def _check_member(app, what, name, obj, skip, options) -> None:
    """Warn about a public member of a class that is skipped because it has no docstring and no `#:` comment."""
    if skip and what == "class" and not name.startswith("_") and name not in _DESCRIBED_BY_THEIR_CLASS:
        _warn_undocumented(name)


def _format_signature(app, what, name, obj, options, signature, returns) -> tuple[str, str | None] | None:
    """Show the default of a dataclass field that is made by a factory as an ellipsis, which can be parsed."""
    return (signature.replace("<factory>", "..."), returns) if signature else None


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _check_docstring)
    app.connect("autodoc-skip-member", _check_member)
    app.connect("autodoc-process-signature", _format_signature)
