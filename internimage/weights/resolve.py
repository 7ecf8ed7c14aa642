# SPDX-License-Identifier: MIT
"""From what a timm pretrained cfg or a user names to weights on this machine, downloading them if necessary."""

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from ..errors import CheckpointError, UserError
from . import hub
from .file_names import CONFIG, WEIGHT_FILES
from .readers import Weights, existing_path
from .released import HUB_PTH_REPO, PUBLISHED, Published

_logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)(@[^/\s]+)?(?:/(.+))?")


class SourceError(UserError, ValueError):
    """An empty name of weights."""


# ---- what a pretrained cfg names


def resolve_source(
    variant: str, cfg: dict[str, Any], cache_dir: str | None = None
) -> Path | Mapping[str, Tensor] | Weights:
    """The weights of a timm pretrained cfg: a path, a state dict or opened weights; downloads them if necessary.

    Args:
        variant: Model name, for messages.
        cfg: A timm pretrained cfg as a dict.
        cache_dir: For downloads.

    Raises:
        CheckpointError: The cfg names no weights.
        internimage.weights.hub.DownloadError: They could not be downloaded.
    """
    state_dict: Mapping[str, Tensor] | Weights | None = cfg.get("state_dict")
    if state_dict is not None and cfg.get("source") != "hf-hub":
        return state_dict
    return _locate(variant, cfg, cache_dir)


def _locate(variant: str, cfg: dict[str, Any], cache_dir: str | None) -> Path:
    if cfg.get("source") == "hf-hub":  # create_model("hf-hub:...")
        hub.check_cached(cfg["hf_hub_id"], CONFIG, cache_dir)  # timm has made the model of it
        return hub.download(cfg["hf_hub_id"], cache_dir=cache_dir)
    if cfg.get("file"):
        return existing_path(cfg["file"])
    if cfg.get("url"):  # before the tag's repository: none of our cfgs has one, so the user gave it
        return hub.download_url(cfg["url"], cache_dir)
    if cfg.get("hf_hub_id"):
        return _download_tag(variant, cfg, cache_dir)
    name = f"{variant}.{cfg['tag']}" if cfg.get("tag") else variant
    raise CheckpointError(
        f"no weights were released for '{name}'; use {hub.OWN_FILE}, or pretrained=False to begin without weights"
    )


def _download_tag(variant: str, cfg: dict[str, Any], cache_dir: str | None) -> Path:
    published = PUBLISHED.get(f"{variant}.{cfg.get('tag')}")
    preferred = cfg.get("hf_hub_filename")
    filenames: tuple[str, ...] = WEIGHT_FILES
    if preferred and preferred not in filenames:
        filenames = (preferred,)
    try:
        return hub.download(cfg["hf_hub_id"], filenames, cache_dir)
    except (hub.NothingThere, hub.Unreachable) as error:
        # there is no fallback for a repository or revision that the user chose, nor for a failed download
        if published is None or published.pth is None or cfg["hf_hub_id"] != published.hub_source:
            raise
        _logger.info("%s; trying %s in %s", error, published.pth, HUB_PTH_REPO)
        try:
            cached_only = isinstance(error, hub.Unreachable)  # waiting for one attempt is enough
            return hub.download(published.pth_source, (published.pth,), cache_dir, cached_only)
        except hub.DownloadError as second:
            collected = f"{published.pth} of {HUB_PTH_REPO}"
            if isinstance(error, hub.Unreachable):
                raise hub.DownloadError(f"{error} Nor is {collected} in the cache.") from second
            raise hub.DownloadError(f"{error}; nor could {collected} be had: {second}") from second


# ---- what a user names


@dataclass(frozen=True)
class Source:
    """Where weights are, and what is known about them."""

    path: Path
    name: str  # for the model card; no path of this machine
    model: str | None = None  # NAME.TAG if it is known
    published: Published | None = None


def find_source(source: str, cache_dir: str | None = None, names: Sequence[str] = tuple(PUBLISHED)) -> Source:
    """Weights by path, by the name of a released model, or on the Hub; downloads them if necessary.

    Args:
        source: A file or folder; `internimage_SIZE.TAG`; or `OWNER/NAME[@REVISION][/FILE]`, also behind `hf-hub:`.
        cache_dir: For downloads.
        names: Of weights that have a repository, as `MODEL.TAG`.

    Raises:
        FileNotFoundError: It is none of these.
        SourceError: It is empty.
        CheckpointError: The model was released without weights.
        internimage.weights.hub.DownloadError: It could not be downloaded.
    """
    if not source:  # as a path, that would be this folder
        raise SourceError("the source is empty; it must be a file, a folder, a released name or OWNER/NAME of the Hub")
    path = Path(source).expanduser()
    if path.exists():
        known = next((name for name, item in PUBLISHED.items() if item.pth == path.name), None)
        return Source(path, path.name, known, PUBLISHED.get(known or ""))
    if source in PUBLISHED or source in names:
        cfg = timm.get_pretrained_cfg(source)
        path = _locate(source.partition(".")[0], cfg.to_dict() if cfg is not None else {}, cache_dir)
        return Source(path, _on_the_hub(path, source), source, PUBLISHED.get(source))
    match = _REPOSITORY.fullmatch(source)
    if match is None or source.startswith(("/", "./", "../")):
        near = [name for name in names if name.startswith(f"{source}.")]
        near = near or difflib.get_close_matches(source, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise FileNotFoundError(f"no weights at '{source}', and it is no OWNER/NAME of the Hub{hint}")
    repo_id, revision, file = match.groups()
    try:
        path = hub.download(repo_id + (revision or ""), (file,) if file else WEIGHT_FILES, cache_dir)
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
    """The repository and commit of a downloaded file, from the names of the cache's folders."""
    if path.parent.parent.name != "snapshots":
        return name
    repo_id = path.parent.parent.parent.name.removeprefix("models--").replace("--", "/")
    return f"{repo_id}@{path.parent.name}/{path.name}"
