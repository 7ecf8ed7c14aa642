# SPDX-License-Identifier: MIT
"""timm's own model tests, run on our models: `make timm-contract`.

The test file comes from the source package of the installed timm, which pip downloads to `.contract/`, ignored by git.
Importing `internimage` registers our models there like timm's own. Every test function that timm runs on all its models
must pass on at least one of ours, so that a filter that excludes them is not mistaken for success.

Other arguments are passed to pytest: `python scripts/checks/timm_contract.py -k tiny`.
"""

import ast
import collections
import os
import subprocess
import sys
import tarfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".contract"
NAMES = ("internimage_", "dcnv1_", "dcnv2_")
MODULES = ("internimage", "dcn_resnet")
DOWNLOADING = {"test_model_load_pretrained", "test_model_features_pretrained"}

# model -> the only tests to run on it; on others, all are run. Meta tensors need no memory at any size.
TOO_BIG = {
    "internimage_huge": {"test_model_forward", "test_model_default_cfgs"},
    "internimage_giant": {"test_model_default_cfgs"},
}
TIMEOUT = 3600  # timm's own 120 seconds are too few on slow machines


def download(version: str) -> Path:
    """Download and unpack the test file of a timm release, and the config that declares its markers."""
    archive = FOLDER / f"timm-{version}.tar.gz"
    if not archive.exists():
        FOLDER.mkdir(exist_ok=True)
        print(f"downloading the source package of timm {version}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", "--dest", FOLDER]
        if subprocess.run([*pip, f"timm=={version}"]).returncode != 0 or not archive.exists():
            sys.exit(f"pip could not download {archive.name}; without a network, put it in {FOLDER.name}/")
    root = f"timm-{version}"
    with tarfile.open(archive) as tar:
        for name in ("pyproject.toml", "tests/conftest.py", "tests/test_models.py"):
            target = FOLDER / root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(f"{root}/{name}").read())
    return FOLDER / root / "tests" / "test_models.py"


def add_our_modules(file: Path) -> None:
    """Add our modules to timm's list of modules with `forward_intermediates`, by which it selects tests."""
    anchor = "FEAT_INTER_FILTERS = [\n"
    text = file.read_text()
    if text.count(anchor) != 1:
        sys.exit(f"timm_contract: {file.name} of this timm has no single line '{anchor.strip()}', which is needed here")
    file.write_text(text.replace(anchor, anchor + "".join(f"    '{module}',\n" for module in MODULES)))


def functions_over_all_models(file: Path) -> list[str]:
    """Test functions parametrized over all models of timm, without a pattern of names, and so over ours as well."""

    def over_all(decorator: ast.expr) -> bool:
        calls = [node for node in ast.walk(decorator) if isinstance(node, ast.Call)]
        lists = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "list_models"]
        return any(not call.args and all(keyword.arg != "filter" for keyword in call.keywords) for call in lists)

    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if any(map(over_all, f.decorator_list)) and f.name not in DOWNLOADING]


class Selection:
    """pytest plugin that selects the tests of our models and counts their outcomes."""

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
            item.add_marker(pytest.mark.timeout(TIMEOUT), append=False)  # the first marker applies

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":  # setup and teardown only count if they fail
            self.outcomes[report.nodeid] = report.outcome

    def count(self, function: str) -> collections.Counter[str]:
        ids = [node for node in self.outcomes if node.split("::")[-1].split("[")[0] == function]
        return collections.Counter(self.outcomes[node] for node in ids)


def main() -> int:
    import pytest
    import timm

    os.environ["TORCH_BACKEND"] = "internimage"  # timm's test file imports the module named here
    os.environ.pop("GITHUB_ACTIONS", None)  # with it, timm skips tests and large models
    file = download(timm.__version__)
    add_our_modules(file)
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
