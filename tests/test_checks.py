# SPDX-License-Identifier: MIT
"""The judgments of scripts/checks on compiled modules; what they build is not built here."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).resolve().parent.parent / "scripts" / "checks"
if not CHECKS.exists():
    pytest.skip("needs the sources, not an installed package", allow_module_level=True)
sys.path.insert(0, str(CHECKS))

import compilers_check  # noqa: E402
import cross_check  # noqa: E402
import symbols  # noqa: E402
import zig  # noqa: E402

GOOD = {"torch_library_impl": "", "aoti_torch_check": "", "memcpy": "GLIBC_2.14", "exp": "GLIBC_2.2.5"}


def needs(**more: str) -> symbols.Needs:
    """A module for Linux that may be shipped, and the symbols given."""
    return symbols.Needs("X86_64", frozenset({"libtorch_cpu.so", "libc.so.6"}), {**GOOD, **more})


def test_a_module_with_torch_and_an_old_glibc_has_no_problems():
    assert symbols.problems(needs(), "2.28") == []
    assert symbols.of_torch(needs()) == {"torch_library_impl", "aoti_torch_check"}
    assert needs().newest("GLIBC") == (2, 14)
    assert needs().newest("GLIBCXX") == ()


@pytest.mark.parametrize(
    "name, version, words",
    [
        ("dlsym", "GLIBC_2.34", "needs glibc 2.34, and not 2.28"),
        ("PyModule_Create2", "", "symbols from Python: PyModule_Create2"),
        ("_Py_NoneStruct", "", "symbols from Python: _Py_NoneStruct"),
        ("_ZNSt9exceptionD2Ev", "GLIBCXX_3.4", "C++ symbols: _ZNSt9exceptionD2Ev"),
        ("__extendhfsf2", "", "not of torch's stable ABI: __extendhfsf2"),
    ],
)
def test_what_does_not_load_everywhere_is_a_problem(name, version, words):
    (problem,) = [text for text in symbols.problems(needs(**{name: version}), "2.28") if words in text]
    assert name in problem or version.removeprefix("GLIBC_") in problem


def test_versions_are_compared_as_numbers():
    assert symbols.problems(needs(f="GLIBC_2.4"), "2.28") == []
    assert symbols.problems(needs(f="GLIBC_2.28"), "2.28") == []
    assert symbols.problems(needs(f="GLIBC_2.100"), "2.28") != []


def test_a_module_that_registers_nothing_is_a_problem():
    (problem,) = symbols.problems(symbols.Needs("X86_64", frozenset(), {"memcpy": "GLIBC_2.14"}), "2.28")
    assert "registers no operator" in problem


@pytest.mark.parametrize("name", ["_ZdlPv", "__ZdlPv", "??2@YAPEAX_K@Z"])
def test_mangled_names_of_every_system(name):
    assert symbols.is_mangled(name)
    assert not symbols.is_mangled("memcpy")


@pytest.mark.parametrize("target", cross_check.TARGETS.values(), ids=list(cross_check.TARGETS))
def test_a_module_may_need_torch_and_the_system_only(target):
    def audit(*libraries, machine=target.machine):
        return cross_check.audit(target, symbols.Needs(machine, frozenset(libraries), GOOD))

    assert audit(target.name) == []
    assert audit(target.name, "libstdc++.so.6") == ["it needs libstdc++.so.6"]
    assert audit() == [f"it does not need {target.name}"]
    assert audit(target.name, machine="M68K") == ["it is for M68K"]


def test_declared_functions_of_torch_hold_those_that_are_registered_with():
    torch = pytest.importorskip("torch")
    names = cross_check.declared(Path(torch.__file__).parent / "include")
    assert {"torch_library_impl", "aoti_torch_check", "aoti_torch_get_dtype", "aoti_torch_abi_version"} <= set(names)


def test_a_compiler_of_several_words_becomes_one_program(tmp_path):
    words = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "two words"]
    program = zig.program(tmp_path / "new", "compiler", words)
    said = subprocess.run([program, "-c", "a b"], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "['two words', '-c', 'a b']"


def test_only_what_exceeds_the_tolerance_is_slower():
    key = ("forward", "float32")
    seconds = {"first": {key: [1.0, 2.0]}, "equal": {key: [1.1, 9.0]}, "slow": {key: [1.2, 1.2]}}
    rows = compilers_check.rows_of(seconds, "avx2")
    assert [row["min_ratio"] for row in rows] == ["1.000", "1.100", "1.200"]
    assert [row["median_ms"] for row in rows] == ["1500", "5050", "1200"]
    assert compilers_check.slower(rows, 0.1) == ["slow, avx2, forward in float32: 1.200"]


def test_rows_are_appended_under_one_header(tmp_path):
    rows = compilers_check.rows_of({"first": {("forward", "float32"): [1.0]}}, "avx2")
    for _ in range(2):
        compilers_check.append(tmp_path / "rows.csv", rows)
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("compiler,capability,work,dtype")
