# SPDX-License-Identifier: MIT
"""`internimage benchmark export`: that it runs, its ratios, and its refusal to time what computes something else."""

import csv
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import onnxruntime
import pytest
import timm
import torch

from internimage.benchmark import export
from internimage.benchmark.contender import Contender
from internimage.benchmark.timing import BenchmarkError, Clock, Times, describe
from internimage.cli import main
from internimage.errors import UserError
from internimage.export import packages
from internimage.export.export import FORMATS, Request
from internimage.ops import onnx_forms

ATTO, PEER = "internimage_atto", "resnet10t"
WAYS = {(way.runtime, way.dtype) for way in export.WAYS if way.runtime != "AOTInductor" and not way.needs}
QUICK = ["benchmark", "export", "--quick", "--models", ATTO, "--threads", "1", "--peers"]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Files in float32 by model and format, for tests that need no other: exporting takes seconds."""
    folder = tmp_path_factory.mktemp("exported")
    write, images = export.export_model, Contender(ATTO, img_size=64)

    def find(name: str, format: str):
        path = folder / f"{name}-{format}{FORMATS[format]}"
        if not path.exists():
            module = replace(images, model=name).build()
            config = {**timm.data.resolve_model_data_config(module), "input_size": (3, 64, 64)}
            write(module, config, "random", path, Request(format, verify=False))
        return path

    return find


@pytest.fixture
def quick_exports(exported, monkeypatch):
    """Every file is the one in float32 of its format; the list of requests."""
    requests = []

    def copy(model, config, weights, path, request, calibration):
        requests.append(request)
        shutil.copyfile(exported(model.pretrained_cfg["architecture"], request.format), path)

    monkeypatch.setattr(export, "export_model", copy)
    return requests


@pytest.fixture
def choose(monkeypatch):
    """Leaves one way of a benchmark."""

    def only(runtime, **changes):
        chosen = [way for way in export.WAYS if way.runtime == runtime][:1]
        assert chosen
        monkeypatch.setattr(export, "WAYS", [replace(way, **changes) for way in chosen])

    return only


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_rows(path, ways):
    """That there are rows of all ways, and that their numbers agree."""
    rows = read(path)
    assert list(rows[0]) == export.COLUMNS and {row["clock"] for row in rows} == {"process"}
    value = {(row["what"], row["who"], row["dtype"], row["of"]): float(row["value"]) for row in rows}
    assert len(value) == len(rows) and all(found > 0 for key, found in value.items() if key[0] != "export")
    written = {*((f"{ATTO}, {runtime}", dtype) for runtime, dtype in ways), (f"{PEER}, onnxruntime", "fp32")}
    eager = {(f"{ATTO}, eager", "fp32"), (f"{ATTO}, eager", "bf16"), (f"{PEER}, eager", "fp32")}
    for what in ("file", "export"):  # OpenVINO reads a file of onnxruntime's
        files = {(who, dtype) for who, dtype in written if "OpenVINO" not in who}
        assert {key[1:3] for key in value if key[0] == what} == files
    for of in ("min", "median"):
        speeds = {key[1:3]: found for key, found in value.items() if key[0] == "inference" and key[3] == of}
        assert {key for key in speeds if "/" not in key[0]} == written | eager
        for who, dtype in written | {(f"{ATTO}, eager", "bf16")}:
            share = speeds[f"{who} / eager", dtype if dtype == "fp32" else f"{dtype} / fp32"]
            single = speeds[f"{who.split(',')[0]}, eager", "fp32"]
            # three numbers of three digits: each is off by 0.5 % at the most
            assert share == pytest.approx(speeds[who, dtype] / single, rel=0.015)
    return rows


def test_it_runs(quick_exports, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "version", lambda name: None if name == "openvino" else "1.0")
    path = tmp_path / "new" / "export.csv"
    assert main([*QUICK, PEER, "--csv", str(path)]) == 0
    printed = capsys.readouterr()
    assert f"{ATTO}, onnxruntime DeformConv / eager" in printed.out and "CPU time of 1 thread, 1 round" in printed.out
    assert "openvino is not installed and is left out" in printed.err and "AOTInductor" not in printed.err
    rows = check_rows(path, WAYS)
    assert {(row["onnxruntime"], row["openvino"]) for row in rows} == {("1.0", "none")}
    ours = [way.request for way in export.WAYS if (way.runtime, way.dtype) in WAYS]
    assert len(ours) == 7 and quick_exports == [*ours, export.PEER_WAYS[0].request]
    assert not any(request.verify for request in ours)


@pytest.mark.slow
def test_it_runs_with_every_file(tmp_path, capsys):
    path = tmp_path / "export.csv"
    common = ["benchmark", "export", "--rounds", "1", "--batches", "1", "--img-size", "64", "--csv", str(path)]
    assert main([*common, "--models", ATTO, "--peers", PEER]) == 0
    assert f"AOTInductor compiles {ATTO}, which takes minutes" in capsys.readouterr().err
    there = {(way.runtime, way.dtype) for way in export.WAYS if not way.needs or packages.version(way.needs)}
    rows = check_rows(path, there)
    size = {(row["who"], row["dtype"]): float(row["value"]) for row in rows if row["what"] == "file"}
    whole = size[f"{ATTO}, onnxruntime DeformConv", "fp32"]
    # half as many bits, and a quarter but for convolutions; and the graph, a twentieth
    for dtype, least, most in (("fp16", 1 / 2, 3 / 5), ("int8 dynamic", 1 / 4, 1 / 2)):
        assert least < size[f"{ATTO}, onnxruntime DeformConv", dtype] / whole < most


def test_ratios():
    """Of the same model in eager float32; of peers in the same runtime and dtype, in their faster memory format."""
    deform, half = (
        export.Timed("ours", "onnxruntime DeformConv"),
        export.Timed("ours", "onnxruntime DeformConv", "fp16"),
    )
    ours, brain = export.Timed("ours"), export.Timed("ours", dtype="bf16")
    first, last = (export.Timed("theirs", channels_last=value) for value in (False, True))
    exported = export.Timed("theirs", "onnxruntime")
    times: Times[export.Timed] = Times(Clock("process", 1), rounds=2)
    times.seconds = {
        ours: [8.0, 2.0],
        brain: [1.0, 1.0],
        first: [4.0, 8.0],
        last: [1.0, 16.0],
        deform: [4.0, 4.0],
        half: [0.5, 0.5],
        exported: [2.0, 2.0],
    }
    rows = export.rows(times, "ours", 8, 64, export._facts(times.clock, times))
    found = {
        (row["who"], row["dtype"], row["memory_format"]): row["value"]
        for row in rows
        if row["of"] == "min" and row["unit"] == "x"
    }
    assert found == {
        ("ours, eager / eager", "bf16 / fp32", "default"): 2,
        ("ours, onnxruntime DeformConv / eager", "fp32", "default"): 0.5,
        ("ours, onnxruntime DeformConv / eager", "fp16 / fp32", "default"): 4,
        ("theirs, onnxruntime / eager", "fp32", "default"): 0.5,
        ("ours, eager / theirs, eager", "fp32", "channels_last"): 0.5,
        ("ours, onnxruntime DeformConv / theirs, onnxruntime", "fp32", "default"): 0.5,
    }
    medians = {(row["who"], row["dtype"]): row["value"] for row in rows if row["of"] == "median"}
    assert medians["ours, eager", "fp32"] == 1.6 and medians["theirs, eager", "fp32"] == 1.33
    assert describe(rows[0]).startswith("CPU time of 1 thread, 2 rounds; ")


def test_a_file_is_written_once(tmp_path, monkeypatch):
    """Ways that read the same file share it; a package of AOTInductor is compiled for each number of threads."""
    written = []

    def write(model, config, weights, path, request, calibration):
        written.append((request, config["input_size"], len(calibration), torch.get_num_threads()))

    monkeypatch.setattr(export, "export_model", write)
    files = export._Files(tmp_path, 64)
    plain, package, static = Request("onnx"), Request("aoti"), Request("onnx", quantize="static")
    news = [files.get(ATTO, *key)[2] for key in ((plain, 1), (plain, 2), (package, 1), (package, 1), (package, 2))]
    assert news == [True, False, True, False, True]
    files.get(ATTO, static, 1)
    assert [(request, calibrated) for request, _, calibrated, _ in written] == [
        (plain, 0), (package, 0), (package, 0), (static, 4)
    ]  # fmt: skip
    assert {size for _, size, _, _ in written} == {(3, 64, 64)}
    paths = [path for path, _ in files.written.values()]
    assert [path.suffix for path in paths] == [".onnx", ".pt2", ".pt2", ".onnx"] and len(set(paths)) == 4


def test_threads(exported, monkeypatch):
    """A session gets the number of the clock when it is made."""
    made = []

    class Options(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    for number in (1, 2):
        export._onnxruntime(exported(ATTO, "onnx"), number)
    assert [(each.intra_op_num_threads, each.inter_op_num_threads) for each in made] == [(1, 1), (2, 1)]


def test_openvino_is_asked_for_float32_and_the_threads(exported, monkeypatch, tmp_path):
    """What stands in for the package, which is no dependency, has the functions that are called, with their names."""
    session = onnxruntime.InferenceSession(exported(ATTO, "onnx"), providers=["CPUExecutionProvider"])
    asked = []

    class Request:
        def infer(self, inputs):
            return session.run(None, inputs)

    class Core:
        def compile_model(self, path, device, settings):
            asked.append((path, device, settings))
            return SimpleNamespace(create_infer_request=Request)

    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=Core))
    logits = export._openvino(tmp_path / "a.onnx", 2)(Contender(ATTO, img_size=64).images(3))()
    assert logits.shape == (3, 1000)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2, "NUM_STREAMS": 1}
    assert asked == [(str(tmp_path / "a.onnx"), "CPU", settings)]


# ---- refusals


def fails(capsys, *arguments):
    assert main(["benchmark", "export", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_a_file_that_computes_something_else_is_not_timed(quick_exports, choose, tmp_path, capsys):
    def load(path, threads):
        bind = export._onnxruntime(path, threads)
        return lambda images: lambda: 1.01 * bind(images)()

    choose("onnxruntime DeformConv", load=load)
    error = fails(capsys, *QUICK[2:], "--csv", str(tmp_path / "out.csv"))
    expected = "internimage_atto, onnxruntime DeformConv fp32: the logits deviate from eager float32 by 1.0e-02 of the "
    assert expected in error and "the times would not be comparable" in error
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.slow
def test_points_in_another_order_are_not_timed(choose, tmp_path, capsys, monkeypatch):
    choose("onnxruntime DeformConv")
    monkeypatch.setattr(onnx_forms.DeformConvForm, "masks", lambda *_: onnx_forms.Outputs())
    error = fails(capsys, *QUICK[2:], "--csv", str(tmp_path / "out.csv"))
    assert "internimage_atto, onnxruntime DeformConv fp32: the logits deviate from eager float32 by " in error
    assert "the times would not be comparable" in error and not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("dtype", export.TOLERANCE)
def test_what_is_allowed(dtype):
    """A deviation just below, just above, and what is not a number."""
    images = torch.zeros(2, 3)
    right = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    other = export.Timed(ATTO, "onnxruntime DeformConv", dtype)

    def check(logits):
        export.check({export.Timed(ATTO): lambda images: lambda: right, other: lambda images: lambda: logits}, images)

    step = 2 * export.TOLERANCE[dtype] * torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    check(right + 0.99 * step)
    for wrong in (right + 1.01 * step, right + float("nan")):
        with pytest.raises(BenchmarkError, match=f"DeformConv {dtype}: the logits deviate from eager float32 by"):
            check(wrong)


def test_a_runtime_that_fails_is_told_in_one_line(quick_exports, choose, capsys):
    def load(path, threads):
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED\nDeformConv(19)")

    choose("onnxruntime DeformConv", load=load)
    error = fails(capsys, *QUICK[2:])
    assert "internimage_atto, onnxruntime DeformConv fp32 does not run: [ONNXRuntimeError] : 9 : NOT_IMPL" in error


def test_a_model_that_cannot_be_exported_is_told_in_one_line(choose, capsys, monkeypatch):
    def write(*_):
        raise UserError("torch cannot export this model")

    choose("torch.export")
    monkeypatch.setattr(export, "export_model", write)
    error = fails(capsys, *QUICK[2:])
    assert error.endswith(f"{ATTO}, torch.export fp32 does not run: torch cannot export this model")


def test_missing_packages(capsys, monkeypatch):
    monkeypatch.setattr(packages, "version", lambda name: None if name == "onnxruntime" else "1.0")
    error = fails(capsys, "--quick")
    assert error.endswith(f"this needs onnxruntime, which is not installed: {packages.EXTRA}")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--models", "resnet50"], "this package has no model 'resnet50'; --models takes "),
        (["--peers", "resnot50"], "timm has no model 'resnot50'; --peers takes timm models"),
        (["--peers", "official"], "timm has no model 'official'; --peers takes timm models"),
        (["--models", ATTO, "--peers", ATTO], f"'{ATTO}' is among both --models and --peers"),
        (["--models", ATTO, ATTO], f"--models has {ATTO} twice"),
        (["--img-size", "32"], "argument --img-size: must be a whole number from 33 to 16384, got '32'"),
        (["--quick", "--no-aoti"], "--no-aoti has no effect with --quick"),
    ],
)
def test_bad_arguments(arguments, said, capsys):
    assert said in fails(capsys, *arguments)


def test_a_file_with_other_columns_is_left_alone(tmp_path, capsys):
    path = tmp_path / "models.csv"
    path.write_text(",".join(export.models.COLUMNS) + "\n")
    error = fails(capsys, "--quick", "--csv", str(path))
    assert "has other columns (onnx, onnxruntime, openvino); use a new file" in error
