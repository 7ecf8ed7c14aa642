# SPDX-License-Identifier: MIT
"""Puts into one folder what a machine with a GPU, but without network and without nvcc, needs for the GPU checks.

    python scripts/checks/gpu_pack.py [--official PATH] [--dcnv4 PATH]

The machine needs Linux on this kind of processor, Python and torch with CUDA. The folder has the files of this
checkout with the built modules, wheels of the Python packages that a machine with torch may lack, and the folders of
the peers' checkouts that the benchmarks build from, as they are. None of it needs to be installed there: run.sh.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULE, CUDA_MODULE, FACTS = "_C.abi3.so", "_C_cuda.abi3.so", "_build.json"
# What the checks import; of the versions of pyproject.toml. The machine may have them: only what it lacks is installed.
NEEDS = [
    "timm>=1.0.31", "safetensors>=0.5", "huggingface_hub>=0.30", "einops>=0.8", "tqdm>=4.66", "pyyaml>=6",
    "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100",
    "setuptools>=77", "ninja",  # for what is built there, if nvcc is there
]  # fmt: skip
PIP = "pip>=24"  # installs the others, and is not installed
# What the machine has, with the versions that the others' requirements are compared with: never in the pack.
THERE = {"torch": "2.11.0", "torchvision": "0.26.0", "numpy": "2.0.0", "pillow": "11.0.0"}
GLIBCS = (5, 12, 17, 24, 27, 28)  # minor versions that wheels are tagged with; the newest is that of our own wheels
PEERS = {  # option -> what is copied of a checkout
    "official": ("classification/ops_dcnv3", "LICENSE"),
    "dcnv4": ("DCNv4_op", "LICENSE"),
}
MEGABYTE = 1_000_000


class PackError(Exception):
    """Why there is no pack; the message is one line."""


# ---- the checkout


def copy_checkout(root: Path, target: Path) -> None:
    """The files that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode != 0:
        raise PackError(f"'{root}' is not a git checkout: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():  # not if it was removed and that was not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def copy_modules(root: Path, target: Path, architectures: Sequence[str]) -> str:
    """The compiled modules; returns what they are.

    Raises:
        PackError: The module for the CPU is missing or older than its sources.
    """
    package = root / "internimage"
    if not (package / MODULE).is_file() or not (package / FACTS).is_file():
        raise PackError(
            f"internimage/{MODULE} is not there: `pip install -e .` or `setup.py build_ext --inplace` makes it"
        )
    sources = [path for path in (root / "csrc").rglob("*") if path.suffix in (".cpp", ".h")]
    built = (package / MODULE).stat().st_mtime
    if newer := sorted(str(path.relative_to(root)) for path in sources if path.stat().st_mtime > built):
        raise PackError(f"internimage/{MODULE} is older than {newer[0]}: `setup.py build_ext --inplace` makes it anew")
    facts = json.loads((package / FACTS).read_text())
    shutil.copy2(package / MODULE, target / MODULE)
    cuda, has = facts.get("cuda", {}), package / CUDA_MODULE
    wanted = {f"sm_{a.replace('.', '')}" for a in architectures}
    if has.is_file() and wanted <= set(cuda.get("architectures", ())):
        shutil.copy2(has, target / CUDA_MODULE)
    else:
        facts["cuda"] = build_cuda_module(root, target / CUDA_MODULE, architectures)
    (target / FACTS).write_text(json.dumps(facts) + "\n")
    if strip := shutil.which("strip"):  # symbols for debuggers are most of the size
        subprocess.run([strip, "--strip-unneeded", *map(str, target.glob("*.so"))], capture_output=True)
    if reason := facts["cuda"].get("reason"):
        return f"{MODULE} alone: {reason}"
    return f"{MODULE}, and {CUDA_MODULE} for {', '.join(facts['cuda']['architectures'])}"


def build_cuda_module(root: Path, library: Path, architectures: Sequence[str]) -> dict[str, object]:
    """Build nvcc's module for some compute capabilities, if that is possible; returns what _build.json says of it."""
    code = (
        "import json, pathlib, re, sys; sys.path.insert(0, 'csrc'); import build_cuda\n"
        "target = re.search(r'TORCH_TARGET, .* = \"(\\w+)\"', pathlib.Path('setup.py').read_text())[1]\n"
        "extension, reason = build_cuda.cuda_extension(target)\n"
        "try: extension and extension.build(pathlib.Path(sys.argv[1]))\n"
        "except build_cuda.CannotBuild as error: extension, reason = None, str(error)\n"
        "print('\\n' + json.dumps(extension.facts() if extension else {'reason': reason}))"
    )
    variables = {"TORCH_CUDA_ARCH_LIST": ";".join(architectures), "INTERNIMAGE_BUILD_CUDA": "auto"}
    command = [sys.executable, "-c", code, str(library)]
    result = subprocess.run(command, cwd=root, env={**os.environ, **variables}, capture_output=True, text=True)
    if result.returncode != 0:
        return {"reason": f"building the CUDA kernels failed: {result.stderr.strip()[-300:]}"}
    return json.loads(result.stdout.splitlines()[-1])


# ---- wheels


def write_stub(folder: Path, name: str, version: str) -> None:
    """A wheel with nothing in it, for what the machine has: pip then looks no further for it."""
    there = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{there}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{there}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{there}/RECORD", "")


def download(target: Path, python: str, links: Path | None) -> list[str]:
    """The wheels of NEEDS and of what these need, without those of THERE; returns their names.

    Args:
        target: The folder for them.
        python: Such as "3.12".
        links: A folder to take them from, instead of the package index.
    """
    target.mkdir(parents=True)
    machine = platform.machine()
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBCS] + [f"manylinux2014_{machine}"]
    with tempfile.TemporaryDirectory() as temporary:
        stubs = Path(temporary)
        for name, version in THERE.items():
            write_stub(stubs, name, f"{version}+there")
        constraints = stubs / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}+there\n" for name, version in THERE.items()))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(target), "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp"]
        command += [word for p in platforms for word in ("--platform", p)]
        command += ["--constraint", str(constraints), "--find-links", str(stubs)]
        command += [] if links is None else ["--no-index", "--find-links", str(links)]
        result = subprocess.run([*command, *NEEDS, PIP], capture_output=True, text=True)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise PackError(f"pip cannot download the wheels: {' '.join(errors)[:500]}")
    for stub in target.glob("*+there-*.whl"):
        stub.unlink()
    names = sorted(path.name for path in target.iterdir())
    if wrong := [n for n in names if re.match(r"(nvidia|triton|cuda|torch|torchvision)[-_]", n, re.I)]:
        raise PackError(f"wheels that the machine must have itself were downloaded: {', '.join(wrong)}")
    return names


# ---- peers


def copy_peer(checkout: Path, target: Path, parts: Sequence[str]) -> None:
    """What the benchmarks need of a checkout, as it is."""
    if not (checkout / parts[0]).is_dir():
        raise PackError(f"'{checkout}' has no folder {parts[0]}")
    for part in parts:
        source = checkout / part
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=shutil.ignore_patterns("__pycache__", "build", "*.so", "*.o"))
        elif source.is_file():
            shutil.copy2(source, target / part)


def build_peers(pack: Path, python: str, peers: Sequence[str], architectures: Sequence[str]) -> list[str]:
    """Build them with an interpreter of the machine's Python and torch; returns what was built, in words."""
    arguments = [word for name in peers for word in (f"--{name}", str(pack / "peers" / name))]
    command = [python, str(pack / "source" / "scripts" / "bench" / "cuda_peers.py"), *arguments]
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": ";".join(architectures), "PYTHONPATH": str(pack / "source")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise PackError(f"'{python}' cannot build the peers: {result.stderr.strip()[-300:]}")
    for path in (pack / "source" / "build").rglob("*.o"):
        path.unlink()
    return [line for line in result.stdout.splitlines() if not line.startswith("-")]


# ---- the pack


def size(folder: Path) -> int:
    """Of all files, in bytes."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def check_size(folder: Path, limit: float) -> None:
    """That it is not larger than so many megabytes."""
    total = size(folder) / MEGABYTE
    if total > limit:
        files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.lstat().st_size)
        largest = ", ".join(f"{p.relative_to(folder)} ({p.lstat().st_size / MEGABYTE:.1f} MB)" for p in files[:4])
        raise PackError(f"the pack has {total:.1f} MB, more than {limit:.0f}: the largest are {largest}")


def read_me(manifest: dict) -> str:
    """The pack's README."""
    peers = "".join(f"- `peers/{name}`: {said}\n" for name, said in manifest["peers"].items())
    return f"""# GPU checks of internimage, {manifest["commit"]}

For a machine with a GPU, Linux on {manifest["machine"]} with glibc {manifest["glibc"]} or newer,
Python {manifest["python"]} and torch 2.10 or newer with CUDA. It needs no network, no pip and, except for the peers, no
nvcc. The single command:

    bash run.sh all

Or one stage of it: `bash run.sh test`. Results are in `results/`, or in the folder that OUT names; PYTHON names the
interpreter that has torch. `source/scripts/checks/gpu_check.sh` without a stage lists stages and variables.

- `source`: the checkout, with {manifest["modules"]}; NVRTC serves other GPUs
- `wheels`: {len(manifest["wheels"])} packages that a machine with torch may lack; `run.sh` makes an environment in
  `venv` with those that it lacks
{peers}- `manifest.json`: the same as data, with the names of the wheels

Made on {manifest["made"]}.
"""


def commit(root: Path) -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or "unknown"


def make(arguments: argparse.Namespace) -> None:
    pack, source = arguments.out, arguments.out / "source"
    architectures = arguments.architectures.replace(";", " ").split()
    if pack.exists() and not (pack / "manifest.json").is_file():
        raise PackError(f"'{pack}' is there and is not a pack: --out names another folder")
    shutil.rmtree(pack, ignore_errors=True)
    pack.mkdir(parents=True)
    (pack / "manifest.json").write_text("{}\n")
    copy_checkout(ROOT, source)
    modules = copy_modules(ROOT, source / "internimage", architectures)
    wheels = download(pack / "wheels", arguments.python, arguments.wheels)
    (pack / "requirements.txt").write_text("\n".join(NEEDS) + "\n")
    checkouts = {name: path for name in PEERS if (path := getattr(arguments, name)) is not None}
    for name, checkout in checkouts.items():
        copy_peer(checkout, pack / "peers" / name, PEERS[name])
    peers = dict.fromkeys(checkouts, "the sources, which nvcc must compile there")
    if arguments.peers_python and checkouts:
        built = build_peers(pack, arguments.peers_python, list(checkouts), architectures)
        peers = {name: f"the sources; when this was made: {line}" for name, line in zip(checkouts, built)}
    shutil.copy2(ROOT / "scripts" / "checks" / "gpu" / "run.sh", pack / "run.sh")
    manifest = {
        "commit": commit(ROOT),
        "made": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M:%S} UTC",
        "python": arguments.python,
        "machine": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "modules": modules,
        "peers": peers,
        "wheels": wheels,
    }
    (pack / "README.md").write_text(read_me(manifest))
    (pack / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    check_size(pack, arguments.limit)
    print(f"{pack}: {size(pack) / MEGABYTE:.1f} MB. {modules}; {len(wheels)} wheels for Python {arguments.python}.")
    for name, said in peers.items():
        print(f"{name}: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-pack")
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--architectures", default="8.0;9.0;10.0", help="compute capabilities of nvcc's module")
    parser.add_argument("--official", type=Path, help="checkout of OpenGVLab/InternImage")
    parser.add_argument("--dcnv4", type=Path, help="checkout of OpenGVLab/DCNv4")
    parser.add_argument(
        "--peers-python", help="interpreter with the machine's version of Python and of torch, to build the peers with"
    )
    parser.add_argument("--wheels", type=Path, help="folder to take the wheels from, instead of the package index")
    parser.add_argument("--limit", type=float, default=60, help="megabytes that the pack may have")
    arguments = parser.parse_args()
    arguments.out = arguments.out.absolute()
    try:
        make(arguments)
    except PackError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
