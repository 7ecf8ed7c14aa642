# SPDX-License-Identifier: MIT
"""Verification of an exported file: read in another process, run at other sizes and batches, compared with float64."""

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import one_line
from ..layers.packing import weights_not_packed
from ..models.parts import check_image_size
from .description import Description, ExportError, VerificationError

_MOST_DOUBLE = 2 * 10**9  # bytes of weights that are copied to float64; larger models are compared with float32
_TIMES_EAGER = 4.0  # a file may be this many times as far from float64 as eager is
_OF_RANGE = {"float32": 1e-5, "float16": 1e-2}  # of the outputs' range, within which a file is good in any case
_PREPROCESSED = 1e-3  # likewise, where a shade of a pixel may be rounded the other way
_EQUAL = 0.98  # least share of equal answers of a quantized file
_TIMEOUT = 3600  # seconds


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        good: Whether the file may be kept.
        text: In words.
        numbers: For the file's description.
    """

    good: bool
    text: str
    numbers: dict[str, Any]


def other_inputs(model: nn.Module, size: tuple[int, int, int], open_: Sequence[str], traced_batch: int) -> list[Tensor]:
    """Inputs of two batches and two sizes that were not traced; where a file is not open, those that were.

    Args:
        model: For the sizes that it takes.
        size: (channels, height, width) that was traced.
        open_: Which of "batch", "height" and "width" are open.
        traced_batch: Its batch.
    """
    channels, height, width = size
    generator = torch.Generator().manual_seed(0)
    batches = (1, traced_batch + 1) if "batch" in open_ else (traced_batch, traced_batch)
    if "height" not in open_:
        return [torch.randn(batch, *size, generator=generator) for batch in batches]
    sizes = []
    for more_height, more_width in ((32, 0), (0, 64), (96, 32), (0, 0)):
        sides = height + more_height, width + more_width
        try:
            check_image_size(model, *sides)
        except ValueError:
            continue
        sizes.append(sides)
    return [torch.randn(batch, channels, *sides, generator=generator) for batch, sides in zip(batches, (sizes * 2)[:2])]


def run_in_another_process(file: Path, inputs: Sequence[Tensor], imports: bool) -> list[list[Tensor]]:
    """Outputs of an exported file in a new process.

    Args:
        file: The file.
        inputs: Of the model.
        imports: Whether the process imports internimage first, for a file that has its operator.

    Raises:
        ExportError: The file does not run, or the process had imported internimage though it should not.
    """
    program = Path(__file__).with_name("run_file.py")
    with tempfile.TemporaryDirectory() as name:
        given, got = Path(name) / "inputs.npz", Path(name) / "outputs.npz"
        arrays: dict[str, Any] = {f"input{i}": each.numpy() for i, each in enumerate(inputs)}
        np.savez(given, **arrays)
        command = [sys.executable, str(program), str(file), str(given), str(got)]
        environment = dict(os.environ)
        if imports:
            command += ["--import", "internimage"]
            package = str(Path(__file__).parents[2])  # which need not be installed
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, env=environment)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            raise VerificationError(f"the exported file does not run: {one_line(RuntimeError(reason), 300)}")
        with np.load(got) as stored:
            if bool(stored["imported"]) != imports:
                raise ExportError("the process that read the file had another set of imports than it should")
            counts = [sum(key.startswith(f"output{i}.") for key in stored.files) for i in range(len(inputs))]
            return [
                [torch.from_numpy(stored[f"output{i}.{k}"]) for k in range(count)] for i, count in enumerate(counts)
            ]


@torch.no_grad()
def verify(
    model: nn.Module, exported: nn.Module, file: Path, description: Description, inputs: Sequence[Tensor]
) -> Verification:
    """Compare an exported file, and the model that was exported, with the model in float64.

    Args:
        model: In float32.
        exported: The same in the file's dtype, as it was exported.
        file: The exported file.
        description: Of it.
        inputs: From `other_inputs`, in float32.

    Raises:
        ExportError: The file does not run.
    """
    dtype = next((parameter.dtype for parameter in exported.parameters()), torch.float32)
    cast = [each.to(dtype) if each.is_floating_point() else each for each in inputs]
    answers = run_in_another_process(file, cast, description.operator == "internimage")
    in_float32 = description.dtype == "float32"
    with weights_not_packed(model), weights_not_packed(exported):  # packed ones would take the memory of the weights
        exact, reference = _reference(model, inputs)
        # in float32 it is the model itself: what was traced is what is in question
        eager = exact
        if not (in_float32 and reference == "float32"):
            eager = [_as_list((model if in_float32 else exported)(each)) for each in cast]
    if description.quantization:
        return _compare_answers(answers, exact)
    of_range = _PREPROCESSED if description.preprocessed else _OF_RANGE.get(description.dtype, 1e-2)
    return compare(answers, eager, exact, [tuple(each.shape) for each in inputs], reference, of_range)


def compare(
    answers: Sequence[Sequence[Tensor]],
    eager: Sequence[Sequence[Tensor]],
    exact: Sequence[Sequence[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    reference: str = "float64",
    of_range: float = _OF_RANGE["float32"],
) -> Verification:
    """Compare outputs of an exported file with exact ones, by what eager torch is off.

    Args:
        answers: Of the file: for each input a list of outputs.
        eager: Of the model in torch, likewise.
        exact: Of the model in `reference`, likewise.
        shapes: Of the inputs, for the text.
        reference: Its name.
        of_range: Share of the outputs' range within which a file is good in any case.
    """
    spread = max(float(output.max() - output.min()) for outputs in exact for output in outputs)
    of_file = max(_difference(a, b) for a, b in zip(answers, exact))
    of_eager = max(_difference(a, b) for a, b in zip(eager, exact))
    limit = max(_TIMES_EAGER * of_eager, of_range * spread)
    good = of_file <= limit and all(bool(torch.isfinite(a).all()) for outputs in answers for a in outputs)
    text = (
        f"inputs {' and '.join('x'.join(map(str, shape)) for shape in shapes)}: largest difference to {reference} "
        f"{of_file:.2g}, of eager {of_eager:.2g}, of a range of {spread:.3g}: {'good' if good else 'NOT good'}"
    )
    numbers = {
        "inputs": [list(shape) for shape in shapes],
        "reference": reference,
        "largest_difference": of_file,
        "eager": of_eager,
        "range": spread,
        "limit": limit,
        "good": good,
    }
    return Verification(good, text, numbers)


def _reference(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[list[Tensor]], str]:
    """Outputs in float64, or in float32 of a model that is too large to copy; and which it is."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > _MOST_DOUBLE:
        return [[output.double() for output in _as_list(model(each))] for each in inputs], "float32"
    double = copy.deepcopy(model).double()
    return [_as_list(double(each.double() if each.is_floating_point() else each)) for each in inputs], "float64"


def _as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference of outputs; infinite if their shapes differ."""
    if [a.shape for a in some] != [b.shape for b in others]:
        return float("inf")
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(some, others))


def _compare_answers(answers: Sequence[Sequence[Tensor]], exact: Sequence[Sequence[Tensor]]) -> Verification:
    """The share of equal answers of a quantized classifier."""
    equal = torch.cat([a[0].argmax(1) == b[0].argmax(1) for a, b in zip(answers, exact)])
    share = float(equal.double().mean())
    good = share >= _EQUAL
    verdict = "good" if good else "NOT good"
    text = f"{100 * share:.1f} % of {len(equal)} images have the same class as in float64: {verdict}"
    return Verification(good, text, {"images": len(equal), "equal": share, "good": good})
