# SPDX-License-Identifier: MIT
"""Loading leaves a model whole or as it was, whatever fails and whenever; no value becomes another one in silence."""

import re

import formats
import pytest
import timm
import torch
from test_convert import ATTO
from test_load import assert_equal, assert_refused, filled, new, warnings_of
from torch import Tensor, nn

from internimage import CheckpointError
from internimage.convert.convert import convert
from internimage.convert.detect import ConvertError
from internimage.dtypes import problem_of
from internimage.engine.create import create_model
from internimage.weights import readers

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
WEIGHT, COUNTER = "levels.1.blocks.0.mlp.fc1.weight", "conv_head.1.0.num_batches_tracked"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return filled()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """One for all, as refusals leave it as it was."""
    return new()


def of_dtype(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Anything of this dtype; not every dtype can be converted to."""
    try:
        return torch.ones(shape).to(dtype)
    except (RuntimeError, NotImplementedError):
        return torch.empty(shape, dtype=dtype)


# ---- reading fails half way


@pytest.mark.parametrize("kind", ["ours", "Hub, shards", "official"])
@pytest.mark.parametrize("after", [0, 40, -1])
@pytest.mark.parametrize("meta", [False, True], ids=["filled", "on meta"])
def test_read_that_fails_leaves_the_model_as_it_was(meta, after, kind, weights, tmp_path, monkeypatch):
    """On meta, a part of the model that the file lacks (a new classifier) gets no memory either."""
    path = formats.write(kind, tmp_path, weights)
    entries, reads = readers.open_weights(path), []
    after = after % len(entries)

    def failing(read):
        def fail():
            reads.append(read)
            if len(reads) > after:
                raise CheckpointError("the disk is at fault")
            return read()

        return fail

    damaged = {
        key: readers.Entry(entry.shape, entry.dtype, failing(entry.read), entry.problem)
        for key, entry in entries.items()
    }
    damaged = readers.Weights(damaged, "the file", entries.files)
    monkeypatch.setattr("internimage.weights.load.open_weights", lambda *_: damaged)
    if not meta:
        assert_refused(new(), path, "the disk is at fault")
    else:
        model = new(device="meta", num_classes=1000)
        with pytest.raises(CheckpointError, match="the disk is at fault"):
            model.load_pretrained(path, device="cpu")
        assert all(value.is_meta for value in model.state_dict().values())
    assert len(reads) == after + 1


def test_new_classifier_of_a_failing_file_stays_on_meta(weights, tmp_path, monkeypatch):
    path = formats.write("ours", tmp_path, weights)
    model = new(device="meta", num_classes=5)

    def read_tensor(*_):
        raise EOFError("the file ends early")

    monkeypatch.setattr(readers, "read_tensor", read_tensor)
    with pytest.raises(CheckpointError, match="reading '.*failed: the file ends early"):
        model.load_pretrained(path, device="cpu", pretrained_cfg=dict(num_classes=1000))
    assert all(value.is_meta for value in model.state_dict().values())


# ---- tensors that cannot be read or written


def test_memory_that_was_freed_is_not_read(weights):
    """torch would read beyond its end, and the process die."""
    freed = torch.ones(weights[WEIGHT].shape)
    freed.untyped_storage().resize_(0)
    assert_refused(new(), {**weights, WEIGHT: freed}, f"'{WEIGHT}' is without its memory")


class OwnTensor(Tensor):
    """What another library might make of a parameter."""


def made_in_inference_mode(value: Tensor) -> Tensor:
    with torch.inference_mode():
        return value.clone()


UNWRITABLE = {
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn; weights are float64"),
    "complex": (lambda t: t.to(torch.complex64), "complex64; weights are"),
    "sparse": (lambda t: t.to_sparse(), "sparse"),
    "expanded": (lambda t: t[:1].expand(t.shape), "expanded, with several elements in one place"),
    "of inference mode": (made_in_inference_mode, r"made in torch.inference_mode\(\)"),
    "of a class of its own": (lambda t: t.as_subclass(OwnTensor), "a OwnTensor, not a plain"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", UNWRITABLE)
def test_parameter_of_the_model_that_cannot_be_filled(what, weights, monkeypatch):
    """It comes late, and is named before the first one is written or read."""
    make, message = UNWRITABLE[what]
    model = new()
    layer = model.get_submodule("levels.3.blocks.0.mlp.fc1")
    layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)
    before = {key: value.clone() for key, value in model.state_dict().items() if "levels.3" not in key}
    reads: list[str] = []
    monkeypatch.setattr(readers, "_own", reads.append)
    with pytest.raises(CheckpointError, match=rf"the model.*'levels.3.blocks.0.mlp.fc1.weight' is {message}") as error:
        model.load_pretrained(weights)
    assert "\n" not in str(error.value)
    assert_equal({key: value for key, value in model.state_dict().items() if "levels.3" not in key}, before)
    assert reads == []


# ---- dtypes, by one table


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_loads_or_is_refused_by_name(dtype, model, weights):
    name = str(dtype).removeprefix("torch.")
    for key, right in ((WEIGHT, FLOATING), (COUNTER, WHOLE)):
        changed = {**weights, key: of_dtype(weights[key].shape, dtype)}
        if dtype in right:
            model.load_pretrained(changed)
            assert_equal(model.state_dict(), {**changed, key: changed[key].to(weights[key].dtype)})
        else:
            message = assert_refused(model, changed, re.escape(key))
            assert re.search(rf"\b{name}\b|quantized", message)
    assert (problem_of(dtype) == "") == (dtype in (*FLOATING, *WHOLE, torch.bool))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convert_writes_what_can_be_loaded_and_nothing_else(dtype, weights, tmp_path):
    source = formats.write("ours", tmp_path, {k: v for k, v in weights.items() if "gamma" not in k})
    if dtype not in FLOATING:
        with pytest.raises(ConvertError, match="dtype must be float64, .* float16 or None, got") as error:
            convert(source, tmp_path / "out", dtype=dtype, **ATTO)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return
    convert(source, tmp_path / "out", dtype=dtype, **ATTO)
    create_model(str(tmp_path / "out"))


@pytest.mark.parametrize("dtype", ["float16", 16, dict, "torch.int8"])
def test_what_is_no_dtype(dtype, tmp_path):
    with pytest.raises(ConvertError, match="dtype must be float64"):
        convert(tmp_path / "none.pth", tmp_path / "out", dtype=dtype)


def test_other_models_of_timm_follow_the_table_too(tmp_path):
    state_dict = timm.create_model("resnet10t", num_classes=2).state_dict()
    key = "layer4.0.conv2.weight"
    path = formats.save_torch(tmp_path / "w.pth", {**state_dict, key: state_dict[key].to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=f"tensor '{key}' is float8_e4m3fn; weights are float64"):
        create_model("resnet10t", str(path))


# ---- values that another dtype cannot hold


def test_values_that_float16_cannot_hold_are_named_when_loading(weights, caplog):
    large = {**weights, "head.bias": torch.full_like(weights["head.bias"], 70_000.0)}
    for on_meta in (True, False):
        caplog.clear()
        model = new(dtype=torch.float16, device="meta" if on_meta else None)
        model.load_pretrained(large, device="cpu")
        (warning,) = warnings_of(caplog)
        assert "1 tensors have values that float16 cannot hold, which are infinite now: head.bias" in warning
        assert model.head.bias.isinf().all()
    caplog.clear()
    new(dtype=torch.bfloat16).load_pretrained(large)
    assert warnings_of(caplog) == []


def test_values_that_float16_cannot_hold_are_not_converted(weights, tmp_path):
    large = {**weights, "head.bias": torch.full_like(weights["head.bias"], 70_000.0)}
    source = formats.write("ours", tmp_path, {k: v for k, v in large.items() if "gamma" not in k})
    message = r"'head.bias' has values that float16 cannot hold \(up to 65504\); name a type of a larger range"
    with pytest.raises(ConvertError, match=message):
        convert(source, tmp_path / "out", dtype=torch.float16, **ATTO)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", dtype=torch.bfloat16, verify=True, **ATTO)


def test_nan_and_infinity_of_the_source_are_converted(weights, tmp_path):
    odd = {**weights, "head.bias": torch.full_like(weights["head.bias"], float("inf"))}
    odd["head.bias"][0] = float("nan")
    source = formats.write("ours", tmp_path, {k: v for k, v in odd.items() if "gamma" not in k})
    convert(source, tmp_path / "out", dtype=torch.float16, verify=True, **ATTO)
