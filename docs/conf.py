# SPDX-License-Identifier: MIT
"""Sphinx configuration; `make docs` builds the site into build/docs and fails on every warning."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer
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
    "deformable_models": tables.deformable_models(),
    "recipes": tables.recipes(),
    "recipe_settings": tables.recipe_settings(),
    "recipe_files": tables.recipe_files(),
    "commands": tables.commands(),
}

# ---- API reference

napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes"]
napoleon_use_ivar = True
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
    ("py:class", r"internimage\.engine\.(task\.Config|task\.Result|world\.T)"),  # type variables
]


def _warn_undocumented(name: str) -> None:
    logging.getLogger(__name__).warning("'%s' is public and has no docstring", name)


# methods of torch.nn.Module, which the "Shapes" of a class describe
_DESCRIBED_BY_THEIR_CLASS = {"forward", "extra_repr"}


def _check_docstring(app, what, name, obj, options, lines) -> None:
    """Warn about a public function, class, method or field without a docstring."""
    if not any(line.strip() for line in lines):
        _warn_undocumented(name)
    if isinstance(obj, type):
        for member in _undocumented_members(obj, lines):
            _warn_undocumented(f"{name}.{member}")


def _undocumented_members(cls: type, lines: list[str]) -> Iterator[str]:
    """Public methods without a docstring, and fields of a dataclass that nothing describes.

    A field is described by a `#:` comment, by its class (in "Attributes", or by name), or by the help of a setting.
    """
    for name, member in vars(cls).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if inspect.isfunction(function) and not name.startswith("_") and name not in _DESCRIBED_BY_THEIR_CLASS:
            if not inspect.getdoc(getattr(cls, name)):  # an override has that of what it overrides
                yield name
    comments = ModuleAnalyzer.for_module(cls.__module__).find_attr_docs()
    described = {name for owner, name in comments if owner == cls.__name__}
    described |= set(re.findall(r"`(\w+)`", cls.__doc__ or ""))
    described |= {line.split()[1].rstrip(":") for line in lines if line.startswith(":ivar ")}
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.name in cls.__annotations__ and "help" not in field.metadata and field.name not in described:
            yield field.name


def _format_signature(app, what, name, obj, options, signature, returns) -> tuple[str, str | None] | None:
    """Show the default of a dataclass field that is made by a factory as an ellipsis, which can be parsed."""
    return (signature.replace("<factory>", "..."), returns) if signature else None


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _check_docstring, priority=600)  # after napoleon
    app.connect("autodoc-process-signature", _format_signature)
