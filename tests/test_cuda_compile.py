# SPDX-License-Identifier: MIT
"""What nvcc and NVRTC make of the CUDA kernels: registers, spills, widths of loads, instructions. Needs no GPU.

A change that makes a kernel slow without making it wrong shows here first.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import cuda_stand_in
import pytest

from internimage.nvrtc import compiler, parts

SOURCE = Path(__file__).parent / "cuda_host" / "all_kernels.cu"
# what most tests look at. The rest is slow, and so is that both compilers make the same of a source: NVRTC alone shows
# what a change of it does
BUILDS = [("nvrtc", "sm_90"), ("nvrtc", "sm_80"), pytest.param(("nvcc", "sm_90"), marks=pytest.mark.slow)]
ALL_ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
HALF = ["__half", "__nv_bfloat16"]


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton's wheel, which torch's CUDA builds bring, carries some of them too."""
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    folders.append(Path("/usr/local/cuda/bin"))
    return shutil.which(name) or next((str(f / name) for f in folders if os.access(f / name, os.X_OK)), None)


NVCC, CUOBJDUMP = find_tool("nvcc"), find_tool("cuobjdump")

pytestmark = pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump (the CUDA toolkit, or Triton's wheel)")


@dataclass
class Kernel:
    registers: int = 0
    spilled_bytes: int = 0
    stack_bytes: int = 0
    instructions: Counter = field(default_factory=Counter)  # opcode with its modifiers, such as LDG.E.128.CONSTANT
    loads_under_way: float = 0  # of 16 bytes, on average over the instructions

    def count(self, pattern: str = "") -> int:
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))


TYPES = {"6__half": "__half", "13__nv_bfloat16": "__nv_bfloat16", "f": "float", "d": "double"}
LAYOUTS = {None: [], "0": [], "1": ["even"], "2": ["odd"]}  # of csrc/cuda/gather/arguments.h; dense is not named


def readable(mangled: str) -> str:
    """_ZN...14forward_kernelI6__halfLi16ELi9ELb1EjLi0EEEv... -> forward_kernel<__half, 16, 9, true, 32>."""
    name, arguments = re.search(r"4cuda\d+([a-z]\w*?_kernel)I(.*?)EEv", mangled).groups()
    storage, rest = re.match(f"({'|'.join(TYPES)})(.*)", arguments).groups()
    numbers, index, layout = re.fullmatch(r"((?:L[ib]\d+E)*)([jmy])(?:Li(\d)E)?", rest).groups()
    values = [
        value if kind == "i" else str(value == "1").lower() for kind, value in re.findall(r"L([ib])(\d+)E", numbers)
    ]
    bits = {"j": "32", "m": "64", "y": "64"}[index]
    return f"{name}<{', '.join([TYPES[storage], *values, bits, *LAYOUTS[layout]])}>"


def parse_resources(text: str) -> dict[str, Kernel]:
    """From what `ptxas -v` says."""
    kernels = {}
    for part in re.split(r"Compiling entry function ", text)[1:]:
        kernel = kernels[readable(re.match(r"'(\S+)'", part).group(1))] = Kernel()
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        kernel.stack_bytes, kernel.spilled_bytes = stack, stores + loads
        kernel.registers = int(re.search(r"Used (\d+) registers", part).group(1))
    return kernels


def parse_instructions(sass: str) -> dict[str, list[tuple[str, str]]]:
    """Opcodes and operands of each kernel, without what the assembler pads with after the end."""
    found = {}
    for part in sass.split("Function : ")[1:]:
        line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?PT?\d* )?([A-Z][A-Za-z0-9_.]*)([^;]*);"
        instructions = re.findall(line, part, re.MULTILINE)
        while instructions[-1][0] in ("NOP", "BRA"):
            instructions.pop()
        found[readable(part.split()[0])] = instructions
    return found


def loads_under_way(instructions: list[tuple[str, str]]) -> float:
    """How many loads of 16 bytes have been issued and not yet been used, on average; for straight-line code."""
    waiting: dict[int, set[int]] = {}  # first register of a load -> its four
    total = 0
    for opcode, operands in instructions:
        total += len(waiting)
        writes = 0 if re.match("ST|RED", opcode) else 1  # operands that are written to
        used = {int(number) for number in re.findall(r"\bR(\d+)\b", ",".join(operands.split(",")[writes:]))}
        waiting = {first: registers for first, registers in waiting.items() if not registers & used}
        if opcode.startswith("LDG.E.128"):
            first = int(re.search(r"\bR(\d+)\b", operands).group(1))
            waiting[first] = set(range(first, first + 4))
    return total / len(instructions)


def compile_all(by: str, architecture: str, binary: Path, chosen: list[str] | None = None) -> str:
    """All kernels of the dense layout, or with NVRTC the chosen ones, for an architecture into a file; returns what
    ptxas says."""
    if by == "nvcc":
        if NVCC is None:
            pytest.skip("needs nvcc (the CUDA toolkit)")
        command = [NVCC, "-std=c++17", "-O3", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", str(SOURCE)]
        built = subprocess.run([*command, "-o", str(binary)], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        return built.stderr + built.stdout
    try:
        found = parts.find()
        nvrtc = compiler.load(found.library)
    except parts.Missing as missing:
        pytest.skip(f"needs NVRTC: {missing}")
    families = ("forward", "backward", "backward3x3", "deterministic", "tiles", "window", "fixed")
    source = "".join(f'#include "cuda/gather/{family}.cuh"\n' for family in families)
    names = chosen or list(cuda_stand_in.layout()["kernels"])
    expressions = [f"internimage::cuda::{kernel}" for kernel in names]
    target = compiler.Target("sm", int(architecture.removeprefix("sm_")))
    image, _, said = nvrtc.build(found, source, expressions, target, "--ptxas-options=-v")
    binary.write_bytes(image)
    return said


def inspect(by: str, architecture: str, folder: Path, chosen: list[str] | None = None) -> dict[str, Kernel]:
    binary = folder / "kernels.cubin"
    said = compile_all(by, architecture, binary, chosen)
    assert "warning" not in said, said
    result = parse_resources(said)
    sass = subprocess.run([CUOBJDUMP, "-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    for name, instructions in parse_instructions(sass).items():
        result[name].instructions = Counter(opcode for opcode, _ in instructions)
        result[name].loads_under_way = loads_under_way(instructions)
    assert len(result) == (len(chosen) if chosen else 72 + 46)
    assert all(kernel.instructions for kernel in result.values())
    return result


@pytest.fixture(scope="module", params=BUILDS, ids="-".join)
def build(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def architecture(build) -> str:
    return build[1]


@pytest.fixture(scope="module")
def kernels(build, tmp_path_factory) -> dict[str, Kernel]:
    """All of them, but for sm_80 only those that tests name."""
    chosen = None
    if build[1] == "sm_80":
        chosen = [
            name for name in cuda_stand_in.layout()["kernels"] if re.search(r"3x3|, [89], |window|fixed_sum.*32", name)
        ]
    return inspect(*build, tmp_path_factory.mktemp("kernels"), chosen)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_nvrtc_makes_what_nvcc_makes(architecture, tmp_path):
    """All kernels compile, within the limits of this file; of those for 3x3, where both are of one version, nvcc's
    instructions. The general kernels have loops, which NVRTC unrolls further for compute capability 10.0 and 12.0."""
    by_nvrtc = inspect("nvrtc", architecture, tmp_path)
    test_no_spills(by_nvrtc)
    test_registers_leave_room(by_nvrtc, architecture)
    version = re.search(
        r"release (\d+\.\d+)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    )
    if version is None or version.group(1) != compiler.load(parts.find().library).version:
        pytest.skip("needs an nvcc of NVRTC's version for the comparison")
    by_nvcc = inspect("nvcc", architecture, tmp_path)
    test_no_spills(by_nvcc)
    test_registers_leave_room(by_nvcc, architecture)
    for name, kernel in by_nvcc.items():
        if re.search(r"<\w+, \d+, [89], ", name):
            assert by_nvrtc[name].count() == pytest.approx(kernel.count(), rel=0.02), name


# The 3x3 forward without softmax is held to 64 registers for more loads at a time, and spills up to this for it: bytes
# stored and loaded again, 4 each a register. Everything else spills nothing.
FEW_REGISTERS = re.compile(r"(forward|tiles)_kernel<\w+, \d+, [89], false, 32(, even|, odd)?>")
FEW_BYTES = 96


def test_no_spills(kernels):
    limits = {name: FEW_BYTES if FEW_REGISTERS.fullmatch(name) else 0 for name in kernels}
    spills = {
        name: k.spilled_bytes for name, k in kernels.items() if max(k.spilled_bytes, k.stack_bytes) > limits[name]
    }
    assert not spills, spills


def test_registers_leave_room(kernels, architecture):
    """Blocks of 256 threads a multiprocessor: four of the 3x3 forward, three of its backward with two lanes, and two of
    all others. Of the window kernel, a block is a warp, and nine of them: there is shared memory for ten (compute
    capability 9.0)."""
    for name, kernel in kernels.items():
        if name.startswith("window"):
            most = 227
        elif re.match(r"(forward|tiles)_kernel<\w+, \d+, [89], ", name):
            most = 64 if architecture != "sm_75" else 80
        else:
            most = 80 if re.match(r"backward3x3_kernel<\w+, \d, 2, ", name) else 128
        assert kernel.registers <= most, name


def test_forward_does_not_wait_for_each_load(kernels):
    """At 55 registers, which nvcc chooses by itself, there are 1.5 at a time; at 64, 3.4 to 4.4."""
    for name, kernel in kernels.items():
        if re.fullmatch(r"(forward|tiles)_kernel<\w+, (16|8), [89], \w+, 32>", name):
            assert kernel.loads_under_way >= 2.5, (name, kernel.loads_under_way)


@pytest.mark.parametrize("family, more", [("forward", 0), ("tiles", 3)])
@pytest.mark.parametrize("softmax, limit", [("false", 125), ("true", 132)])  # 116 and 123, and room for another nvcc
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("points", [9, 8])
def test_instructions_for_an_output_element(points, dtype, softmax, limit, family, more, kernels):
    """Straight-line code, so that what is there is what runs: 16 channels a thread."""
    kernel = kernels[f"{family}_kernel<{dtype}, 16, {points}, {softmax}, 32>"]
    assert kernel.count("CALL|BRX|WARPSYNC") == 0
    assert kernel.count("BRA") == 0  # but for the padding, which was cut off
    assert kernel.count() / 16 <= limit + more, kernel.instructions.most_common()


def vector_width(name: str) -> tuple[str, int, int]:
    dtype, channels, points = re.match(r"\w+<(\w+), (\d+), (\d+), ", name).groups()
    return dtype, int(channels), int(points)


SIZES = {"__half": 2, "__nv_bfloat16": 2, "float": 4, "double": 8}


def test_forward_loads_16_bytes_at_once(kernels):
    for name in (n for n in kernels if n.startswith(("forward_kernel", "tiles_kernel"))):
        dtype, channels, points = vector_width(name)
        if channels == 1:
            continue
        bytes_a_corner = channels * SIZES[dtype]
        assert bytes_a_corner in (16, 32)
        loads = 4 * (points or 1) * bytes_a_corner // 16  # corners; the general kernel is a loop
        assert kernels[name].count(r"LDG\.E\.128") >= loads, name
        assert kernels[name].count(r"STG\.E\.128") == bytes_a_corner // 16, name


def test_all_addresses_are_known_to_be_global(kernels):
    """Else each access first asks which memory an address is in, and each atomic addition becomes a loop. Only
    the window kernel has shared memory."""
    for name, kernel in kernels.items():
        local = kernel.count(r"(LDL|STL)(\.|$)")  # what is spilled
        assert kernel.count(r"(LD|ST|ATOM|QSPC|ATOMS|LDL|STL)(\.|$)") == local, (name, kernel.instructions)
        assert 4 * local <= kernel.spilled_bytes, name
        assert name.startswith("window") or kernel.count(r"(LDS|STS)(\.|$)") == 0, (name, kernel.instructions)


# ---- the backward of a 3x3 kernel: 8 channels a thread, 9 points

BACKWARD = "backward3x3_kernel<{}, 9, {}, 32>"
LANES = [2, 0]  # two, and what is known at launch


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [*HALF, "float"])
def test_backward_loads_16_bytes_at_once(dtype, lanes, kernels):
    """The four corners of each point, and grad_output."""
    a_corner = 8 * SIZES[dtype] // 16
    loads = kernels[BACKWARD.format(dtype, lanes)].count(r"LDG\.E\.128")
    assert loads == (4 * 9 + 1) * a_corner


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [*HALF, "float"])
def test_backward_adds_4_floats_at_once(dtype, lanes, kernels, architecture):
    kernel = kernels[BACKWARD.format(dtype, lanes)]
    wide, all_of_them = kernel.count(r"REDG?\.E\.ADD\..*F32x4"), kernel.count(r"REDG?\.E\.ADD")
    # from compute capability 9.0 on
    assert (wide, all_of_them) == ((72, 72) if architecture == "sm_90" else (0, 288)), kernel.instructions


@pytest.mark.parametrize("dtype, limit", [("__half", 305), ("__nv_bfloat16", 305), ("float", 300)])
def test_instructions_for_a_gradient_of_the_input(dtype, limit, kernels, architecture):
    """Both ways of each branch are counted; without an addition of 4 floats at once there are 27 more."""
    count = kernels[BACKWARD.format(dtype, 2)].count() / 8
    assert count <= limit + (0 if architecture == "sm_90" else 27), count


@pytest.mark.parametrize("lanes", LANES)
def test_backward_shuffles_and_stores(lanes, kernels):
    """Three sums a point; two points of an offset, and of a mask, with one store, of the mask once for each branch."""
    kernel = kernels[BACKWARD.format("__half", lanes)]
    assert kernel.count("SHFL") == 9 * 3
    assert kernel.count("STG") <= 5 + 2 * 5


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("points", [9, 8])
def test_window_on_tensor_cores(points, dtype, kernels, architecture):
    """16 channels a thread. Both ways of each branch are counted: the way of a point outside of the window, which is a
    quarter of the 236 of sm_90, and atomic additions one by one."""
    kernel = kernels[f"window_kernel<{dtype}, {points}, 32>"]
    assert kernel.count(r"HMMA\.16816\.F32") == 40 + 80
    assert kernel.count(r"(LDS|STS)\.128") == 40 + 40 + 40  # dots and zeros go there, weights come back
    wide = kernel.count(r"REDG?\.E\.ADD\..*F32x4")
    assert wide == (20 + 16 if architecture == "sm_90" else 0)  # of the window's pixels, and of a point's corners
    assert kernel.count() / 16 <= 245, kernel.instructions.most_common()


@pytest.mark.slow
def test_window_of_sm_75_has_no_products(tmp_path):
    kernels = inspect("nvrtc", "sm_75", tmp_path)
    assert kernels["window_kernel<__half, 9, 32>"].count("HMMA") == 0
    test_no_spills(kernels)
    test_registers_leave_room(kernels, "sm_75")


@pytest.mark.parametrize("dtype", [*HALF, "float"])
@pytest.mark.parametrize("channels", [1, 4])
def test_fixed_point_sums_are_added_by_one_instruction(channels, dtype, kernels):
    """Of 64 bits, and not by a loop that compares and swaps."""
    kernel = kernels[f"fixed_sum_kernel<{dtype}, {channels}, 32>"]
    assert kernel.count(r"REDG?\.E\.ADD\.64") == 4 * channels and kernel.count(r"ATOMG?\.") == 0


# ---- offsets and masks in other layouts: the same kernels with other places and orders


@pytest.fixture(scope="module")
def strided(tmp_path_factory) -> dict[str, Kernel]:
    """The kernels for 3x3, for sm_90; beside those of the dense layout, by the same compiler."""
    listed = cuda_stand_in.layout()
    pattern = r"(forward_kernel<(__half|float), (16|8), 9|backward3x3_kernel<(__half|float), 9), "
    chosen = [name for key in ("kernels", "other_kernels") for name in listed[key] if re.match(pattern, name)]
    return inspect("nvrtc", "sm_90", tmp_path_factory.mktemp("strided"), chosen)


def test_layouts_cost_little(strided):
    """Within the same registers, at most a tenth more instructions (3 to 8.4 %): where a unit's numbers begin, and the
    two orders, which are known at launch alone."""
    test_no_spills(strided)
    test_registers_leave_room(strided, "sm_90")
    others = [name for name in strided if name.endswith((", even>", ", odd>"))]
    assert len(others) == 2 * (len(strided) - len(others)) == 16
    for name in others:
        dense = strided[re.sub(", (even|odd)>", ">", name)]
        assert dense.count() < strided[name].count() <= 1.1 * dense.count(), name


@pytest.mark.parametrize("dtype, pair, single", [("__half", r"LDG\.E\.CONSTANT", r"LDG\.E\.U16\.CONSTANT")])
def test_offsets_are_loaded_in_pairs_where_they_are_aligned(dtype, pair, single, strided):
    """9 masks one by one, and 9 offsets by one load each or by two."""
    for layout, pairs, singles in (("", 9, 9), (", even", 9, 9), (", odd", 0, 27)):
        kernel = strided[f"forward_kernel<{dtype}, 16, 9, false, 32{layout}>"]
        assert (kernel.count(pair), kernel.count(single)) == (pairs, singles), (layout, kernel.instructions)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_all_kernels_of_other_layouts(architecture, tmp_path):
    """They compile, within the limits of this file."""
    kernels = inspect("nvrtc", architecture, tmp_path, list(cuda_stand_in.layout()["other_kernels"]))
    assert len(kernels) == 2 * 72
    test_no_spills(kernels)
    test_registers_leave_room(kernels, architecture)
