# SPDX-License-Identifier: MIT
"""The DCNv3 operator: schema, reference, fake kernels, autograd, torch.func, autocast and the public function.

`torch.ops.internimage.dcnv3` and `torch.ops.internimage.dcnv3_backward` are defined here. The plain-torch reference
serves every device; a compiled kernel, once loaded, takes over its device. All that is not arithmetic stays here, so
that it is the same for every backend.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from . import reference
from .arguments import (
    as_pair,
    check_channels,
    check_kernel,
    check_offset_scale,
    check_one_device,
    check_shapes,
    check_tensors,
)
from .sampling import output_size
from .transforms import as_function, is_transformed

# ---- schema and reference

_GEOMETRY = (
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups, float offset_scale, "
    "bool remove_center, bool softmax"
)

_library = torch.library.Library("internimage", "DEF")
_library.define(
    f"dcnv3(Tensor input, Tensor offset, Tensor mask, {_GEOMETRY}) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
_library.define(
    f"dcnv3_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor mask, {_GEOMETRY}, bool deterministic, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define("cpu_capability() -> str")  # the instruction set of the CPU kernels; served by the compiled module only
_library.impl("dcnv3", reference.dcnv3, "CompositeExplicitAutograd")
_library.impl("dcnv3_backward", reference.dcnv3_backward, "CompositeExplicitAutograd")

_dcnv3 = torch.ops.internimage.dcnv3.default
_dcnv3_backward = torch.ops.internimage.dcnv3_backward.default

# ---- fake kernels: shapes without data


# Also run for tensors of the meta device, and for others beside one of those, whose data no kernel would read.


@torch.library.register_fake("internimage::dcnv3", lib=_library)
def _fake(input, offset, mask, kernel_size, stride, padding, dilation, *_) -> Tensor:
    check_one_device({"input": input, "offset": offset, "mask": mask})
    n, height, width, channels = input.shape
    ho, wo = output_size((height, width), kernel_size, stride, padding, dilation)
    return input.new_empty(n, ho, wo, channels)


@torch.library.register_fake("internimage::dcnv3_backward", lib=_library)
def _fake_backward(grad_output, input, offset, mask, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    check_one_device({"input": input, "grad_output": grad_output, "offset": offset, "mask": mask})
    wanted = arguments[-1]
    return tuple(t.new_empty(t.shape if want else (0,)) for t, want in zip((input, offset, mask), wanted))


# ---- autograd


def _without_autocast(device_type: str):
    """Context in which `bmm` keeps the dtype of its operands; a backward pass may be run under autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.geometry = *inputs[:3], inputs[3:]
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_output: Tensor):
    needed = list(ctx.needs_input_grad[:3])
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = _apply_backward(grad_output, *ctx.saved_tensors, *ctx.geometry, deterministic, needed)
    return *(grad if need else None for grad, need in zip(grads, needed)), *[None] * len(ctx.geometry)


def _setup_context_backward(ctx, inputs, output) -> None:
    *tensors, ctx.arguments = *inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *grad_grads):
    """Double backward, in differentiable torch operations whatever kernel computed the backward pass."""
    *geometry, deterministic, output_mask = ctx.arguments
    tensors = ctx.saved_tensors
    given = [
        g if g is not None and wanted else torch.zeros_like(t)
        for g, t, wanted in zip(grad_grads, tensors[1:], output_mask)
    ]
    with _without_autocast(tensors[0].device.type):
        grads = reference.dcnv3_double_backward(*given, *tensors, *geometry, deterministic)
    return *grads, *[None] * len(ctx.arguments)


torch.library.register_autograd("internimage::dcnv3", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(
    "internimage::dcnv3_backward", _double_backward, setup_context=_setup_context_backward, lib=_library
)

# ---- vmap: the mapped axis becomes part of the batch


def _fold(tensors: Sequence[Tensor], axes: Sequence[int | None], size: int) -> list[Tensor]:
    moved = [t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0) for t, axis in zip(tensors, axes)]
    return [t.flatten(0, 1) for t in moved]


def _vmap(call, info, in_dims, input, offset, mask, *geometry):
    output = call(*_fold((input, offset, mask), in_dims, info.batch_size), *geometry)
    return output.unflatten(0, (info.batch_size, -1)), 0


def _vmap_backward(call, info, in_dims, grad_output, input, offset, mask, *arguments):
    grads = call(*_fold((grad_output, input, offset, mask), in_dims, info.batch_size), *arguments)
    unfolded = [
        grad.unflatten(0, (info.batch_size, -1)) if wanted else grad.expand(info.batch_size, 0)
        for grad, wanted in zip(grads, arguments[-1])
    ]
    return tuple(unfolded), (0, 0, 0)


torch.library.register_vmap("internimage::dcnv3", partial(_vmap, _dcnv3), lib=_library)
torch.library.register_vmap("internimage::dcnv3_backward", partial(_vmap_backward, _dcnv3_backward), lib=_library)

# ---- torch.func and forward mode


def _jvp(tensors, tangents, geometry) -> Tensor:
    with _without_autocast(tensors[0].device.type):
        return reference.dcnv3_jvp(_or_zero(tangents, tensors), tensors, *geometry)


def _jvp_backward(tensors, tangents, arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients are linear in grad_output; their derivative in the direction of the other tensors is what double
    backward gives for these tensors, as second derivatives do not depend on the order."""
    *geometry, deterministic, output_mask = arguments
    grad_output_dir, *directions = _or_zero(tangents, tensors)
    grads = _apply_backward(grad_output_dir, *tensors[1:], *arguments)
    with _without_autocast(tensors[0].device.type):
        _, *bent = reference.dcnv3_double_backward(*directions, *tensors, *geometry, deterministic)
    return tuple(a + b if wanted else a for a, b, wanted in zip(grads, bent, output_mask))


def _or_zero(tangents, tensors) -> list[Tensor]:
    return [torch.zeros_like(t) if tangent is None else tangent for t, tangent in zip(tensors, tangents)]


def apply_dcnv3(*arguments) -> Tensor:
    """`torch.ops.internimage.dcnv3`, in the schema's order and unchecked, also where that has no derivatives: under the
    transforms of `torch.func` and in forward mode."""
    if not is_transformed():
        return _dcnv3(*arguments)
    kind = arguments[0].device.type
    if not _is_autocast_enabled(kind):
        return _DCNv3Function.apply(*arguments)
    tensors = _cast(kind, arguments[:3])  # before the function, so that the gradients have the dtypes of what it saves
    with _without_autocast(kind):
        return _DCNv3Function.apply(*tensors, *arguments[3:])


def _apply_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _DCNv3BackwardFunction.apply(*arguments) if is_transformed() else _dcnv3_backward(*arguments)


# their vmap rules call what may be transformed once more: another vmap, or a gradient of the whole
_DCNv3BackwardFunction = as_function(
    _dcnv3_backward,
    tensors=4,
    setup_context=_setup_context_backward,
    backward=_double_backward,
    vmap=partial(_vmap_backward, _apply_backward),
    jvp=_jvp_backward,
)
_DCNv3Function = as_function(
    _dcnv3, tensors=3, setup_context=_setup_context, backward=_backward, vmap=partial(_vmap, apply_dcnv3), jvp=_jvp
)


# ---- autocast


def _cast(device_type: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in autocast's dtype; float64 is left alone, as torch's own casting rules do."""
    dtype = torch.get_autocast_dtype(device_type)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _register_autocast(key: str, device_type: str) -> None:
    def kernel(input, offset, mask, *geometry):
        with _without_autocast(device_type):
            return _dcnv3(*_cast(device_type, (input, offset, mask)), *geometry)

    def kernel_backward(*arguments):
        with _without_autocast(device_type):
            return _dcnv3_backward(*arguments)

    _library.impl("dcnv3", kernel, key)
    _library.impl("dcnv3_backward", kernel_backward, key)


def _is_autocast_enabled(device_type: str) -> bool:
    return device_type in _AUTOCAST and torch.is_autocast_enabled(device_type)  # "meta" has none to ask


_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}
for _device_type, _key in _AUTOCAST.items():
    _register_autocast(_key, _device_type)

# ---- public function


def dcnv3(
    input: Tensor,  # (N, H, W, C)
    offset: Tensor,  # (N, Ho, Wo, groups * P * 2)
    mask: Tensor,  # (N, Ho, Wo, groups * P)
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """Deformable convolution v3: modulated sampling at learned offsets, without a weight of its own.

    With P = kh * kw - remove_center sampling points a group, for output pixel o and the channels of group g::

        output[o, g] = sum_p  m[o, g, p] * bilinear(input[:, g], location[o, g, p])
        location     = o * stride - padding + centre + (kernel_point_p + offset[o, g, p]) * offset_scale

    where centre = dilation * (kernel_size - 1) // 2, kernel points are counted from the centre, and m is `mask`, or its
    softmax over the P points with `softmax=True`. Pixels outside the image are zero. A location that is not strictly
    inside (-1, W) x (-1, H), or not finite, contributes nothing and gets no gradient. (Wang et al., "InternImage:
    Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", CVPR 2023, equation 2.)

    Differentiable any number of times in all three tensors; works under autocast (which casts all three to its dtype),
    `torch.compile`, `torch.export`, the transforms of `torch.func` (`grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`,
    `hessian`, `vmap`) and in forward mode.

    Args:
        input: (N, H, W, C), channels last. float64, float32, bfloat16 or float16; the half types accumulate in float32.
            N may be 0.
        offset: (N, Ho, Wo, groups * P * 2), in pixels: group-major, then point, then (x, y). The points are counted
            x-major: all rows of the leftmost kernel column first. Dtype and device of `input`.
        mask: (N, Ho, Wo, groups * P): group-major, then point. Factors, or logits with `softmax=True`.
        kernel_size: Kernel (height, width), or one int for both.
        stride: Step between output pixels.
        padding: Zeros around the image, any non-negative number.
        dilation: Distance of neighbouring kernel points.
        groups: Number of groups, each with offsets and mask of its own; divides C.
        offset_scale: Factor on the kernel grid and on the offsets.
        remove_center: Leave out the centre point; both kernel sides must be odd.
        softmax: `mask` holds logits, to be normalised over the P points of a group (in float32 for the half types).

    Returns:
        (N, Ho, Wo, C) with `Ho = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1`, Wo likewise.

    Raises:
        TypeError: An argument has the wrong type, or a tensor a wrong dtype.
        ValueError: An argument is out of range, or a tensor has a wrong rank, shape or device.
    """
    kernel_size, stride = as_pair(kernel_size, "kernel_size", 1), as_pair(stride, "stride", 1)
    padding, dilation = as_pair(padding, "padding", 0), as_pair(dilation, "dilation", 1)
    remove_center, softmax = bool(remove_center), bool(softmax)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    same_dtype = not _is_autocast_enabled(input.device.type)
    check_tensors({"input": input, "offset": offset, "mask": mask}, same_dtype)
    check_channels(input.shape[3], groups)
    check_offset_scale(offset_scale)
    check_kernel(kernel_size, remove_center)
    check_shapes(input, offset, mask, kernel_size, stride, padding, dilation, groups, remove_center)
    return apply_dcnv3(
        input, offset, mask, kernel_size, stride, padding, dilation, groups, float(offset_scale), remove_center, softmax
    )  # fmt: skip
