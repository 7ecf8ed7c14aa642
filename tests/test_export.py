# SPDX-License-Identifier: MIT
"""`internimage export`: what is written, how it is verified, what takes it back, and what it says to bad input."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import views
from PIL import Image
from test_onnx_models import HUGE
from torch import nn

from internimage.cli import main
from internimage.data.datasets import EvaluationTransform
from internimage.engine.create import data_config
from internimage.export import export as export_module
from internimage.export import onnx as onnx_module
from internimage.export import runtime
from internimage.export.description import Description, ExportError, checksum, describe
from internimage.export.export import Request, export_model
from internimage.export.preprocess import FromBytes
from internimage.export.runtime import open_exported
from internimage.export.verify import Verification, run_in_another_process
from internimage.layers.dcnv3 import DCNv3
from internimage.models.timm_folder import save_model

CLASSES = ["cat", "fox & <owl>", "猫"]
SMALL = dict(depths=(1, 1, 1, 1), channels=16, groups=(1, 2, 4, 8), num_classes=3)


def small_model(**arguments):
    """Offsets of about a pixel, so that a mistake in their order shows."""
    torch.manual_seed(0)
    model = timm.create_model("internimage_atto", **SMALL, **arguments).eval()
    for module in model.modules():
        if isinstance(module, DCNv3):
            nn.init.normal_(module.offset.bias)
            nn.init.normal_(module.offset.weight, std=0.05)
            nn.init.normal_(module.mask.weight, std=0.2)
    return model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def config(model):
    return data_config(model, 64)


@pytest.fixture(scope="module")
def folder(model, config, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "mine"
    path.mkdir()
    save_model(model, path, CLASSES, config)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of smooth images of odd sizes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(91, 64), (64, 91), (200, 133), (77, 301), (65, 65), (129, 127)]):
        coarse = rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8)
        (root / CLASSES[i % 3]).mkdir(exist_ok=True)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(root / CLASSES[i % 3] / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def exported(folder, photos, tmp_path_factory):
    """Files by name, made by the command when they are first asked for."""
    place, made = tmp_path_factory.mktemp("exported"), {}
    options = {
        "default.onnx": [],
        "grid.onnx": ["--operator", "grid-sample", "--external-data"],
        "features.onnx": ["--features"],
        "static.onnx": ["--static", "--dtype", "fp16"],
        "int8.onnx": ["--quantize", "static", "--calibrate", str(photos), "--images", "6"],
        "bytes.onnx": ["--with-preprocess"],
        "plain.pt2": ["--decompose"],
        "ours.pt2": [],
    }

    def get(name):
        if name not in made:
            arguments = ["--model", str(folder), "--output", str(place / name), *options[name]]
            assert main(["export", *arguments]) == 0
            made[name] = place / name
        return made[name]

    return get


def fails(capsys, *arguments, status=2):
    """The line of a command that must fail."""
    try:
        code = main(list(map(str, arguments)))
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == status, captured.err
    (line,) = captured.err.splitlines()
    return line


def run(path, image):
    return onnxruntime.InferenceSession(str(path)).run(None, {"image": image.numpy()})


def description_of(path):
    properties = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    return Description.from_properties(properties, str(path))


# ---- ONNX


def test_a_file_of_standard_operators_with_open_sizes(model, exported):
    """In onnxruntime at sizes and batches that neither the exporter nor its verification has seen, against float64: at
    most a hundred thousandth of the outputs' range, where float32's own rounding is a tenth of that."""
    path = exported("default.onnx")
    file = onnx.load(str(path))
    onnx.checker.check_model(file, full_check=True)
    assert {node.domain for node in file.graph.node} == {""} and file.opset_import[0].version == 20
    types = [node.op_type for node in file.graph.node]
    assert types.count("DeformConv") == 4 and "GatherND" not in types and "GridSample" not in types
    (given,) = file.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert given.name == "image" and dims == ["batch", 3, "height", "width"]
    assert [output.name for output in file.graph.output] == ["logits"]
    double = small_model().double()
    for shape in ((1, 3, 47, 33), (5, 3, 128, 70)):
        image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            exact = double(image.double())
        (logits,) = run(path, image)
        spread = float(exact.max() - exact.min())
        assert np.abs(logits - exact.numpy()).max() <= 1e-5 * spread


def test_what_is_seen_in_the_file_is_named_by_modules(model, exported):
    """Nodes by the module that they are of; weights that were not folded as in the state dict; and no lines or paths of
    the source code, which the exporter writes beside each node."""
    file = onnx.load(str(exported("default.onnx")))
    nodes, modules = file.graph.node, {name for name, _ in model.named_modules()}
    assert len({node.name for node in nodes}) == len(nodes)
    for node in nodes:
        module, _, name = node.name.rpartition("/")
        assert module in modules and re.fullmatch(rf"{node.op_type}(_\d+)?", name)
        assert all(name in ("", "logits") or name.startswith(f"{node.name}_output") for name in node.output)
    assert [node.name for node in nodes if node.op_type == "DeformConv"] == [
        f"levels.{i}.blocks.0.dcn/DeformConv" for i in range(4)
    ]
    state = model.state_dict()
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in file.graph.initializer}
    weights.pop("conv_head.0.weight")  # times the factors of the batch norm after it
    own = [name for name in weights if "/" not in name and "_input_" not in name]
    assert len(own) > 20 and all(np.array_equal(weights[name], state[name].numpy()) for name in own)
    assert b'.py", line ' not in exported("default.onnx").read_bytes()


def test_a_model_for_images_of_32_pixels_takes_larger_ones(model, tmp_path):
    """Its last map has one pixel, which must not become a constant: the file is verified at 64 x 32 and 32 x 96."""
    found = export_model(model, data_config(model, 32), "random", tmp_path / "m.onnx", Request("onnx"))
    assert found.verification.numbers["inputs"] == [[1, 3, 64, 32], [3, 3, 32, 96]]
    assert found.description.input_size == (3, 32, 32)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = small_model().double()(image.double()).numpy()
    assert np.abs(run(tmp_path / "m.onnx", image)[0] - exact).max() <= 1e-5 * np.ptp(exact)


def test_what_is_traced_is_of_a_size_that_the_model_takes():
    """The attentive head needs an even number of sixteenths, rounded up: 4 of 50 pixels are, and 7 of 100 are not."""
    attentive = views.model("internimage_atto", **HUGE)
    for height, width in ((50, 50), (32, 64), (224, 160)):
        sides = export_module._large_enough(attentive, height, width)
        assert min(sides) >= 64 and sides[0] * width == sides[1] * height and not sides[0] % height
        attentive.check_image_size(*sides)
    with pytest.raises(ValueError):
        attentive.check_image_size(100, 100)
    assert export_module._large_enough(nn.Identity(), 32, 96) == (64, 192)


def test_the_file_explains_itself(model, exported, config):
    found = description_of(exported("default.onnx"))
    assert found.architecture == "internimage_atto" and found.classes == tuple(CLASSES)
    assert found.input_size == (3, 64, 64) and found.mean == tuple(config["mean"])
    assert found.checksum == checksum(model) and (found.operator, found.opset) == ("deform-conv", 20)
    assert found.verification["good"] and found.verification["reference"] == "float64"
    assert found.verification["inputs"] == [[1, 3, 96, 64], [3, 3, 64, 128]]
    assert set(found.versions) == {"internimage", "torch", "timm", "onnx", "onnxscript"}


SLOW = pytest.mark.slow  # another export; what differs in it is tested alone, here or in test_onnx_forms


@pytest.mark.parametrize(
    "name",
    ["default.onnx", *(pytest.param(f"{name}", marks=SLOW) for name in ("static.onnx", "features.onnx", "bytes.onnx"))]
    + [pytest.param("plain.pt2", marks=SLOW)],
)
def test_the_code_of_the_card_runs(name, exported):
    """In a process of its own, in the file's folder, without internimage."""
    path = exported(name)
    text = path.with_name(f"{path.name}.md").read_text(encoding="utf-8")
    (code, *_) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 7 and "NOT verified" not in text
    code += "import sys\nassert 'internimage' not in sys.modules\n"
    result = subprocess.run([sys.executable, "-c", code], cwd=path.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@SLOW
def test_the_other_form_has_its_weights_beside_it(model, exported):
    path = exported("grid.onnx")
    file = onnx.load(str(path), load_external_data=False)
    types = [node.op_type for node in file.graph.node]
    assert types.count("GridSample") == 4 and "DeformConv" not in types and file.opset_import[0].version == 18
    (data,) = path.parent.glob("grid.onnx.*.data")
    assert data.stat().st_size > 10**6 > path.stat().st_size
    image = torch.randn(2, 3, 50, 81, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = small_model().double()(image.double()).numpy()
    assert np.abs(run(path, image)[0] - exact).max() <= 1e-5 * np.ptp(exact)


@SLOW
def test_features_are_the_maps_of_the_stages(model, exported):
    path = exported("features.onnx")
    file = onnx.load(str(path))
    assert [output.name for output in file.graph.output] == ["stride4", "stride8", "stride16", "stride32"]
    image = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = small_model().double().forward_intermediates(image.double(), intermediates_only=True)
    for found, expected in zip(run(path, image), exact, strict=True):
        assert np.abs(found - expected.numpy()).max() <= 1e-5 * np.ptp(expected.numpy())


def test_the_front_resizes_crops_and_normalizes_as_timm_does(model, photos, config):
    """Shades differ by at most one of 255: torch and Pillow round the sums of the same filter."""
    front, transform = FromBytes(model, config), EvaluationTransform(config)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for bytes_, image in read(photos):
        shades = [255 * (each * std + mean) for each in (front.preprocess(bytes_), transform(image)[None])]
        assert float((shades[0] - shades[1]).abs().max()) < 1.001


def read(photos):
    """Each photograph as bytes (1, height, width, 3), and as Pillow has it."""
    for file in sorted(photos.rglob("*.png")):
        with Image.open(file) as image:
            yield torch.from_numpy(np.asarray(image.convert("RGB")).copy())[None], image.convert("RGB")


@SLOW
def test_preprocessing_within_the_file_is_that_of_predict(model, exported, photos, config):
    """One shade of 255 moves probabilities little: they are compared at three digits."""
    path, transform = exported("bytes.onnx"), EvaluationTransform(config)
    assert description_of(path).preprocessed
    for bytes_, image in read(photos):
        with torch.no_grad():
            probabilities = model(transform(image)[None]).softmax(-1).numpy()
        assert np.abs(run(path, bytes_)[0] - probabilities).max() < 2e-3


@SLOW
def test_int8_and_half_are_smaller(exported):
    sizes = {name: exported(name).stat().st_size for name in ("default.onnx", "int8.onnx", "static.onnx")}
    assert sizes["int8.onnx"] < 0.5 * sizes["default.onnx"] and sizes["static.onnx"] < 0.7 * sizes["default.onnx"]
    assert description_of(exported("int8.onnx")).verification["images"] == 6


# ---- pt2


@pytest.mark.parametrize("name, imports", [("ours.pt2", True), pytest.param("plain.pt2", False, marks=SLOW)])
def test_a_program_runs_in_another_process(name, imports, exported):
    image = torch.randn(3, 3, 128, 70, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = small_model().double()(image.double())
    ((logits,),) = run_in_another_process(exported(name), [image], imports)
    assert float((logits - exact).abs().max()) <= 1e-5 * float(exact.max() - exact.min())
    if imports:
        with pytest.raises(ExportError, match="the exported file does not run"):
            run_in_another_process(exported(name), [image], False)


def test_a_program_of_a_model_below_33_pixels_has_fixed_sides(folder, tmp_path, capsys):
    """torch.export keeps sides open from 33 pixels on; the batch stays open."""
    path = tmp_path / "m.pt2"
    assert main(["export", "--model", str(folder), "--output", str(path), "--size", "32"]) == 0
    assert "sides are fixed at 32 x 32: torch.export keeps them open from 33 pixels on" in capsys.readouterr().out
    assert "`image`: float32, (batch, 3, 32, 32), made for 32 x 32" in path.with_name("m.pt2.md").read_text("utf-8")
    found = open_exported(path)
    assert found.description.verification["inputs"] == [[1, 3, 32, 32], [3, 3, 32, 32]]
    image = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = small_model().double()(image.double())
    assert float((found(image) - exact).abs().max()) <= 1e-5 * float(exact.max() - exact.min())
    with pytest.raises(ExportError, match="cannot run on images"):
        found(torch.zeros(2, 3, 64, 64))


# ---- what takes a file back


@pytest.mark.parametrize(
    "name",
    ["default.onnx", "ours.pt2", *(pytest.param(n, marks=SLOW) for n in ("static.onnx", "int8.onnx", "plain.pt2"))],
)
def test_evaluate_and_predict_take_a_file(name, folder, exported, photos, tmp_path, capsys):
    results = []
    for path in (folder, exported(name)):
        report = tmp_path / "report.json"
        arguments = ["--model", str(path), "--data", str(photos), "--workers", "0", "--batch-size", "4"]
        assert main(["evaluate", *arguments, "--json", str(report)]) == 0
        results.append(json.loads(report.read_text()))
        capsys.readouterr()
        assert main(["predict", str(photos), "--model", str(path), "--json", "--topk", "3"]) == 0
        results.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    tolerance = {"default.onnx": 1e-5, "plain.pt2": 1e-5, "ours.pt2": 1e-5, "static.onnx": 1e-2, "int8.onnx": 0.2}[name]
    assert results[0]["images"] == results[2]["images"] == 6
    assert abs(results[0]["loss"] - results[2]["loss"]) < 2 * tolerance
    for mine, theirs in zip(results[1], results[3], strict=True):
        probabilities = [{c["label"]: c["probability"] for c in each["classes"]} for each in (mine, theirs)]
        assert probabilities[0].keys() == probabilities[1].keys() == set(CLASSES)
        assert all(abs(probabilities[0][label] - probabilities[1][label]) < 2 * tolerance for label in CLASSES)


def test_files_that_cannot_be_taken_back(exported, photos, tmp_path, capsys):
    image = str(next(photos.rglob("*.png")))

    def said(path, *more):
        return fails(capsys, "predict", image, "--model", path, *more)

    assert "there is no file" in said(tmp_path / "none.onnx")
    whole = exported("default.onnx").read_bytes()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    assert "half.onnx' cannot be read by onnxruntime" in said(tmp_path / "half.onnx")
    file = onnx.load(str(exported("default.onnx")))
    del file.metadata_props[:]
    onnx.save(file, str(tmp_path / "foreign.onnx"))
    assert "says nothing of its model: it was not written by internimage export" in said(tmp_path / "foreign.onnx")
    file = onnx.load(str(exported("default.onnx")))
    onnx.save_model(file, str(tmp_path / "apart.onnx"), save_as_external_data=True, location="apart.onnx.data")
    (tmp_path / "apart.onnx.data").unlink()
    assert "apart.onnx' are in 'apart.onnx.data', which is not beside it" in said(tmp_path / "apart.onnx")

    def saying(**changes):
        """The default file with another description."""
        file = onnx.load(str(exported("default.onnx")))
        found = dataclasses.replace(description_of(exported("default.onnx")), **changes)
        onnx.helper.set_model_props(file, found.properties())
        onnx.save(file, str(tmp_path / "other.onnx"))
        return tmp_path / "other.onnx"

    assert "gives the maps of the stages" in said(saying(features=("stride4",)))
    assert "resizes and normalizes images by itself (--with-preprocess)" in said(saying(preprocessed=True))
    assert "takes images of 64 x 64 only, got --img-size 96" in said(saying(open=()), "--img-size", "96")
    assert "--num-classes has no effect with an exported file" in said(exported("default.onnx"), "--num-classes", "3")
    (tmp_path / "damaged.pt2").write_bytes(exported("ours.pt2").read_bytes()[:5000])
    assert "damaged.pt2' is damaged, or no file of torch.export" in said(tmp_path / "damaged.pt2")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("hello", "x")
    assert "other.pt2' cannot be read by torch" in said(tmp_path / "other.pt2")
    line = fails(capsys, "analyze", image, "--model", exported("default.onnx"), "--output", tmp_path / "a")
    assert "is an exported file, which evaluate and predict take, and no others" in line


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"device": "cuda"}, "was built for cuda, and exported files are evaluated on the CPU"),
        ({}, "cannot be read by torch"),  # there is no compiled model in it
        (None, "says nothing of its model: it was not written by internimage export"),
        ("{", "is damaged"),
    ],
)
def test_packages_that_cannot_be_taken_back(metadata, words, model, config, photos, tmp_path, capsys):
    """An AOTInductor package is recognized by its metadata, before its code is loaded, which may need its device."""
    if isinstance(metadata, dict):
        device = metadata.get("device", "cpu")
        text = json.dumps(describe(model, config, "tag", format="aoti", operator="", device=device).properties())
    else:
        text = metadata
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/aotinductor/model/abc.wrapper.so", b"nothing")
        if text is not None:
            archive.writestr("m/data/aotinductor/model/abc.wrapper_metadata.json", text)
    assert words in fails(capsys, "predict", photos, "--model", path)
    assert words in fails(capsys, "evaluate", "--model", path, "--data", photos, "--workers", "0")


def test_an_older_onnxruntime_is_named(exported, monkeypatch):
    class Old:
        __version__, __spec__ = "1.24.4", onnxruntime.__spec__
        SessionOptions = onnxruntime.SessionOptions

        @staticmethod
        def InferenceSession(*_, **__):
            raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find DeformConv(19)")

    monkeypatch.setitem(sys.modules, "onnxruntime", Old)
    with pytest.raises(
        ExportError, match="DeformConv, which onnxruntime has from 1.25 on, and this is 1.24.4: pip inst"
    ):
        open_exported(exported("default.onnx"))


# ---- verification and writing


def test_a_file_that_fails_is_removed(model, config, tmp_path, monkeypatch):
    def wrong(*_):
        return Verification(False, "largest difference 5", {})

    monkeypatch.setattr(export_module, "verify", wrong)
    with pytest.raises(ExportError, match="is not what the model is, and was removed: largest difference 5") as error:
        export_model(model, config, "random", tmp_path / "m.pt2", Request("pt2", dynamic=False))
    assert error.value.status == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["points", "scale", "weights"])
def test_verification_finds_another_model(change, model, config, tmp_path, monkeypatch):
    """What is traced differs from what it is compared with."""
    other = small_model()
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, DCNv3):
                if change == "points":
                    module.mask.weight.copy_(module.mask.weight.flip(0))
                elif change == "scale":
                    module.offset_scale = 1.01
                else:
                    module.input_proj.weight.mul_(1.001)
    monkeypatch.setattr(export_module, "_wrapped", lambda *_: other)
    with pytest.raises(ExportError, match="is not what the model is, and was removed: inputs 1x3x64x64 and 1x3x64x64"):
        export_model(model, config, "random", tmp_path / "m.pt2", Request("pt2", dynamic=False))
    assert list(tmp_path.iterdir()) == []


def test_without_verification_the_card_says_so(folder, tmp_path, capsys):
    path = tmp_path / "m.pt2"
    assert main(["export", "--model", str(folder), "--output", str(path), "--no-verify", "--static"]) == 0
    assert "not verified" in capsys.readouterr().err
    assert "This file was NOT verified" in (tmp_path / "m.pt2.md").read_text(encoding="utf-8")
    assert not open_exported(path).description.open


def test_a_full_disk_leaves_what_was_there(model, config, tmp_path, monkeypatch):
    (tmp_path / "m.pt2").write_bytes(b"old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(
            model, config, "random", tmp_path / "m.pt2", Request("pt2", dynamic=False, verify=False, overwrite=True)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"] and (tmp_path / "m.pt2").read_bytes() == b"old"


def test_a_full_disk_is_an_error_while_torch_writes(model, config, tmp_path):
    """torch alone would end the process."""
    resource = pytest.importorskip("resource", reason="needs Unix's limits")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))  # bytes of a file; the model has 1.8 million
    try:
        with pytest.raises(OSError, match="File too large"):
            export_model(model, config, "random", tmp_path / "m.pt2", Request("pt2", dynamic=False, verify=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_files_have_no_paths_of_this_machine(exported):
    for name in ("default.onnx", "ours.pt2"):
        path = exported(name)
        whole = path.read_bytes()
        if name.endswith(".pt2"):
            with zipfile.ZipFile(path) as archive:
                whole = b"".join(map(archive.read, archive.namelist()))
        assert b"site-packages" not in whole and b"internimage/layers" not in whole


def test_the_weights_of_an_earlier_file_do_not_stay_beside_a_new_one(model, config, tmp_path):
    for name in ("m.pt2", "m.pt2.0123abcd.data", "m.pt2.md", "m.pt2.mine.data"):
        (tmp_path / name).write_bytes(b"old")
    request = Request("pt2", dynamic=False, verify=False, overwrite=True)
    found = export_model(model, config, "random", tmp_path / "m.pt2", request)
    there = {path.name for path in tmp_path.iterdir()}
    assert (
        there == {path.name for path in found.files} | {"m.pt2.mine.data"} == {"m.pt2", "m.pt2.md", "m.pt2.mine.data"}
    )


class Killed(BaseException):
    """Nothing is cleaned up after a kill."""


def writer(number):
    """Instead of tracing a model: an ONNX file whose external data are one number."""

    def write(model, traced, staged, description, *_):
        data = np.full(256, number, np.float32).tobytes()  # raw: other numbers stay in the file
        weights = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [256], data, raw=True)
        node = onnx.helper.make_node("Identity", ["w"], ["logits"])
        output = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [256])
        graph = onnx.helper.make_graph([node], "g", [], [output], [weights])
        file = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        name = onnx_module.data_name(staged, description)
        onnx.save_model(file, str(staged), save_as_external_data=True, location=name, size_threshold=0)

    return write


@pytest.mark.parametrize("after", range(4))
def test_a_kill_leaves_a_file_beside_its_own_weights(after, model, config, tmp_path, monkeypatch):
    """Between any two of the three moves that put a new file, its weights and its card in place of older ones."""
    request = Request("onnx", dynamic=False, verify=False, overwrite=True, external_data=True)
    path, moves, real = tmp_path / "m.onnx", [], os.replace
    monkeypatch.setattr(export_module, "_write", writer(1.0))
    export_model(model, config, "random", path, request)

    def replace(source, target):
        if os.path.dirname(target) == str(tmp_path):
            moves.append(target)
            if len(moves) > after:
                raise Killed
        return real(source, target)

    other = small_model()
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    monkeypatch.setattr(export_module, "_write", writer(2.0))
    monkeypatch.setattr(export_module.os, "replace", replace)
    with contextlib.suppress(Killed):
        export_model(other, config, "random", path, request)
    assert len(moves) == min(after + 1, 3)
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {})
    assert set(found.tolist()) == {1.0 if after < 2 else 2.0}
    assert len(list(tmp_path.glob("*.data"))) == (1 if after in (0, 3) else 2)


# ---- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        (["--output", "m.onnx", "--opset", "18"], "DeformConv is in opset 19 and later, got 18"),
        (["--output", "m.onnx", "--opset", "20", "--operator", "grid-sample"], "for opset 18 and 19, got 20: TensorRT"),
        (["--output", "m.onnx", "--opset", "98"], "opset must be at most"),
        (["--output", "m.bin", "--format", "onnx"], "a file of format onnx ends in .onnx, got 'm.bin'"),
        (["--output", "m.onnx", "--format", "pt2"], "a file of format pt2 ends in .pt2, got 'm.onnx'"),
        (["--output", "there.onnx"], "'there.onnx' exists; --overwrite replaces it"),
        (["--output", "folder.onnx"], "'folder.onnx' is a folder; the result is a file"),
        (["--output", "m.onnx", "--quantize", "dynamic", "--dtype", "fp16"], "quantization starts from a classifier"),
        (["--output", "m.onnx", "--quantize", "dynamic", "--features"], "quantization starts from a classifier"),
        (
            ["--output", "m.pt2", "--quantize", "dynamic"],
            "quantization, preprocessing, external data and an opset are for",
        ),
        (["--output", "m.onnx", "--quantize", "static"], "--quantize static needs --calibrate FOLDER"),
        (
            ["--output", "m.onnx", "--quantize", "static", "--calibrate", "one"],
            "needs at least 2 images, and 'one' has 1",
        ),
        (["--output", "m.onnx", "--quantize", "static", "--calibrate", "none"], "there is no image at 'none'"),
        (["--output", "m.onnx", "--with-preprocess", "--features"], "--with-preprocess has no effect with --features"),
        (["--output", "m.onnx", "--with-preprocess", "--size", "96"], "--with-preprocess has no effect with --size"),
        (["--output", "m.onnx", "--decompose"], "--decompose has no effect on ONNX"),
        (["--output", "m.pt2", "--operator", "deform-conv"], "--operator has no effect on .pt2"),
        (["--output", "there.onnx/m.onnx"], "'there.onnx/m.onnx' cannot be written to: Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_no_file(folder, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").write_bytes(b"mine")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "one").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "one" / "1.png")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert words in fails(capsys, "export", "--model", folder, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_missing_package_is_named(folder, tmp_path, capsys, monkeypatch):
    from internimage.export import packages

    monkeypatch.setattr(packages, "version", lambda name: None if name == "onnxscript" else "1")
    line = fails(capsys, "export", "--model", folder, "--output", tmp_path / "m.onnx")
    assert "this needs onnxscript, which is not installed: pip install 'internimage[export]'" in line


def test_an_opset_that_the_exporter_does_not_know(monkeypatch):
    """torch then writes another, without an error."""
    real = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **options: real(*a, **{**options, "opset_version": 18}))
    with pytest.raises(ExportError, match="does not know opset 19, and wrote 18: take a lower --opset"):
        onnx_module.trace(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8), "", 19, ("maps",), False)


def test_a_size_that_the_model_does_not_take(config, tmp_path):
    """The attentive head halves the last map but one; nothing is traced before this is seen."""
    model = timm.create_model("internimage_atto", **SMALL, attentive_head=True)
    request = Request("onnx", size=(64, 48))
    with pytest.raises(ExportError, match=r"ceil\(side / 16\) is even, got 64 x 48; multiples of 32 always fit"):
        export_model(model, config, "random", tmp_path / "m.onnx", request)
    assert list(tmp_path.iterdir()) == []


def test_models_that_the_front_does_not_fit(config):
    gray = timm.create_model("internimage_atto", **SMALL, in_chans=1)
    with pytest.raises(ExportError, match="for RGB images, and this model takes 1 channel"):
        FromBytes(gray, data_config(gray, 64))
    for change in ({"crop_mode": "border"}, {"input_size": (3, 64, 96)}, {"interpolation": "lanczos"}):
        with pytest.raises(ExportError, match="preprocessing within the file"):
            FromBytes(nn.Identity(), {**config, **change})


# ---- descriptions


def test_a_description_survives_a_file(model, config):
    one = describe(model, config, "tag", format="onnx", operator="deform-conv", opset=20, features=("stride4",))
    assert Description.from_properties(one.properties(), "file") == one
    assert all(isinstance(value, str) for value in one.properties().values())
    for damage in ("{", "[" * 5000, "5"):
        broken = one.properties() | {"internimage.mean": damage, "internimage.classes": damage}
        if damage != "5":
            with pytest.raises(ExportError, match="what 'file' says of its model is damaged"):
                Description.from_properties(broken, "file")
    missing = {key: value for key, value in one.properties().items() if key != "internimage.checksum"}
    with pytest.raises(ExportError, match="damaged"):
        Description.from_properties(missing, "file")


def test_the_checksum_is_of_every_bit(model):
    before = checksum(model)
    other = small_model()
    assert checksum(other) == before
    with torch.no_grad():
        weight = other.patch_embed.conv1.weight
        weight.view(torch.int32).view(-1)[0] ^= 1
    assert checksum(other) != before
    assert len(before) == 64 and dataclasses.replace(
        describe(model, data_config(model, 64), "x", format="pt2", operator="")
    )


def test_the_suffixes_that_the_command_line_knows():
    from internimage.cli import verbs

    assert verbs._EXPORTED == runtime.SUFFIXES and os.sep not in "".join(runtime.SUFFIXES)
