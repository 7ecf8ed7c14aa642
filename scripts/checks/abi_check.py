# SPDX-License-Identifier: MIT
"""One binary for every torch: builds the CPU kernels once, with the newest torch, and tests that file with older ones.

The sources are also compiled against the headers of the older versions; those for CUDA only if there is an nvcc.

Each torch gets a virtual environment under --work, which later runs reuse. torch is installed without its dependencies
if it can be imported so (CPU builds can) or finds NVIDIA's libraries in the environment of the Python that runs this
script, otherwise with them. The kernels are tested with the operators only, which need neither timm nor torchvision.
pip's variables (PIP_INDEX_URL, PIP_CONFIG_FILE) select the index.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH_TARGET = "0x020a000000000000ULL"  # as in setup.py
VERSIONS = ["2.10", "2.11", "2.13", "newest"]
BESIDE_TORCH = [
    *("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "numpy", "einops", "safetensors"),
    *("tqdm", "pytest", "pytest-timeout", "hypothesis"),
]
TESTS = [
    "test_dcnv3.py",
    "test_dcnv3_arguments.py",
    "test_dcnv3_properties.py",
    "test_cpu_kernels.py",
    "test_layer_norm.py",
    "test_gelu.py",
    "test_query.py",
    "test_block.py",
    "test_deform_columns.py",
    "test_deform_conv_edges.py",
    "test_deform_conv_transforms.py",
]
MODULE = "internimage/_C.abi3.so"  # in a wheel
NEED_TORCHVISION = "test_torchvision"
# what a version of torch cannot do with any operator
CANNOT = {"2.10": "test_a_compiled_gradient"}  # compile a transform of torch.func


class Environment:
    """A virtual environment with one version of torch."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.version = folder / f"torch-{version}", version
        self.python = self.folder / "bin" / "python"
        self.variables = dict(os.environ)

    def prepare(self) -> None:
        """Create it, unless an earlier run did."""
        if not self.python.exists():
            subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        torch = "torch" if self.version == "newest" else f"torch=={self.version}.*"
        if not self.torch_version():
            self.pip("--no-deps", torch)
            self.pip(*BESIDE_TORCH, "setuptools>=77,<82")  # torch 2.11 requires an older one
        if not self.torch_version():
            libraries = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/**/lib"))
            self.variables["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, libraries))
        if not self.torch_version():
            del self.variables["LD_LIBRARY_PATH"]
            self.pip(torch)
        if not self.torch_version():
            self.run("-c", "import torch")  # for its message

    def torch_version(self) -> str:
        result = subprocess.run(
            [self.python, "-c", "import torch; print(torch.__version__)"],
            env=self.variables,
            capture_output=True,
            text=True,
        )
        return result.stdout.strip()

    def pip(self, *arguments: str) -> None:
        self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)

    def run(self, *arguments: str) -> None:
        subprocess.run([self.python, *arguments], env=self.variables, check=True)


def build_module(python: Path, variables: dict[str, str], work: Path) -> Path:
    """The compiled module, rebuilt with the torch of an interpreter's environment."""
    folder = work / "build"
    shutil.rmtree(folder, ignore_errors=True)
    command = [python, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    variables = {**variables, "INTERNIMAGE_BUILD_CPU": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\nbuilding the module failed")
    (module,) = (folder / "lib" / "internimage").glob("_C.*so")
    return module


def compile_with_headers(environment: Environment, work: Path) -> None:
    """Check that the sources compile against the headers of that torch, and so need no newer one."""
    (include,) = environment.folder.glob("lib/python*/site-packages/torch/include")
    flags = ["-std=c++17", f"-I{include}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    commands = [
        [os.environ.get("CXX", "g++"), "-fsyntax-only", "-Wno-psabi", *flags, path]
        for path in sorted((ROOT / "csrc").rglob("*.cpp"))
        if "<torch/" in path.read_text()
    ]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        source = ROOT / "csrc" / "cuda" / "dcnv3" / "dcnv3.cu"
        commands.append([nvcc, "-arch=sm_80", "-DUSE_CUDA", *flags, "-c", source, "-o", work / "dcnv3.o"])
    for command in commands:
        subprocess.run(command, check=True)
    print(f"the kernels for CPU{' and CUDA' if nvcc else ''} compile against its headers", flush=True)


def operators_alone(module: Path, work: Path) -> Path:
    """A folder for PYTHONPATH with an `internimage` that has only the operators and the module."""
    folder = work / "package"
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "internimage"
    for name in ("ops", "nvrtc"):
        shutil.copytree(ROOT / "internimage" / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (ROOT / "internimage").glob("[!_]*.py"):  # the modules that the operators may import
        shutil.copy(file, package)
    shutil.copy(module, package)
    (package / "__init__.py").write_text(
        '"""The operators of internimage, without the models."""\n\nfrom . import ops\n'
    )
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "abi", help="folder for environments and builds")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="of torch; the last one builds the module")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--module", type=Path, help="test this module instead of building one")
    given.add_argument("--wheel", type=Path, help="test the module of this wheel")
    parser.add_argument("--pytest", nargs="*", default=[], metavar="ARGUMENT", help="for pytest, such as -k=golden")
    arguments = parser.parse_args()
    file = arguments.module or arguments.wheel
    if file and not file.is_file():
        parser.error(f"there is no file '{file}'")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if arguments.wheel:
        arguments.module = Path(zipfile.ZipFile(arguments.wheel).extract(MODULE, work / "wheel"))
    environments = [Environment(work, version) for version in arguments.versions]
    for environment in environments:
        environment.prepare()
        print(f"{environment.folder.name}: torch {environment.torch_version()}", flush=True)
    module = arguments.module or build_module(environments[-1].python, environments[-1].variables, work)
    digest = hashlib.sha256(module.read_bytes()).hexdigest()[:16]
    origin = "given" if arguments.module else f"built with torch {environments[-1].torch_version()}"
    print(f"{module.name}: {module.stat().st_size} bytes, sha256 {digest}, {origin}", flush=True)
    package = operators_alone(module.resolve(), work)
    failed = []
    for environment in environments:
        version = environment.torch_version()
        print(f"\n== {module.name} ({digest}) under torch {version}", flush=True)
        compile_with_headers(environment, work)
        tests = [ROOT / "tests" / name for name in TESTS]
        without = " and ".join(f"not {name}" for name in (NEED_TORCHVISION, CANNOT.get(version)) if name)
        selection = ["-k", without, *arguments.pytest, *tests]
        result = subprocess.run(
            [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", *selection],
            env={**environment.variables, "PYTHONPATH": str(package), "INTERNIMAGE_FAIL_ON_SKIP": "1"},
            cwd=work,
        )
        if result.returncode != 0:
            failed.append(version)
    print(f"\nfailed under torch {', '.join(failed)}" if failed else "\nthe one binary passed under every torch")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"abi_check: command failed: {' '.join(map(str, error.cmd))}")
