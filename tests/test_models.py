# SPDX-License-Identifier: MIT
"""What our models promise beyond what timm's own tests ask (scripts/checks/timm_contract.py runs those)."""

import copy
import re

import golden
import numpy as np
import pytest
import timm
import torch
from conftest import assert_close
from timm.models import create_feature_extractor, get_notrace_functions
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import internimage
from internimage.layers import mlp as layer_mlp
from internimage.models import PUBLISHED, CheckpointError, InternImage
from internimage.models.blocks import Block
from internimage.models.classifier import check_fusable
from internimage.ops import onednn

ARCHITECTURES = [
    f"internimage_{size}" for size in ("atto", "tiny", "small", "base", "large", "xlarge", "huge", "giant")
]

SMALL = dict(channels=16, depths=(2, 1, 3, 1), groups=(1, 2, 4, 8), num_classes=10)
# what distinguishes small to xlarge, and what distinguishes huge and giant
SCALED = dict(SMALL, post_norm=True, layer_scale=1e-5, offset_scale=2.0)
ATTENTIVE = dict(
    SMALL,
    res_post_norm=True,
    dw_kernel_size=5,
    center_feature_scale=True,
    attentive_head=True,
    stage3_post_norm_blocks=(0, 2),
)
KINDS = {"plain": SMALL, "scaled": SCALED, "attentive": ATTENTIVE}


def build(arguments: dict, **more) -> InternImage:
    """A model in which every parameter matters: the initial offsets and masks are zero, and layer scales tiny."""
    model = InternImage(**{**arguments, **more}).eval()
    model.load_state_dict(golden.fill_state_dict({key: value.shape for key, value in model.state_dict().items()}))
    return model


def image(*size: int, batch: int = 2) -> Tensor:
    return golden.images(1, (batch, 3, *size))


@pytest.fixture(params=KINDS, ids=str)
def kind(request) -> dict:
    return KINDS[request.param]


# ---- fast paths of inference


def test_inference_computes_what_training_mode_differentiates(kind):
    """Without gradients blocks are fused; with gradients every step is one of torch's operators."""
    model, x = build(kind).double(), image(64, 96).double()
    recorded = model(x)
    assert recorded.requires_grad
    with torch.no_grad():
        assert_close(model(x), recorded, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("least_rows", [1, 8])
@torch.inference_mode()
def test_timms_graph_has_the_bits_of_the_model(kind, dtype, least_rows, monkeypatch):
    """timm compares its FX graphs with the model: blocks, linear layers and MLPs in chunks round alike in both."""
    monkeypatch.setattr(onednn, "MIN_ROWS", least_rows)
    monkeypatch.setattr(layer_mlp, "_HIDDEN_BYTES", 1 << 12)
    model, x = build(kind).to(dtype), image(64, 96).to(dtype)
    graph = create_feature_extractor(model, ["head"])
    assert torch.equal(graph(x)["head"], model(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", ["internimage_atto", "internimage_tiny"])
@torch.inference_mode()
def test_a_released_model_as_timm_tests_it(name):
    """The cheapest of timm's own tests (`make timm-contract`): forward, FX and TorchScript, at the model's own size."""
    model = timm.create_model(name).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    logits = model(x)
    assert logits.shape == (1, model.num_classes) and logits.isfinite().all()
    assert torch.equal(create_feature_extractor(model, ["head"])(x)["head"], logits)
    assert_close(torch.jit.script(model)(x), logits)


@torch.inference_mode()
def test_a_model_with_hooks_has_the_bits_of_the_model(kind):
    """Hooks make blocks call their modules one by one."""
    model, x = build(kind), image(64, 96)
    expected, seen = model(x), []
    for module in model.modules():
        if isinstance(module, Block):
            module.drop_path1.register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    assert torch.equal(model(x), expected)
    assert len(seen) == sum(kind["depths"])


# ---- sizes


@pytest.mark.parametrize("size", [(64, 64), (33, 65), (50, 230), (7, 9), (1, 1)], ids=str)
@torch.no_grad()
def test_any_image_size(size):
    model = build(SCALED)
    logits = model(image(*size))
    assert logits.shape == (2, 10) and logits.isfinite().all()
    maps = model.forward_intermediates(image(*size), intermediates_only=True)
    for i, (stage, stride) in enumerate(zip(maps, (4, 8, 16, 32))):
        assert stage.shape == (2, 16 * 2**i, -(-size[0] // stride), -(-size[1] // stride))


@torch.no_grad()
def test_one_model_takes_one_size_after_another():
    model = build(SMALL)
    first = model(image(40, 56))
    model(image(96, 33))
    assert torch.equal(model(image(40, 56)), first)


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (50, 61), (17, 49)], ids=str)
@torch.no_grad()
def test_attentive_head_shapes(size):
    model = build(ATTENTIVE)
    features = model.forward_features(image(*size))
    assert features.shape == (2, 1024, -(-size[0] // 16), -(-size[1] // 16))
    assert (model.num_features, model.head_hidden_size) == (1024, 768)
    assert model.forward_head(features, pre_logits=True).shape == (2, 768)
    assert model(image(*size)).shape == (2, 10)


@pytest.mark.parametrize(
    "size, named",
    [((48, 64), "64 x 64"), ((64, 16), "64 x 32"), ((100, 130), "128 x 160"), ((1, 1), "32 x 32")],
    ids=str,
)
@torch.no_grad()
def test_attentive_head_names_sizes_that_fit(size, named):
    model = build(ATTENTIVE)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=f"got {size[0]} x {size[1]}.* {named}$"):
            call(image(*size))
    check_fusable(torch.empty(1, 3, *map(int, named.split(" x "))))
    assert len(model.forward_intermediates(image(*size), intermediates_only=True)) == 4  # needs no head


def test_atto_is_small():
    assert sum(p.numel() for p in timm.create_model("internimage_atto", num_classes=10).parameters()) < 1_000_000


# ---- head


@pytest.mark.parametrize("pool, width", [("avg", 192), ("max", 192), ("avgmax", 192), ("catavgmax", 384)])
@torch.no_grad()
def test_pooling(pool, width):
    model = build(SMALL, global_pool=pool)
    assert (model.num_features, model.head_hidden_size) == (128, width)
    features = model.forward_features(image(64, 96))
    head_map = model.conv_head(features)
    mean, largest = head_map.mean((2, 3)), head_map.amax((2, 3))
    expected = {
        "avg": mean,
        "max": largest,
        "avgmax": (mean + largest) / 2,
        "catavgmax": torch.cat([mean, largest], dim=1),
    }[pool]
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
    torch.testing.assert_close(model(image(64, 96)), model.head(expected))
    model.reset_classifier(7)  # keeps the pooling
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
    assert model(image(64, 96)).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image(64, 96)), expected)


@pytest.mark.parametrize(
    "arguments, shape", [(SMALL, (2, 192, 2, 3)), (ATTENTIVE, (2, 1024, 4, 6))], ids=["plain", "attentive"]
)
@torch.no_grad()
def test_no_pooling(arguments, shape):
    model = build(arguments, num_classes=0, global_pool="")
    assert model(image(64, 96)).shape == shape
    assert model.head_hidden_size == shape[1]
    model.reset_classifier(5)  # which needs a pooled vector
    assert model(image(64, 96)).shape == (2, 5)
    with pytest.raises(ValueError, match="num_classes=0"):
        model.reset_classifier(5, "")


@torch.no_grad()
def test_attentive_pooling_is_removed_and_restored():
    model = build(ATTENTIVE)
    pooled = model.forward_head(model.forward_features(image(64, 64)), pre_logits=True)
    model.reset_classifier(0, "")
    assert model(image(64, 64)).shape == (2, 1024, 4, 4)
    model.reset_classifier(0, "attn")
    torch.testing.assert_close(model(image(64, 64)), pooled)


@pytest.mark.parametrize(
    "arguments, pool",
    [(SMALL, "attn"), (SMALL, "mean"), (ATTENTIVE, "avg"), (ATTENTIVE, "catavgmax"), (SMALL, "")],
    ids=["plain-attn", "plain-mean", "attentive-avg", "attentive-catavgmax", "plain-none"],
)
def test_pooling_that_does_not_fit(arguments, pool):
    with pytest.raises(ValueError, match="global_pool"):
        InternImage(**arguments, global_pool=pool)


def test_dropout_before_the_classifier():
    model = build(SMALL, drop_rate=0.5).train()
    model.conv_head.eval()
    features = model.forward_features(image(64, 64))
    pooled = model.forward_head(features, pre_logits=True)
    assert 0.3 < (pooled == 0).float().mean() < 0.7
    assert not (model.eval().forward_head(features, pre_logits=True) == 0).any()


NAN, INF = float("nan"), float("inf")
WRONG_ARGUMENTS = [
    (dict(in_chans=0), "in_chans must be a whole number from 1"),
    (dict(in_chans=3.0), "in_chans.*3.0"),
    (dict(num_classes=-3), "num_classes must be a whole number from 0.*-3"),
    (dict(num_classes="ten"), "num_classes.*'ten'"),
    (dict(num_classes=True), "num_classes.*True"),
    (dict(num_classes=10**12), "num_classes must be a whole number"),
    (dict(channels=0), "channels must be a whole number from 2"),
    (dict(channels=15, groups=(1, 1, 1, 1)), "channels must be even.*15"),
    (dict(channels="16"), "channels.*'16'"),
    (dict(channels=10**12), "channels must be a whole number from 2 to 8192"),
    (dict(depths=(1, 1, 1)), "depths and groups must name four stages"),
    (dict(depths=(0, 1, 3, 1)), "each of depths must be a whole number from 1"),
    (dict(depths=(2, -1, 3, 1)), "each of depths.*-1"),
    (dict(depths=(10**9, 1, 3, 1)), "each of depths must be a whole number from 1 to 1000"),
    (dict(depths="2131"), "depths must be a sequence"),
    (dict(depths=7), "depths must be a sequence"),
    (dict(groups=(1, 2, 4, 7)), "groups must divide the channels of their stage: stage 4 has 128 channels and 7"),
    (dict(groups=(0, 2, 4, 8)), "each of groups"),
    (dict(groups=(1, 2, 4, None)), "each of groups.*None"),
    (dict(mlp_ratio=0), "mlp_ratio must be a number above 0"),
    (dict(mlp_ratio=-4.0), "mlp_ratio"),
    (dict(mlp_ratio=NAN), "mlp_ratio.*nan"),
    (dict(mlp_ratio=0.01), "mlp_ratio.*leaves a channel"),
    (dict(mlp_ratio=10**400), "mlp_ratio"),
    (dict(cls_scale=0.0), "cls_scale must be a number above 0"),
    (dict(cls_scale="1.5"), "cls_scale.*'1.5'"),
    (dict(layer_scale=NAN), "layer_scale must be None or a finite number"),
    (dict(layer_scale="small"), "layer_scale.*'small'"),
    (dict(offset_scale=NAN), "offset_scale must be a finite number"),
    (dict(offset_scale=INF), "offset_scale.*inf"),
    (dict(offset_scale=None), "offset_scale.*None"),
    (dict(post_norm=True, res_post_norm=True), "post_norm and res_post_norm exclude each other"),
    (dict(post_norm="yes"), "post_norm must be true or false.*'yes'"),
    (dict(attentive_head=[]), "attentive_head must be true or false"),
    (dict(pack_weights="no"), "pack_weights must be true or false.*'no'"),
    (dict(dw_kernel_size=0), "dw_kernel_size.*from 1"),
    (dict(dw_kernel_size=4), "dw_kernel_size 4 cannot be centered"),
    (dict(dw_kernel_size=10**9 + 1), "dw_kernel_size.*to 255"),
    (dict(stage3_post_norm_blocks=(3,)), "stage3_post_norm_blocks must be a whole number from 0 to 2"),
    (dict(stage3_post_norm_blocks="02"), "stage3_post_norm_blocks must be a sequence"),
    (dict(act_layer="nope"), "act_layer must be timm's name of an activation, such as 'gelu', got 'nope'"),
    (dict(act_layer=""), "act_layer"),
    (dict(act_layer=5), "act_layer.*5"),
    (dict(act_layer=["gelu"]), "act_layer"),
    (dict(drop_rate=1.5), "drop_rate must be a number from 0 to 1, got 1.5"),
    (dict(drop_rate=-0.1), "drop_rate"),
    (dict(drop_rate=NAN), "drop_rate"),
    (dict(drop_path_rate=2), "drop_path_rate must be a number from 0 to 1, got 2"),
    (dict(drop_path_rate="0.1"), "drop_path_rate"),
    (dict(global_pool=5), "global_pool must be one of"),
]


@pytest.mark.parametrize("arguments, message", WRONG_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        InternImage(**{**SMALL, **arguments, "device": "meta"})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_arguments_in_other_types_of_numbers():
    model = InternImage(
        in_chans=np.int64(1), num_classes=np.int32(3), channels=np.int64(16), depths=[1, 1, np.int64(1), 1],
        groups=np.array([1, 2, 4, 8]), mlp_ratio=np.float32(2), drop_rate=0, layer_scale=1, act_layer=nn.SiLU,
        center_feature_scale=1,
    )  # fmt: skip
    assert model(image(32, 32)[:, :1]).shape == (2, 3)


@pytest.mark.parametrize("num_classes", [-1, "ten", 2.5, None])
def test_new_classifier_of_an_impossible_size(num_classes):
    model = build(SMALL)
    with pytest.raises(ValueError, match="num_classes must be a whole number"):
        model.reset_classifier(num_classes)
    assert model(image(32, 32)).shape == (2, 10)  # the model is as it was


# ---- features


@torch.no_grad()
def test_features_only():
    model = timm.create_model("internimage_atto", features_only=True)
    assert model.feature_info.channels() == [16, 32, 64, 128]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(x.shape) for x in model(image(64, 96))] == [
        (2, 16, 16, 24),
        (2, 32, 8, 12),
        (2, 64, 4, 6),
        (2, 128, 2, 3),
    ]


@torch.no_grad()
def test_out_indices():
    model = timm.create_model("internimage_atto", features_only=True, out_indices=(0, 2))
    assert model.feature_info.channels() == [16, 64]
    assert [x.shape[1] for x in model(image(64, 96))] == [16, 64]
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "levels.3" in name or "levels.2.downsample" in name or "head" in name]
    last = timm.create_model("internimage_atto", features_only=True, out_indices=(-1,))
    assert [x.shape[1] for x in last(image(64, 96))] == [128]


@torch.no_grad()
def test_forward_intermediates(kind):
    model, x = build(kind), image(64, 96)
    seen = []
    handles = [stage.register_forward_hook(lambda *args: seen.append(args[2])) for stage in model.levels]
    features, nhwc = model.forward_intermediates(x, output_fmt="NHWC")
    for handle in handles:
        handle.remove()
    assert len(nhwc) == 4 and all(torch.equal(a, b) for a, b in zip(nhwc, seen))
    _, nchw = model.forward_intermediates(x)
    assert all(torch.equal(a.permute(0, 3, 1, 2), b) for a, b in zip(nhwc, nchw))
    torch.testing.assert_close(features, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(features), model(x))
    for indices, kept in ((2, [2, 3]), ([0, 2], [0, 2]), ([-3], [1])):
        taken = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
        assert [tuple(t.shape) for t in taken] == [tuple(nchw[i].shape) for i in kept]
        assert all(torch.equal(t, nchw[i]) for t, i in zip(taken, kept))


def test_forward_intermediates_refuses_an_unknown_layout():
    with pytest.raises(ValueError, match="output_fmt"):
        build(SMALL).forward_intermediates(image(32, 32), output_fmt="NLC")


@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_pruning(kind, last):
    model, x = build(kind), image(64, 96)
    # with gradients, as below: the fast path of inference may round differently
    expected = model.forward_intermediates(x, intermediates_only=True)[last].detach()
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([last], prune_norm=True) == [last]
    features, (tap,) = pruned.forward_intermediates(x, [last])
    assert torch.equal(tap, expected) and torch.equal(features, expected)
    assert torch.equal(pruned.forward_features(x), expected)
    assert pruned.num_features == pruned.head_hidden_size == expected.shape[1]
    tap.sum().backward()
    assert not [name for name, parameter in pruned.named_parameters() if parameter.grad is None]
    pruned.reset_classifier(5)
    assert pruned(x).shape == (2, 5)


@torch.no_grad()
def test_pruning_nothing_changes_nothing(kind):
    model, x = build(kind), image(64, 96)
    expected = model(x)
    model.prune_intermediate_layers(4, prune_head=False)
    assert torch.equal(model(x), expected)
    features = model.forward_features(x)
    model.prune_intermediate_layers(4)  # removes the head; forward_features is unchanged
    assert torch.equal(model.forward_features(x), features)
    assert torch.equal(model(x), features)


# ---- training


def test_drop_path_rises_linearly_over_all_blocks():
    model = InternImage(**SMALL, drop_path_rate=0.6)
    blocks = [block for stage in model.levels for block in stage.blocks]
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    for name in ("drop_path1", "drop_path2"):
        rates = [getattr(block, name).drop_prob for block in blocks[1:]]
        assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_layers_are_upstreams():
    """Upstream's `lr_decay_keywards`: each block is a layer; what is between stages belongs to the block after it."""
    model = InternImage(**ATTENTIVE)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {name for name, _ in model.named_parameters()}
    expected = {
        "patch_embed.": 0,
        "levels.0.blocks.0.": 0,
        "levels.0.blocks.1.": 1,
        "levels.0.norm.": 2,
        "levels.0.downsample.": 2,
        "levels.1.blocks.0.": 2,
        "levels.1.norm.": 3,
        "levels.1.downsample.": 3,
        "levels.2.blocks.0.": 3,
        "levels.2.post_norms.0.": 3,
        "levels.2.blocks.1.": 4,
        "levels.2.blocks.2.": 5,
        "levels.2.post_norms.1.": 5,
        "levels.2.norm.": 6,
        "levels.2.downsample.": 6,
        "levels.3.blocks.0.": 6,
        "levels.3.norm.": 6,
        "dcnv3_head_x3.": 6,
        "dcnv3_head_x4.": 6,
        "clip_projector.": 6,
        "fc_norm.": 6,
        "head.": 6,
    }
    for name, layer in layers.items():
        assert [layer] == [value for prefix, value in expected.items() if name.startswith(prefix)], name
    plain = InternImage(**SMALL)
    layers = group_parameters(plain, plain.group_matcher(), reverse=True)
    assert {layers[name] for name in layers if name.startswith(("conv_head.", "head."))} == {6}
    coarse = group_parameters(plain, plain.group_matcher(coarse=True), reverse=True)
    assert (coarse["patch_embed.conv1.weight"], coarse["levels.0.blocks.1.norm1.0.weight"]) == (0, 1)


def test_layer_decay_of_timm():
    model = InternImage(**SMALL)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert scales[id(named["head.weight"])] == scales[id(named["levels.3.blocks.0.mlp.fc1.weight"])] == 1.0
    assert scales[id(named["levels.2.downsample.conv.weight"])] == 1.0
    assert scales[id(named["levels.2.blocks.2.mlp.fc1.weight"])] == 0.5
    assert scales[id(named["patch_embed.conv1.weight"])] == 0.5**6
    assert {decays[id(p)] for p in named.values() if p.ndim > 1} == {0.05}
    assert {decays[id(p)] for p in named.values() if p.ndim == 1} == {0.0}


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(kind, drop_path):
    calls, results = [], []
    for checkpointing in (False, True):
        model = build(kind, drop_path_rate=drop_path).train()
        model.set_grad_checkpointing(checkpointing)
        count = []
        for module in model.modules():
            if isinstance(module, Block):
                module.register_forward_pre_hook(lambda *args, count=count: count.append(1))
        torch.manual_seed(3)
        logits = model(image(64, 64))
        logits.square().mean().backward()
        calls.append(len(count))
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert calls == [7, 14]  # every block ran again in the backward pass
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def test_initial_values(kind):
    """As upstream: linears truncated normal 0.02 but DCNv3's projections Xavier, offsets and masks zero."""
    model = InternImage(**kind)
    for name, value in model.state_dict().items():
        linear = value.ndim == 2
        if name.endswith((".gamma1", ".gamma2")):
            assert (value == 1e-5).all(), name
        elif ".offset." in name or ".mask." in name or "center_feature_scale" in name:
            assert not value.any(), name
        elif linear and ("input_proj" in name or "output_proj" in name):
            assert value.std().item() == pytest.approx((1 / value.shape[0]) ** 0.5, rel=0.15), name
        elif linear:
            assert value.std().item() == pytest.approx(0.02, rel=0.15), name
        elif name.endswith("bias") and ("mlp" in name or "proj" in name or name == "head.bias" or "cross_dcn" in name):
            assert not value.any(), name


def test_init_weights_after_to_empty(kind):
    fresh = InternImage(**kind).state_dict()
    model = InternImage(**kind, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(float("nan") if value.is_floating_point() else 9)
    model.init_weights()
    for name, value in model.state_dict().items():
        expected = fresh[name]
        if expected.unique().numel() == 1:
            assert torch.equal(value, expected), name
        else:
            assert value.isfinite().all(), name
            few = 4 / expected.numel() ** 0.5  # standard errors
            assert value.std().item() == pytest.approx(expected.std().item(), rel=0.05 + few), name
            assert value.mean().item() == pytest.approx(expected.mean().item(), abs=few * expected.std().item()), name


# ---- devices, dtypes, compilers


def test_device_and_dtype(kind):
    model = InternImage(**kind, device="meta", dtype=torch.bfloat16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert not [name for name, value in tensors.items() if value.device.type != "meta"]
    assert {value.dtype for value in tensors.values() if value.is_floating_point()} == {torch.bfloat16}
    atto = timm.create_model("internimage_atto", dtype=torch.float64)
    assert {parameter.dtype for parameter in atto.parameters()} == {torch.float64}
    assert atto(image(32, 32).double()).dtype == torch.float64


@torch.no_grad()
def test_bfloat16(kind):
    model, x = build(kind), image(64, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    assert mixed.dtype == torch.bfloat16
    assert_close(mixed, expected, 0.1, "autocast")
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half, expected, 0.1, "bfloat16")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(backend):
    """The code of inductor takes a minute of C++ compilation."""
    model = timm.create_model("internimage_atto", num_classes=10).eval()
    model.load_state_dict(golden.fill_state_dict({key: value.shape for key, value in model.state_dict().items()}))
    compiled, results = torch.compile(model, fullgraph=True, backend=backend), []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(image(64, 96))
        logits.square().mean().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    for expected, actual in zip(*results):
        assert_close(actual, expected, 1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # timm's models still support it
@torch.no_grad()
def test_script_and_trace(kind):
    """timm's tests script and trace no model with the attentive head, as these are too big."""
    model, x = build(kind), image(64, 96)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    graph = torch.fx.Tracer(autowrap_functions=tuple(get_notrace_functions())).trace(model)
    traced = torch.fx.GraphModule(model, graph)
    torch.testing.assert_close(traced(x), expected)
    if kind is ATTENTIVE:
        with pytest.raises(ValueError, match="64 x 64"):
            traced(image(48, 64))


# ---- registration


@pytest.mark.parametrize(
    "name, post_norm, layer_scale, offset_scale, extra_norms",
    [
        ("internimage_atto", False, None, 1.0, []),
        ("internimage_tiny", False, None, 1.0, []),
        ("internimage_small", True, 1e-5, 1.0, []),
        ("internimage_base", True, 1e-5, 1.0, []),
        ("internimage_large", True, 1e-5, 2.0, []),
        ("internimage_xlarge", True, 1e-5, 2.0, []),
        ("internimage_huge", False, None, 1.0, [5, 11, 17, 23, 29]),
        ("internimage_giant", True, None, 1.0, [5, 11, 17, 23, 29, 35, 41, 47]),
    ],
)
def test_arguments_that_no_key_shows(name, post_norm, layer_scale, offset_scale, extra_norms):
    """The outputs of the large models are compared in the slow tests only."""
    model = timm.create_model(name, device="meta")
    blocks = [block for stage in model.levels for block in stage.blocks]
    assert {block.post_norm for block in blocks} == {post_norm}
    assert {block.layer_scale for block in blocks} == {layer_scale}
    assert {block.dcn.offset_scale for block in blocks} == {offset_scale}
    assert [stage.post_norm_blocks for stage in model.levels] == [[], [], extra_norms, []]


def test_list_models():
    ours = [name for name in internimage.list_models() if not name.startswith("dcnv")]  # see test_dcn_resnet.py
    assert sorted(ours) == sorted(ARCHITECTURES)
    assert {name for name in internimage.list_models(pretrained=True) if not name.startswith("dcnv")} == {
        name for name, published in PUBLISHED.items() if published.hub_id
    }
    assert set(timm.list_models("internimage_*")) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ["internimage_nano", "internimage_tiny.ogvl_in22k"])
def test_unknown_name(name):
    with pytest.raises(RuntimeError, match="Unknown model|Invalid pretrained tag"):
        timm.create_model(name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_name_without_tag_has_1000_classes(name):
    model = timm.create_model(name, device="meta")
    assert model.num_classes == model.pretrained_cfg["num_classes"] == model.get_classifier().out_features == 1000


TAGGED = timm.list_models("internimage_*", include_tags=True)


@pytest.mark.parametrize("name", TAGGED)
def test_pretrained_cfg(name):
    cfg = timm.get_pretrained_cfg(name)
    architecture, tag = name.split(".")
    side = int((re.search(r"_(\d+)$", tag) or ["", 224])[1])
    stride = 16 if architecture in ("internimage_huge", "internimage_giant") else 32
    assert cfg.input_size == (3, side, side)
    assert cfg.pool_size == (side // stride, side // stride)
    assert cfg.num_classes == (21841 if "in22k" in tag and "ft_in1k" not in tag else 1000)
    assert (cfg.crop_pct, cfg.interpolation) == (1.0, "bicubic")
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (cfg.first_conv, cfg.classifier, cfg.license) == ("patch_embed.conv1", "head", "mit")
    resize, crop, *_ = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    ).transforms
    assert (resize.size, tuple(crop.size)) == (side, (side, side))


def test_tags_are_the_published_weights():
    assert {name for name in TAGGED if not name.startswith("internimage_atto")} == set(PUBLISHED)
    for file, name in golden.MODELS.items():
        cfg, published = timm.get_pretrained_cfg(name), PUBLISHED[name]
        if file == "internimage_h_22kto1k_384":  # a configuration without a file
            assert (published.hub_id, published.pth, cfg.hf_hub_id) == (None, None, None)
            assert not timm.is_model_pretrained(name)
            continue
        assert published.hub_id == cfg.hf_hub_id == f"OpenGVLab/{file}"
        assert cfg.hf_hub_filename == "model.safetensors"
        assert published.pth.endswith(".pth")
        assert timm.is_model_pretrained(name)


@pytest.mark.parametrize("name", ["internimage_atto", "internimage_huge.ogvl_joint_in22k_ft_in1k_384"])
def test_asking_for_weights_that_were_never_released(name, monkeypatch):
    # timm builds a model before it asks for weights, and this one is big
    monkeypatch.setattr(
        "internimage.models.classifier.InternImage.__init__", lambda self, **_: nn.Module.__init__(self)
    )
    with pytest.raises(CheckpointError, match="no weights were released"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_exported_model_gives_the_same(kind):
    """As docs/models.md says about torch.export."""
    model, x = build(SMALL).eval(), image(64, 64)
    auto = torch.export.Dim.AUTO
    shapes = None if kind == "fixed" else {"x": {2: auto, 3: auto}}
    program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    for size in (64,) if kind == "fixed" else (64, 96):
        other = image(size, size)
        with torch.no_grad():
            torch.testing.assert_close(program(other), model(other), rtol=1e-5, atol=1e-6)
