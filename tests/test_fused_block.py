# SPDX-License-Identifier: MIT
"""Blocks in CPU inference: the bits of their modules, and that nothing about a block goes unnoticed."""

import copy
import io
import pickle
import threading
import zipfile

import golden
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, assert_close
from test_gelu import exact_gelu
from test_layer_norm import exact_layer_norm
from timm.layers import DropPath
from timm.models import create_feature_extractor
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from internimage.extension import has_kernel
from internimage.layers import batches
from internimage.layers import mlp as mlp_module
from internimage.layers.conv import Conv2d
from internimage.layers.linear import Linear
from internimage.layers.norm import create_norm
from internimage.layers.packing import set_weight_packing
from internimage.models import InternImage, fused_block
from internimage.models.blocks import Block
from internimage.models.fused_block import FusedBlock
from internimage.models.timm_folder import save_model
from internimage.ops import dcnv3_reference, onednn

pytestmark = pytest.mark.skipif(not has_kernel("query", "cpu"), reason="needs the compiled CPU kernels")

KINDS = {
    "plain": {},
    "scaled": dict(post_norm=True, layer_scale=0.5, offset_scale=2.0),
    "pre-norm, scaled": dict(layer_scale=0.5),
    "huge": dict(res_post_norm=True, dw_kernel_size=5, center_feature_scale=True),
    "huge, scaled": dict(res_post_norm=True, center_feature_scale=True, layer_scale=0.5),
    "no center": dict(remove_center=True, mlp_ratio=2.5),
    "stochastic": dict(drop_path=0.5),
}
HALF = [torch.bfloat16, torch.float16]


def build(kind="plain", channels=16, groups=2, dtype=torch.float32, **more) -> Block:
    """A block in which every parameter matters."""
    block = Block(channels, groups, **{**KINDS[kind], **more}).eval()
    block.load_state_dict(golden.fill_state_dict({key: value.shape for key, value in block.state_dict().items()}))
    return block.to(dtype)


def by_modules(block: Block, x: Tensor) -> Tensor:
    """What the modules compute, one after another, as a hook asks for."""
    handle = block.drop_path1.register_forward_hook(lambda *_: None)
    try:
        return block(x)
    finally:
        handle.remove()


def exact(block: Block, x: Tensor) -> Tensor:
    """In float64 by torch's own functions and the plain-torch operator, from the block's parameters."""
    p = {name: value.detach().double() for name, value in block.named_parameters()}
    dcn, x = block.dcn, x.double()

    def norm(name: str, x: Tensor) -> Tensor:
        return exact_layer_norm(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"], 1e-6) if f"{name}.0.weight" in p else x

    def linear_(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def attend(x: Tensor) -> Tensor:
        conv = F.conv2d(
            x.permute(0, 3, 1, 2), p["dcn.dw_conv.0.weight"], p["dcn.dw_conv.0.bias"],
            padding=dcn.dw_kernel_size[0] // 2, groups=x.shape[-1],
        )  # fmt: skip
        query = exact_layer_norm(conv.permute(0, 2, 3, 1), p["dcn.dw_conv.1.1.weight"], p["dcn.dw_conv.1.1.bias"], 1e-6)
        query, projected = exact_gelu(query), linear_("dcn.input_proj", x)
        y = dcnv3_reference.dcnv3(projected, linear_("dcn.offset", query), linear_("dcn.mask", query), *dcn.geometry)
        if dcn.center_feature_scale:
            names = "dcn.center_feature_scale_proj_weight", "dcn.center_feature_scale_proj_bias"
            share = F.linear(query, p[names[0]], p[names[1]]).sigmoid().repeat_interleave(x.shape[-1] // dcn.groups, -1)
            y = y * (1 - share) + projected * share
        return linear_("dcn.output_proj", y)

    def mlp(x: Tensor) -> Tensor:
        return linear_("mlp.fc2", exact_gelu(linear_("mlp.fc1", x)))

    for i, branch in ((1, attend), (2, mlp)):
        y = norm(f"norm{i}", branch(x)) if block.post_norm else norm(f"res_post_norm{i}", branch(norm(f"norm{i}", x)))
        x = x + y * p.get(f"gamma{i}", 1.0)
    return x


def calls(monkeypatch) -> list[FusedBlock]:
    """The fused blocks that compute something, from now on."""
    seen: list[FusedBlock] = []
    run = FusedBlock.__call__
    monkeypatch.setattr(FusedBlock, "__call__", lambda self, x: seen.append(self) or run(self, x))
    return seen


@pytest.fixture(params=KINDS, ids=str)
def kind(request) -> str:
    return request.param


# ---- results

SIZES = [(2, 9, 11), (1, 1, 1), (1, 2, 3), (1, 1, 7), (1, 2, 4), (3, 1, 3), (0, 4, 4), (1, 33, 40)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.inference_mode()
def test_a_fused_block_has_the_bits_of_its_modules(monkeypatch, kind, dtype, packed):
    """Few rows, and chunks with a rest of few rows, go by torch's products in both."""
    monkeypatch.setattr(mlp_module, "_HIDDEN_BYTES", 50 * 64 * dtype.itemsize)
    with torch.inference_mode(False):
        block = build(kind, dtype=dtype)
    set_weight_packing(block, packed)
    seen = calls(monkeypatch)
    for i, size in enumerate(SIZES):
        x = golden.randn(i, (*size, 16)).to(dtype)
        kept = x.clone()
        output = block(x)
        assert len(seen) == i + 1 and torch.equal(x, kept)
        assert output.is_contiguous() and output.dtype == dtype
        assert torch.equal(output, by_modules(block, x)), size
        assert_close(output, exact(block, x), 1e-5 if dtype == torch.float32 else None)
        strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert torch.equal(block(strided), output)
        del seen[-1]
    can = onednn.CAN_PACK and packed and onednn.has_product(dtype)
    assert (block._fused.fc1.packed is not None) == can


@pytest.mark.parametrize("channels, groups", [(64, 4), (80, 5), (112, 7), (192, 12)], ids=str)
@torch.inference_mode()
def test_widths_of_released_models(channels, groups):
    with torch.inference_mode(False):
        block = build("scaled", channels, groups)
    for size in ((1, 14, 14), (2, 7, 7), (1, 31, 28)):
        x = golden.images(1, (*size, channels))
        assert torch.equal(block(x), by_modules(block, x)), size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", ["pre-norm, scaled", "scaled", "plain"])
@torch.no_grad()
def test_widths_with_remainders(kind, dtype):
    """Rows that are no whole number of vectors, of any width of them."""
    for channels, groups in ((3, 3), (10, 2), (26, 2), (70, 7)):
        block = build(kind, channels, groups, dtype)
        x = golden.randn(1, (2, 3, 5, channels)).to(dtype)
        output = block(x)
        assert isinstance(block._fused, FusedBlock)
        assert_close(output, exact(block, x), 2 * TOLERANCE.get(dtype, 1e-5) if dtype in HALF else None)
        if dtype not in HALF:
            assert torch.equal(output, by_modules(block, x))


@torch.no_grad()
def test_a_torch_without_the_products_that_a_block_calls(monkeypatch):
    monkeypatch.setattr(fused_block, "has_kernel", lambda name, device: name != "block" and has_kernel(name, device))
    block, x = build("scaled"), golden.images(1, (2, 9, 11, 16))
    output = block(x)
    assert block._fused is None
    assert torch.equal(output, build("scaled")(x))


@torch.no_grad()
def test_the_operator_refuses_what_does_not_fit():
    """Called directly it has no checks in Python."""
    block, x = build("pre-norm, scaled"), golden.images(1, (2, 9, 11, 16))
    expected = block(x)
    weights, settings, numbers = block._fused.arguments
    operator = torch.ops.internimage.block
    assert torch.equal(operator(x, weights, settings, numbers, 50), expected)
    for lists in ((weights[1:], settings, numbers), (weights, settings[1:], numbers), (weights, settings, [])):
        with pytest.raises(RuntimeError, match="internimage::block: wrong number of weights, settings or numbers"):
            operator(x, *lists, 50)
    with pytest.raises(RuntimeError, match="wrong number"):
        operator(x, weights, settings, numbers, 0)
    for other in (x[0], x.transpose(1, 2), x[..., :8]):
        with pytest.raises(RuntimeError, match="internimage::block: input must be"):
            operator(other, weights, settings, numbers, 50)
    scale = next(i for i, weight in enumerate(weights) if weight is block.gamma2)
    for wrong in (block.gamma2[:7], block.gamma2.double(), block.gamma2.view(4, 4)):
        with pytest.raises(RuntimeError, match="a branch and its scale must have input's sizes and dtype"):
            operator(x, [*weights[:scale], wrong, *weights[scale + 1 :]], settings, numbers, 50)
    for name in range(len(weights)):  # whatever is missing
        if weights[name] is not None and weights[name] is not block.gamma1 and weights[name] is not block.gamma2:
            fewer = [*weights[:name], None, *weights[name + 1 :]]
            try:
                operator(x, fewer, settings, numbers, 50)
            except RuntimeError as error:
                assert str(error)


@torch.inference_mode()
def test_threads_do_not_change_a_bit(monkeypatch, kind):
    monkeypatch.setattr(mlp_module, "_HIDDEN_BYTES", 1 << 15)
    with torch.inference_mode(False):
        block = build(kind)
    x, threads = golden.images(1, (2, 40, 33, 16)), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [block(x), by_modules(block, x)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtypes", [None, frozenset({torch.float32}), frozenset()], ids=["own", "float32", "none"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_half_types(monkeypatch, kind, dtype, packed, dtypes):
    """Also on a processor without products in them, where the block is computed in float32."""
    if dtypes is not None:
        monkeypatch.setattr(onednn, "_DTYPES", dtypes)
        monkeypatch.setattr(fused_block, "CAN_PACK", onednn.CAN_PACK and bool(dtypes))
    block = build(kind, dtype=dtype)
    set_weight_packing(block, packed)
    x = golden.randn(1, (2, 9, 11, 16)).to(dtype)
    seen = calls(monkeypatch)
    output = block(x)
    assert seen and output.dtype == dtype
    expected = exact(block, x)
    assert_close(output, expected, 2 * TOLERANCE[dtype])  # the blocks' steps are rounded, too
    if seen[0].in_float:  # only once, at the end: half a unit, and what float32 makes of sums
        unit = torch.finfo(dtype).eps / 2
        error = (output.double() - expected).abs()
        assert (error <= 1.01 * unit * expected.abs() + 1e-4).all()
    assert_close(by_modules(block, x), expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [8, 9, 3136])
@torch.no_grad()
def test_weights_packed_for_one_size_serve_another(rows):
    block = build("plain", 64, 4)
    block(golden.images(1, (1, 1, rows, 64)))
    made = block._fused
    for size in ((1, 1, 2), (1, 4, 4), (2, 31, 28), (5, 14, 14)):
        x = golden.images(2, (*size, 64))
        assert torch.equal(block(x), by_modules(block, x))
    assert block._fused is made


# ---- what is noticed


def step(block: Block, make=lambda parameters: torch.optim.SGD(parameters, 0.1)) -> None:
    with torch.enable_grad():
        block(golden.images(5, (1, 4, 5, 16))).square().sum().backward()
    make(block.parameters()).step()


def replaced(block: Block, path: str, value: object) -> None:
    owner, _, name = path.rpartition(".")
    setattr(block.get_submodule(owner), name, value)


def tripled(block: Block) -> dict[str, Tensor]:
    return {key: value * 3 for key, value in block.state_dict().items()}


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def drawn(block: Block, path: str) -> nn.Parameter:
    return nn.Parameter(torch.randn_like(block.get_parameter(path)))


def assigned(block: Block, path: str, value: Tensor) -> None:
    block.get_parameter(path).data = value


# each changes what the block computes
CHANGES = {
    "in place": lambda b: b.mlp.fc1.weight.mul_(2),
    "one element": lambda b: b.mlp.fc1.weight[3, 5].add_(9),
    "in place, a bias": lambda b: b.mlp.fc1.bias.add_(1),
    "in place, a joined bias": lambda b: b.dcn.mask.bias.mul_(-2),
    "in place, a norm": lambda b: b.norm1[0].weight.mul_(2),
    "in place, a view": lambda b: b.dcn.offset.weight[3:7].mul_(2),
    "in place, detached": lambda b: b.dcn.offset.weight.detach().mul_(2),
    "in place, through the state": lambda b: b.state_dict()["dcn.offset.weight"].mul_(2),
    "in place, foreach": lambda b: torch._foreach_mul_(list(b.parameters()), 1.5),
    "data": lambda b: b.mlp.fc2.weight.data.mul_(2),
    "data of a joined bias": lambda b: b.dcn.offset.bias.data.mul_(2),
    "data of a bias": lambda b: b.dcn.output_proj.bias.data.add_(2),
    "data of a norm": lambda b: b.norm2[0].weight.data.mul_(2),
    "data of a convolution": lambda b: b.dcn.dw_conv[0].weight.data.mul_(2),
    "other data": lambda b: assigned(b, "mlp.fc1.weight", torch.randn(64, 16)),
    "other data of a norm": lambda b: assigned(b, "norm1.0.bias", torch.randn(16)),
    "strided data": lambda b: assigned(b, "dcn.input_proj.weight", b.dcn.input_proj.weight.data.T),
    "strided data elsewhere": lambda b: assigned(b, "mlp.fc1.weight", torch.randn(16, 64).T),
    "numpy": lambda b: b.mlp.fc2.weight.detach().numpy().fill(0.5),
    "parameter": lambda b: replaced(b, "mlp.fc1.weight", drawn(b, "mlp.fc1.weight")),
    "parameter of a norm": lambda b: replaced(b, "norm2.0.bias", drawn(b, "norm2.0.bias")),
    "parameter of the offsets": lambda b: replaced(b, "dcn.offset.bias", drawn(b, "dcn.offset.bias")),
    "new layer scale": lambda b: replaced(b, "gamma2", nn.Parameter(torch.full((16,), 0.5))),
    "state": lambda b: b.load_state_dict(tripled(b)),
    "state, assigned": lambda b: b.load_state_dict(tripled(b), assign=True),
    "SGD": step,
    "AdamW": lambda b: step(b, lambda p: torch.optim.AdamW(p, 0.1)),
    "AdamW, fused": lambda b: step(b, lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "AdamW, foreach": lambda b: step(b, lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "swapped": lambda b: torch.utils.swap_tensors(b.mlp.fc1.weight, drawn(b, "mlp.fc1.weight")),
    "vector": lambda b: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(b.parameters()) * 1.5, b.parameters()
    ),
    "initial": lambda b: nn.init.trunc_normal_(b.dcn.mask.weight),
    "layer": lambda b: replaced(b, "mlp.fc1", Linear(16, 64)),
    "torch's layer": lambda b: replaced(b, "mlp.fc2", nn.Linear(64, 16)),
    "no bias": lambda b: replaced(b, "dcn.output_proj", Linear(16, 16, bias=False)),
    "bias removed": lambda b: replaced(b, "dcn.output_proj.bias", None),
    "wider": lambda b: (replaced(b, "mlp.fc1", Linear(16, 40)), replaced(b, "mlp.fc2", Linear(40, 16))),
    "activation": lambda b: replaced(b, "mlp.act", nn.ReLU()),
    "activation of the query": lambda b: replaced(b, "dcn.dw_conv.2", nn.ReLU()),
    "norm": lambda b: replaced(b, "norm1", create_norm(16, eps=0.5)),
    "torch's norm": lambda b: replaced(b, "norm1.0", nn.LayerNorm(16, eps=0.5)),
    "no norm": lambda b: replaced(b, "norm1", nn.Identity()),
    "norm without weight": lambda b: replaced(b, "norm1.0", nn.LayerNorm(16, elementwise_affine=False)),
    "norm after the branch": lambda b: replaced(b, "res_post_norm2", create_norm(16)),
    "batch norm": lambda b: replaced(b, "dcn.dw_conv.1", create_norm(16, "batchnorm", "NCHW").eval()),
    "appended": lambda b: b.norm2.append(Halved()),
    "appended to the query": lambda b: b.dcn.dw_conv.append(Halved()),
    "inserted into the norm of the query": lambda b: b.dcn.dw_conv[1].insert(1, nn.Softmax(-1)),
    "path": lambda b: replaced(b, "drop_path2", Halved()),
    "eps": lambda b: replaced(b, "norm1.0.eps", 0.5),
    "eps of the query": lambda b: replaced(b, "dcn.dw_conv.1.1.eps", 0.5),
    "offset_scale": lambda b: replaced(b, "dcn.offset_scale", 0.3),
    "dilation": lambda b: (replaced(b, "dcn.dilation", (2, 2)), replaced(b, "dcn.padding", (2, 2))),
    "dilation of the query": lambda b: (
        replaced(b, "dcn.dw_conv.0.dilation", (2, 2)),
        replaced(b, "dcn.dw_conv.0.padding", (2, 2)),
    ),
    "post_norm": lambda b: setattr(b, "post_norm", True),
    "forward": lambda b: setattr(b.mlp, "forward", lambda x: x / 2),
    "forward of a path": lambda b: setattr(b.drop_path1, "forward", lambda x: x / 2),
    "hook": lambda b: b.mlp.act.register_forward_hook(lambda module, arguments, output: output / 2),
    "hook before": lambda b: b.dcn.register_forward_pre_hook(lambda module, arguments: (arguments[0] / 2,)),
    "weight norm": lambda b: parametrizations.weight_norm(b.mlp.fc1).parametrizations.weight.original0.mul_(2),
    "parametrized": lambda b: parametrize.register_parametrization(b.mlp.fc2, "weight", Halved()),
    "pruned": lambda b: prune.random_unstructured(b.mlp.fc1, "weight", 0.5),
}


UNCOUNTED = [name for name in CHANGES if name.startswith("data")]


@pytest.mark.parametrize("change", [CHANGES[name] for name in UNCOUNTED], ids=UNCOUNTED)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_a_change_of_what_was_copied_to_float32_is_noticed(monkeypatch, dtype, change):
    monkeypatch.setattr(onednn, "_DTYPES", frozenset({torch.float32}))
    block, x = build(dtype=dtype), golden.randn(1, (2, 6, 7, 16)).to(dtype)
    before = block(x)
    assert block._fused.in_float == onednn.CAN_PACK
    change(block)
    assert_close(block(x), exact(block, x), 2 * TOLERANCE[dtype])
    assert not torch.allclose(block(x), before, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_is_noticed(monkeypatch, change):
    """What a block that has run computes after a change is what one computes that never ran before."""
    block, x = build(), golden.images(1, (2, 6, 7, 16))
    before = block(x)
    assert block._fused is not None
    torch.manual_seed(1)
    change(block)
    output = block(x)
    monkeypatch.setattr(Block, "fused_for", lambda self, x: None)
    expected = block(x)
    assert torch.equal(output, expected)
    assert not torch.allclose(output, before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_old_weight_norm():
    block, x = build(), golden.images(1, (2, 6, 7, 16))
    before = block(x)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(block.mlp.fc1)
    assert_close(block(x), before, 1e-5)
    block.mlp.fc1.weight_g.mul_(2)
    assert not torch.allclose(block(x), before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_hooks_that_are_added_later_run_as_long_as_they_are_there(monkeypatch):
    block, x = build(), golden.images(1, (2, 6, 7, 16))
    expected, seen = block(x), calls(monkeypatch)
    ran: list[nn.Module] = []
    for module in list(block.modules())[1:]:
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda module, *_: ran.append(module))
            output = block(x)
            # the modules of the query are torch's, which round otherwise
            assert_close(output, expected, 1e-5 if module in set(block.dcn.dw_conv.modules()) else 0)
            handle.remove()
        assert ran == [module] * 2
        del ran[:]
    assert not seen
    for register in (
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda module, *_: ran.append(module))
        assert_close(block(x), expected, 1e-5)
        handle.remove()
        assert set(ran) == set(block.modules())
        del ran[:]
    assert not seen and torch.equal(block(x), expected) and len(seen) == 1


@torch.no_grad()
def test_hooks_of_the_block_itself_leave_it_fused(monkeypatch):
    block, x = build(), golden.images(1, (2, 6, 7, 16))
    expected, seen = block(x), calls(monkeypatch)
    block.register_forward_hook(lambda module, arguments, output: output * 2)
    assert torch.equal(block(x), expected * 2) and len(seen) == 1


@torch.no_grad()
def test_a_path_that_drops_is_not_fused():
    """`train` of the path alone, as for an ensemble of draws."""
    block, x = build("stochastic"), golden.images(1, (64, 2, 2, 16))
    expected = block(x)
    paths = [block.drop_path1, block.drop_path2]
    assert block._fused is not None and all(isinstance(path, DropPath) for path in paths)
    for path in paths:
        path.train()
        assert not torch.equal(block(x), expected)
        path.eval()
        assert torch.equal(block(x), expected)


@torch.no_grad()
def test_training_frees_what_was_packed():
    model = InternImage(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), num_classes=3).eval()
    x = golden.images(1, (1, 3, 64, 64))
    keepers = [module for module in model.modules() if isinstance(module, (Block, Conv2d))]
    assert len(keepers) == 4 + 2 + 3

    def kept() -> list[bool]:
        return [(module._fused if isinstance(module, Block) else module._packed) is not None for module in keepers]

    for drop in (
        lambda state: model.double().float(),
        lambda state: model.to("meta").to_empty(device="cpu").load_state_dict(state),
        lambda state: set_weight_packing(model, True),
    ):
        model(x)
        assert all(kept()) or not onednn.CAN_PACK
        state = {key: value.clone() for key, value in model.state_dict().items()}
        drop(state)
        assert not any(kept())
    expected = model(x)
    model.train()
    assert not any(kept())
    model(x)
    assert not any(kept())
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    assert torch.equal(model(x), expected)


def test_gradients_go_by_modules(monkeypatch):
    block, x = build(), golden.images(1, (2, 6, 7, 16))
    seen = calls(monkeypatch)
    output = block(x)
    assert output.requires_grad and not seen and block._fused is None  # nothing was packed in vain
    with torch.no_grad():
        expected = block(x)
    assert seen
    assert_close(output, expected, 1e-5)
    del seen[:]
    block(x).sum().backward()
    assert not seen and all(parameter.grad is not None for parameter in block.parameters())
    block.requires_grad_(False)
    assert torch.equal(block(x), expected) and len(seen) == 1
    block(x.clone().requires_grad_()).sum().backward()
    assert len(seen) == 1
    block.mlp.fc2.bias.requires_grad_(True)
    assert block(x).requires_grad and len(seen) == 1
    with torch.inference_mode():
        assert torch.equal(block(x), expected)


def test_inference_mode_and_its_absence():
    """Weights that are packed in one serve in the other; those that were made in it have no versions."""
    x = golden.images(1, (2, 6, 7, 16))
    with torch.inference_mode():
        made_inside = build()
        outside = golden.images(1, (2, 6, 7, 16))
        expected = made_inside(x)
        made_inside.mlp.fc1.weight.mul_(2)
        changed = made_inside(x)
        assert torch.equal(changed, by_modules(made_inside, x)) and not torch.equal(changed, expected)
        assert made_inside._fused is None or made_inside._fused.fc1.packed is None
        made_inside.mlp.fc1.weight.mul_(0.5)
    with torch.no_grad():
        assert torch.equal(made_inside(outside), expected)
    block = build()
    with torch.inference_mode():
        assert torch.equal(block(x), expected)
    with torch.no_grad():
        assert torch.equal(block(outside), expected)
        block.mlp.fc1.weight.mul_(2)
        assert torch.equal(block(x), changed)
    with torch.inference_mode():
        assert torch.equal(block(x), changed)
        block.mlp.fc1.weight.mul_(0.5)
        assert torch.equal(block(x), expected)
    assert torch.equal(block.requires_grad_(False)(x), expected)


@torch.no_grad()
def test_dtypes_one_after_another():
    block, x = build(), golden.images(1, (2, 6, 7, 16))
    expected = exact(block, x)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        block.to(dtype)
        assert_close(block(x.to(dtype)), expected, 2 * TOLERANCE[torch.bfloat16])
        assert block._fused.dtype == dtype
    with pytest.raises(RuntimeError):
        block(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(block(x), expected, 0.05)


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_an_input_that_does_not_fit_is_refused(packed):
    block = build("scaled")
    set_weight_packing(block, packed)
    block(golden.images(1, (2, 6, 7, 16)))
    for shape in ((2, 6, 7, 15), (2, 6, 7, 17), (2, 6, 7, 32), (2, 6, 7, 1), (2, 6, 7, 0)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            block(torch.randn(shape))


# ---- copies


@torch.no_grad()
def test_copies_and_files_have_no_packed_weights():
    block, x = build(), golden.images(1, (2, 6, 7, 16))
    names = list(block.state_dict())
    expected = block(x)
    assert block._fused is not None
    buffer = io.BytesIO()
    torch.save(block, buffer)
    stored = [name for name in zipfile.ZipFile(buffer).namelist() if "/data/" in name]
    assert len(stored) == len(list(block.parameters()))
    buffer.seek(0)
    for made in (
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(buffer, weights_only=False),
    ):
        assert made._fused is None
        assert torch.equal(made(x), expected)
        made.mlp.fc1.weight.mul_(2)
        assert not torch.equal(made(x), expected) and torch.equal(block(x), expected)
    assert list(block.state_dict()) == names == list(build().state_dict())
    shallow = copy.copy(block)
    assert torch.equal(shallow(x), expected)


# ---- models


def model_and_image(**arguments) -> tuple[InternImage, Tensor]:
    sizes = dict(channels=16, depths=(2, 1, 3, 1), groups=(1, 2, 4, 8), num_classes=10)
    model = InternImage(**sizes, **arguments).eval()
    model.load_state_dict(golden.fill_state_dict({key: value.shape for key, value in model.state_dict().items()}))
    return model, golden.images(1, (2, 3, 64, 96))


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (64, 96), (33, 70)], ids=str)
@torch.inference_mode()
def test_packing_changes_no_bit_of_a_model(size):
    """An image of 32 x 32 has one row in the last stage."""
    with torch.inference_mode(False):
        model, _ = model_and_image()
    for batch in (1, 3, 9):
        x = golden.images(2, (batch, 3, *size))
        set_weight_packing(model, True)
        expected = model(x)
        assert torch.equal(model(x), expected)
        set_weight_packing(model, False)
        assert_close(model(x), expected, 1e-5)
        assert all(not isinstance(module, Conv2d) or module._packed is None for module in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@torch.no_grad()
def test_a_used_model_is_scripted_compiled_and_exported():
    model, x = model_and_image()
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    model(x)
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected)
    assert torch.equal(create_feature_extractor(model, ["head"])(x)["head"], expected)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), expected)
    doubled = {name: value * 1.1 for name, value in model.named_parameters()}
    other = torch.func.functional_call(model, doubled, (x,))
    assert not torch.allclose(other, expected)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(torch.func.vmap(model)(x.unsqueeze(1)).squeeze(1), expected)


@torch.no_grad()
def test_features_only(monkeypatch):
    model = timm.create_model("internimage_atto", features_only=True).eval()
    model.load_state_dict(golden.fill_state_dict({key: value.shape for key, value in model.state_dict().items()}))
    x, seen = golden.images(1, (2, 3, 64, 96)), calls(monkeypatch)
    maps = model(x)
    assert len(seen) == sum(isinstance(module, Block) for module in model.modules())
    set_weight_packing(model, False)
    for actual, expected in zip(model(x), maps):
        assert_close(actual, expected, 1e-5)
    monkeypatch.setattr(Block, "fused_for", lambda self, x: None)
    for actual, expected in zip(model(x), maps):
        assert_close(actual, expected, 1e-5)


def test_two_threads_run_one_model():
    model, x = model_and_image()
    images = [x, golden.images(3, (1, 3, 32, 64))]
    with torch.no_grad():
        expected = [copy.deepcopy(model)(image) for image in images]
    results: dict[int, list[Tensor]] = {0: [], 1: []}
    ready = threading.Barrier(2)

    def work(i: int) -> None:
        ready.wait()
        with torch.inference_mode():
            for _ in range(5):
                model.levels[0].blocks[0].clear_packed()
                results[i].append(model(images[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(results[i]) == 5 and all(torch.equal(result, expected[i]) for result in results[i])


@torch.no_grad()
def test_packing_is_an_argument_of_models(tmp_path):
    """Also of timm's function, with or without weights, and in the folder of a model."""
    x = golden.images(1, (1, 3, 64, 64))
    for arguments in ({}, {"features_only": True}):
        model = timm.create_model("internimage_atto", pack_weights=False, **arguments).eval()
        keepers = [module for module in model.modules() if hasattr(module, "pack_weights")]
        assert keepers and not any(module.pack_weights for module in keepers)
        model(x)
        assert all(getattr(module, "_packed", None) is None for module in keepers)
        assert all(module._fused.fc1.packed is None for module in keepers if isinstance(module, Block))
    plain = timm.create_model("internimage_atto").eval()
    assert all(module.pack_weights for module in plain.modules() if hasattr(module, "pack_weights"))
    save_model(model_to_save := timm.create_model("internimage_atto", pack_weights=False), tmp_path, ["a"] * 1000, {})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, pack_weights=False).eval()
    assert_close(loaded(x), model_to_save.eval()(x), 1e-5)
    assert not any(module.pack_weights for module in loaded.modules() if hasattr(module, "pack_weights"))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True) is not None


# ---- groups of images


@pytest.mark.parametrize("arguments", [{}, dict(post_norm=True, layer_scale=0.5), dict(stage3_post_norm_blocks=(0, 2))])
@torch.no_grad()
def test_groups_of_images_change_no_bit(monkeypatch, arguments):
    """Whatever the number of images, down to one at a time; with a last group that is smaller."""
    model, _ = model_and_image(**arguments)
    x = golden.images(2, (7, 3, 64, 96))
    expected, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
    sizes = []
    call = FusedBlock.__call__
    monkeypatch.setattr(FusedBlock, "__call__", lambda self, x: (sizes.append(len(x)), call(self, x))[1])
    image = 16 * 24 * 16 * 4  # bytes of a map of the first stage; that of the stem is twice as large
    for images, groups in ((1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (4, [4, 3]), (7, [7])):
        sizes.clear()
        monkeypatch.setattr(batches, "_BYTES", images * image // torch.get_num_threads())
        assert torch.equal(model(x), expected)
        assert sizes[:: len(model.levels[0].blocks)][: len(groups)] == groups
        for found, expected_map in zip(model.forward_intermediates(x, intermediates_only=True), maps):
            assert torch.equal(found, expected_map)


@torch.no_grad()
def test_hooks_see_whole_batches(monkeypatch):
    monkeypatch.setattr(batches, "_BYTES", 1)
    model, _ = model_and_image(post_norm=True, layer_scale=0.5)
    x, seen = golden.images(2, (3, 3, 64, 96)), []
    expected = model(x)
    names = [
        "patch_embed",
        "patch_embed.conv2",
        "levels.0",
        "levels.0.blocks.1",
        "levels.0.blocks.1.mlp",
        "levels.0.norm",
    ]
    for name in names:
        handle = model.get_submodule(name).register_forward_hook(lambda module, arguments, y: seen.append(len(y)))
        assert torch.equal(model(x), expected)
        assert seen == [3], name
        seen.clear()
        handle.remove()
