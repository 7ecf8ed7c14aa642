# SPDX-License-Identifier: MIT
"""What the variables of gpu_check.sh say."""

import os
from dataclasses import dataclass
from pathlib import Path

from .report import ROOT


class SettingsError(Exception):
    """A variable with a value that cannot be; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """See gpu_check.sh."""

    report: Path
    out: Path
    limit: float  #: seconds that a stage may take
    official: Path | None
    dcnv4: Path | None
    cpu_tests: bool
    racecheck: bool

    @classmethod
    def read(cls, variables: "os._Environ[str] | dict[str, str]") -> "Settings":
        out = Path(variables.get("OUT") or ROOT / "build" / "gpu-check").absolute()
        report = Path(variables.get("REPORT") or (out / "gpu.md" if variables.get("OUT") else ROOT / DEFAULT_REPORT))
        given = variables.get("LIMIT") or "480"
        try:
            limit = float(given)
        except ValueError:
            limit = 0
        if not 30 <= limit <= 3600:
            raise SettingsError(f"LIMIT must be seconds, from 30 to 3600, got '{given}'")
        checkouts = [Path(variables[name]).absolute() if variables.get(name) else None for name in CHECKOUTS]
        for name, path in zip(CHECKOUTS, checkouts):
            if path is not None and not path.is_dir():
                raise SettingsError(f"{name} must be a checkout, and there is no folder '{path}'")
        switches = [_switch(variables, name) for name in ("CPU_TESTS", "RACECHECK")]
        return cls(report.absolute(), out, limit, *checkouts, *switches)

    def peers(self, *names: str) -> list[str]:
        """Arguments of the benchmarks for the checkouts that were given."""
        found = ((name, getattr(self, name)) for name in names)
        return [word for name, path in found if path is not None for word in (f"--{name}", str(path))]


DEFAULT_REPORT = Path("docs/benchmarks/gpu.md")
CHECKOUTS = ("OFFICIAL", "DCNV4")


def _switch(variables: "os._Environ[str] | dict[str, str]", name: str) -> bool:
    value = variables.get(name) or "0"
    if value not in ("0", "1"):
        raise SettingsError(f"{name} must be 0 or 1, got '{value}'")
    return value == "1"
