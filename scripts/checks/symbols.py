# SPDX-License-Identifier: MIT
"""What a compiled module needs from outside: for ELF, PE (Windows) and Mach-O (macOS) files, on any system.

`read` needs lief (`pip install lief`).
"""

import re
from dataclasses import dataclass
from pathlib import Path

TORCH_SHIMS = re.compile(r"_?(aoti_torch_\w+|torch_\w+)")  # the C functions of torch's stable ABI
PYTHON = re.compile(r"_?_?Py[A-Z_]\w*")
VERSION = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)")


@dataclass(frozen=True)
class Needs:
    """The libraries that a module is linked to, and the symbols that it takes from them."""

    machine: str
    libraries: frozenset[str]
    symbols: dict[str, str]  # name -> library (Windows, macOS) or version (ELF); empty if there is none

    def newest(self, name: str) -> tuple[int, ...]:
        """The newest version of GLIBC, GLIBCXX or the like; () if there is no such symbol."""
        found = (VERSION.fullmatch(version) for version in self.symbols.values())
        return max((numbers(m.group(2)) for m in found if m is not None and m.group(1) == name), default=())


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(word) for word in version.split("."))


def read(path: Path) -> Needs:
    """The needs of a module.

    Raises:
        ValueError: The file is not a library of a known format.
    """
    import lief

    binary = lief.parse(str(path))
    if isinstance(binary, lief.ELF.Binary):
        symbols = {}
        for symbol in binary.dynamic_symbols:
            # weak ones may be missing
            if symbol.name and symbol.shndx == 0 and symbol.binding != lief.ELF.Symbol.BINDING.WEAK:
                version = symbol.symbol_version
                auxiliary = version.symbol_version_auxiliary if version and version.has_auxiliary_version else None
                symbols[symbol.name] = auxiliary.name if auxiliary else ""
        return Needs(binary.header.machine_type.name, frozenset(map(str, binary.libraries)), symbols)
    if isinstance(binary, lief.PE.Binary):
        symbols = {entry.name: library.name for library in binary.imports for entry in library.entries}
        return Needs(binary.header.machine.name, frozenset(library.name for library in binary.imports), symbols)
    if isinstance(binary, lief.MachO.Binary):
        symbols = {}
        for symbol in binary.imported_symbols:
            info = symbol.binding_info if symbol.has_binding_info else None
            symbols[symbol.name] = info.library.name if info is not None and info.has_library else ""
        own = lief.MachO.LoadCommand.TYPE.ID_DYLIB  # the module's own name
        names = frozenset(library.name for library in binary.libraries if library.command != own)
        return Needs(binary.header.cpu_type.name, names, symbols)
    raise ValueError(f"'{path}' is not a shared library")


def of_torch(needs: Needs) -> set[str]:
    """The functions of torch's stable ABI that it takes."""
    return {name for name in needs.symbols if TORCH_SHIMS.fullmatch(name)}


def problems(needs: Needs, glibc: str = "") -> list[str]:
    """Why a module would not load everywhere: what it takes from Python, from a C++ library, or from a newer glibc.

    Args:
        needs: What a module needs.
        glibc: The oldest glibc that it is to run with; for ELF files.
    """
    found = []
    if python := sorted(name for name in needs.symbols if PYTHON.fullmatch(name)):
        found.append(f"it takes symbols from Python: {', '.join(python)}")
    if mangled := sorted(name for name in needs.symbols if is_mangled(name)):
        found.append(f"it takes C++ symbols: {', '.join(mangled[:5])}")
    if glibc and needs.newest("GLIBC") > numbers(glibc):
        found.append(f"it needs glibc {'.'.join(map(str, needs.newest('GLIBC')))}, and not {glibc}")
    if glibc:  # a symbol without a version is not one of glibc's
        others = sorted(name for name, version in needs.symbols.items() if not version)
        if foreign := [name for name in others if not TORCH_SHIMS.fullmatch(name)]:
            found.append(f"it takes symbols that are not of torch's stable ABI: {', '.join(foreign[:5])}")
    if not of_torch(needs):
        found.append("it takes nothing from torch, so that it registers no operator")
    return found


def is_mangled(name: str) -> bool:
    """Whether it is the symbol of a C++ function, of Itanium's or Microsoft's ABI."""
    return re.match(r"_?_Z|\?", name) is not None
