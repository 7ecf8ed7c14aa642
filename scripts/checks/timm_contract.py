# SPDX-License-Identifier: MIT
"""timm's own model tests, run on our models: `make timm-contract`.

The test file comes from the source package of the installed timm, downloaded by pip into `.contract/` and never
committed. Importing `internimage` registers our models there as if they were timm's. Every test function that timm runs
over all its models must have been passed by some of ours, so that a filter that forgets them cannot look like a pass.

Further arguments go to pytest: `python scripts/checks/timm_contract.py -k tiny`.
"""

import ast
import collections
import os
import subprocess
import sys
import tarfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".contract"
NAMES = "internimage_"
DOWNLOADING = {"test_model_load_pretrained", "test_model_features_pretrained"}

# model -> the only tests that it takes; the others take all. Meta tensors cost nothing whatever the size.
TOO_BIG = {
    "internimage_huge": {"test_model_forward", "test_model_default_cfgs"},
    "internimage_giant": {"test_model_default_cfgs"},
}
TIMEOUT = 3600  # timm's 120 seconds a test, made for other machines, would fail a sound model on a slow one


def download(version: str) -> Path:
    """The unpacked test file of that timm, as released; its config beside it declares the markers that it uses."""
    archive = FOLDER / f"timm-{version}.tar.gz"
    if not archive.exists():
        FOLDER.mkdir(exist_ok=True)
        print(f"downloading the source package of timm {version}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", "--dest", FOLDER]
        if subprocess.run([*pip, f"timm=={version}"]).returncode != 0 or not archive.exists():
            sys.exit(f"pip could not download {archive.name}; without a network, put it into {FOLDER.name}/ yourself")
    root = f"timm-{version}"
    with tarfile.open(archive) as tar:
        for name in ("pyproject.toml", "tests/conftest.py", "tests/test_models.py"):
            target = FOLDER / root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(f"{root}/{name}").read())
    return FOLDER / root / "tests" / "test_models.py"


def add_our_module(file: Path) -> None:
    """Name our module in timm's list of those with `forward_intermediates`, which picks tests by module."""
    anchor = "FEAT_INTER_FILTERS = [\n"
    text = file.read_text()
    if text.count(anchor) != 1:
        sys.exit(f"timm_contract: {file.name} of this timm has no single line '{anchor.strip()}', which is needed here")
    file.write_text(text.replace(anchor, f"{anchor}    'internimage',\n"))


def functions_over_all_models(file: Path) -> list[str]:
    """Test functions parametrised on timm's model list without a pattern for names, so that ours belong to them."""

    def over_all(decorator: ast.expr) -> bool:
        calls = [node for node in ast.walk(decorator) if isinstance(node, ast.Call)]
        lists = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "list_models"]
        return any(not call.args and all(keyword.arg != "filter" for keyword in call.keywords) for call in lists)

    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any(map(over_all, f.decorator_list)) and f.name not in DOWNLOADING]


class Selection:
    """pytest plugin: keeps the tests of our models, and counts their outcomes."""

    def __init__(self) -> None:
        self.collected: collections.Counter[str] = collections.Counter()
        self.outcomes: dict[str, str] = {}  # by test id

    @staticmethod
    def _wanted(item) -> bool:
        model = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        if not isinstance(model, str) or not model.startswith(NAMES) or item.originalname in DOWNLOADING:
            return False
        return item.originalname in TOO_BIG.get(model.split(".")[0], {item.originalname})

    def pytest_collection_modifyitems(self, config, items) -> None:
        import pytest

        wanted = [item for item in items if self._wanted(item)]
        config.hook.pytest_deselected(items=[item for item in items if not self._wanted(item)])
        items[:] = wanted
        self.collected.update(item.originalname for item in items)
        for item in items:
            item.add_marker(pytest.mark.timeout(TIMEOUT), append=False)  # the first one holds

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":  # a passed setup or teardown says nothing
            self.outcomes[report.nodeid] = report.outcome

    def count(self, function: str) -> collections.Counter[str]:
        ids = [node for node in self.outcomes if node.split("::")[-1].split("[")[0] == function]
        return collections.Counter(self.outcomes[node] for node in ids)


def main() -> int:
    import pytest
    import timm

    os.environ["TORCH_BACKEND"] = "internimage"  # a module that timm's test file imports
    os.environ.pop("GITHUB_ACTIONS", None)  # there, timm leaves out tests and big models
    file = download(timm.__version__)
    add_our_module(file)
    expected = functions_over_all_models(file)
    selection = Selection()
    config = file.parent.parent / "pyproject.toml"
    options = ["-c", str(config), "-p", "no:cacheprovider", "-W", "ignore", "-v", "-rs", "--durations=10"]
    status = pytest.main([*options, str(file), *sys.argv[1:]], plugins=[selection])

    print(f"\n{'timm ' + timm.__version__:<45}{'collected':>10}{'passed':>10}{'failed':>10}{'skipped':>10}")
    missing = []
    for function in sorted({*expected, *selection.collected}):
        counts = selection.count(function)
        if not counts["passed"]:
            missing.append(function)
        numbers = (selection.collected[function], counts["passed"], counts["failed"], counts["skipped"])
        print(f"{function:<45}" + "".join(f"{number:>10}" for number in numbers))
    for function in missing:
        print(f"FAILED: none of our models passed {function}")
    return 1 if missing or status != pytest.ExitCode.OK else 0


if __name__ == "__main__":
    sys.exit(main())
