# SPDX-License-Identifier: MIT
"""The C++ and CUDA headers: each compiles by itself and includes what it uses."""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_host
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu"))
HEADERS = [path for path in FILES if path.suffix in (".h", ".cuh")]
# needs the CUDA toolkit: dcnv3.cu includes it before anything else, and test_cuda_build.py compiles that
NVCC_ONLY = CSRC / "cuda" / "launch.cuh"
COMPILERS = list(dict.fromkeys(filter(None, (cuda_host.COMPILER, shutil.which("clang++")))))

pytestmark = pytest.mark.skipif(not FILES, reason="needs the sources, not an installed package")

FLAGS = ["-std=c++17", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]


def compile_alone(compiler: str, header: Path, stand_in: Path) -> str:
    """What the compiler says of a header that it rejects, else ""."""
    before = ["-include", str(stand_in)] if header.suffix == ".cuh" else []
    torch_headers = ["-isystem", str(Path(torch.__file__).parent / "include")]
    command = [compiler, *FLAGS, "-fsyntax-only", *torch_headers, *before, "-include", str(header)]
    result = subprocess.run([*command, "-x", "c++", "-"], input="", capture_output=True, text=True)
    return result.stderr if result.returncode else ""


@pytest.mark.skipif(not COMPILERS, reason="needs a C++ compiler (g++ or clang++, or CXX)")
@pytest.mark.parametrize(
    "compiler",
    # one shows what a header lacks: the headers of the standard library are the same for all
    [pytest.param(path, marks=[pytest.mark.slow] * (path != COMPILERS[-1])) for path in COMPILERS],
    ids=lambda path: Path(path).name,
)
def test_every_header_compiles_by_itself(compiler, tmp_path):
    """Those of CUDA with the tests' stand-in for it, which is precompiled: both compilers look for that beside it."""
    stand_in = Path(shutil.copy(cuda_host.FOLDER / "cuda_host.h", tmp_path))
    suffix = "pch" if "clang" in Path(compiler).name else "gch"
    command = [compiler, *FLAGS, "-x", "c++-header", str(stand_in), "-o", f"{stand_in}.{suffix}"]
    subprocess.run(command, check=True)
    headers = [header for header in HEADERS if header != NVCC_ONLY]
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda header: compile_alone(compiler, header, stand_in), headers)
        failed = {header.relative_to(ROOT).as_posix(): text for header, text in zip(headers, said) if text}
    assert not failed, "\n".join(failed.values())


def test_a_header_for_nvcc_alone_is_included_first():
    source = (CSRC / "cuda" / "dcnv3" / "dcnv3.cu").read_text()
    assert re.search(r'#include ["<](.+)[">]', source).group(1) == "../launch.cuh"


# ---- the code of shuffles: they dominate the backward pass if a compiler moves lanes one by one

SHUFFLES = """
#include "cpu/simd/shuffle.h"
namespace internimage {
namespace INTERNIMAGE_ISA {
template <typename T, int N>
INTERNIMAGE_INLINE void all(T* to, const T* from) {
  Vector<T, N> v[N], a, b, c, d;
  for (int i = 0; i < N; i += 2) load_pairs<T, N>(from + i * N, v[i], v[i + 1]);
  store(to, sum_lanes_n<T, N>(v));
  load_fours<T, N>(from, a, b, c, d);
  sum_lanes_4<T, N>(to + N, a, b, c, d);
  store_pairs<T, N>(to + 2 * N, a, d);
}
extern "C" void floats(float* to, const float* from) { all<float, kLanes<float>>(to, from); }
extern "C" void doubles(double* to, const double* from) { all<double, kLanes<double>>(to, from); }
}
}
"""
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-DINTERNIMAGE_ISA=isa_avx512"),
    *("-DINTERNIMAGE_BUILD=build_avx512", '-DINTERNIMAGE_NAME="avx512"', "-DINTERNIMAGE_VECTOR_BYTES=64"),
]
ONE_LANE = re.compile(r"^\s+(v(?:insertps|pinsr[dq]|pextr[dq]|extractps|movs[sd]|mov[dq]))\s", re.MULTILINE)
ZIG = [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu"]  # a newer Clang
ALL_COMPILERS = [[path] for path in COMPILERS] + ([ZIG] if importlib.util.find_spec("ziglang") else [])


@pytest.mark.skipif(not ALL_COMPILERS, reason="needs a C++ compiler (g++, clang++ or ziglang, or CXX)")
@pytest.mark.parametrize("compiler", ALL_COMPILERS, ids=lambda command: Path(command[2 if command[1:] else 0]).name)
def test_shuffles_are_not_compiled_lane_by_lane(compiler, tmp_path):
    if compiler is not ZIG:
        machine = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
        if not machine.startswith("x86_64"):
            pytest.skip("needs a compiler for x86-64")
    source, listing = tmp_path / "shuffles.cpp", tmp_path / "shuffles.s"
    source.write_text(SHUFFLES)
    command = [*compiler, "-O3", "-std=c++17", "-Wno-psabi", *AVX512, f"-I{CSRC}", "-S", source, "-o", listing]
    subprocess.run(command, check=True, capture_output=True)
    code = listing.read_text()
    assert "zmm" in code
    assert ONE_LANE.findall(code) == []


# ---- include what you use: a template may use a name that is not declared yet, and still parse

DEFINITIONS = re.compile(  # at the level of the namespace, where lines are not indented
    r"^(?:struct|class) (?:alignas\(\w+\) )?(\w+)(?:[^;<\n]*\{(?:\};)?|;)$"
    r"|^using (\w+) ="
    r"|^ *#define (\w+)"
    r"|^(?:extern|constexpr|__device__) [\w ]*?(\w+)(?: =.*)?;"
    r"|^(?!return|template)\w[^(\n;]* (\w+)\("
    r"|^    (\w+_kernel)\(",
    re.MULTILINE,
)
STANDARD = {
    "<cmath>": r"std::isfinite",
    "<cstdint>": r"\bu?int(?:\d+|ptr)_t\b",
    "<limits>": r"std::numeric_limits",
    "<memory>": r"std::unique_ptr",
    "<optional>": r"std::optional",
    "<tuple>": r"std::tuple",
    "<vector>": r"std::vector",
}
NOT_NAMES = {"__attribute__", "__launch_bounds__"}
# names of members, parameters and template parameters, which need no include, and of kernels that an operator is
# called like
OTHER_NAMES = {
    "cpu/block/block.cpp": {"layer_norm", "query"},
    "cpu/deform/dcnv3.cpp": {"softmax"},
    "cpu/isa/kernel_table.h": {
        *("plan_forward", "forward", "plan_backward", "backward"),
        *("layer_norm", "gelu", "scaled_sum", "query_scratch", "query"),
    },
    "cpu/isa/build.h": {"layer_norm", "query"},
    "cpu/operators.h": {"layer_norm", "query", "softmax"},
    "cpu/simd/target.h": {"build_default"},
    "cuda/gather/kernels.cuh": {"Launch"},
}


@functools.cache
def read(path: Path) -> tuple[set[Path], set[str], set[str], str]:
    """What a file includes of ours, the names it defines, all words in its code, and the code."""
    text = re.sub(r"//.*", "", path.read_text())
    code = re.sub(r'"[^"\n]*"', "", text)
    names = {name for found in DEFINITIONS.findall(code) for name in found if name} - NOT_NAMES
    own = {(path.parent / name).resolve() for name in re.findall(r'#include "(.+)"', text)}
    return own, names, set(re.findall(r"(?<![.>\w])\w+", code)), code


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_what_is_used_is_included_and_nothing_else(path):
    own, names, words, code = read(path)
    assert own <= set(HEADERS)
    folder = path.relative_to(CSRC).parts[0]
    for header in HEADERS:
        if header == path or (header.parent != CSRC and header.relative_to(CSRC).parts[0] != folder):
            continue
        used = (read(header)[1] - names) & words
        if header not in own:
            assert used <= OTHER_NAMES.get(path.relative_to(CSRC).as_posix(), set()), (
                f"{header.relative_to(CSRC)} has {used}"
            )
        elif path in HEADERS:
            assert used, f"{header.relative_to(CSRC)} has nothing that is used"
    for name, pattern in STANDARD.items():
        assert bool(re.search(pattern, code)) == (f"#include {name}\n" in code), f"{name}: used and included?"


# folder of a header -> folders whose headers it may include, besides its own and csrc/
BELOW = {
    "cpu/simd": set(),
    "cpu/gather": {"cpu/simd"},
    "cpu/layer_norm": {"cpu/simd"},
    "cpu/gelu": {"cpu/simd"},
    "cpu/query": {"cpu/simd", "cpu/layer_norm"},
    "cpu/block": {"cpu/simd"},
    "cpu/deform": set(),
    "cpu/isa": {"cpu/simd", "cpu/gather", "cpu/layer_norm", "cpu/gelu", "cpu/query", "cpu/block"},
    "cpu": set(),
    "cuda/gather": {"cuda"},
    "cuda/dcnv3": {"cuda", "cuda/gather"},
    "cuda/driver": {"cuda/gather"},
    "cuda": {"cuda/gather"},
    ".": set(),
}


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_no_folder_includes_one_above_it(header):
    folder, *others = (path.parent.relative_to(CSRC).as_posix() for path in (header, *read(header)[0]))
    assert set(others) <= BELOW[folder] | {folder, "."}
    if header.name in ("storage.cuh", "types.h"):
        assert set(others) <= {folder}


def test_no_exception_reaches_torch():
    """The module may have a C++ runtime of its own, through which torch's cannot unwind: csrc/boxed.h."""
    sources = [path for path in FILES if path.suffix == ".cpp"]
    unguarded = [
        path.relative_to(CSRC) for path in sources if re.search(r"(?<!INTERNIMAGE_)\bTORCH_BOX\(", path.read_text())
    ]
    assert len(sources) > 5 and not unguarded
