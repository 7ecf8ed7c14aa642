# SPDX-License-Identifier: MIT
"""Registration of operators with torch: everything about an operator except its arithmetic.

A differentiable operator takes tensors, whose first axis is the batch, and other arguments::

    NAME(tensors..., arguments...) -> Tensor
    NAME_backward(Tensor grad_output, tensors..., arguments..., bool deterministic, bool[] output_mask) -> tensors

Its author writes four functions in plain torch, the `Reference`, and gets `torch.ops.internimage.NAME` and
`NAME_backward` on every device: with fakes (meta tensors, `torch.compile`, `torch.export`), derivatives of every order,
`torch.func`, forward mode, vmap and autocast. A compiled kernel registers itself for the two names under the dispatch
key of its device and takes precedence there; everything else is inherited from here.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..nvrtc import cuda_kernel
from .arguments import check_one_device
from .transforms import as_function, is_transformed

NAMESPACE = "internimage"
library = torch.library.Library(NAMESPACE, "DEF")
# implemented by the compiled module only
library.define("cpu_capability() -> str")  # the instruction set in use
library.define("fingerprint(Tensor[] tensors) -> int")  # of a few elements, to notice that tensors changed
# a block in inference, from the lists of models/fused_block.py
library.define("block(Tensor input, Tensor?[] weights, int[] settings, float[] numbers, int mlp_rows) -> Tensor")
library.define("serve_cuda() -> ()")  # registers the CUDA kernels that are compiled at run time, by:
library.define("cuda_kernel(str kernel, int argument_bytes, int device, str refusal) -> (Tensor, Tensor)")
library.impl("cuda_kernel", cuda_kernel, "CompositeExplicitAutograd")

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


@dataclass(frozen=True)
class Reference:
    """An operator in plain torch, on any device and in float64, float32, bfloat16 and float16.

    Attributes:
        forward: `(*tensors, *arguments) -> output`.
        backward: `(grad_output, *tensors, *arguments, deterministic, output_mask) -> grads`, one for each tensor, of
            shape (0,) where `output_mask` is false.
        double_backward: `(*grad_grads, grad_output, *tensors, *arguments, deterministic) -> grads` of grad_output and
            of each tensor. Written in differentiable operations, from which torch derives third and higher orders.
        jvp: `(tangents, tensors, *arguments) -> tangent of the output`, also in differentiable operations.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]
    double_backward: Callable[..., tuple[Tensor, ...]]
    jvp: Callable[..., Tensor]


class DifferentiableOperator:
    """A registered operator. Calling it is calling `torch.ops.internimage.NAME`, but also works where that has no
    derivatives: under the transforms of `torch.func` and in forward mode. Arguments are not checked.

    Args:
        name: NAME.
        tensors: Names of its tensors. The first axis of each, and of the output, is the batch, unless `batched` is
            false.
        arguments: The schema of its other arguments, such as "int groups, bool softmax".
        output_shape: `(*shapes of the tensors, *arguments) -> shape of the output`. The output has the dtype of the
            first tensor.
        reference: The arithmetic.
        batched: Whether vmap folds the mapped axis into the batch. Otherwise it calls the operator for each element.
        memory_format: `(tensor) -> memory format` of the output, of the first tensor, and of the gradient of each. All
            are contiguous if not given.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[str],
        arguments: str,
        output_shape: Callable[..., Sequence[int]],
        reference: Reference,
        batched: bool = True,
        memory_format: Callable[[Tensor], torch.memory_format] = lambda tensor: torch.contiguous_format,
    ) -> None:
        self.name, self.tensors, self.output_shape, self.reference = name, tuple(tensors), output_shape, reference
        self._memory_format = memory_format
        count = len(tensors)
        inputs = ", ".join(f"Tensor {tensor}" for tensor in tensors)
        grads = ", ".join(["Tensor"] * count)
        tag = torch.Tag.pt2_compliant_tag
        schema = f"({inputs}, {arguments}) -> Tensor"
        schema_backward = (
            f"(Tensor grad_output, {inputs}, {arguments}, bool deterministic, bool[{count}] output_mask) -> ({grads})"
        )
        for suffix in ("", "_reference"):  # the second is for a kernel that turns out not to work on a device
            library.define(f"{name}{suffix}{schema}", tags=tag)
            library.define(f"{name}_backward{suffix}{schema_backward}", tags=tag)
            library.impl(f"{name}{suffix}", reference.forward, "CompositeExplicitAutograd")
            library.impl(f"{name}_backward{suffix}", reference.backward, "CompositeExplicitAutograd")
        namespace = getattr(torch.ops, NAMESPACE)
        self._forward_op = getattr(namespace, name).default
        self._backward_op = getattr(namespace, f"{name}_backward").default

        self._register("register_fake", self._fake, self._fake_backward)
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", self._backward, setup_context=self._keep_inputs, lib=library
        )
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}_backward",
            self._double_backward,
            setup_context=self._keep_inputs_of_backward,
            lib=library,
        )
        vmap: Callable[..., Any] = self._vmap if batched else self._map
        vmap_backward: Callable[..., Any] = self._vmap_backward if batched else self._map_backward
        self._register("register_vmap", partial(vmap, self._forward_op), partial(vmap_backward, self._backward_op))
        for device_type, key in _AUTOCAST_KEYS.items():
            library.impl(name, partial(self._autocast, device_type), key)
            library.impl(f"{name}_backward", partial(self._autocast_backward, device_type), key)
        # the vmap rules of these functions call the transformable form: another transform may enclose this one
        self._forward_function = as_function(
            self._forward_op,
            tensors=count,
            setup_context=self._keep_inputs,
            backward=self._backward,
            vmap=partial(vmap, self),
            jvp=self._jvp,
        )
        self._backward_function = as_function(
            self._backward_op,
            tensors=count + 1,
            setup_context=self._keep_inputs_of_backward,
            backward=self._double_backward,
            vmap=partial(vmap_backward, self.backward),
            jvp=self._jvp_of_backward,
        )

    def _register(self, rule: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        for name, function in ((self.name, forward), (f"{self.name}_backward", backward)):
            getattr(torch.library, rule)(f"{NAMESPACE}::{name}", function, lib=library)

    def __call__(self, *arguments: Any) -> Tensor:
        if not is_transformed():
            return self._forward_op(*arguments)
        device_type = arguments[0].device.type
        if not is_autocast_enabled(device_type):
            return self._forward_function.apply(*arguments)
        count = len(self.tensors)
        # cast outside of the function, so that its gradients have the dtypes of the tensors that it saves
        tensors = _autocast_tensors(device_type, arguments[:count])
        with without_autocast(device_type):
            return self._forward_function.apply(*tensors, *arguments[count:])

    def backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """`torch.ops.internimage.NAME_backward`, wherever it has no derivatives, too."""
        return self._backward_function.apply(*arguments) if is_transformed() else self._backward_op(*arguments)

    # ---- fakes: shapes without data. They also run for meta tensors, even if only one of the tensors is one

    def _fake(self, *arguments: Any) -> Tensor:
        count = len(self.tensors)
        tensors = arguments[:count]
        check_one_device(dict(zip(self.tensors, tensors)))
        shape = self.output_shape(*(t.shape for t in tensors), *arguments[count:])
        return tensors[0].new_empty(shape).contiguous(memory_format=self._memory_format(tensors[0]))

    def _fake_backward(self, grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, wanted = arguments[: len(self.tensors)], arguments[-1]
        first, *others = zip(self.tensors, tensors)
        check_one_device(dict([first, ("grad_output", grad_output), *others]))
        return tuple(
            t.new_empty(t.shape).contiguous(memory_format=self._memory_format(t)) if want else t.new_empty(0)
            for t, want in zip(tensors, wanted)
        )

    # ---- autograd

    def _keep_inputs(self, ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        count = len(self.tensors)
        ctx.save_for_backward(*inputs[:count])
        ctx.arguments = inputs[count:]

    def _backward(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[: len(self.tensors)])
        deterministic = torch.are_deterministic_algorithms_enabled()
        grads = self.backward(grad_output, *ctx.saved_tensors, *ctx.arguments, deterministic, needed)
        return *(grad if need else None for grad, need in zip(grads, needed)), *[None] * len(ctx.arguments)

    def _keep_inputs_of_backward(self, ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        count = len(self.tensors) + 1
        ctx.save_for_backward(*inputs[:count])
        ctx.arguments = inputs[count:]
        ctx.set_materialize_grads(False)

    def _double_backward(self, ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *arguments, deterministic, output_mask = ctx.arguments
        tensors = ctx.saved_tensors
        given = [
            g if g is not None and wanted else torch.zeros_like(t)
            for g, t, wanted in zip(grad_grads, tensors[1:], output_mask)
        ]
        with without_autocast(tensors[0].device.type):
            grads = self.reference.double_backward(*given, *tensors, *arguments, deterministic)
        return *grads, *[None] * len(ctx.arguments)

    # ---- vmap: the mapped axis is folded into the batch

    def _vmap(
        self, call: Callable[..., Tensor], info: Any, in_dims: Sequence[int | None], *arguments: Any
    ) -> tuple[Tensor, int]:
        count = len(self.tensors)
        output = call(*_fold(arguments[:count], in_dims, info.batch_size), *arguments[count:])
        return output.unflatten(0, (info.batch_size, -1)), 0

    def _vmap_backward(
        self, call: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: Sequence[int | None], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        count = len(self.tensors) + 1
        grads = call(*_fold(arguments[:count], in_dims, info.batch_size), *arguments[count:])
        unfolded = tuple(
            grad.unflatten(0, (info.batch_size, -1)) if wanted else grad.expand(info.batch_size, 0)
            for grad, wanted in zip(grads, arguments[-1])
        )
        return unfolded, (0,) * len(unfolded)

    # without a batch: one call for each element of the mapped axis

    def _map(
        self, call: Callable[..., Tensor], info: Any, in_dims: Sequence[int | None], *arguments: Any
    ) -> tuple[Tensor, int]:
        count = len(self.tensors)
        elements = _elements(arguments[:count], in_dims, info.batch_size)
        return torch.stack([call(*tensors, *arguments[count:]) for tensors in elements]), 0

    def _map_backward(
        self, call: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: Sequence[int | None], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        count = len(self.tensors) + 1
        elements = _elements(arguments[:count], in_dims, info.batch_size)
        grads = zip(*(call(*tensors, *arguments[count:]) for tensors in elements))
        return tuple(torch.stack(of_tensor) for of_tensor in grads), (0,) * (count - 1)

    # ---- forward mode

    def _jvp(self, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None], arguments: Sequence[Any]) -> Tensor:
        with without_autocast(tensors[0].device.type):
            return self.reference.jvp(_or_zero(tangents, tensors), tensors, *arguments)

    def _jvp_of_backward(
        self, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None], arguments: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        """The tangents of the gradients: one term for grad_output, in which the gradients are linear, and one for the
        other tensors, a product of the (symmetric) Hessian, which double backward computes."""
        *others, deterministic, output_mask = arguments
        grad_output_dir, *directions = _or_zero(tangents, tensors)
        grads = self.backward(grad_output_dir, *tensors[1:], *arguments)
        with without_autocast(tensors[0].device.type):
            _, *curvature = self.reference.double_backward(*directions, *tensors, *others, deterministic)
        return tuple(a + b if wanted else a for a, b, wanted in zip(grads, curvature, output_mask))

    # ---- autocast

    def _autocast(self, device_type: str, *arguments: Any) -> Tensor:
        count = len(self.tensors)
        with without_autocast(device_type):
            return self._forward_op(*_autocast_tensors(device_type, arguments[:count]), *arguments[count:])

    def _autocast_backward(self, device_type: str, *arguments: Any) -> tuple[Tensor, ...]:
        with without_autocast(device_type):
            return self._backward_op(*arguments)


def is_autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; False for those without autocast, such as meta."""
    return device_type in _AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Context without autocast, which may be active when a backward pass runs."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _autocast_tensors(device_type: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in autocast's dtype, except those in float64, as in torch's own casting rules."""
    dtype = torch.get_autocast_dtype(device_type)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _fold(tensors: Sequence[Tensor], axes: Sequence[int | None], size: int) -> list[Tensor]:
    """Move the mapped axis of each tensor (None: not mapped, repeat it) to the front and merge it with the batch."""
    moved = [t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0) for t, axis in zip(tensors, axes)]
    return [t.flatten(0, 1) for t in moved]


def _elements(tensors: Sequence[Tensor], axes: Sequence[int | None], size: int) -> list[list[Tensor]]:
    """The tensors of each element of the mapped axis (None: not mapped, the same for all)."""
    return [[t if axis is None else t.select(axis, i) for t, axis in zip(tensors, axes)] for i in range(size)]


def _or_zero(tangents: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if tangent is None else tangent for t, tangent in zip(tensors, tangents)]
