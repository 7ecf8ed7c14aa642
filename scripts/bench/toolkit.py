# SPDX-License-Identifier: MIT
"""Where the toolkit of the nvcc on the PATH is, as nvcc itself says: what is on the PATH may be a script or a link."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Toolkit:
    """The paths that an nvcc uses."""

    nvcc: str
    home: Path  #: what CUDA_HOME should be
    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]


def find() -> Toolkit | None:
    """The toolkit of the nvcc on the PATH, or of the usual one; None if there is none, or it does not tell."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    try:
        # prints what it would do: nothing is compiled
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    except OSError:
        return None
    values = dict(re.findall(r"^#\$ (\w+)=(.*)$", said, re.MULTILINE))
    top = values.get("TOP", "").strip()
    if not top:
        return None
    return Toolkit(
        nvcc,
        Path(top).resolve(),
        _folders(f"{values.get('INCLUDES', '')} {values.get('SYSTEM_INCLUDES', '')}", "-I", "-isystem"),
        _folders(values.get("LIBRARIES", ""), "-L"),
    )


def _folders(words: str, *options: str) -> tuple[Path, ...]:
    """The existing folders of options like `-Ifolder` or `-isystem folder`."""
    found, is_next = [], False
    for word in shlex.split(words):
        option = next((o for o in options if word.startswith(o)), None)
        if is_next or (option is not None and word != option):
            found.append(Path(word if is_next else word[len(option or "") :]))
        is_next = word == option
    return tuple(dict.fromkeys(path.resolve() for path in found if path.is_dir()))
