# SPDX-License-Identifier: MIT
"""Loading weights of every known format into a model.

The names come from the model's `KeyMap`. For InternImage:

| source | key naming |
| --- | --- |
| official `.pth` | ours; wrapped in `model`, `model_ema` or `module`; sometimes behind `module.` or `student.` |
| official Hub repositories | `model.` + ours, with `layer_scale1/2` for `gamma1/2` |
| mmdetection, mmsegmentation | `backbone.` + ours, without the classifier's head |
| ours | ours |

A deformable ResNet has timm's keys, with mmcv's `conv_offset` below the deformable convolutions; the weights of a
plain ResNet become its own (`Model.prepare`).

All keys, and the kind, shape and dtype of every tensor, are compared, and all files are read, before any parameter is
written.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..dtypes import name_of, problem_of, same_kind
from ..errors import CheckpointError, list_some
from . import imagenet22k
from .comparison import Comparison, check_plain, find_model, problem_with, shapes
from .key_maps import KeyMap, Shape
from .readers import Entry, Weights, from_state_dict, open_weights

__all__ = ["CheckpointError", "Model", "WeightsSource", "count_classes", "load_pretrained", "match", "shapes_of"]

_logger = logging.getLogger(__name__)


WeightsSource = str | Path | Mapping[str, Tensor] | Weights


class Model(Protocol):
    """What loading needs of a model, which is a `torch.nn.Module` besides."""

    num_classes: int
    in_chans: int

    @property
    def key_map(self) -> KeyMap:
        """Its parameter names."""

    def state_dict(self) -> dict[str, Any]:
        """As of a module."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of a module."""

    def materialize(self, children: set[str], device: torch.device | str) -> None:
        """Give direct children on the meta device memory on `device` and initial values."""

    def prepare(self, found: dict[str, Entry], origin: str) -> None:
        """Replace tensors of a file, under the model's names, by those that the model has in their place."""

    def advice(self, in_file: Mapping[str, Shape]) -> str:
        """What to do about weights of these shapes, which do not fit; empty if the model does not know."""


def shapes_of(weights: Weights, key_map: KeyMap) -> dict[str, Shape]:
    """The shapes of the model's tensors under its own names; reads no values.

    Raises:
        CheckpointError: There is no model of the family.
    """
    return shapes(find_model(weights, key_map)[0])


def count_classes(weights: Weights, key_map: KeyMap) -> int:
    """How many classes the classifier has; 0 without one. Raises as `shapes_of`."""
    return key_map.num_classes(shapes_of(weights, key_map))


# ---- loading


def load_pretrained(
    model: Model,
    source: WeightsSource,
    backbone_only: bool = False,
    use_ema: bool = False,
    pretrained_cfg: dict[str, Any] | None = None,
    head_from_22k: bool | Sequence[str] = False,
    device: torch.device | str | None = None,
) -> None:
    """Load weights into a model, all or nothing: if they are refused or cannot be read, the model is unchanged.

    Therefore a model that is not on the meta device needs the memory of its weights twice for a moment; one on the meta
    device needs it once.

    The classifier is new, with a warning, if the model was created with another number of classes than the weights' cfg
    has; the first convolution is adapted to another number of image channels, as in timm. Everything else must fit.
    Weights with NaN or infinity are loaded, and a warning names them.

    Args:
        model: The model.
        source: A file or folder (see `readers.open_weights`), opened weights, or a state dict, wrapped or not.
        backbone_only: Only the stages matter: tensors of the head are loaded if they fit, and ignored if not.
        use_ema: Take the averaged weights of a file that has both, if it is opened here.
        pretrained_cfg: timm's cfg of the weights (`num_classes`, `input_size`); the model's own cfg if None.
        head_from_22k: Take the rows of an ImageNet-22k classifier for these synsets, one for each class; True means
            ImageNet-1k's.
        device: Where a model on the meta device is moved to.

    Raises:
        CheckpointError: The file cannot be read or does not fit, with the first ten differences; or a tensor of the
            model cannot be filled. Nothing was written.
        FileNotFoundError: There is no such file.
    """
    target = model.state_dict()
    _check_fillable(target)
    on_meta = any(value.is_meta for value in target.values())
    if on_meta and (device is None or torch.device(device).type == "meta"):
        raise CheckpointError("a model on the meta device cannot hold weights; call its to_empty(device=...) first")
    weights = _opened(source, use_ema)
    found = match(model, weights, backbone_only, pretrained_cfg, head_from_22k)
    nonfinite: list[str] = []
    overflowed: dict[str, list[str]] = {}

    def read(key: str) -> Tensor:
        whole, dtype = found[key].read(), target[key].dtype
        tensor = whole.to(dtype)
        if _has_nonfinite(tensor):
            in_file = tensor is whole or _has_nonfinite(whole)
            (nonfinite if in_file else overflowed.setdefault(name_of(dtype), [])).append(key)
        return tensor

    with torch.no_grad():
        if on_meta:
            assert device is not None
            filled = {key: read(key).to(device) for key in found}
            # what the file lacks belongs to a child of the model, the head, which is initialized
            model.materialize({key.partition(".")[0] for key in target if key not in found}, device)
            model.load_state_dict(filled, strict=False, assign=True)
        else:
            tensors: Iterable[tuple[str, Tensor]] = ((key, read(key)) for key in found)
            if weights.files:  # reading a file can fail at any of them
                tensors = list(tensors)
            for key, tensor in tensors:
                target[key].copy_(tensor)
    if nonfinite:
        _logger.warning("%s: NaN or infinity in %d tensors: %s", weights.origin, len(nonfinite), list_some(nonfinite))
    for name, keys in overflowed.items():
        _logger.warning(
            "%s: %d tensors have values that %s cannot hold, which are infinite now: %s",
            weights.origin, len(keys), name, list_some(keys),
        )  # fmt: skip


def _opened(source: WeightsSource, use_ema: bool) -> Weights:
    if isinstance(source, Weights):
        return source
    if isinstance(source, Mapping):
        return from_state_dict(source, use_ema=use_ema)
    return open_weights(source, use_ema)


def _check_fillable(target: Mapping[str, Tensor]) -> None:
    """Refuse a model with tensors that cannot be written to, or that would not keep the values."""
    for key, entry in from_state_dict(target, "the model").items():
        value = target[key]
        problem = problem_of(entry.dtype) if value.is_meta else problem_with(entry)
        if not problem and value.is_inference() and not torch.is_inference_mode_enabled():
            problem = "made in torch.inference_mode(), which allows no change outside of it"
        if not problem and any(side > 1 and not step for side, step in zip(value.shape, value.stride())):
            problem = "expanded, with several elements in one place in memory"
        if problem:
            raise CheckpointError(f"the model cannot be filled, and nothing was loaded: its '{key}' is {problem}")


def _has_nonfinite(tensor: Tensor) -> bool:
    """Whether there is NaN or infinity in it.

    The sum alone rules it out for almost all tensors, and needs no memory: allocating and freeing between tensors that
    are kept would fragment memory, in the end as much as the weights take.
    """
    if not tensor.is_floating_point() or math.isfinite(tensor.sum()):
        return False
    return not bool(torch.isfinite(tensor).all())


def match(
    model: Model,
    weights: Weights,
    backbone_only: bool = False,
    pretrained_cfg: dict[str, Any] | None = None,
    head_from_22k: bool | Sequence[str] = False,
) -> dict[str, Entry]:
    """What `load_pretrained` would read, compared in full with the model; reads no values. Arguments as there.

    Returns:
        The tensors by the model's names, without those that the model keeps, such as a new classifier's.
    """
    cfg = pretrained_cfg or getattr(model, "pretrained_cfg", None) or {}
    found, beside = find_model(weights, model.key_map)
    if beside:
        _logger.info("%s: ignored %d tensors beside the backbone (%s, ...)", weights.origin, len(beside), beside[0])
    model.prepare(found, weights.origin)
    target = model.state_dict()
    expected = {key: tuple(value.shape) for key, value in target.items()}
    sides = Comparison(model.key_map, model.num_classes, weights.origin, found, expected)
    if head_from_22k:
        sides.take_rows(imagenet22k.imagenet_1k() if head_from_22k is True else list(head_from_22k))
    if backbone_only:
        sides.drop_unequal_head()
    else:
        sides.fit_head(cfg.get("num_classes"))
    sides.adapt_first_conv(model.in_chans, (cfg.get("input_size") or (3,))[0])
    check_plain(found, expected, weights.origin)
    differences = sides.differences() + [
        f"dtype: {key} holds {found[key].dtype} in the file, and the model needs {value.dtype}"
        for key, value in target.items()
        if key in found and not same_kind(found[key].dtype, value.dtype)
    ]
    if differences:
        listed = "\n".join(f"  {line}" for line in differences[:10])
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointError(
            f"{weights.origin} does not fit the model; nothing was loaded. {len(differences)} differences:\n"
            f"{listed}{more}{sides.hint(model.advice(shapes(found)))}"
        )
    return {key: found[key] for key in target if key in found}
