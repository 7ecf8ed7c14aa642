# SPDX-License-Identifier: MIT
"""What the documentation says of the repository is there: modules, tests, links, names, pictures."""

import ast
import re
from pathlib import Path

import pytest

import internimage

ROOT = Path(internimage.__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the sources, not an installed package")


def modules_in_the_tree() -> list[str]:
    """The modules that the tree in docs/architecture.md names, as paths below the repository."""
    (tree,) = re.findall(r"```text\n(internimage/ .*?)```", (DOCS / "architecture.md").read_text(), re.DOTALL)
    folders, found = [], []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], name]
        if not name.endswith("/"):
            found.append("".join(folders))
    return found


def test_the_tree_names_every_module_and_no_other():
    """One line for each module; a package's `__init__.py` is described by the line of its folder."""
    named = modules_in_the_tree()
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "internimage").rglob("*.py")
        if path.name != "__init__.py" and "__pycache__" not in path.parts
    }
    missing, gone = sorted(there - set(named)), sorted(set(named) - there)
    assert not missing, f"not in the tree of docs/architecture.md: {', '.join(missing)}"
    assert not gone, f"in the tree of docs/architecture.md, but not in the package: {', '.join(gone)}"
    assert len(named) == len(set(named))


# the packages of the picture in docs/architecture.md: each imports from lower levels alone
LEVELS = dict(
    nvrtc=1, ops=2, layers=3, weights=4, models=5, data=6, analysis=6, benchmark=6, convert=6, engine=7, tasks=8, cli=9
)


def _imports(path: Path) -> set[str]:
    """The packages and modules of `internimage` that a module imports, by the name below `internimage`."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[1 : len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join((*base, name)).split(".")[0] for name in names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("internimage."):
            found.add(node.module.split(".")[1])
    return found


def test_imports_go_one_way():
    packages = {path.parent.name for path in (ROOT / "internimage").glob("*/__init__.py")}
    assert packages == set(LEVELS)
    wrong = []
    for path in (ROOT / "internimage").rglob("*.py"):
        name, *below = path.relative_to(ROOT / "internimage").parts
        if not below and name in ("__init__.py", "__main__.py"):
            continue
        level = LEVELS[name] if below else 0  # the ground floor imports no package
        targets = _imports(path) - {name}
        wrong += [f"{path.relative_to(ROOT)}: {t}" for t in targets if LEVELS.get(t, -1) >= level]
    assert not wrong, f"imports that do not go down: {', '.join(wrong)}"


def test_the_tests_that_the_pages_name_exist():
    named = {
        match
        for page in PAGES
        for match in re.findall(r"`(?:tests/)?(test_\w+)(?:\.py)?(?:::(test_\w+))?`", page.read_text())
    }
    missing = []
    for module, function in sorted(named):
        path = ROOT / "tests" / f"{module}.py"
        functions = re.findall(r"^ *def (\w+)", path.read_text(), re.MULTILINE) if path.is_file() else None
        if functions is None or (function and function not in functions):
            missing.append(f"{module}::{function}" if function else module)
    assert len(named) > 20 and not missing, f"named in the documentation, but not there: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_of_the_repository(page):
    """As on a page of the repository: `make docs` checks them as on a page of the site."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_of_the_repository_that_are_named(page):
    """Paths below a folder of the repository, in code."""
    pattern = r"`((?:configs|docs|scripts|tests|internimage|csrc)/[\w./-]+\.(?:py|sh|yaml|md|csv|h|cpp|cuh?))`"
    made = {"docs/benchmarks/gpu.md"}  # by the command that is described
    for path in set(re.findall(pattern, page.read_text())) - made:
        if "NAME" in path:  # a pattern
            continue
        assert (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_on_the_pages_can_be_parsed(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        ast.parse(block)


def test_verbs_of_the_makefile_that_are_named():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    workflows = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    texts = "".join(page.read_text() for page in PAGES) + workflows
    named = {
        name for line in re.findall(r"(?:`|run: |^)make ([a-z0-9-]+)", texts, re.MULTILINE) for name in line.split()
    }
    assert {"test", "docs", "timm-contract"} <= named <= targets, f"no verb of the Makefile: {sorted(named - targets)}"


def test_the_readme_begins_with_the_two_commands_and_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines[2:6] == ["```", "make demo", "make test", "```"]
    assert len(lines) <= 100


def test_the_table_of_the_readme_is_that_of_the_models(monkeypatch):
    """Names, parameters, image size and top-1 of the README are those of the table that is made from the code."""
    monkeypatch.syspath_prepend(str(DOCS))
    import tables

    rows = {row[0]: row for row in map(_cells, tables.models().splitlines())}
    shown = [
        _cells(line) for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `internimage_")
    ]
    assert len(shown) == 7
    for name, parameters, size, top1 in shown:
        assert [parameters, size, top1] == [rows[name][i] for i in (1, 3, 5)]


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("name", ["packages.svg", "ways.svg"])
def test_pictures_are_those_that_the_script_draws(name, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import draw

    assert (DOCS / "static" / name).read_text() == draw.PICTURES[name]()
