# SPDX-License-Identifier: MIT
"""The packages of `internimage`: which imports which, no cycles, and what is imported before torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, environment

PACKAGE = ROOT / "internimage"
# package -> the packages that it may import, besides itself and the modules of the ground floor
MAY_IMPORT = {
    "nvrtc": set(),
    "ops": {"nvrtc"},
    "layers": {"ops"},
    "weights": set(),  # knows no model class
    "models": {"ops", "layers", "weights"},
    "data": {"models"},
    "engine": {"layers", "weights", "models", "data"},
    "analysis": {"ops", "layers", "models"},
    "export": {"ops", "layers", "models"},
    "benchmark": {"ops", "layers", "models", "export"},
    "convert": {"weights", "models"},
    "tasks": {"weights", "models", "data", "engine", "analysis"},
    "cli": {"ops", "weights", "models", "data", "engine", "analysis", "benchmark", "convert", "export", "tasks"},
}
# modules that the command line imports before it has checked its arguments
WITHOUT_TORCH = [
    "internimage.cli.verbs", "internimage.cli.tables", "internimage.cli.benchmark_tables", "internimage.cli.options",
    "internimage.config", "internimage.values", "internimage.dtypes", "internimage.errors", "internimage.malloc",
    "internimage.terminal",
    "internimage.engine.config", "internimage.data.variants", "internimage.tasks.classification.config",
]  # fmt: skip
HEAVY = ["torch", "timm", "torchvision", "PIL", "numpy", "huggingface_hub", "safetensors"]


def modules() -> dict[str, Path]:
    """The modules of the package by name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str, path: Path, text: str) -> set[str]:
    """The modules of `internimage` that a module imports, also inside functions, but not for type checking only.

    `from .package import name` counts as the module `package.name` if there is one, else as `package`.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                member = f"{source}.{alias.name}"
                found.add(member if member in MODULES else source)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(text))
    return {target for target in found if target.split(".")[0] == "internimage"}


IMPORTS = {name: imported(name, path, path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room(name: str) -> str:
    """The package of a module; "" for the modules of the ground floor, and for `internimage` itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


@pytest.mark.parametrize(
    "text, expected",
    [
        ("from ..errors import UserError", {"internimage.errors"}),
        ("from .. import ops", {"internimage.ops"}),
        ("from ..ops import dcnv3_reference as r", {"internimage.ops.dcnv3_reference"}),
        ("from .. import __version__", {"internimage"}),
        ("def f():\n    if x:\n        from ..weights.hub import push", {"internimage.weights.hub"}),
        ("import internimage.models", {"internimage.models"}),
        ("import torch\nfrom torch import nn", set()),
        ("if TYPE_CHECKING:\n    from ..models import x\nelse:\n    from ..data import y", {"internimage.data"}),
    ],
)
def test_imports_are_found(text, expected):
    assert imported("internimage.cli.info", PACKAGE / "cli" / "info.py", text) == expected


def test_the_table_has_every_package():
    assert set(MAY_IMPORT) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    order = list(MAY_IMPORT)
    assert all(order.index(below) < order.index(name) for name, allowed in MAY_IMPORT.items() for below in allowed)


@pytest.mark.parametrize("name", ["", *MAY_IMPORT])
def test_imports_go_one_way(name):
    entrances = {"internimage", "internimage.__main__"}  # not of the ground floor
    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        if room(module) == name and module not in entrances
        for target in sorted(targets)
        if room(target) not in {name, "", *MAY_IMPORT.get(name, ())}
    ]
    assert not wrong, "; ".join(wrong)


def test_tasks_do_not_import_each_other():
    def task(module: str) -> str | None:
        parts = module.split(".")
        return parts[2] if parts[1:2] == ["tasks"] and (PACKAGE / "tasks" / "".join(parts[2:3])).is_dir() else None

    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in sorted(targets)
        if task(module) and task(target) not in (None, task(module))
    ]
    assert not wrong, "; ".join(wrong)


def test_no_modules_import_each_other():
    """Removes, again and again, the modules that import none of those that are left: those of cycles stay."""
    left = {module: targets & MODULES.keys() for module, targets in IMPORTS.items()}
    while leaves := [module for module, targets in left.items() if not targets & left.keys() - {module}]:
        for module in leaves:
            del left[module]
    assert not left, f"these modules, or some of them, import each other: {', '.join(sorted(left))}"


def test_modules_of_the_parser_do_not_import_torch():
    """In the command line, whose imports of the package load no models."""
    code = (
        "import importlib, sys, internimage_command\n"
        "internimage_command.starting = True\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "    if heavy := [package for package in sys.argv[1].split() if package in sys.modules]:\n"
        "        sys.exit(f'{name} imports {heavy}')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, " ".join(HEAVY), *WITHOUT_TORCH],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
