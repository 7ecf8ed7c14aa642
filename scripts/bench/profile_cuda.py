# SPDX-License-Identifier: MIT
"""Calls each kernel once, for a profiler: `ncu --profile-from-start off python scripts/bench/profile_cuda.py`.

The first stage of InternImage-T at batch 64, where most of the operator's time is. What runs before is not profiled: it
compiles the kernels and fills the caches of torch's memory.
"""

import argparse
import sys
from pathlib import Path

import bench_cuda
import cuda_peers
import torch

DTYPES = ("float16", "bfloat16", "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="checkout of OpenGVLab/InternImage")
    parser.add_argument("--dcnv4", type=Path, help="checkout of OpenGVLab/DCNv4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, help="one type instead of all")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "no GPU: torch.cuda.is_available() is False\n")
    peers = [
        cuda_peers.build(kind, checkout, may_build=False)[0]
        for kind, checkout in ((cuda_peers.OfficialDCNv3, arguments.official), (cuda_peers.DCNv4, arguments.dcnv4))
    ]
    side, groups = bench_cuda.STAGES[0]
    for name in DTYPES if arguments.dtype is None else (arguments.dtype,):
        dtype = getattr(torch, name)
        sets = [bench_cuda.draw(arguments.batch, side, groups, dtype, 0)]
        for (work, who), (call,) in bench_cuda.works(sets, groups, *peers, dtype, only_ours=False).items():
            if who == "reference" or (who != "ours" and dtype != torch.float16):
                continue
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(f"{name} {work}, {who}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
