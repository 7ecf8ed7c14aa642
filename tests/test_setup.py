# SPDX-License-Identifier: MIT
"""setup.py where the kernels cannot be built: what it installs, what it says, and when that is an error.

Nothing is compiled here; that a build succeeds is what test_cpu_kernels.py stands on.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from internimage.nvrtc import parts

ROOT = Path(__file__).resolve().parent.parent
REASON = "building the CPU kernels failed"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources, not an installed package")


@pytest.fixture
def sources(tmp_path):
    """A copy of what setup.py works on."""
    folder = tmp_path / "sources"
    ignored = shutil.ignore_patterns("__pycache__", "_C.*", "_schema.*", "_build.json")
    for name in ("internimage", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "internimage_command.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def setup(sources, *arguments, **variables):
    """Run setup.py, without the CUDA kernels; a variable that is None is unset."""
    given = {**os.environ, "INTERNIMAGE_BUILD_CUDA": "0", **variables}
    environment = {name: value for name, value in given.items() if value is not None}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)


def build(sources, **variables):
    """`setup.py build` as pip does it; returns the process, the built package's folder and its facts."""
    result = setup(sources, "build", "--build-lib", "lib", **variables)
    package = sources / "lib" / "internimage"
    facts = package / "_build.json"
    return result, package, json.loads(facts.read_text()) if facts.exists() else None


def is_pure(package) -> bool:
    return (package / "ops" / "dcnv3.py").exists() and not list(package.glob("*.so"))


def test_the_sources_of_the_cuda_kernels_are_installed(sources):
    """What NVRTC compiles: all of it, and nothing else of csrc, so that both ways make the same of it."""
    result, package, _ = build(sources, INTERNIMAGE_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    there = {path.relative_to(package / "csrc") for path in (package / "csrc").rglob("*") if path.is_file()}
    wanted = parts.source_files(ROOT / "csrc")
    assert there == {path.relative_to(ROOT / "csrc") for path in wanted}
    assert all((package / "csrc" / path).read_bytes() == (ROOT / "csrc" / path).read_bytes() for path in there)
    included = {name for path in wanted for name in re.findall(r'#include "(.+)"', path.read_text())}
    assert {Path(name).name for name in included} <= {path.name for path in there}
    assert not (sources / "internimage" / "csrc").exists()


NO_COMPILER = {
    "failing": {"CC": "false", "CXX": "false"},
    "missing": {"CC": None, "CXX": None, "PATH": "/nonexistent"},
    "named and missing": {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"},
}


@pytest.mark.parametrize("compiler", ["missing", "named and missing"])
def test_auto_installs_without_the_kernels_and_says_why(compiler, sources):
    result, package, facts = build(sources, INTERNIMAGE_BUILD_CPU="auto", **NO_COMPILER[compiler])
    assert result.returncode == 0, result.stderr
    assert is_pure(package)
    assert facts["reason"].startswith(REASON)
    assert REASON in result.stderr and "installing without them" in result.stderr


def test_auto_is_the_default_and_info_tells_the_reason(sources):
    result, package, facts = build(sources, INTERNIMAGE_BUILD_CPU=None, **NO_COMPILER["failing"])
    assert result.returncode == 0 and is_pure(package)
    assert facts["reason"].startswith(REASON)
    assert REASON in result.stderr and "installing without them" in result.stderr
    environment = dict(os.environ, PYTHONPATH=str(package.parent))
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-m", "internimage", "info"]
    printed = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True).stdout
    assert "DCNv3 is served by plain torch" in printed
    assert facts["reason"] in printed and "no compiled kernels are installed" in printed
    assert (package.parent / "internimage_command.py").exists()  # the console script's module, beside the package
    assert 'internimage = "internimage_command:main"' in (sources / "pyproject.toml").read_text()


@pytest.mark.parametrize("compiler", ["failing"])
def test_1_stops(compiler, sources):
    result, package, _ = build(sources, INTERNIMAGE_BUILD_CPU="1", **NO_COMPILER[compiler])
    assert result.returncode != 0
    assert "installing without them" not in result.stderr
    assert not list(package.glob("*.so"))


def test_0_builds_nothing(sources):
    """Not even a compiler is asked for, and torch is not imported."""
    (sources / "torch.py").write_text("raise AssertionError('torch was imported')\n")
    result, package, facts = build(sources, INTERNIMAGE_BUILD_CPU="0", PYTHONPATH=str(sources))
    assert result.returncode == 0, result.stderr
    assert is_pure(package)
    assert facts["reason"] == "INTERNIMAGE_BUILD_CPU was 0 when the package was built"


@pytest.mark.parametrize("wish, status", [("auto", 0), ("1", 1)])
def test_no_torch_to_build_against(wish, status, sources):
    (sources / "torch.py").write_text("raise ImportError('no torch here')\n")
    result, package, facts = build(sources, INTERNIMAGE_BUILD_CPU=wish, PYTHONPATH=str(sources))
    assert result.returncode == status
    if status == 0:
        assert is_pure(package) and "no torch here" in facts["reason"]
    else:
        assert "INTERNIMAGE_BUILD_CPU=1" in result.stderr and "no torch here" in result.stderr


def test_what_is_no_value_is_refused(sources):
    result, *_ = build(sources, INTERNIMAGE_BUILD_CPU="yes")
    assert result.returncode != 0
    assert "INTERNIMAGE_BUILD_CPU must be auto, 0 or 1, got 'yes'" in result.stderr


def test_a_module_of_older_sources_does_not_stay(sources):
    """A development install whose rebuild fails: the old module would not be what the sources say."""
    modules = [sources / "internimage" / f"{name}.abi3.so" for name in ("_C", "_schema")]
    for module in modules:
        module.write_bytes(b"old")
        os.utime(module, (0, 0))
    result = setup(sources, "build_ext", "--inplace", INTERNIMAGE_BUILD_CPU="auto", **NO_COMPILER["failing"])
    assert result.returncode == 0, result.stderr
    assert not any(module.exists() for module in modules)
    assert json.loads((sources / "internimage" / "_build.json").read_text())["reason"].startswith(REASON)


def test_every_source_is_built():
    """What csrc has is what the module is made of; a file left out would be missed at load time only."""
    code = (
        "import json, setuptools\n"
        "def setup(ext_modules, **_): print(json.dumps([[e.sources, e.depends] for e in ext_modules]))\n"
        "setuptools.setup = setup\n"
        "exec(open('setup.py').read())\n"
    )
    environment = dict(os.environ, INTERNIMAGE_BUILD_CPU="1")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    modules = json.loads(result.stdout.splitlines()[-1])
    (sources, headers), (schema, _) = modules[:2]
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert schema == ["csrc/schema.cpp"]
    assert sources == sorted(file for file in found if file.endswith(".cpp") and file not in schema)
    assert set(headers) == {file for file in found if file.endswith(".h")}
