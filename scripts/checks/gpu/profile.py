# SPDX-License-Identifier: MIT
"""Stage profile: the hardware's counters of each kernel, by Nsight Compute."""

import csv
import re
import sys
from collections.abc import Iterable

from . import machine
from .report import Clock, Report, verdict
from .settings import Settings

ISSUED = "sm__inst_issued.avg.pct_of_peak_sustained_active|smsp__issue_active.avg.pct_of_peak_sustained_active"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed|gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
# heading -> a counter of ncu, by the unit that it counts in; those that a version or a GPU does not have are left blank
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "registers": "launch__registers_per_thread",
    "warps, % of peak": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue slots, %": ISSUED,
    "instructions": "smsp__inst_executed.sum|sm__inst_executed.sum",
    "L1, %": "l1tex__throughput.avg.pct_of_peak_sustained_active|l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 data pipe, %": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "L1 tags, %": "l1tex__lsuin_requests.avg.pct_of_peak_sustained_elapsed",
    "load requests": "l1tex__t_requests_pipe_lsu_mem_global_op_ld.sum",
    "load sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "L1 hits, %": "l1tex__t_sector_pipe_lsu_mem_global_op_ld_hit_rate.pct|l1tex__t_sector_hit_rate.pct",
    "red requests": "l1tex__t_requests_pipe_lsu_mem_global_op_red.sum",
    "red sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_red.sum",
    "L2, %": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed|lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 sectors read": "lts__t_sectors_op_read.sum",
    "L2 sectors written": "lts__t_sectors_op_write.sum",
    "L2 sectors of reds": "lts__t_sectors_op_red.sum",
    "L2 hits, %": "lts__t_sector_hit_rate.pct",
    "DRAM, %": DRAM,
    "DRAM read": "dram__bytes_read.sum",
    "DRAM written": "dram__bytes_write.sum",
}
OPTIONS = [
    *("--set", "full", "--profile-from-start", "off", "--csv", "--page", "raw"),
    *("--clock-control", "none"),  # the clock at which the benchmarks run
]
DTYPES = ("float16", "bfloat16", "float32")
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio$")
DENIED = r"ERR_NVGPUCTRPERM|Failed to initialize the profiler|LibraryNotLoaded|not supported"


def run(report: Report, settings: Settings, clock: Clock) -> int:
    tool = machine.tool("ncu")
    if tool is None:
        report.write("not available: there is no ncu (Nsight Compute).")
        return 0
    script = [sys.executable, "scripts/bench/profile_cuda.py"]
    report.write("The calls, without the profiler:\n")
    trial = report.run(script, clock.left() / 3, tail=20)
    if problem := verdict(trial):
        report.write(f"Not profiled: {problem}")
        return 1
    failed = False
    for i, dtype in enumerate(DTYPES):  # one by one, as ncu writes at its end
        seconds = clock.left() / (len(DTYPES) - i)
        report.write(f"\n### {dtype}\n")
        arguments = ["--dtype", dtype, *settings.peers("official", "dcnv4")]
        path = settings.out / f"profile-{dtype}.csv"
        path.unlink(missing_ok=True)
        profiled = report.run([tool, *OPTIONS, "--log-file", str(path), *script, *arguments], seconds, tail=5)
        lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
        said = [line for line in [*lines, *profiled.lines] if "==ERROR" in line]
        kernels = list(read(lines))
        if not kernels and re.search(DENIED, "\n".join(said)):
            report.write(f"not available: {said[0]}")
            return 0
        for line in filter(None, [*said[:5], verdict(profiled)]):
            report.write(line)
        report.write(table(kernels) if kernels else "No kernel was profiled.")
        report.write(f"\nAll counters are in `{path.name}`." if kernels else "")
        failed |= not kernels or bool(verdict(profiled))
    return int(failed)


def read(lines: Iterable[str]) -> Iterable[dict[str, str]]:
    """The kernels of a raw page: a row of names, a row of units, and a row for each kernel."""
    rows = csv.reader(line for line in lines if line.startswith('"'))
    names, units = next(rows, None), next(rows, None)
    if names is None or units is None:
        return
    for row in rows:
        if len(row) == len(names):
            yield {name: f"{value} {unit}".strip() for name, value, unit in zip(names, row, units)}


def table(kernels: list[dict[str, str]]) -> str:
    """Counters by kernel: a table with a row for each counter, as there are more of these, and one of the stalls."""
    short = [re.sub(r"\(.*|internimage::cuda::|void ", "", kernel.get("Kernel Name", "?"))[:70] for kernel in kernels]
    lines = ["", *(f"{i}. `{name}`" for i, name in enumerate(short, 1)), ""]
    lines += ["| | " + " | ".join(str(i) for i in range(1, len(kernels) + 1)) + " |", "|---|" + "--:|" * len(kernels)]
    for heading, names in COUNTERS.items():
        values = [next((k[name] for name in names.split("|") if k.get(name)), "") for k in kernels]
        lines.append(f"| {heading} | " + " | ".join(values) + " |")
    stalls = sorted({name for kernel in kernels for name in kernel if STALL.match(name)})
    lines += ["", "Warps that wait, per issued instruction, by what they wait for:", ""]
    lines += ["| | " + " | ".join(str(i) for i in range(1, len(kernels) + 1)) + " |", "|---|" + "--:|" * len(kernels)]
    for name in stalls:
        values = [kernel.get(name, "").split(" ")[0] for kernel in kernels]
        if any(number(value) >= 0.05 for value in values):
            lines.append(f"| {STALL.match(name)[1].replace('_', ' ')} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0
