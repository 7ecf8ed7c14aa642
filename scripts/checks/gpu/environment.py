# SPDX-License-Identifier: MIT
"""The environment of a pack (gpu_pack.py): the packages of the interpreter that has torch, and the wheels on top.

    python environment.py PACK

Prints the path of the environment's interpreter. Needs no network, and no pip but the pack's. The environment is kept
in the pack, or in a temporary folder if that cannot be written to, and made anew for another interpreter or torch.
"""

import email
import importlib.metadata
import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path


class EnvironmentProblem(Exception):
    """Why there is none; the message is one line."""


def facts(manifest: dict) -> dict[str, str]:
    """What an environment depends on."""
    import torch

    here = "{}.{}".format(*sys.version_info)
    if here != manifest["python"]:
        wanted = f"the wheels of this pack are for Python {manifest['python']}, and '{sys.executable}' is {here}"
        raise EnvironmentProblem(f"{wanted}: PYTHON selects another, `make gpu-pack PACK_PYTHON={here}` makes another")
    return {"interpreter": sys.executable, "torch": torch.__version__, "made": manifest["made"]}


def interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"


def lacking(wheels: Path, requirements: list[str], installed: Callable[[str], str | None]) -> list[Path]:
    """The wheels of what is required and not installed, or too old, and of what these wheels require, and so on.

    What is installed and new enough is left as it is, with all that it requires: torch's own requirements are nothing
    that a pack could meet.

    Raises:
        EnvironmentProblem: Something is lacking that there is no wheel of.
    """
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename

    offered = {}
    for path in wheels.glob("*.whl"):
        name, version, _, _ = parse_wheel_filename(path.name)
        offered[name] = (path, version)
    chosen: dict[str, Path] = {}
    left = [Requirement(text) for text in requirements]
    while left:
        required = left.pop()
        name = canonicalize_name(required.name)
        if required.marker is not None and not required.marker.evaluate({"extra": ""}) or name in chosen:
            continue
        version = installed(name)
        if version is not None and required.specifier.contains(version, prereleases=True):
            continue
        path, offer = offered.get(name, (None, None))
        if path is None or not required.specifier.contains(offer, prereleases=True):
            has = "is not installed" if version is None else f"is installed in version {version}"
            raise EnvironmentProblem(f"{required.name} {has}, and the pack has no wheel for '{required}'")
        chosen[name] = path
        with zipfile.ZipFile(path) as wheel:
            metadata = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            message = email.message_from_string(wheel.read(metadata).decode("utf-8"))
        left += [Requirement(text) for text in message.get_all("Requires-Dist") or ()]
    return sorted(chosen.values())


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def make(folder: Path, wheels: Path, requirements: list[str]) -> None:
    """Make one in a folder, which is replaced."""
    pip = next(iter(sorted(wheels.glob("pip-*.whl"))), None)
    if pip is None:
        raise EnvironmentProblem(f"'{wheels}' has no wheel of pip")
    sys.path.insert(0, str(pip))
    chosen = lacking(wheels, requirements, installed_version)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, system_site_packages=True, symlinks=True)
    # The system's packages are not those of this interpreter if it is itself in an environment.
    name = "python{}.{}".format(*sys.version_info)
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (folder / "lib" / name / "site-packages" / "zz_below.pth").write_text("\n".join(lines) + "\n")
    if not chosen:
        return
    # what is too old is in a folder below, where it stays
    options = [
        "--no-index",
        "--no-deps",
        "--ignore-installed",
        "--quiet",
        "--no-compile",
        "--disable-pip-version-check",
    ]
    command = [str(interpreter(folder)), str(pip / "pip"), "install", *options, *map(str, chosen)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        said = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise EnvironmentProblem(f"pip cannot install the wheels of '{wheels}': {' '.join(said)[:500]}")


def ready(pack: Path) -> Path:
    """The interpreter of the pack's environment, made if it is not there."""
    now = facts(json.loads((pack / "manifest.json").read_text()))
    folder = pack / "venv"
    stamp = folder / "made.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == now and interpreter(folder).exists():
        return interpreter(folder)
    if not os.access(pack, os.W_OK):
        folder = Path(tempfile.mkdtemp(prefix="internimage-gpu-")) / "venv"
        stamp = folder / "made.json"
    make(folder, pack / "wheels", (pack / "requirements.txt").read_text().split())
    stamp.write_text(json.dumps(now))
    return interpreter(folder)


if __name__ == "__main__":
    try:
        print(ready(Path(sys.argv[1]).absolute()))
    except ImportError as error:
        sys.exit(f"'{sys.executable}' has no torch ({error}): PYTHON selects the interpreter")
    except EnvironmentProblem as problem:
        sys.exit(str(problem))
