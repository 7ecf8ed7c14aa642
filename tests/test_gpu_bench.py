# SPDX-License-Identifier: MIT
"""The benchmarks of the CUDA kernels (scripts/bench), without a GPU: what is timed, when they stop, what they build."""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path

import cuda_host
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "scripts" / "bench"
if not BENCH.exists():
    pytest.skip("needs the sources, not an installed package", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import bench_atomics  # noqa: E402
import bench_cuda  # noqa: E402
import cuda_peers  # noqa: E402
import driver  # noqa: E402
import timing  # noqa: E402
import toolkit  # noqa: E402

from internimage.nvrtc import parts  # noqa: E402

# ---- the toolkit

SAID = """#$ _HERE_={top}/bin
#$ TOP={top}/bin/..
#$ INCLUDES="-I{top}/bin/../targets/x/include"
#$ SYSTEM_INCLUDES="-isystem" "{top}/cccl" "-isystem" "/no/such"
#$ LIBRARIES=  "-L{top}/bin/../targets/x/lib/stubs" "-L{top}/bin/../targets/x/lib"
#$ gcc -D__CUDA_ARCH_LIST__=750 -E "-I/not/this"
"""


@pytest.fixture
def nvcc(tmp_path) -> Path:
    """An nvcc of a toolkit, which can say where it is."""
    top = tmp_path / "toolkit"
    for folder in ("bin", "targets/x/include", "targets/x/lib", "cccl"):
        (top / folder).mkdir(parents=True)
    program = top / "bin" / "nvcc"
    program.write_text(f'#!/bin/sh\n[ "$1" = --dryrun ] && cat >&2 <<"END"\n{SAID.format(top=top)}END\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("kind", ["itself", "script", "link"])
def test_the_toolkit_of_an_nvcc_on_the_path(kind, nvcc, tmp_path, monkeypatch):
    folder = nvcc.parent
    if kind != "itself":
        folder = tmp_path / "local" / "bin"
        folder.mkdir(parents=True)
        if kind == "link":
            (folder / "nvcc").symlink_to(nvcc)
        else:
            (folder / "nvcc").write_text(f'#!/bin/sh\nexec "{nvcc}" "$@"\n')
            (folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    found, top = toolkit.find(), nvcc.parent.parent
    assert (found.nvcc, found.home) == (str(folder / "nvcc"), top)
    assert found.includes == (top / "targets" / "x" / "include", top / "cccl")
    assert found.libraries == (top / "targets" / "x" / "lib",)


def test_an_nvcc_that_says_nothing(nvcc, monkeypatch):
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert toolkit.find() is None


def test_the_toolkit_of_this_machine():
    found = toolkit.find()
    if found is None:
        pytest.skip("needs nvcc")
    assert any((folder / "cuda_runtime.h").is_file() for folder in found.includes)
    assert os.access(found.home / "bin" / "nvcc", os.X_OK)


# ---- peers


@pytest.mark.parametrize(
    "built, wanted, runs",
    [
        ("8.0;9.0", "9.0", True),
        ("8.0;9.0", "9.0;8.0", True),
        ("8.0", "8.6", True),  # machine code of an earlier minor version
        ("8.6", "8.0", False),
        ("8.0", "9.0", False),
        ("8.0+PTX", "9.0", True),
        ("9.0", "", False),
        ("", "9.0", False),
        ("", "", True),
    ],
)
def test_which_build_runs_where(built, wanted, runs):
    assert cuda_peers.serves(built, wanted) == runs


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout of a peer whose module is one of Python's, so that it compiles everywhere and at once."""
    monkeypatch.setattr(cuda_peers, "FOLDER", tmp_path / "peers")
    monkeypatch.setattr(cuda_peers, "wanted", lambda: "9.0")
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = tmp_path / "checkout" / "op" / "src"
    source.mkdir(parents=True)
    (source / "a.cu").write_text("value.type().is_cuda();\n")
    return tmp_path / "checkout"


def prepare(checkout: Path, name: str, may_build: bool = True):
    return cuda_peers.prepare(cuda_peers.Checkout(checkout, may_build), "op", "peer", name, ["src/a.cu"])


def test_a_peer_is_built_once(checkout, monkeypatch):
    compiled = []

    def compile_copy(folder, module, sources, flags):
        compiled.append((folder / "src" / "a.cu").read_text())
        (folder / "built").mkdir()
        (folder / "built" / f"{module}.py").write_text("")

    monkeypatch.setattr(cuda_peers, "compile_copy", compile_copy)
    with pytest.raises(cuda_peers.PeerError, match="it has not been built"):
        prepare(checkout, "peer_of_a_test", may_build=False)
    assert compiled == []
    for may_build in (True, False):
        _, changes, module = prepare(checkout, "peer_of_a_test", may_build)
        assert module.__name__ == "peer_of_a_test" and "deprecated" in changes[0]
    assert compiled == ["value.is_cuda();\n"] and "type()" in (checkout / "op" / "src" / "a.cu").read_text()
    monkeypatch.setattr(cuda_peers, "wanted", lambda: "10.0")  # another GPU
    with pytest.raises(cuda_peers.PeerError, match="it has not been built"):
        prepare(checkout, "peer_of_a_test", may_build=False)


def test_a_peer_that_does_not_load(checkout, monkeypatch):
    monkeypatch.setattr(cuda_peers, "compile_copy", lambda folder, *_: (folder / "built").mkdir())
    with pytest.raises(cuda_peers.PeerError, match="no_such_peer does not load: No module named 'no_such_peer'"):
        prepare(checkout, "no_such_peer")


def test_the_runtime_under_its_plain_name(tmp_path):
    versioned, plain = tmp_path / "versioned", tmp_path / "plain"
    for folder, name in ((versioned, "libcudart.so.13"), (plain, "libcudart.so")):
        folder.mkdir()
        (folder / name).write_text("")
    link = cuda_peers.unversioned_runtime(tmp_path / "links", [versioned]) / "libcudart.so"
    assert link.resolve() == versioned / "libcudart.so.13"
    assert not list(cuda_peers.unversioned_runtime(tmp_path / "none", [versioned, plain]).iterdir())


# ---- time


@pytest.mark.parametrize(
    "calls, output_bytes, free_bytes, count",
    [
        (24, 10, 10_000, 24),
        (24, 500, 10_000, 5),  # a quarter of the memory
        (24, 10_000, 10_000, 2),  # one could reuse its own memory
        (1, 10_000, 10_000, 1),
        (24, 0, 10_000, 24),
    ],
)
def test_how_many_outputs_exist_at_a_time(calls, output_bytes, free_bytes, count):
    assert timing.how_many(calls, output_bytes, free_bytes) == count


def test_bytes_of_what_a_call_returns():
    tensor = torch.zeros(3, dtype=torch.float16)
    assert timing.bytes_of(tensor) == 6 and timing.bytes_of((tensor, [1], None, tensor)) == 12
    assert timing.bytes_of(None) == 0


class Cuda:
    """What `timing` uses of torch.cuda; a graph captures nothing, and may refuse to."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses
        self.captures = False

    class CUDAGraph:
        def replay(self) -> None:
            pass

    @contextlib.contextmanager
    def graph(self, _):
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures = True
        yield
        self.captures = False

    def synchronize(self) -> None:
        pass

    def mem_get_info(self) -> tuple[int, int]:
        return 1 << 20, 1 << 20

    def empty_cache(self) -> None:
        pass


@pytest.mark.parametrize("refuses", [False, True])
def test_each_call_of_a_graph_has_an_output_of_its_own(refuses, monkeypatch):
    cuda, alive = Cuda(refuses), []
    monkeypatch.setattr(timing, "torch", types.SimpleNamespace(cuda=cuda))

    class Output(torch.Tensor):
        pass

    outputs: list[weakref.ref] = []

    def call():
        made = torch.zeros(4).as_subclass(Output)
        if cuda.captures:
            outputs.append(weakref.ref(made))
        return made

    def events_ms(run, repeats):
        run()
        alive.extend(output() is not None for output in outputs)
        return 6.0

    monkeypatch.setattr(timing, "events_ms", events_ms)
    ms, how = timing.replay_ms([call, call, call], 20)
    assert (ms, how) == (2.0, "eager" if refuses else "graph")
    assert alive == ([] if refuses else [True] * 3) and not any(output() is not None for output in outputs)


# ---- the operator


def tensors(dtype=torch.float32, batch=2, side=6, groups=2) -> list[torch.Tensor]:
    channels = (groups * 16, groups * 18, groups * 9, groups * 16)
    return [torch.randn(batch, side, side, c).to(dtype) for c in channels]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("work", list(bench_cuda.our_works(1)))
def test_right_results_have_no_problem(work, dtype):
    assert bench_cuda.problem(work, 2, tensors(dtype)) == ""


def test_wrong_results_have_one(monkeypatch):
    right = torch.ops.internimage.dcnv3.default
    given = tensors()

    def wrong(x, *rest):
        result = right(x, *rest)
        result[-1, 0, 0] += 1  # the last image alone
        return result

    monkeypatch.setattr(bench_cuda, "OP", wrong)
    assert re.fullmatch(r"deviates by \S+ from the reference, allowed 1e-03", bench_cuda.problem("forward", 2, given))
    monkeypatch.setattr(bench_cuda, "OP", lambda x, *rest: torch.zeros_like(x))
    zeros = [torch.zeros_like(t) for t in given]
    assert "deviates by nan" in bench_cuda.problem("forward", 2, zeros)  # a GPU that computes nothing


def test_two_calls_that_differ_are_not_deterministic(monkeypatch):
    monkeypatch.setattr(bench_cuda, "OP_BACKWARD", lambda g, *rest: [torch.rand(2), torch.rand(2), torch.rand(2)])
    assert bench_cuda.problem(bench_cuda.DETERMINISTIC, 2, tensors()) == "two calls differ"


def test_rows(capsys):
    table = bench_cuda.Rows("float16", "56x56", 0.022, as_json=False)
    table.right("forward", "ours", 0.05, "")
    table.right("forward", "DCNv4", 0.1, "eager")
    table.wrong("backward", "DCNv4", "failed: x")
    assert table.all_right
    table.wrong("backward", "ours", "deviates")
    assert not table.all_right
    assert capsys.readouterr().out.splitlines() == [
        "| 56x56 | forward | ours | 0.0500 |  | 44 % | 0.06 |  |",
        "| 56x56 | forward | DCNv4 | 0.1000 | 2.00 |  |  | eager |",
        "| 56x56 | backward | DCNv4 | | | | | failed: x |",
        "| 56x56 | backward | ours | | | | | deviates |",
    ]
    bench_cuda.Rows("float16", "7x7", 1, as_json=True).right("forward", "ours", 0.5, "")
    facts = {"dtype": "float16", "stage": "7x7", "work": "forward", "ms": 0.5, "problem": ""}
    assert json.loads(capsys.readouterr().out) == facts


# ---- models


class Budget:
    """Over after so many questions."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def is_over(self) -> bool:
        self.left -= 1
        return self.left < 0


def models(monkeypatch, questions: int, measure) -> bool:
    monkeypatch.setattr(bench_cuda, "measure_model", measure)
    arguments = types.SimpleNamespace(official=None, built=True, batch=64, training_batch=32)
    return bench_cuda.bench_models(arguments, Budget(questions))


def test_time_is_looked_at_before_each_model(monkeypatch, capsys):
    measured = []

    def measure(contender, *_):
        measured.append(contender[0])
        return 100.0 if contender[0] == "internimage_tiny" else 50.0

    assert models(monkeypatch, 4, measure)
    assert measured == ["internimage_tiny", "convnext_tiny", "swin_tiny_patch4_window7_224", "internimage_tiny"]
    *_, third, fourth, _, last = capsys.readouterr().out.splitlines()
    assert third == "| swin_tiny_patch4_window7_224 | bfloat16 | inference | 64 | 50 | 2.00 |"
    assert fourth == "| internimage_tiny | bfloat16 | inference, compiled | 64 | 100 | |"
    assert last.startswith("Out of time for convnext_tiny (inference, compiled), swin_tiny")
    assert last.endswith("swin_base_patch4_window7_224 (training step, compiled).")


def test_a_model_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    def measure(contender, *_):
        if contender[0].startswith("convnext"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")
        return 1.0

    assert models(monkeypatch, 1000, measure)
    lines = capsys.readouterr().out.splitlines()
    expected = "| convnext_tiny | bfloat16, channels_last | inference | 64 | failed: CUDA out of memory. Tried to | |"
    assert expected in lines and sum("| internimage_base |" in line for line in lines) == 4


# ---- atomic additions

ON_A_HOST = """
#include <math.h>
#include <stdint.h>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
static struct { uint32_t x; } blockIdx, threadIdx;
#include "atomics.cu"
template <int kOperation, int kPattern>
void run(char* memory, uint32_t blocks, uint32_t units, uint32_t images, uint32_t side, uint32_t groups) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x)
      add<kOperation, kPattern>(memory, units, images, side, groups);
}
"""


@pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs a C++ compiler (g++ or clang++)")
def test_additions_of_the_benchmark(tmp_path):
    """As many as are counted, all within the memory, and where the pattern says."""
    source, exported = ON_A_HOST, {}
    for operation, (name, *_) in bench_atomics.OPERATIONS.items():
        for pattern, kind in bench_atomics.PATTERNS.items():
            exported[operation, pattern] = f"run_{name}_{kind}"
            source += f'extern "C" void {exported[operation, pattern]}(char* m, uint32_t b, uint32_t u, uint32_t i, '
            source += f"uint32_t s, uint32_t g) {{ run<{name}, {kind}>(m, b, u, i, s, g); }}\n"
    (tmp_path / "host.cpp").write_text(source)
    command = [cuda_host.COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{BENCH}"]
    subprocess.run([*command, str(tmp_path / "host.cpp"), "-o", str(tmp_path / "host.so")], check=True)
    library = ctypes.CDLL(str(tmp_path / "host.so"))
    images, side, groups, repeats = 2, 8, 4, 3
    rows, guard = images * side * side * groups, 1 << 14
    units = repeats * rows
    for (operation, pattern), function in exported.items():
        _, width, value_bytes, _ = bench_atomics.OPERATIONS[operation]
        dtype = torch.float32 if value_bytes == 4 else torch.int64
        memory = torch.zeros(guard + rows * 16 + guard, dtype=dtype)
        blocks = -(-units * (16 // width) // bench_atomics.THREADS)
        begin = ctypes.c_void_p(memory.data_ptr() + guard * value_bytes)
        getattr(library, function)(begin, *map(ctypes.c_uint32, (blocks, units, images, side, groups)))
        assert not memory[:guard].any() and not memory[-guard:].any(), (operation, pattern)
        counts = memory[guard:-guard].view(rows, 16)
        assert (counts == counts[:, :1]).all(), "channels of a row are treated alike"
        if operation.startswith("none"):
            assert not counts.any()
        elif operation.startswith("st"):
            assert counts.max() == 1
        else:
            assert counts.sum() == units * 36 * 16
            if pattern == "streaming":  # once through the memory after the other
                assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0)])
def test_the_additions_compile(capability):
    try:
        there = parts.find()
    except parts.Missing as missing:
        pytest.skip(f"needs NVRTC: {missing}")
    expressions = bench_atomics.expressions(capability)
    assert any("kRedV4" in text for text in expressions) == (capability >= (9, 0))
    image, names = driver.compile_source(bench_atomics.SOURCE, expressions, capability)
    assert there and image.startswith(b"\x7fELF") and len(set(names.values())) == len(expressions)


def test_additions_that_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(parts, "find", lambda: (_ for _ in ()).throw(parts.Missing("no NVRTC")))
    with pytest.raises(parts.Missing, match="no NVRTC"):
        driver.compile_source(bench_atomics.SOURCE, ["count_cycles"], (9, 0))
