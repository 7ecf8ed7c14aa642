# SPDX-License-Identifier: MIT
"""Whether, why not and how the CUDA kernels are built (csrc/build_cuda.py), on machines with and without a toolkit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda_compile import NVCC

from internimage import extension

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the sources, not an installed package")

DECIDE = (
    "import json, sys; sys.path.insert(0, 'csrc'); import build_cuda; "
    "found, reason = build_cuda.cuda_extension('0x020a000000000000ULL'); "
    "print(json.dumps([found and found.facts(), found and found.command(build_cuda.Path('x'), 'y'), reason]))"
)


def make_torch(site: Path, cuda: str | None, hip: str | None = None, with_headers: bool = False) -> Path:
    """A torch to build against, which must not be imported, in a folder for PYTHONPATH."""
    folder = site / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('torch was imported')\n")
    (folder / "version.py").write_text(f"__version__ = '2.99.0'\ncuda = {cuda!r}\nhip = {hip!r}\n")
    if with_headers:
        real = Path(torch.__file__).parent
        (folder / "include").symlink_to(real / "include")
        (folder / "lib" / "libtorch_cpu.so").symlink_to(real / "lib" / "libtorch_cpu.so")
    return site


@pytest.fixture
def torch_of(tmp_path):
    return lambda cuda, hip=None: make_torch(tmp_path / "site", cuda, hip)


@pytest.fixture
def toolkit_of(tmp_path):
    """Makes a CUDA_HOME whose nvcc can tell its version, and nothing else."""

    def make(version: str, codes: str = "sm_75 sm_80 sm_86 sm_89 sm_90") -> Path:
        nvcc = tmp_path / f"cuda-{version}" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        answers = f'[ "$1" = --version ] && echo "Cuda compilation tools, release {version}, V{version}.1"'
        listing = f'[ "$1" = --list-gpu-code ] && printf "%s\\n" {codes}'
        nvcc.write_text(f"#!/bin/sh\n{answers} && exit\n{listing} && exit\necho 'error: no compiler' >&2; exit 1\n")
        nvcc.chmod(0o755)
        return nvcc.parent.parent

    return make


def run(code: str, site: Path, **variables) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")}
    environment = {**inherited, "PYTHONPATH": str(site), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def decide(site: Path, **variables) -> tuple[dict | None, list | None, str]:
    result = run(DECIDE, site, **{"INTERNIMAGE_BUILD_CUDA": "auto", **{k: str(v) for k, v in variables.items()}})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_built_if_torch_and_toolkit_go_together(torch_of, toolkit_of):
    facts, command, reason = decide(torch_of("13.2"), CUDA_HOME=toolkit_of("13.0"))
    assert reason == ""
    assert facts == {
        "toolkit": "13.0",
        "architectures": ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "compute_90"],  # all it knows; PTX of the last
        "torch": "2.99.0",
        "reason": "",
    }
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000ULL" in command and "csrc/cuda/dcnv3/dcnv3.cu" in command


@pytest.mark.parametrize(
    "wish, architectures",
    [
        ("8.0", ["sm_80"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("7.5 9.0a", ["sm_75", "sm_90a"]),
        ("12.0+PTX", ["sm_120", "compute_120"]),
    ],
)
def test_torch_cuda_arch_list(wish, architectures, torch_of, toolkit_of):
    facts, command, _ = decide(torch_of("13.0"), CUDA_HOME=toolkit_of("13.0"), TORCH_CUDA_ARCH_LIST=wish)
    assert facts["architectures"] == architectures
    assert len([flag for flag in command if flag.startswith("-gencode")]) == len(architectures)


REASONS = {
    "0": ({"INTERNIMAGE_BUILD_CUDA": "0"}, {"cuda": "13.0"}, "INTERNIMAGE_BUILD_CUDA was 0"),
    "other major version": (
        {},
        {"cuda": "12.8"},
        r"toolkit is 13\.0 .* CUDA 12\.8; the major versions must be the same",
    ),
    "CPU-only torch": ({}, {"cuda": None}, r"against a CPU-only torch \(2\.99\.0\)"),
    "ROCm": ({}, {"cuda": None, "hip": "6.4"}, "torch for ROCm"),
    "no nvcc": (
        {"CUDA_HOME": "/nonexistent"},
        {"cuda": "13.0"},
        "CUDA_HOME is '/nonexistent', which has no bin/nvcc",
    ),
    "invalid list": ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, {"cuda": "13.0"}, r"like '8\.0;9\.0\+PTX', got 'Hopper'"),
}


@pytest.mark.parametrize("case", REASONS)
def test_auto_keeps_the_reason_and_1_stops(case, torch_of, toolkit_of):
    variables, torch_facts, pattern = REASONS[case]
    site, variables = torch_of(**torch_facts), {"CUDA_HOME": toolkit_of("13.0"), **variables}
    facts, _, reason = decide(site, **variables)
    assert facts is None and re.search(pattern, reason)
    if case not in ("0", "CPU-only torch"):
        result = run(DECIDE, site, **{**{k: str(v) for k, v in variables.items()}, "INTERNIMAGE_BUILD_CUDA": "1"})
        assert result.returncode == 1
        assert re.search(f"INTERNIMAGE_BUILD_CUDA=1, but .*{pattern}", result.stderr)


def test_no_toolkit(torch_of, tmp_path):
    if Path("/usr/local/cuda/bin/nvcc").exists():
        reason = decide(torch_of("13.0"), CUDA_HOME=tmp_path)[2]
        assert reason.endswith("which has no bin/nvcc")
    else:
        assert "no CUDA toolkit was found" in decide(torch_of("13.0"), PATH="/nonexistent")[2]


def test_no_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = None\n" + DECIDE.replace("; ", "\n")
    code = "import importlib.util; importlib.util.find_spec = lambda name: None\n" + code
    result = run(code, tmp_path, INTERNIMAGE_BUILD_CUDA="auto")
    assert "torch was not installed" in json.loads(result.stdout)[2]


def test_what_is_no_value_is_refused(torch_of):
    result = run(DECIDE, torch_of("13.0"), INTERNIMAGE_BUILD_CUDA="yes")
    assert result.returncode == 1 and "INTERNIMAGE_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in result.stderr


INTO = (
    "import json, sys; sys.path.insert(0, 'csrc'); import build_cuda; "
    "facts = build_cuda.build_into(build_cuda.Path(sys.argv[1]), *build_cuda.cuda_extension('0x020a000000000000ULL'))\n"
    "print('\\n' + json.dumps(facts))"
)


@pytest.mark.parametrize("wish, status", [("auto", 0), ("1", 1)])
def test_a_compiler_that_fails(wish, status, torch_of, toolkit_of, tmp_path):
    """With auto that is a reason like another, and no older library stays."""
    old = tmp_path / "package" / "_C_cuda.abi3.so"
    old.parent.mkdir()
    old.write_bytes(b"old")
    code = INTO.replace("sys.argv[1]", repr(str(old.parent)))
    result = run(code, torch_of("13.0"), CUDA_HOME=str(toolkit_of("13.0")), INTERNIMAGE_BUILD_CUDA=wish)
    assert result.returncode == status and not old.exists()
    if status == 0:
        reason = json.loads(result.stdout.splitlines()[-1])["reason"]
        assert reason == "building the CUDA kernels failed: error: no compiler"
    else:
        assert "INTERNIMAGE_BUILD_CUDA=1, but building the CUDA kernels failed" in result.stderr


# ---- a real build

# torch's stable ABI, the CUDA runtime, the C library, and of C++ what is in namespace std or below it
STABLE = (
    r"(aoti_torch_|torch_|cuda|__cuda)\w+|_Unwind_\w+|_ITM_\w+|__\w+|(mem|str|local)\w+|time|free|malloc|dlsym|getenv|"
    r"_Z(NK?|T[ISV])?(S[abstiod]|N10__cxxabiv1)\w*|_Z(n[wa]|d[la])\w+"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The module for one compute capability, built against a torch that looks like a CPU-only build."""
    if NVCC is None:
        pytest.skip("needs nvcc (the CUDA toolkit)")
    site = make_torch(tmp_path_factory.mktemp("site"), None, with_headers=True)
    folder = tmp_path_factory.mktemp("package")
    code = INTO.replace("sys.argv[1]", repr(str(folder)))
    variables = {"INTERNIMAGE_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    result = run(code, site, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["architectures"] == ["sm_90"] and facts["reason"] == ""
    return folder / "_C_cuda.abi3.so"


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_the_library_depends_on_the_stable_abi_alone(library):
    printed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1].split("@")[0] for line in printed.stdout.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert [s for s in symbols if not re.fullmatch(STABLE, s)] == []


@pytest.mark.parametrize(
    "symbol",
    ["_ZNK2at10TensorBase3dimEv", "_ZN3c105ErrorC1Ev", "_ZTVN3c105ErrorE", "_ZN5torch7LibraryD1Ev", "PyObject_Call"],
)
def test_what_is_not_stable(symbol):
    assert not re.fullmatch(STABLE, symbol)


def test_the_library_loads_where_torch_has_cuda(library):
    """Under a CUDA build of torch, with or without a GPU, it registers the kernels; else it does not load."""
    code = (
        "import internimage_command\ninternimage_command.starting = True\n"  # the models take seconds more to import
        "import sys, torch\nimport internimage.ops\nfrom internimage import extension\n"
        "has = lambda name: torch._C._dispatch_has_kernel_for_dispatch_key(f'internimage::{name}', 'CUDA')\n"
        "extension._FOLDER = extension.Path(sys.argv[1])\nextension.load()\n"
        "print(has('dcnv3'), has('dcnv3_backward'), extension.cuda_note())"
    )
    command = [sys.executable, "-c", code, str(library.parent)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=library.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = (
        "True True loaded" if torch.version.cuda else "False False installed, but not loaded: this torch has no CUDA"
    )
    assert result.stdout.startswith(expected)


# ---- what is said about it


def test_info_tells_the_reason(monkeypatch, tmp_path):
    (tmp_path / "_build.json").write_text(json.dumps({"reason": "", "cuda": {"reason": "the toolkit is too old"}}))
    monkeypatch.setattr(extension, "_FOLDER", tmp_path)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("internimage::dcnv3", "CUDA"):
        assert extension.backend("dcnv3", "cuda").reason.startswith("the toolkit is too old; ")
        assert extension.cuda_note().startswith(
            "none: the toolkit is too old; and they cannot be compiled at run time: "
        )


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "_C_cuda.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(extension, "_failures", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    extension.load()
    assert "_C_cuda.abi3.so' could not be loaded" in extension._failures["cuda"]


def test_kernels_of_another_major_version_are_left_alone(monkeypatch, tmp_path):
    """Where their libcudart.so is found they would load, and ask a newer driver of the user than torch does."""
    (tmp_path / "_C_cuda.abi3.so").write_bytes(b"not a library")
    (tmp_path / "_build.json").write_text(json.dumps({"cuda": {"toolkit": "13.0", "architectures": ["sm_90"]}}))
    monkeypatch.setattr(extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(extension, "_failures", {})
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    extension.load()
    assert re.fullmatch(
        "'_C_cuda.abi3.so' was not loaded: it was built with CUDA 13.0, but torch .+ has CUDA 12.8; "
        "the major versions must be the same",
        extension._failures["cuda"],
    )
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    extension.load()
    assert "could not be loaded" in extension._failures["cuda"]


@pytest.mark.parametrize(
    "architecture, capability, runs",
    [
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("sm_120", (12, 0), True),
        ("sm_120", (10, 0), False),
        ("compute_90", (10, 0), True),
        ("compute_90", (8, 9), False),
        ("compute_90a", (10, 0), False),
    ],
)
def test_which_gpu_runs_what(architecture, capability, runs):
    assert extension._runs_on(architecture, capability) == runs


def test_info_tells_of_a_gpu_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("old", "new")[i])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((7, 0), (9, 0))[i])
    said = extension._unsupported_gpus(lambda capability: capability >= (8, 0), ": build with TORCH_CUDA_ARCH_LIST")
    assert said == ", but not for old (compute capability 7.0): build with TORCH_CUDA_ARCH_LIST"
    assert extension._unsupported_gpus(lambda capability: True) == ""
