# SPDX-License-Identifier: MIT
"""Which weights are meant, and which model they belong to."""

import difflib
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..errors import UserError, one_line
from ..models.model_config import CONFIG, NOT_OF_A_MODEL, ModelConfigError, has_model_config, is_ours, read_model_config
from ..weights import hub
from ..weights import load as checkpoints
from ..weights.imagenet22k import imagenet_1k
from ..weights.released import PUBLISHED, Published
from ..weights.resolve import resolve_source

_logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(@[^/\s]+)?(?:/(.+))?")


class ConvertError(UserError, RuntimeError):
    """Weights that cannot be converted, or a folder that cannot be written. Nothing was left behind."""


@dataclass(frozen=True)
class Source:
    """Where weights are, and what is known of them."""

    path: Path
    name: str  # for the model card; no path of this machine
    model: str | None = None  # NAME.TAG if these are released weights
    published: Published | None = None


def find_source(source: str, cache_dir: str | None = None) -> Source:
    """Weights by path, by the name of a released model, or on the Hub; downloads them if need be.

    Args:
        source: A file or folder; `internimage_SIZE.TAG`; or `OWNER/NAME[@REVISION][/FILE]`, also behind `hf-hub:`.
        cache_dir: For downloads.

    Raises:
        FileNotFoundError: It is none of these.
        internimage.weights.hub.DownloadError: It could not be downloaded.
    """
    if not source:  # as a path, that would be this folder
        raise ConvertError("the source is empty; it must be a file, a folder, a released name or OWNER/NAME of the Hub")
    path = Path(source).expanduser()
    if path.exists():
        known = next((name for name, item in PUBLISHED.items() if item.pth == path.name), None)
        return Source(path, path.name, known, PUBLISHED.get(known or ""))
    if source in PUBLISHED:
        cfg = timm.get_pretrained_cfg(source).to_dict()
        path = resolve_source(source.partition(".")[0], cfg, cache_dir)
        return Source(path, _on_the_hub(path, source), source, PUBLISHED[source])
    match = _REPOSITORY.fullmatch(source)
    if match is None or source.startswith(("/", "./", "../")):
        near = [name for name in PUBLISHED if name.startswith(f"{source}.")]
        near = near or difflib.get_close_matches(source, PUBLISHED, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise FileNotFoundError(f"no weights at '{source}', and it is no OWNER/NAME of the Hub{hint}")
    repo_id, revision, file = match.groups()
    try:
        path = hub.download(repo_id + (revision or ""), (file,) if file else hub.WEIGHT_FILES, cache_dir)
    except hub.DownloadError as error:
        raise hub.DownloadError(f"there is no file '{source}' here, and on the Hub: {error}") from error
    known = next((k for k, item in PUBLISHED.items() if repo_id == item.hub_id or (file and file == item.pth)), None)
    if known is None and file is None:
        try:  # beside the weights, of the same commit: what the model is
            hub.download(f"{repo_id}@{hub.commit_of(path, path.name)}", (CONFIG,), cache_dir)
        except hub.NothingThere:
            _logger.debug("%s has no %s", repo_id, CONFIG)
    return Source(path, _on_the_hub(path, repo_id), known, PUBLISHED.get(known or ""))


def _on_the_hub(path: Path, name: str) -> str:
    """The repository and commit of a downloaded file, as the cache's folders are named."""
    if path.parent.parent.name != "snapshots":
        return name
    repo_id = path.parent.parent.parent.name.removeprefix("models--").replace("--", "/")
    return f"{repo_id}@{path.parent.name}/{path.name}"


# ---- which model


def model_of(
    source: Source, name: str | None, model_kwargs: dict[str, Any], use_ema: bool, reduce_head: bool
) -> tuple[nn.Module, bool]:
    """The model that weights belong to, on the meta device, and whether they lack a head.

    Args:
        source: The weights.
        name: timm's name of the model; found out if None.
        model_kwargs: Arguments of the model where it differs from that name.
        use_ema: Of two sets of weights, look at the averaged one.
        reduce_head: The model gets ImageNet-1k's classes.

    Raises:
        ConvertError: It is of no released size and no name was given, or cannot be built.
        CheckpointError: The weights cannot be read.
    """
    odd = [key for key in model_kwargs if key in NOT_OF_A_MODEL]
    if odd:
        raise ConvertError(f"'{odd[0]}' is no argument of a model")
    shapes = checkpoints.describe(source.path, use_ema)
    kwargs: dict[str, Any] = {"device": "meta", **model_kwargs}
    described = _described(source.path) if name is None and source.model is None else None
    if described is not None:
        name = f"local-dir:{described}"
    else:
        name = name or source.model or _guess(shapes, source.path)
        first, classifier = shapes.get("patch_embed.conv1.weight"), shapes.get("head.weight")
        if first is not None and len(first) == 4:
            kwargs.setdefault("in_chans", first[1])
        kwargs.setdefault("num_classes", classifier[0] if classifier else 0)
        if "levels.0.blocks.0.gamma1" in shapes:
            kwargs.setdefault("layer_scale", _layer_scale(name))
    if reduce_head:
        kwargs["num_classes"] = len(imagenet_1k())
    architecture = name if described is None else read_model_config(described).architecture
    if timm.is_model(architecture) and not is_ours(architecture):
        raise ConvertError(f"'{name}' is of the architecture '{architecture}'; only InternImage can be converted")
    try:
        model = timm.create_model(name, **kwargs)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        given = {key: value for key, value in kwargs.items() if key != "device"}
        raise ConvertError(f"cannot build '{name}' with {given}: {one_line(error)}") from error
    return model, not checkpoints.has_head(shapes)


def _described(source: Path) -> Path | None:
    """The folder with a timm config.json that a source is, or stands in; that of transformers is another.

    Raises:
        ModelConfigError: The source is a folder whose config.json is damaged.
    """
    folder = source if source.is_dir() else source.parent
    try:
        if not has_model_config(folder):
            return None
        read_model_config(folder)
    except ModelConfigError as error:
        if source.is_dir():
            raise
        _logger.warning("%s; it was left out, as a file of weights was named", error)
        return None
    return folder


def _layer_scale(name: str) -> float:
    """What the model itself has, else 1, the value that the detectors' tiny is trained from."""
    model = timm.create_model(name, device="meta")
    return model.levels[0].blocks[0].layer_scale or 1.0


def _guess(shapes: dict[str, tuple[int, ...]], path: Path) -> str:
    """The released model with these channels, depths and classes; without its tag if the classes are others."""
    size = checkpoints.size_of(shapes)
    classes = shapes["head.weight"][0] if shapes.get("head.weight") else 0
    names = list(dict.fromkeys(tagged.partition(".")[0] for tagged in PUBLISHED))
    fitting = [name for name in names if size is not None and _size_by_name(name) == size]
    for tagged in PUBLISHED:
        if tagged.startswith(tuple(f"{name}." for name in fitting)):
            if timm.get_pretrained_cfg(tagged).num_classes == classes:
                return tagged
    if not fitting:
        raise ConvertError(
            f"'{path}' is of no released size ({size or 'no stem in it'}): name the model that it belongs to, such as "
            f"--model internimage_atto, and what differs from it, such as --model-kwargs channels=8"
        )
    return fitting[0]


@cache
def _size_by_name(name: str) -> str | None:
    state_dict = timm.create_model(name, device="meta").state_dict()
    return checkpoints.size_of({key: tuple(value.shape) for key, value in state_dict.items()})
