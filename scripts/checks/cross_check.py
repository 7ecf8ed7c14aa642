# SPDX-License-Identifier: MIT
"""Builds the CPU kernels for Windows, macOS and Linux on aarch64 with zig, and checks what the modules need.

torch's library is stood in for by one that has the functions of torch's stable ABI, as its headers declare them, and
nothing else. A module must link against that and the system's own C library, and may need nothing else: no Python, no
C++ library, no compiler's run-time library. The modules are not run.
"""

import argparse
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import symbols
import zig
from abi_check import ROOT, TORCH_TARGET

FLAGS = ["-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-psabi", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
SHIMS = ["torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h", "torch/headeronly/version.h"]
DECLARED = re.compile(r"\b((?:aoti_torch|torch)_\w+)\s*\(")


@dataclass(frozen=True)
class Target:
    """A system, and what a module for it may need."""

    triple: str  # for zig
    machine: str  # as lief calls it
    torch: str  # the file name of torch's library
    name: str  # how a module refers to it
    system: re.Pattern[str]  # libraries that come with the system
    glibc: str = ""
    flags: tuple[str, ...] = ("-fPIC",)
    link: tuple[str, ...] = ()  # of the stand-in
    link_module: tuple[str, ...] = ()


TARGETS = {
    "x86_64-windows": Target(
        "x86_64-windows-gnu",
        "AMD64",
        "torch_cpu.dll",
        "torch_cpu.dll",
        re.compile(r"(kernel32|ntdll|advapi32|api-ms-win-crt-[a-z0-9-]+)\.dll", re.IGNORECASE),
        flags=(),
        link=("-Wl,--out-implib,{folder}/torch_cpu.lib",),
    ),
    "aarch64-macos": Target(
        "aarch64-macos",
        "ARM64",
        "libtorch_cpu.dylib",
        "@rpath/libtorch_cpu.dylib",
        re.compile(r"/usr/lib/libSystem\.B\.dylib"),
        link=("-Wl,-install_name,@rpath/libtorch_cpu.dylib",),
        link_module=("-Wl,-install_name,@rpath/{module}",),
    ),
    "aarch64-linux": Target(
        zig.LINUX["aarch64"],
        "AARCH64",
        "libtorch_cpu.so",
        "libtorch_cpu.so",
        re.compile(r"(lib(c|m|dl|pthread)\.so\.\d|ld-linux-aarch64\.so\.1)"),
        glibc=zig.GLIBC,
        link=("-Wl,-soname,libtorch_cpu.so",),
    ),
}


def declared(include: Path) -> list[str]:
    """The C functions of torch's stable ABI."""
    texts = [(include / name).read_text() for name in SHIMS if (include / name).is_file()]
    return sorted({name for text in texts for name in DECLARED.findall(text) if not name.isupper()})


def run(command: list[str | Path]) -> str:
    """Run a command and return what it says; on failure, exit with that."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{result.stderr}\ncross_check: command failed: {' '.join(map(str, command))}")
    return result.stderr


def build(target: Target, include: Path, work: Path) -> list[Path]:
    """The modules for a target; exits if a source has a warning."""
    work.mkdir(parents=True, exist_ok=True)
    compiler = zig.command(target.triple)
    stand_in = work / "torch.c"
    export = "__declspec(dllexport)" if "windows" in target.triple else '__attribute__((visibility("default")))'
    stand_in.write_text("".join(f"{export} void {name}(void) {{}}\n" for name in declared(include)))
    link = [option.format(folder=work) for option in target.link]
    run([*compiler, "-x", "c", "-w", "-shared", *target.flags, stand_in, *link, "-o", work / target.torch])

    def compile(source: Path) -> Path:
        output = work / f"{source.parent.name}_{source.stem}.o"
        said = run([*compiler, *FLAGS, *target.flags, "-isystem", include, "-c", source, "-o", output])
        if "warning:" in said:
            sys.exit(f"{said}\ncross_check: {source.name} does not compile without warnings for {target.triple}")
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sorted((ROOT / "csrc").rglob("*.cpp"))))
    schema = [each for each in objects if each.name == "csrc_schema.o"]
    modules = {"_C.abi3.so": [each for each in objects if each not in schema], "_schema.abi3.so": schema}
    for name, parts in modules.items():
        options = [option.format(module=name) for option in target.link_module]
        run([*compiler, "-shared", *parts, *options, f"-L{work}", "-ltorch_cpu", "-o", work / name])
    return [work / name for name in modules]


def audit(target: Target, needs: symbols.Needs) -> list[str]:
    """What a module needs and may not."""
    problems = symbols.problems(needs, target.glibc)
    if needs.machine != target.machine:
        problems.append(f"it is for {needs.machine}")
    others = [name for name in needs.libraries if name != target.name and not target.system.fullmatch(name)]
    if others:
        problems.append(f"it needs {', '.join(sorted(others))}")
    if target.name not in needs.libraries:
        problems.append(f"it does not need {target.name}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cross", help="folder for the builds")
    parser.add_argument("--only", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    arguments = parser.parse_args()
    include = Path(sysconfig.get_path("purelib"), "torch", "include")
    failed = False
    for name in arguments.only:
        target = TARGETS[name]
        for module in build(target, include, arguments.work.resolve() / name):
            needs = symbols.read(module)
            problems = audit(target, needs)
            glibc = f", glibc {'.'.join(map(str, needs.newest('GLIBC')))}" if target.glibc else ""
            print(
                f"{name}: {module.name}, {module.stat().st_size} bytes, {len(symbols.of_torch(needs))} functions of "
                f"torch's stable ABI, {', '.join(sorted(needs.libraries))}{glibc}: "
                f"{'; '.join(problems) or 'linked, not run'}",
                flush=True,
            )
            failed |= bool(problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
