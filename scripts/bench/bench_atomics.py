# SPDX-License-Identifier: MIT
"""The rate of atomic additions in the footprint of DCNv3's backward, as a Markdown table.

    python scripts/bench/bench_atomics.py

The backward adds 36 times 16 floats for each pixel and group, by instructions of four floats where the GPU has them.
At the first stage of InternImage-T and batch 64 that is 1.85 GB of additions to 12.8 million floats. atomics.cu does
the same additions and nothing else, with other instructions and other orders for comparison; what the addresses alone
take is measured as well. It is compiled by NVRTC.

A sector is 32 bytes. Its rate is by the multiprocessors' clock, which is measured; the L2 cache has another.
"""

import argparse
import ctypes
import sys
from pathlib import Path

import torch
from timing import Budget, copy_bandwidth, events_ms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a clone that is not installed

import driver  # noqa: E402

from internimage.nvrtc import compiler, parts  # noqa: E402

SOURCE = Path(__file__).with_name("atomics.cu")
SIDE, GROUPS, CHANNELS, BATCH, ROWS_OF_A_UNIT, THREADS = 56, 4, 16, 64, 36, 256
# what -> name in atomics.cu, channels a thread, bytes a value, whether it needs compute capability 9.0
OPERATIONS = {
    "red.v4.f32": ("kRedV4", 4, 4, True),
    "red.v4.f32, 8 channels a thread": ("kRedV4Twice", 8, 4, True),
    "red.v2.f32": ("kRedV2", 2, 4, True),
    "red.f32, a channel a thread": ("kRed", 1, 4, False),
    "red.f32, 4 channels a thread": ("kRedOneByOne", 4, 4, False),
    "red.u64, a channel a thread": ("kRedU64", 1, 8, False),
    "st.v4.f32": ("kStoreV4", 4, 4, False),
    "none: addresses of 4 channels": ("kNothingV4", 4, 4, False),
    "none: addresses of a channel": ("kNothing", 1, 4, False),
}
# values an instruction, where that is not the channels a thread
VALUES = {"red.v4.f32, 8 channels a thread": 4, "red.f32, 4 channels a thread": 1}
PATTERNS = {
    "window": "kWindow",  # as the backward, with offsets of standard deviation 1
    "anywhere": "kAnywhere",
    "streaming": "kStreaming",
}
IMAGES = (BATCH, 4)  # the footprint of batch 64, and one that fits the L2 cache


def expression(operation: str, pattern: str) -> str:
    return f"add<{OPERATIONS[operation][0]}, {PATTERNS[pattern]}>"


def expressions(capability: tuple[int, int]) -> list[str]:
    """The kernels that a GPU can run."""
    able = [name for name, (_, _, _, needs_9) in OPERATIONS.items() if capability >= (9, 0) or not needs_9]
    return [*(expression(operation, pattern) for operation in able for pattern in PATTERNS), "count_cycles"]


def megahertz(module: driver.Module) -> float:
    """The multiprocessors' clock, now."""
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    module.launch("count_cycles", 1, 1, [ctypes.c_uint64(2_000_000), ctypes.c_uint64(counts.data_ptr())])
    cycles, nanoseconds = counts.tolist()
    return 1e3 * cycles / nanoseconds if nanoseconds else float("nan")


def measure(module: driver.Module, operation: str, pattern: str, images: int) -> str:
    """A row of the table."""
    _, width, value_bytes, _ = OPERATIONS[operation]
    units = BATCH * SIDE * SIDE * GROUPS
    dtype = torch.float32 if value_bytes == 4 else torch.int64
    memory = torch.zeros(images * SIDE * SIDE * GROUPS * CHANNELS, dtype=dtype, device="cuda")
    blocks = -(-units * (CHANNELS // width) // THREADS)
    arguments = [ctypes.c_uint64(memory.data_ptr()), *map(ctypes.c_uint32, (units, images, SIDE, GROUPS))]

    def run() -> None:
        module.launch(expression(operation, pattern), blocks, THREADS, arguments)

    run()
    additions = units * ROWS_OF_A_UNIT * CHANNELS
    wrong = ""
    if operation.startswith("red"):
        total = int(memory.sum(dtype=torch.float64 if value_bytes == 4 else torch.int64).item())
        wrong = "" if total == additions else f"wrong: {total:.4e} of {additions:.4e} additions"
    elif operation.startswith("st") and int(memory.max()) != 1:
        wrong = "wrong: nothing was stored"
    if wrong:
        return f"{wrong} |||||"
    ms = events_ms(run)
    clock = megahertz(module)
    payload = additions * value_bytes
    instructions = additions / VALUES.get(operation, width)
    sectors = payload / 32 / (ms * clock * 1e3)  # a clock
    return f"{ms:.3f} | {payload / ms / 1e6:.0f} | {instructions / ms / 1e6:.0f} | {sectors:.1f} | {clock:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=400, help="seconds after which no measurement is started")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "no GPU: torch.cuda.is_available() is False\n")
    budget = Budget(arguments.budget)
    capability = torch.cuda.get_device_capability()
    try:
        module = driver.Module(SOURCE, expressions(capability))
    except (parts.Missing, compiler.CompileError, driver.DriverError) as error:
        parser.exit(1, f"not measured: {error}\n")
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    print(f"L2 cache {l2 / 2**20:.0f} MiB; a copy of 1 GiB moves {copy_bandwidth() / 1e9:.0f} GB/s.")
    if capability < (9, 0):
        print("\nThere are no red.v4.f32 and red.v2.f32 before compute capability 9.0.")
    all_right = True
    for images in IMAGES:
        size = images * SIDE * SIDE * GROUPS * CHANNELS * 4 / 2**20
        print(f"\n### {size:.1f} MiB of floats, or twice that for red.u64\n")
        print("| operation | order | ms | GB/s of values | 10^9 instructions of a thread a s | sectors a clock | MHz |")
        print("|---|---|--:|--:|--:|--:|--:|", flush=True)
        for operation in OPERATIONS:
            for pattern in PATTERNS:
                if expression(operation, pattern) not in module.names:
                    continue
                if budget.is_over():
                    print("\nThe rest was skipped: out of time.")
                    return
                figures = measure(module, operation, pattern, images)
                all_right &= not figures.startswith("wrong")
                print(f"| {operation} | {pattern} | {figures}", flush=True)
    if not all_right:
        sys.exit(1)


if __name__ == "__main__":
    main()
