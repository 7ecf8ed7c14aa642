# SPDX-License-Identifier: MIT
"""A block of InternImage as CPU inference computes it: fewer calls, less memory traffic, and packed weights.

The same arithmetic as `Block.forward`, in float32 and float64 to the bit, except that

* the weights of linear layers are kept in oneDNN's own layout;
* offset and mask come from one product, whose output the operator reads with strides;
* the second half goes through in chunks of rows, which stay in the cache from norm to residual sum;
* no result goes to memory of its own where one that is no longer needed can hold it;
* a half type without products of its own on this processor is computed in float32.

All of it is one operator, csrc/cpu/block. What it needs is collected here, once. `FusedBlock.is_current` tells in
microseconds whether that still holds.
"""

from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..extension import has_kernel
from ..layers.activation import GELU
from ..layers.dcnv3 import DCNv3
from ..layers.fast_path import PLAIN_TYPES, has_hooks
from ..layers.linear import Linear
from ..layers.mlp import Mlp, chunk_rows
from ..layers.norm import LayerNorm, layer_norm_of
from ..layers.packing import Snapshot
from ..layers.query import Query
from ..ops import onednn
from ..ops.onednn import CAN_PACK, has_product, multiplied_in, pack

_KERNELS = "block", "fingerprint"
_BY_TORCH, _BY_ONEDNN, _BY_ONEDNN_IN_FLOAT = range(3)  # how products are computed

# what of a module besides its parameters and children its result depends on
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    DCNv3: (
        *("kernel_size", "stride", "padding", "dilation", "groups", "offset_scale"),
        *("remove_center", "center_feature_scale"),
    ),
    DropPath: ("training",),
    LayerNorm: ("eps",),
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
}


class _Norm(NamedTuple):
    """The arguments of a layer norm."""

    weight: Tensor
    bias: Tensor
    eps: float


class _Product:
    """One linear layer, or several of the same input, whose packed weights are one.

    Args:
        layers: Weight and bias of each.
    """

    def __init__(self, *layers: tuple[Tensor, Tensor]) -> None:
        self.weight, self.bias = layers[0]
        self.packed: Tensor | None = None
        self.layers = layers

    def pack(self, rows: int) -> list[Tensor]:
        """Keep the weights in oneDNN's layout; returns what was copied."""
        if len(self.layers) == 1:
            self.packed = pack(self.weight, rows)
            return [self.weight]
        weights, biases = zip(*self.layers)
        self.bias = torch.cat(biases)
        self.packed = pack(torch.cat(weights), rows)
        return [*weights, *biases]


class FusedBlock:
    """What a `Block` computes, for an input like x.

    Args:
        block: In eval mode.
        x: (N, H, W, C) on the CPU.
        packing: Whether to keep packed copies of the weights.

    Raises:
        Unsupported: The block is one that its modules compute one by one.
    """

    class Unsupported(Exception):
        """Not for this block, or not for this input."""

    def __init__(self, block: Any, x: Tensor, packing: bool) -> None:
        self.dtype, self.packing = x.dtype, packing
        dcn, mlp = block.dcn, block.mlp
        self._require(type(dcn) is DCNv3 and type(mlp) is Mlp and type(mlp.act) is GELU and type(dcn.dw_conv) is Query)
        self._require(dcn.dw_conv.parts() is not None)
        self._collect(block)
        self._require(all(has_kernel(name, "cpu") for name in _KERNELS))
        self._require(all(type(t) in PLAIN_TYPES for t in self._tensors))
        self._require(all(t.dtype == x.dtype and t.is_cpu and t.is_contiguous() for t in self._tensors))
        # torch does not count the changes of tensors that were made in inference mode
        self._is_counted = not any(t.is_inference() for t in self._tensors)
        may_copy = packing and self._is_counted and CAN_PACK
        self.in_float = may_copy and multiplied_in(x.dtype) != x.dtype
        self._copied: list[Tensor] = []
        with torch.no_grad():
            self._read(block)
            if may_copy and (self.in_float or has_product(x.dtype)):
                for layer in (self.input_proj, self.offset_and_mask, self.output_proj, self.fc1, self.fc2):
                    self._copied += layer.pack(x.numel() // x.shape[-1])
        self.arguments = self._arguments()
        if self.in_float:
            self._copied = self._tensors
        self._snapshot = Snapshot(self._tensors, self._copied) if self._is_counted else None

    @staticmethod
    def _require(condition: bool) -> None:
        if not condition:
            raise FusedBlock.Unsupported

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of a block, and a pickled one, make their own

    # ---- what it was made of

    def _collect(self, block: Any) -> None:
        """Note every module, parameter and argument, and the dictionary that has it."""
        self._members: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []  # of sequences, which can be appended to
        modules = list(block.modules())
        for module in modules:
            self._members += [(module._modules, name, child) for name, child in module._modules.items()]
            self._members += [(module._parameters, name, value) for name, value in module._parameters.items()]
            own = module.__dict__
            self._members += [(own, name, own[name]) for name in _ARGUMENTS.get(type(module), ())]
            self._require(not module._buffers)
            if isinstance(module, nn.Sequential):
                self._sizes.append((module._modules, len(module)))
        self._members.append((block.__dict__, "post_norm", block.post_norm))
        self._tensors = [value for _, _, value in self._members if isinstance(value, Tensor)]
        self.modules = modules[1:]  # the block itself is called: its own hooks run

    def is_current(self) -> bool:
        """Whether the block still has what it was made of, and the values that were copied."""
        for members, name, value in self._members:
            if members.get(name) is not value:
                return False
        for members, size in self._sizes:
            if len(members) != size:
                return False
        return self._snapshot is None or self._snapshot.is_current()

    def has_hooks(self) -> bool:
        """Whether a module has hooks, which run only if the module is called."""
        return has_hooks(*self.modules)

    def requires_grad(self) -> bool:
        return any(t.requires_grad for t in self._tensors)

    # ---- the arguments of what it computes

    def _own(self, module: nn.Module, name: str) -> Tensor:
        """A parameter that the module itself has, in the dtype of the computation."""
        parameter = module._parameters.get(name)
        self._require(parameter is not None)
        assert parameter is not None
        return parameter.float() if self.in_float else parameter

    def _linear(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        self._require(type(module) is Linear)
        return self._own(module, "weight"), self._own(module, "bias")

    def _norm(self, norm: nn.Module) -> _Norm | None:
        """Of a norm from `create_norm` that is a layer norm, or of an identity, which has none."""
        if type(norm) is nn.Identity:
            return None
        return self._layer_norm(layer_norm_of(norm))

    def _layer_norm(self, layer: LayerNorm | None) -> _Norm:
        self._require(layer is not None)
        assert layer is not None
        return _Norm(self._own(layer, "weight"), self._own(layer, "bias"), layer.eps)

    def _scale(self, block: Any, name: str) -> Tensor | None:
        return None if getattr(block, name) is None else self._own(block, name)

    def _read(self, block: Any) -> None:
        dcn, mlp = block.dcn, block.mlp
        conv, query_norm = dcn.dw_conv.parts()
        for path in (block.drop_path1, block.drop_path2):
            self._require(type(path) is nn.Identity or (type(path) is DropPath and not path.training))
        norms = self._norm(block.norm1), self._norm(block.norm2)
        self.before = (None, None) if block.post_norm else norms
        after = self._norm(block.res_post_norm1), self._norm(block.res_post_norm2)
        self.after = norms if block.post_norm else after
        self.scales = self._scale(block, "gamma1"), self._scale(block, "gamma2")
        self.input_proj = _Product(self._linear(dcn.input_proj))
        self.offset_and_mask = _Product(self._linear(dcn.offset), self._linear(dcn.mask))
        self.output_proj = _Product(self._linear(dcn.output_proj))
        self.fc1, self.fc2 = _Product(self._linear(mlp.fc1)), _Product(self._linear(mlp.fc2))
        norm = self._layer_norm(query_norm)
        weight, bias = self._own(conv, "weight"), self._own(conv, "bias")
        self.query = weight, bias, norm.weight, norm.bias, conv.stride, conv.padding, norm.eps
        self.geometry = dcn.geometry
        self.blend: tuple[Tensor, Tensor] | None = None
        if dcn.center_feature_scale:
            names = "center_feature_scale_proj_weight", "center_feature_scale_proj_bias"
            self.blend = self._own(dcn, names[0]), self._own(dcn, names[1])

    def _arguments(self) -> tuple[list[Tensor | None], list[int], list[float]]:
        """The lists that `torch.ops.internimage.block` takes, in the order of csrc/cpu/block/block.cpp."""
        offset, mask = (_Product(layer) for layer in self.offset_and_mask.layers)
        products = (
            *(self.input_proj, self.offset_and_mask, offset, mask),
            *(self.output_proj, self.fc1, self.fc2),
        )
        norms = (*self.before, *self.after)
        conv_weight, conv_bias, norm_weight, norm_bias, stride, padding, eps = self.query
        weights: list[Tensor | None] = [
            *(tensor for norm in norms for tensor in ((None, None) if norm is None else norm[:2])),
            *self.scales,
            *(conv_weight, conv_bias, norm_weight, norm_bias),
            *((None, None) if self.blend is None else self.blend),
            *(tensor for p in products for tensor in (p.weight, p.bias, p.packed)),
        ]
        kernel_size, dcn_stride, dcn_padding, dilation, groups, offset_scale, remove_center, softmax = self.geometry
        dtype = torch.float32 if self.in_float else self.dtype
        method = _BY_ONEDNN if has_product(dtype) else _BY_TORCH
        if multiplied_in(dtype) != dtype:
            method = _BY_ONEDNN_IN_FLOAT
        settings = [
            method,
            onednn.MIN_ROWS,
            *(*stride, *padding, *kernel_size, *dcn_stride, *dcn_padding, *dilation),
            *(groups, int(remove_center), int(softmax)),
        ]
        return weights, settings, [*(0.0 if norm is None else norm.eps for norm in norms), eps, offset_scale]

    # ---- what it computes

    def __call__(self, x: Tensor) -> Tensor:
        wide = (x.float() if self.in_float else x).contiguous()
        rows = wide.shape[:-1].numel()
        size = max(1, chunk_rows(rows, len(self.fc1.weight), wide.dtype, self.fc1.packed is not None))
        return torch.ops.internimage.block.default(wide, *self.arguments, size).to(x.dtype)
