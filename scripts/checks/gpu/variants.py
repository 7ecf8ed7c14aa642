# SPDX-License-Identifier: MIT
"""Stage variants: the kernels' variants (INTERNIMAGE_CUDA_VARIANTS) beside the default, each in its own process."""

import json
import sys

from .report import ROOT, Clock, Report, verdict
from .settings import Settings

VARIABLE = "INTERNIMAGE_CUDA_VARIANTS"
NAMES = ("tiles", "window", "fixed")
# the default again at the end: how far its times differ is how little the others may be trusted
RUNS = {"default": "", **{name: name for name in NAMES}, "all": ",".join(NAMES), "default again": ""}


def unknown() -> str:
    """Why this build has no variants; empty if it has."""
    package = ROOT / "internimage"
    files = [*package.glob("*.so"), *package.rglob("*.py")]
    if any(VARIABLE.encode() in path.read_bytes() for path in files):
        return ""
    return f"This build does not know {VARIABLE}: it has no variants."


def run(report: Report, settings: Settings, clock: Clock) -> int:
    if reason := unknown():
        report.write(f"not available: {reason}")
        return 0
    rows: dict[str, dict[tuple[str, str, str], dict]] = {}
    failed = False
    for i, (name, value) in enumerate(RUNS.items()):
        seconds = clock.left() / (len(RUNS) - i)
        if seconds < 15:
            report.write(f"{name}: not run, out of time.")
            continue
        command = [sys.executable, "scripts/bench/bench_cuda.py", "ops", "--ours", "--json", "--batch", "64"]
        report.write(f"\n{name}:\n")
        variables = {VARIABLE: value} if value else {}
        running = report.start([*command, "--budget", f"{seconds * 3 / 4:.0f}"], seconds, **variables)
        status = running.wait()
        found = [json.loads(line) for line in running.lines if line.startswith("{")]
        rows[name] = {(row["dtype"], row["stage"], row["work"]): row for row in found}
        wrong = [row for row in found if row["problem"]]
        report.write(f"{len(found)} rows{'' if wrong else ', all results right'}. {verdict(running)}".rstrip())
        for row in wrong:
            report.write(f"- {row['dtype']}, {row['stage']}, {row['work']}: {row['problem']}")
        if status not in (0, 124) and not found:
            report.write("```\n" + "\n".join(running.lines[-8:]) + "\n```")
        failed |= status not in (0, 124) or bool(wrong)
    report.write(table(rows))
    return int(failed)


def table(rows: dict[str, dict[tuple[str, str, str], dict]]) -> str:
    """Times in ms, side by side; the best of a row in bold."""
    keys = list(dict.fromkeys(key for found in rows.values() for key in found))
    lines = ["", "| dtype | stage | work | " + " | ".join(rows) + " |", "|---|---|---|" + "--:|" * len(rows)]
    for key in keys:
        times = [found[key]["ms"] if key in found else None for found in rows.values()]
        best = min((ms for ms in times if ms is not None), default=None)
        shown = ["" if ms is None else f"**{ms:.4f}**" if ms == best else f"{ms:.4f}" for ms in times]
        lines.append(f"| {' | '.join(key)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
