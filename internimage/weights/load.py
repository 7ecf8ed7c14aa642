# SPDX-License-Identifier: MIT
"""Weights from every format that InternImage exists in, into our model. Nothing else knows the old names.

| source | key naming |
| --- | --- |
| official `.pth` | ours; wrapped in `model`, `model_ema` or `module`; sometimes behind `module.` or `student.` |
| official Hub repositories | `model.` + ours, with `layer_scale1/2` for `gamma1/2` |
| mmdetection, mmsegmentation | `backbone.` + ours, without the classifier's head |
| ours | ours |

The whole key set and every tensor's kind, shape and dtype are compared, and what is in files is read, before a single
parameter is written.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.models._manipulate import adapt_input_conv
from torch import Tensor

from ..errors import CheckpointError, some
from . import imagenet22k
from .dtypes import name_of, problem_of, same_kind
from .readers import Entry, from_state_dict, open_checkpoint

if TYPE_CHECKING:
    from ..models.backbone import InternImage

__all__ = ["CheckpointError", "count_classes", "describe", "has_head", "load_pretrained", "match"]

_logger = logging.getLogger(__name__)

_FIRST_CONV = "patch_embed.conv1.weight"
_ANCHORS = (_FIRST_CONV, "levels.0.blocks.0.dcn.offset.weight")  # where these stand, the model begins
_PREFIX = re.compile(r"(?:(?:module|_orig_mod|student|model|backbone)\.)*")
_CLASSIFIER = ("head.weight", "head.bias")
_HEAD = ("conv_head.", "dcnv3_head_x3.", "dcnv3_head_x4.", "clip_projector.", "fc_norm.", "head.")
_OPTIONAL = "num_batches_tracked"  # counts training steps; without meaning for the model's output

# ---- names


def _own_names(entries: dict[str, Entry], origin: str) -> tuple[dict[str, Entry], list[str]]:
    """The entries of the model under our names, and the names of what may be beside it (a detector's neck, a teacher).

    What has no business there keeps a name that no model has, so that it comes out as a difference.
    """
    prefixes = {
        key[: -len(anchor)]
        for key in entries
        for anchor in _ANCHORS
        if key.endswith(anchor) and _PREFIX.fullmatch(key[: -len(anchor)])
    }
    if not prefixes:
        raise CheckpointError(
            f"{origin} holds no InternImage: no '{_FIRST_CONV}' in it, nor behind 'module.', 'student.', 'model.' or "
            f"'backbone.'. It has {len(entries)} tensors, beginning with {', '.join(list(entries)[:5])}"
        )
    if len(prefixes) > 1:
        raise CheckpointError(f"{origin} holds several models: under {', '.join(map(repr, sorted(prefixes)))}")
    prefix = prefixes.pop()
    stands_alone = not ("backbone." in prefix or "student." in prefix)
    own: dict[str, Entry] = {}
    beside = []
    for key, entry in entries.items():
        if key.startswith(prefix):
            name = re.sub(r"\.layer_scale([12])$", r".gamma\1", key[len(prefix) :])
            own[f"{name} (again, as {key})" if name in own else name] = entry
        elif stands_alone:
            own[f"{key} (without '{prefix}')"] = entry
        else:
            beside.append(key)
    return own, beside


# ---- comparing and writing


def load_pretrained(
    model: "InternImage",
    source: str | Path | Mapping[str, Tensor],
    backbone_only: bool = False,
    use_ema: bool = False,
    pretrained_cfg: dict[str, Any] | None = None,
    head_from_22k: bool | Sequence[str] = False,
    device: torch.device | str | None = None,
) -> None:
    """Load weights into a model, whole or not at all: whatever is refused or cannot be read leaves it as it was.

    For that, a model that is not on the meta device has the weights of a file in memory beside its own for a moment.
    One on the meta device has them once.

    The classifier may be new, with a warning, if the model was asked for another number of classes than the weights'
    cfg names; the first convolution is adapted if it was asked for another number of image channels (timm's rule). All
    else must fit. Weights that hold NaN or infinity are loaded, and a warning names them.

    Args:
        model: The model.
        source: File or folder (see `containers.open_checkpoint`), or a state dict, wrapped or not.
        backbone_only: Only the stages matter: whatever the file has of the head is taken or left.
        use_ema: Take the averaged weights of a file that has both.
        pretrained_cfg: What the weights were made for (`num_classes`, `input_size`); the model's own cfg if None.
        head_from_22k: Make the classifier of the rows that an ImageNet-22k one has for these synsets, one a class; True
            stands for ImageNet-1k's.
        device: Where a model that was built on the meta device goes.

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
    origin, found = match(model, source, backbone_only, use_ema, pretrained_cfg, head_from_22k)
    odd: list[str] = []
    beyond: dict[str, list[str]] = {}

    def read(key: str) -> Tensor:
        whole, dtype = found[key].read(), target[key].dtype
        tensor = whole.to(dtype)
        if _is_odd(tensor):
            (odd if tensor is whole or _is_odd(whole) else beyond.setdefault(name_of(dtype), [])).append(key)
        return tensor

    with torch.no_grad():
        if on_meta:
            filled = {key: read(key).to(device) for key in found}
            # what the file lacks belongs to a child of the model (the head) that gets initial values
            model.materialize({key.partition(".")[0] for key in target if key not in found}, device)
            model.load_state_dict(filled, strict=False, assign=True)
        else:
            tensors: Iterable[tuple[str, Tensor]] = ((key, read(key)) for key in found)
            if not isinstance(source, Mapping):  # reading a file can fail at any of them
                tensors = list(tensors)
            for key, tensor in tensors:
                target[key].copy_(tensor)
    if odd:
        _logger.warning("%s: NaN or infinity in %d tensors: %s", origin, len(odd), some(odd))
    for name, keys in beyond.items():
        _logger.warning(
            "%s: %d tensors have values that %s cannot hold, which are infinite now: %s",
            origin, len(keys), name, some(keys),
        )  # fmt: skip


def match(
    model: "InternImage",
    source: str | Path | Mapping[str, Tensor],
    backbone_only: bool = False,
    use_ema: bool = False,
    pretrained_cfg: dict[str, Any] | None = None,
    head_from_22k: bool | Sequence[str] = False,
) -> tuple[str, dict[str, Entry]]:
    """What `load_pretrained` would read, compared whole with the model; nothing is read. Arguments as there.

    Returns:
        A name of the source for messages, and the model's names with the tensors for them; those that the model keeps
        (a new classifier) are not among them.
    """
    cfg = pretrained_cfg or getattr(model, "pretrained_cfg", None) or {}
    if isinstance(source, Mapping):
        origin = "the state dict"
        entries = from_state_dict(source, origin, use_ema)
    else:
        origin, entries = f"'{source}'", open_checkpoint(source, use_ema)
    found, beside = _own_names(entries, origin)
    if beside:
        _logger.info("%s: left out %d tensors beside the backbone (%s, ...)", origin, len(beside), beside[0])
    target = model.state_dict()
    expected = {key: tuple(value.shape) for key, value in target.items()}
    if head_from_22k:
        synsets = imagenet22k.imagenet_1k() if head_from_22k is True else list(head_from_22k)
        _reduce_head(model.num_classes, synsets, origin, found)
    _drop_head(model, origin, found, expected, cfg, backbone_only)
    _adapt_first_conv(model.in_chans, (cfg.get("input_size") or (3,))[0], origin, found)
    check_plain(found, expected, origin)
    differences = _differences(found, expected)
    differences += [
        f"dtype: {key} holds {found[key].dtype} in the file, and numbers of a {value.dtype} are needed"
        for key, value in target.items()
        if key in found and not same_kind(found[key].dtype, value.dtype)
    ]
    if differences:
        listed = "\n".join(f"  {line}" for line in differences[:10])
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        hint = _hint(found, expected)
        raise CheckpointError(
            f"{origin} does not fit the model; nothing was loaded. {len(differences)} differences:\n"
            f"{listed}{more}{hint}"
        )
    return origin, {key: found[key] for key in target if key in found}


def problem_with(entry: Entry) -> str:
    """Why a tensor cannot be read as numbers, or its numbers are no weights; empty if it is well."""
    return entry.problem or problem_of(entry.dtype)


def check_plain(found: dict[str, Entry], expected: Iterable[str], origin: str) -> None:
    """CheckpointError if one of the tensors expected cannot be used."""
    for key in expected:
        problem = problem_with(found[key]) if key in found else ""
        if problem:
            raise CheckpointError(f"{origin} cannot be used, and nothing was loaded: its tensor '{key}' is {problem}")


def _check_fillable(target: Mapping[str, Tensor]) -> None:
    """Refuse a model with tensors that cannot be written to, or only with other values than the weights'."""
    for key, entry in from_state_dict(target, "the model").items():
        value = target[key]
        problem = problem_of(entry.dtype) if value.is_meta else problem_with(entry)
        if not problem and value.is_inference() and not torch.is_inference_mode_enabled():
            problem = "made in torch.inference_mode(), which allows no change outside of it"
        if not problem and any(side > 1 and not step for side, step in zip(value.shape, value.stride())):
            problem = "expanded, with several elements in one place in memory"
        if problem:
            raise CheckpointError(f"the model cannot be filled, and nothing was loaded: its '{key}' is {problem}")


def _is_odd(tensor: Tensor) -> bool:
    """Whether there is NaN or infinity in it.

    The sum tells of almost all tensors that there is not, and takes no memory: what is taken and given back between
    tensors that stay leaves holes, in the end as large as the weights.
    """
    if not tensor.is_floating_point() or math.isfinite(tensor.sum()):
        return False
    return not bool(torch.isfinite(tensor).all())


def _reduce_head(num_classes: int, synsets: Sequence[str], origin: str, found: dict[str, Entry]) -> None:
    """Have an ImageNet-22k classifier read as one of its rows for `synsets`."""
    if num_classes != len(synsets):
        raise CheckpointError(
            f"a head from ImageNet-22k for {len(synsets)} synsets needs num_classes={len(synsets)}, got {num_classes}"
        )
    classes = _classes(found)
    if classes != imagenet22k.NUM_CLASSES:
        raise CheckpointError(
            f"{origin} has {classes} classes; a head from ImageNet-22k needs its {imagenet22k.NUM_CLASSES}"
        )
    rows = imagenet22k.rows(synsets)
    for key in _CLASSIFIER:
        if key in found:
            whole = found[key]
            shape = (len(rows), *whole.shape[1:])
            found[key] = Entry(shape, whole.dtype, lambda whole=whole: whole.read()[rows])
    _logger.info("%s: took %d of the classifier's %d rows", origin, len(rows), classes)


def _adapt_first_conv(in_chans: int, source_chans: int, origin: str, found: dict[str, Entry]) -> None:
    """Have the first convolution of `source_chans` image channels read as one of `in_chans`."""
    first = found.get(_FIRST_CONV)
    if in_chans == source_chans or first is None or len(first.shape) != 4 or first.shape[1] != source_chans:
        return
    found[_FIRST_CONV] = Entry(
        (first.shape[0], in_chans, *first.shape[2:]),
        first.dtype,
        lambda: adapt_input_conv(in_chans, first.read(), base_chans=source_chans),
    )
    _logger.info("%s: adapted the first convolution from %d to %d channels", origin, source_chans, in_chans)


def _drop_head(
    model: "InternImage",
    origin: str,
    found: dict[str, Entry],
    expected: dict[str, tuple[int, ...]],
    cfg: dict[str, Any],
    backbone_only: bool,
) -> None:
    """Remove from both sides what need not fit; warns where that leaves initial values in the model."""
    if backbone_only:
        for key in [key for key in {**found, **expected} if key.startswith(_HEAD)]:
            if key not in found or found[key].shape != expected.get(key):
                found.pop(key, None)
                expected.pop(key, None)
        return
    if not has_head(found) and has_head(expected):
        if model.num_classes > 0:
            raise CheckpointError(
                f"{origin} has a backbone and no head, so it cannot classify. Load it with features_only=True or "
                f"num_classes=0; for a new classifier, call reset_classifier(N) on the latter"
            )
        new = sorted({key.split(".")[0] for key in expected if key.startswith(_HEAD)})
        for key in [key for key in expected if key.startswith(_HEAD)]:
            del expected[key]
        _logger.warning(
            "%s has no head: %s keep their initial, untrained values. forward_features and forward_intermediates do "
            "not use %s",
            origin,
            " and ".join(new),
            "it" if len(new) == 1 else "them",
        )
        return
    if model.num_classes == 0:
        for key in _CLASSIFIER:
            found.pop(key, None)
        return
    in_file = _classes(found)
    asked_for_other = cfg.get("num_classes") is not None and model.num_classes != cfg["num_classes"]
    if asked_for_other and in_file != model.num_classes:
        for key in _CLASSIFIER:
            found.pop(key, None)
            expected.pop(key, None)
        hint = "; head_from_22k=True would take ImageNet-1k's rows of it" if _could_reduce(in_file, model) else ""
        _logger.warning(
            "%s has %d classes and %d were asked for: the classifier is new and untrained%s",
            origin,
            in_file,
            model.num_classes,
            hint,
        )


def _could_reduce(in_file: int, model: "InternImage") -> bool:
    return in_file == imagenet22k.NUM_CLASSES and model.num_classes == 1000


def _differences(found: dict[str, Entry], expected: dict[str, tuple[int, ...]]) -> list[str]:
    lines = [
        f"missing: {key} {shape}" for key, shape in expected.items() if key not in found and not key.endswith(_OPTIONAL)
    ]
    lines += [
        f"shape: {key} is {found[key].shape} in the file and {shape} in the model"
        + (" (transposed)" if len(shape) == 2 and found[key].shape == shape[::-1] else "")
        for key, shape in expected.items()
        if key in found and found[key].shape != shape
    ]
    lines += [f"unexpected: {key} {entry.shape}" for key, entry in found.items() if key not in expected]
    return lines


def _hint(found: dict[str, Entry], expected: dict[str, tuple[int, ...]]) -> str:
    """What to do about the commonest differences."""
    in_file = {key: entry.shape for key, entry in found.items()}
    size, wanted_size = size_of(in_file), size_of(expected)
    if size and size != wanted_size:
        return f"\nThe file is of another size: {size}; the model has {wanted_size}"
    if any(key.endswith(".gamma1") for key in set(found) - set(expected)):
        return "\nThe file has a layer scale (as the detectors' tiny has): create the model with layer_scale=1.0"
    head, wanted = in_file.get("head.weight"), expected.get("head.weight")
    if head is None and wanted is not None:
        return "\nThe file has no classifier: load it with num_classes=0; for a new one, then call reset_classifier(N)"
    if head is not None and wanted is not None and head[1:] == wanted[1:] and head[0] != wanted[0]:
        return f"\nThe file has {head[0]} classes: create the model with num_classes={head[0]}"
    return ""


def _classes(found: dict[str, Entry]) -> int:
    head = found.get("head.weight")
    return head.shape[0] if head is not None and head.shape else 0


def size_of(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Channels and depths, as names and shapes tell them; None if they do not."""
    channels = shapes.get("patch_embed.conv2.bias")
    if not channels:
        return None
    blocks = {match.groups() for key in shapes if (match := re.match(r"levels\.(\d+)\.blocks\.(\d+)\.", key))}
    depths = Counter(level for level, _ in sorted(blocks))
    return f"channels={channels[0]}, depths={tuple(depths.values())}"


def describe(source: str | Path, use_ema: bool = False) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's model under our names; reads no weights.

    Raises:
        CheckpointError: It cannot be read, or holds no InternImage.
        FileNotFoundError: There is no such file.
    """
    found, _ = _own_names(open_checkpoint(source, use_ema), f"'{source}'")
    return {key: entry.shape for key, entry in found.items()}


def count_classes(source: str | Path, use_ema: bool = False) -> int:
    """How many classes the classifier of a checkpoint has; 0 without one. Reads names and shapes only."""
    found, _ = _own_names(open_checkpoint(source, use_ema), f"'{source}'")
    return _classes(found)


def has_head(names: Iterable[str]) -> bool:
    """Whether tensors of these names include any of a head, beside the stages of a backbone."""
    return any(name.startswith(_HEAD) for name in names)
