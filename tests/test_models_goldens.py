# SPDX-License-Identifier: MIT
"""Our models against the official ones: keys and shapes, outputs, gradients."""

import re
from functools import lru_cache

import golden
import pytest
import timm
import torch
from conftest import assert_close
from torch import Tensor, nn

import internimage  # noqa: F401  (registers the models)
from internimage.models import InternImage

# absolute, on logits and maps of the order of 1 to 10
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4}
STREAMED = ("internimage_h", "internimage_g")  # too big to stand in memory in float64 beside anything else
SLOW = ("internimage_l", "internimage_xl", *STREAMED)

# What differs between the sizes shows at either input and in either dtype, and what differs between inputs and between
# dtypes shows in tiny.
SEEN_IN_OTHERS = {
    (f"{size}_2x{pixels}", dtype)
    for size in ("s", "b")
    for pixels, dtype in (("224x224", torch.float64), ("192x256", torch.float32))
}

# ---- keys and shapes


@pytest.mark.parametrize("file", golden.MODELS)
def test_keys_and_shapes_are_the_official_ones(file):
    expected = golden.manifest()[file]
    model = timm.create_model(golden.MODELS[file], device="meta")
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["num_params"]
    assert model.num_classes == expected["num_classes"]


def test_manifest_and_names_agree():
    assert set(golden.MODELS) == set(golden.manifest())
    assert sorted(golden.MODELS.values()) == sorted(name for name in internimage.models.PUBLISHED)


# ---- outputs


def weights(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The golden weights of a module that stands at `prefix` in a model, in the module's dtypes."""
    return {key: golden.fill(prefix + key, value.shape).to(value.dtype) for key, value in module.state_dict().items()}


@lru_cache(maxsize=1)
def whole(file: str, dtype: torch.dtype) -> InternImage:
    """A model with its golden weights."""
    model = timm.create_model(golden.MODELS[file], device="meta", dtype=dtype).eval()
    filled = golden.fill_state_dict(golden.manifest()[file]["shapes"])
    filled = {key: value.to(dtype) if value.is_floating_point() else value for key, value in filled.items()}
    model.load_state_dict(filled, strict=True, assign=True)
    return model


def streamed(file: str, dtype: torch.dtype) -> InternImage:
    """A model on the meta device, of which every part gets its golden weights when it runs, and loses them after."""
    model = timm.create_model(golden.MODELS[file], device="meta", dtype=dtype).eval()
    part = re.compile(r"levels\.\d+\.(?:(?:blocks|post_norms)\.\d+|norm|downsample)|(?!levels$)\w+")

    def load(module: nn.Module, _args, prefix: str) -> None:
        module.load_state_dict(weights(module, prefix), strict=True, assign=True)

    def drop(module: nn.Module, _args, _output) -> None:
        module.to("meta")

    for name, module in model.named_modules():
        if part.fullmatch(name):
            module.register_forward_pre_hook(lambda m, args, prefix=f"{name}.": load(m, args, prefix))
            module.register_forward_hook(drop)
    return model


def model_cases() -> list:
    cases = []
    for name, case in golden.cases("models").items():
        for dtype in LIMIT:
            slow = []
            if re.match(r"internimage_[a-z]+", case["model"])[0] in SLOW:
                slow = [pytest.mark.slow, pytest.mark.timeout(3600)]
            elif (name, dtype) in SEEN_IN_OTHERS:
                slow = [pytest.mark.slow]
            cases.append(pytest.param(name, dtype, marks=slow, id=f"{name}-{str(dtype)[6:]}"))
    return cases


def inputs(case: dict, dtype: torch.dtype) -> Tensor:
    x = golden.images(case["input_seed"], case["input_shape"])
    fingerprint = case["input_fingerprint"]
    assert x.double().flatten()[:3].tolist() == fingerprint["first3"]
    assert x.double().sum().item() == pytest.approx(fingerprint["sum"], rel=1e-12)
    return x.to(dtype)


def deviation(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual.double() - expected).abs().max().item()


@pytest.mark.parametrize("name, dtype", model_cases())
@torch.no_grad()
def test_outputs_are_the_official_ones(name, dtype):
    case, tensors = golden.cases("models")[name], golden.tensors("models")
    limit = LIMIT[dtype]
    build = streamed if case["model"].startswith(STREAMED) else whole
    model = build(case["model"], dtype)
    x = inputs(case, dtype)
    features, stages = model.forward_intermediates(x, output_fmt="NHWC")
    logits = model.forward_head(features)
    assert logits.dtype == dtype
    assert deviation(logits, tensors[f"{name}/logits"]) < limit
    assert len(stages) == len(case["stages"]) == 4
    for i, (stage, expected) in enumerate(zip(stages, case["stages"]), 1):
        assert list(stage.shape) == expected["shape"]
        assert deviation(stage.flatten()[:64], tensors[f"{name}/stage{i}_first64"]) < limit
        if f"{name}/stage{i}" in tensors:
            assert deviation(stage, tensors[f"{name}/stage{i}"]) < limit
        stage = stage.double()
        for statistic, value in (
            ("mean", stage.mean()),
            ("std", stage.std(correction=0)),
            ("absmax", stage.abs().max()),
        ):
            assert value.item() == pytest.approx(expected[statistic], abs=limit), statistic


def test_some_case_holds_whole_stages():
    assert {key for key in golden.tensors("models") if re.search(r"/stage\d$", key)} == {
        f"t_2x64x96_full/stage{i}" for i in (1, 2, 3, 4)
    }


# ---- gradients

_OURS = {  # the official names of hyper-parameters that have another one here
    "use_clip_projector": "attentive_head",
    "level2_post_norm_block_ids": "stage3_post_norm_blocks",
}
_OFFICIAL_ONLY = {"level2_post_norm": True, "act_layer": "GELU", "norm_layer": "LN"}  # what else they say is fixed here


def with_hparams(hparams: dict) -> InternImage:
    arguments = {}
    for key, value in hparams.items():
        if key in _OFFICIAL_ONLY:
            assert value == _OFFICIAL_ONLY[key]
        else:
            arguments[_OURS.get(key, key)] = value
    return InternImage(**arguments)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", golden.cases("grad"))
def test_gradients_are_the_official_ones(name, checkpointing):
    case, tensors = golden.cases("grad")[name], golden.tensors("grad")
    model = timm.create_model(golden.MODELS[case["model"]]) if case["model"] else with_hparams(case["hparams"])
    model.load_state_dict(golden.fill_state_dict(case["shapes"]), strict=True)
    model.double().eval().set_grad_checkpointing(checkpointing)
    x = golden.images(case["input_seed"], case["input_shape"]).double().requires_grad_()
    logits = model(x)
    loss = logits.square().mean()
    loss.backward()
    assert_close(logits, tensors[f"grad_{name}/logits"], 1e-9, "logits")
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    assert_close(x.grad, tensors[f"grad_{name}/grad_input"], 1e-9, "grad_input")
    grads = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert set(grads) == set(case["param_grads"])
    for key, expected in case["param_grads"].items():
        norm, probe = grads[key].norm().item(), (grads[key] * golden.grad_probe(key, grads[key].shape)).sum().item()
        # zero in exact arithmetic; else relative to the norm, of which the probe is a multiple near one
        scale = 1.0 if key in case["zero_grads"] else expected["norm"]
        assert abs(norm - expected["norm"]) <= 1e-9 * scale, key
        assert abs(probe - expected["probe"]) <= 1e-9 * scale, key
