# SPDX-License-Identifier: MIT
"""Converting weights of any format to a folder for timm, transformers and the Hub.

The folder has `model.safetensors` (or shards and their index) with our names, timm's `config.json`, and a model card.
Weights are read, cast and written one tensor at a time.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from ..dtypes import FLOATING, is_weights, name_of
from ..errors import CheckpointError, UserError, is_disk_full, one_line
from ..files import write_text
from ..models.families import FamilyModel, families, list_models
from ..models.model_config import find_model_config
from ..models.timm_folder import write_config
from ..values import shown
from ..weights.file_names import CONFIG, WEIGHTS, WEIGHTS_INDEX
from ..weights.load import match
from ..weights.readers import Entry, open_weights
from ..weights.resolve import find_source
from ..weights.safetensors_io import nbytes, write_safetensors
from .detect import ConvertError, model_of
from .folder import CARD, check_destination, check_source, mark, place, staging
from .model_card import model_card

_logger = logging.getLogger(__name__)

HEAD_22K_TO_1K = "22k-to-1k"


@dataclass
class Conversion:
    """What a conversion has written."""

    folder: Path  #: where it is
    model: str  #: architecture, with the tag of released weights
    files: dict[str, int] = field(default_factory=dict)  #: name -> bytes
    tensors: int = 0  #: how many
    parameters: int = 0  #: how many numbers they have
    dtypes: list[str] = field(default_factory=list)  #: of the tensors, as names
    verified: bool = False  #: whether the result was read back and compared


def convert(
    source: str | Path,
    destination: str | Path,
    model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    shard_size: int | str = "5GB",
    head: str | None = None,
    use_ema: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    cache_dir: str | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Conversion:
    """Convert weights to a folder, which appears under its name only once it is complete.

    Args:
        source: See `find_source`.
        destination: Folder to create.
        model: timm's name of the model, with or without a tag; detected if None.
        model_kwargs: Arguments of the model where it differs from that name.
        dtype: Of all floating-point tensors: float64, float32, bfloat16 or float16; None keeps their own.
        shard_size: Largest file of weights, in bytes or such as "5GB"; beyond, they are split, with an index.
        head: "22k-to-1k" keeps ImageNet-1k's rows of an ImageNet-22k classifier.
        use_ema: Take the averaged weights of a source that has both.
        verify: Read the result back and compare every tensor, bit by bit, before it gets its name.
        overwrite: Replace the model in a folder that an earlier conversion has written. Other files are kept, and so is
            a card that was edited.
        cache_dir: For downloads.
        progress: Called with the number of bytes of each tensor written.

    Raises:
        ConvertError: The weights cannot be converted, or the folder cannot be written; the message says why.
        CheckpointError: The weights cannot be read, or do not fit the model.
    """
    if dtype is not None and not is_weights(dtype):
        raise ConvertError(f"dtype must be {', '.join(FLOATING)} or None, got {shown(dtype)}")
    destination = Path(destination).expanduser()
    if head not in (None, HEAD_22K_TO_1K):
        raise ConvertError(f"head must be '{HEAD_22K_TO_1K}' or None, got '{head}'")
    check_source(Path(source).expanduser(), destination)
    check_destination(destination, overwrite)
    found_source = find_source(str(source), cache_dir, list_models(pretrained=True))
    check_source(found_source.path, destination)
    reduce_head = head == HEAD_22K_TO_1K
    weights = open_weights(found_source.path, use_ema)
    built, headless = model_of(found_source, weights, model, dict(model_kwargs or {}), reduce_head)
    found = match(built, weights, backbone_only=headless, head_from_22k=reduce_head)
    if headless:
        _logger.warning("%s has no head: the folder is for features_only=True and num_classes=0", weights.origin)
    entries = {key: _cast(key, entry, dtype) for key, entry in found.items()}
    # with other classes than released they are someone's own weights, about which nothing is known
    own = built.num_classes != built.pretrained_cfg["num_classes"] and not reduce_head
    published = None if own else found_source.published
    name = f"{built.pretrained_cfg['architecture']}"
    if published is not None and built.pretrained_cfg.get("tag"):
        name += f".{built.pretrained_cfg['tag']}"
    result = Conversion(
        destination,
        name,
        tensors=len(entries),
        parameters=sum(torch.Size(entries[key].shape).numel() for key, _ in built.named_parameters() if key in entries),
        dtypes=sorted({name_of(entry.dtype) for entry in entries.values() if entry.dtype.is_floating_point}),
    )
    card = model_card(
        built,
        name,
        source=found_source.name,
        published=published,
        started_from=None if own or published or found_source.model is None else built.pretrained_cfg["hf_hub_id"],
        parameters=result.parameters,
        dtypes=result.dtypes,
        head_from_22k=reduce_head,
        headless=headless,
    )
    try:
        with staging(destination, overwrite) as staged:
            _check_room(destination.parent, staged, entries)
            _write_weights(staged, entries, shard_size, progress)
            _write_config(staged / CONFIG, built, card, known=published is not None)
            write_text(staged / CARD, card)
            if verify:
                _verify(staged, entries)
                result.verified = True
            result.files = {name: (destination / name).stat().st_size for name in place(staged, destination)}
    except UserError:
        raise
    except OSError as error:
        if is_disk_full(error):
            raise ConvertError(
                f"'{destination.parent}' has no room for the result ({error.strerror}); nothing was left there"
            ) from error
        raise ConvertError(f"'{destination}' cannot be written: {error}") from error
    return result


def _cast(key: str, entry: Entry, dtype: torch.dtype | None) -> Entry:
    if dtype is None or not entry.dtype.is_floating_point or entry.dtype == dtype:
        return entry

    def read() -> Tensor:
        whole = entry.read()
        tensor = whole.to(dtype)
        if bool((tensor.isinf() & whole.isfinite()).any()):
            raise ConvertError(
                f"'{key}' has values that {name_of(dtype)} cannot hold (up to {torch.finfo(dtype).max:g}); name a type "
                f"of a larger range, or leave dtype out"
            )
        return tensor

    return Entry(entry.shape, dtype, read)


def _check_room(folder: Path, staged: Path, entries: dict[str, Entry]) -> None:
    needed = sum(nbytes(entry.shape, entry.dtype) for entry in entries.values())
    free = shutil.disk_usage(staged).free
    if needed > free:
        raise ConvertError(f"'{folder}' has {free / 1e9:.2f} GB of room, and the result takes {needed / 1e9:.2f} GB")


def _write_weights(
    folder: Path, entries: dict[str, Entry], shard_size: int | str, progress: Callable[[int], object]
) -> None:
    try:
        plan = split_state_dict_into_shards_factory(
            entries,
            get_storage_size=lambda entry: nbytes(entry.shape, entry.dtype),
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_size,
        )
    except ValueError as error:
        raise ConvertError(f"shard_size must be a number of bytes or such as '5GB' or '500MB': {error}") from error

    def read(key: str) -> Tensor:
        tensor = entries[key].read()
        progress(tensor.nbytes)
        return tensor

    for file, keys in plan.filename_to_tensors.items():
        write_safetensors(folder / file, {key: (entries[key].shape, entries[key].dtype) for key in keys}, read)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / WEIGHTS_INDEX, json.dumps(index, indent=2) + "\n")


def _write_config(path: Path, model: FamilyModel, card: str, known: bool) -> None:
    """timm's config.json. `known`: the weights are released ones, whose tag belongs in it."""
    cfg = model.pretrained_cfg
    labels = {key: cfg[key] for key in ("label_names", "label_descriptions") if cfg.get(key)}
    if labels and len(labels.get("label_names", ())) != model.num_classes:
        labels = {}

    def change(config: dict[str, Any]) -> None:
        if not known:
            config["pretrained_cfg"].pop("tag", None)
        mark(config, card)

    write_config(path, model, labels, change=change)


def _verify(folder: Path, entries: dict[str, Entry]) -> None:
    written = open_weights(folder)
    if set(written) != set(entries):
        raise ConvertError(f"the result has other tensors than the source: {sorted(set(written) ^ set(entries))[:10]}")
    for key, entry in entries.items():
        expected, actual = entry.read(), written[key].read()
        # as bytes: NaN equals nothing, and -0 equals 0
        same = (expected.shape, expected.dtype) == (actual.shape, actual.dtype) and torch.equal(
            expected.reshape(-1).view(torch.uint8), actual.reshape(-1).view(torch.uint8)
        )
        if not same:
            raise ConvertError(f"the result differs from the source in '{key}'; the disk may be at fault")


# ---- before an upload


def check_folder(folder: str | Path) -> list[str]:
    """The files of a converted folder to upload to the Hub, after a check that it is complete.

    Raises:
        CheckpointError: Its configuration and weights do not fit together, or some of them are missing.
    """
    folder = Path(folder).expanduser()
    config = find_model_config(folder) if folder.is_dir() else None
    if config is None:
        raise CheckpointError(f"'{folder}' is no folder with timm's {CONFIG}; `internimage convert` makes one")
    if not config.ours:
        ours = " or ".join(family.name for family in families())
        raise CheckpointError(f"'{folder}' is of the architecture '{config.architecture}', which is no {ours}")
    try:
        model = timm.create_model(f"local-dir:{folder}", device="meta")
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"the {CONFIG} of '{folder}' builds no model: {one_line(error)}") from error
    assert isinstance(model, FamilyModel)  # by its architecture
    weights = open_weights(folder)
    match(model, weights, backbone_only=not model.key_map.has_head(weights))
    files = [path.relative_to(folder).as_posix() for path in weights.files]
    if files[0] not in (WEIGHTS, WEIGHTS_INDEX):
        raise CheckpointError(f"'{folder}' has no {WEIGHTS}; `internimage convert` writes one")
    return [*files, CONFIG, *(name for name in (CARD, "LICENSE") if (folder / name).is_file())]
