# SPDX-License-Identifier: MIT
"""What the package says about the kernels that it found, and about INTERNIMAGE_CPU_CAPABILITY."""

import json
import os

import launched
import pytest

from internimage import extension
from internimage.cli import main
from internimage.extension import CAPABILITIES, backend, has_kernel

compiled = pytest.mark.skipif(
    not has_kernel("dcnv3", "cpu"),
    reason=f"needs the compiled CPU kernels: {backend('dcnv3', 'cpu').reason}",
)


@compiled
def test_info_names_the_instruction_set():
    """In a process for each that has not called the kernels yet, as the variable is read once."""
    printed = {}
    for wish in CAPABILITIES:
        variables = os.environ | {"INTERNIMAGE_CPU_CAPABILITY": wish}
        result = launched.python("-m", "internimage", "info", variables=variables)
        assert result.returncode == 0 and "RuntimeWarning" not in result.stderr
        printed[wish] = result.stdout
    (best,) = [c for c in CAPABILITIES if f"compiled kernel, {c} instructions" in printed[CAPABILITIES[-1]]]
    for wish, text in printed.items():
        used = min(wish, best, key=CAPABILITIES.index)
        assert f"DCNv3 is served by compiled kernel, {used} instructions" in text
        assert ("the best that this processor supports is" in text) == (used != wish)


@pytest.mark.parametrize("wish", ["avx1024", "AVX2", "1"])
def test_an_instruction_set_that_there_is_not(wish, monkeypatch, capsys):
    """A warning at import and a line in info: that a run is with other kernels than was meant would go unnoticed."""
    monkeypatch.setenv("INTERNIMAGE_CPU_CAPABILITY", wish)
    message = f"INTERNIMAGE_CPU_CAPABILITY is '{wish}' and has no effect; it can be default, avx2 or avx512"
    with pytest.warns(RuntimeWarning, match=message):
        extension.load()
    assert main(["info"]) == 0
    assert message in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel_capability_note"] == message


@pytest.mark.filterwarnings("error")
def test_an_empty_value_is_none(monkeypatch, capsys):
    monkeypatch.setenv("INTERNIMAGE_CPU_CAPABILITY", "")
    extension.load()
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kernel_capability_note"] is None
    assert facts["kernel_capability"] in (CAPABILITIES if has_kernel("dcnv3", "cpu") else [None])
