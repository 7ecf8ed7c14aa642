# SPDX-License-Identifier: MIT
"""Exported models in their runtimes on the CPU against eager torch, and against timm models exported to ONNX.

Every file is written by the function behind `internimage export`, whose CPU time is reported with the file's size. The
logits of each are compared with those of eager torch in float32 before anything is timed.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..dtypes import torch_dtype
from ..errors import UserError
from ..export.description import cause_of
from ..export.export import FORMATS, Request, export_model
from ..export.packages import required, version
from ..export.silence import silence
from ..progress import message
from . import EXPORT_PEERS as PEERS
from . import MODELS, models
from .contender import Contender, inference
from .models import Row, check_names, compare_logits, errors_of, table
from .timing import HOW, BenchmarkError, Clock, Times, append_csv, check_csv, describe, facts, interleave, significant

Bind = Callable[[Tensor], Callable[[], Tensor]]  # images -> a function that computes their logits
Load = Callable[[Path, int], Bind]  # file, number of threads

EAGER = "eager"
# Of the largest logit, by what a dtype is named in rows. Masks in the order of other points change tiny's by 0.08.
# float32: rounding errors of another order of summation, 1e-6, with room for a hundredfold. bfloat16: 0.0016 of a
# number for each of some hundred roundings, which add up like a random walk, to 0.02; float16 has three bits more.
# int8: 0.013 of each product, for steps of 1/255 of eight standard deviations in both factors; products give the
# offsets, too, so that large's error grows to ten times that. The order of its points is that of the float32 file.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.05 / 8, "int8 dynamic": 0.2, "int8 static": 0.2}
_CALIBRATION = 4  # images, which are random: of a static file the time is in question, not its accuracy


@dataclass(frozen=True)
class Way:
    """A way to run an exported model.

    Attributes:
        runtime: As rows name it, with the form of the operator.
        dtype: As rows name it, with the kind of quantization.
        request: What to export.
        load: Opens the file.
        needs: The package that has the runtime, beyond those that every export to ONNX needs.
    """

    runtime: str
    dtype: str
    request: Request
    load: Load
    needs: str = ""


def _onnxruntime(path: Path, threads: int) -> Bind:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what goes wrong is an exception as well
    # else threads that wait for the next call would compute while others are timed
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    half = session.get_inputs()[0].type == "tensor(float16)"

    def bind(images: Tensor) -> Callable[[], Tensor]:
        inputs = {"image": (images.half() if half else images).numpy()}
        return lambda: torch.from_numpy(session.run(None, inputs)[0])

    return bind


def _openvino(path: Path, threads: int) -> Bind:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()

    def bind(images: Tensor) -> Callable[[], Tensor]:
        inputs = {"image": images.numpy()}
        return lambda: torch.from_numpy(request.infer(inputs)[0])

    return bind


def _program(path: Path, threads: int) -> Bind:
    with silence():
        return partial(inference, torch.export.load(str(path)).module())


def _package(path: Path, threads: int) -> Bind:
    package: Any = torch._inductor.aoti_load_package(str(path))
    return partial(inference, package)


def _onnx(**arguments: Any) -> Request:
    return Request("onnx", verify=False, **arguments)


_DEFORM_CONV = "onnxruntime DeformConv"
WAYS = (
    Way(_DEFORM_CONV, "fp32", _onnx(), _onnxruntime),
    Way("onnxruntime GridSample", "fp32", _onnx(operator="grid-sample"), _onnxruntime),
    Way(_DEFORM_CONV, "int8 dynamic", _onnx(quantize="dynamic"), _onnxruntime),
    Way(_DEFORM_CONV, "int8 static", _onnx(quantize="static"), _onnxruntime),
    Way(_DEFORM_CONV, "fp16", _onnx(dtype="float16"), _onnxruntime),
    Way("OpenVINO GridSample", "fp32", _onnx(operator="grid-sample"), _openvino, "openvino"),
    Way("torch.export", "fp32", Request("pt2", verify=False), _program),
    Way("torch.export decomposed", "fp32", Request("pt2", decompose=True, verify=False), _program),
    Way("AOTInductor", "fp32", Request("aoti", verify=False), _package),
)
PEER_WAYS = (Way("onnxruntime", "fp32", _onnx(), _onnxruntime),)


@dataclass(frozen=True)
class Timed:
    """What a row is about."""

    model: str
    runtime: str = EAGER
    dtype: str = "fp32"
    channels_last: bool = False

    @property
    def who(self) -> str:
        """Its name in rows."""
        return f"{self.model}, {self.runtime}"


# ---- files


@dataclass
class _Files:
    """The exported files of a run, each written once.

    Attributes:
        folder: Where they are.
        img_size: What they are traced at, in pixels.
        written: The files, with the CPU seconds that their exports took: of this process, and of the compilers that
            it started.
    """

    folder: Path
    img_size: int
    written: dict[tuple[str, Request, int], tuple[Path, float]] = field(default_factory=dict)

    def get(self, model: str, request: Request, threads: int) -> tuple[Path, float, bool]:
        """File, CPU seconds, and whether it was written now."""
        compiled = request.format == "aoti"  # for a number of threads
        key = model, request, threads if compiled else 0
        new = key not in self.written
        if new:
            path = self.folder / f"{len(self.written)}{FORMATS[request.format]}"
            if compiled:
                message(f"AOTInductor compiles {model}, which takes minutes; --no-aoti leaves it out")
            module = Contender(model, img_size=self.img_size).build()
            config = timm.data.resolve_model_data_config(module)
            config["input_size"] = (config["input_size"][0], self.img_size, self.img_size)
            before = sum(os.times()[:4])  # user and system time, of child processes too
            export_model(module, config, "random", path, request, self._calibration(request))
            self.written[key] = path, sum(os.times()[:4]) - before
        return *self.written[key], new

    def _calibration(self, request: Request) -> list[Tensor]:
        number = _CALIBRATION if request.quantize == "static" else 0
        generator = torch.Generator().manual_seed(3)
        return [torch.randn(1, 3, self.img_size, self.img_size, generator=generator) for _ in range(number)]


@contextlib.contextmanager
def _named(timed: Timed) -> Iterator[None]:
    """Context in which errors of exporters and runtimes, which have no common type, become messages."""
    try:
        yield
    except BenchmarkError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else cause_of(error)
        raise BenchmarkError(f"{timed.who} {timed.dtype} does not run: {reason}") from error


# ---- contenders


def contenders(
    model: str, peers: Sequence[str], ways: Sequence[Way], files: _Files, threads: int
) -> tuple[dict[Timed, Bind], dict[Timed, tuple[float, float]]]:
    """What is to be timed, and of the files that were written for it MiB and CPU seconds.

    Raises:
        BenchmarkError: A model cannot be exported, or its runtime cannot open the file.
    """
    binds: dict[Timed, Bind] = {}
    written: dict[Timed, tuple[float, float]] = {}
    eager = [Timed(model), Timed(model, dtype="bf16")]
    eager += [Timed(peer, channels_last=last) for peer in peers for last in (False, True)]
    for timed in eager:
        contender = Contender(timed.model, timed.dtype, timed.channels_last, img_size=files.img_size)
        with errors_of(contender):
            binds[timed] = partial(_eager, contender.build(), contender)
    for name, way in [(model, way) for way in ways] + [(peer, way) for peer in peers for way in PEER_WAYS]:
        timed = Timed(name, way.runtime, way.dtype)
        with _named(timed):
            path, seconds, new = files.get(name, way.request, threads)
            binds[timed] = way.load(path, threads)
        if new:
            written[timed] = path.stat().st_size / 2**20, seconds
    return binds, written


def _eager(module: nn.Module, contender: Contender, images: Tensor) -> Callable[[], Tensor]:
    memory_format = torch.channels_last if contender.channels_last else torch.contiguous_format
    return inference(module, images.to(torch_dtype(contender.dtype)).contiguous(memory_format=memory_format))


def check(binds: dict[Timed, Bind], images: Tensor) -> None:
    """Check that all compute the logits of the same model in eager torch in float32.

    Raises:
        BenchmarkError: They deviate by more than `TOLERANCE`, or a model does not run.
    """
    expected: dict[str, Tensor] = {}
    for timed, bind in binds.items():
        with _named(timed):
            logits = bind(images)().float()
        right = expected.setdefault(timed.model, logits)  # eager torch in float32 is the first of each model
        compare_logits(f"{timed.who} {timed.dtype}", logits, right, "eager float32", TOLERANCE[timed.dtype])


# ---- rows

COLUMNS = [*models.COLUMNS, "onnx", "onnxruntime", "openvino"]


def _facts(clock: Clock, times: Times[Any] | None = None) -> Row:
    versions = {name: version(name) or "none" for name in ("onnx", "onnxruntime", "openvino")}
    return {**facts(clock, times), **versions}


def _row(values: Row) -> Row:
    """A row with its columns in order, and its value rounded."""
    return {column: values[column] for column in COLUMNS} | {"value": significant(values["value"])}


def rows(times: Times[Timed], model: str, batch: int, img_size: int, about: Row) -> list[Row]:
    """Images per second; speedups over the same model in eager float32; and speedups of our model over the others in
    the same runtime and dtype."""
    result: list[Row] = []
    for how in ("min", "median"):
        fastest: dict[tuple[str, str, str], tuple[float, Timed]] = {}
        for timed in times.seconds:
            found = times.pick(timed, how), timed
            key = timed.model, timed.runtime, timed.dtype
            if key not in fastest or found[0] < fastest[key][0]:
                fastest[key] = found

        def add(timed: Timed, who: str, dtype: str, value: float, unit: str, of: str = how) -> None:
            named = {"what": "inference", "who": who, "dtype": dtype, "batch": batch, "img_size": img_size, "of": of}
            format = "channels_last" if timed.channels_last else "default"
            result.append(_row({**named, "value": value, "unit": unit, "memory_format": format, **about}))

        for seconds, timed in fastest.values():
            add(timed, timed.who, timed.dtype, batch / seconds, "images/s")
        for seconds, timed in fastest.values():
            single, eager = fastest[timed.model, EAGER, "fp32"]
            if timed != eager:
                dtypes = timed.dtype if timed.dtype == "fp32" else f"{timed.dtype} / fp32"
                add(timed, f"{timed.who} / {EAGER}", dtypes, single / seconds, "x")
        ours = [(seconds, timed) for seconds, timed in fastest.values() if timed.model == model]
        for theirs, peer in fastest.values():
            for seconds, timed in ours if peer.model != model else ():
                if timed.runtime.startswith(peer.runtime) and timed.dtype == peer.dtype:
                    add(peer, f"{timed.who} / {peer.who}", timed.dtype, theirs / seconds, "x")
    return result


def file_rows(written: dict[Timed, tuple[float, float]], img_size: int, about: Row) -> list[Row]:
    """Sizes of files in MiB, and CPU seconds of their exports."""
    result: list[Row] = []
    for timed, values in written.items():
        named = {"who": timed.who, "dtype": timed.dtype, "batch": "", "img_size": img_size, "of": "once"}
        for what, unit, value in zip(("file", "export"), ("MiB", "s"), values):
            result.append(
                _row({"what": what, **named, "value": value, "unit": unit, "memory_format": "default", **about})
            )
    return result


# ---- the benchmark


def benchmark_export(
    models: Sequence[str] = MODELS,
    peers: Sequence[str] = PEERS,
    batches: Sequence[int] = (1, 8),
    rounds: int = 12,
    threads: Sequence[int] = (1,),
    img_size: int = 224,
    aoti: bool = True,
    csv: Path | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Export models and time the files in their runtimes, in turns with eager torch.

    Args:
        models: Models of this package. One after the other is timed against all peers.
        peers: timm models, timed in eager torch and exported to ONNX.
        batches: Batch sizes.
        rounds: Number of timed calls per file, batch size and clock.
        threads: Numbers of threads to measure with: 1 for the CPU time of the process, more for the wall time of so
            many.
        img_size: Side of the images in pixels, at least 33.
        aoti: Also compile a package of AOTInductor, which takes minutes, for each number of threads.
        csv: File to append the rows to.
        report: Called with the printed tables.

    Returns:
        The rows, by column.

    Raises:
        ExportError: A package is missing that writes or runs ONNX files.
        BenchmarkError: A model is not available or cannot be exported, or a file computes something else, or the file
            of rows has other columns.
    """
    required("onnx", "onnxscript", "onnxruntime")
    check_names(models, peers, None, has_official=False)
    if csv is not None:
        check_csv(csv, COLUMNS)
    ways = [way for way in WAYS if aoti or way.request.format != "aoti"]
    for package in {way.needs for way in ways if way.needs and version(way.needs) is None}:
        message(f"{package} is not installed and is left out; pip install {package}")
        ways = [way for way in ways if way.needs != package]
    result: list[Row] = []
    for model in models:
        for head, entries in timings(model, peers, ways, batches, rounds, threads, img_size):
            if csv is not None:
                append_csv(csv, entries)
            report(f"\n{head}\n\n{table(entries)}")
            result.extend(entries)
    return result


def timings(
    model: str,
    peers: Sequence[str],
    ways: Sequence[Way],
    batches: Sequence[int],
    rounds: int,
    threads: Sequence[int],
    img_size: int,
) -> Iterator[tuple[str, list[Row]]]:
    """For the files, and for each clock and batch size, what stands above the table, and the rows."""
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # what is open stays on some systems
        files = _Files(Path(folder), img_size)
        for number in threads:
            clock = Clock("process" if number == 1 else "wall", number)  # runtimes may compute in threads of their own
            torch.set_num_threads(number)
            try:
                binds, written = contenders(model, peers, ways, files, number)
                check(binds, Contender(model, img_size=img_size).images(2))
            finally:
                torch.set_num_threads(before)
            if written:
                head = f"files at {img_size} px, and CPU time of their exports with the compilers that these start"
                yield head, file_rows(written, img_size, _facts(Clock("process", number)))
            for batch in batches:
                images = Contender(model, img_size=img_size).images(batch)
                functions = {timed: bind(images) for timed, bind in binds.items()}
                times = interleave(functions, rounds, clock, settle=False, name=f"{model} export")
                entries = rows(times, model, batch, img_size, _facts(clock, times))
                how = f"{describe(entries[0])}, onnxruntime {entries[0]['onnxruntime']}"
                yield f"inference, batch {batch}, {img_size} px: {how}\n{HOW}", entries
