# SPDX-License-Identifier: MIT
"""Where a timm pretrained cfg says that weights are, and their download. Reading them is `checkpoints.py`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from . import hub
from .readers import existing_path
from .released import HUB_PTH_REPO, PUBLISHED

_logger = logging.getLogger(__name__)


def resolve_source(variant: str, cfg: dict[str, Any], cache_dir: str | None = None) -> Path | Mapping[str, Tensor]:
    """The local file or folder, or the state dict, that a timm pretrained cfg names; downloads it if need be.

    Args:
        variant: Model name, for messages.
        cfg: A timm pretrained cfg as a dict.
        cache_dir: For downloads.

    Raises:
        CheckpointError: The cfg names no weights.
        internimage.weights.hub.DownloadError: They could not be downloaded.
    """
    if cfg.get("source") == "hf-hub":  # create_model("hf-hub:...")
        hub.check_cached(cfg["hf_hub_id"], hub.CONFIG, cache_dir)  # timm has made the model of it
        return hub.download(cfg["hf_hub_id"], cache_dir=cache_dir)
    if cfg.get("state_dict") is not None:
        return cfg["state_dict"]
    if cfg.get("file"):
        return existing_path(cfg["file"])
    if cfg.get("url"):  # before the tag's repository: none of our cfgs has one, so it was asked for
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
    filenames = hub.WEIGHT_FILES
    if preferred and preferred not in filenames:
        filenames = (preferred,)
    try:
        return hub.download(cfg["hf_hub_id"], filenames, cache_dir)
    except (hub.NothingThere, hub.Unreachable) as error:
        # a repository or a revision of one's own choice has no second choice, nor has a download that broke
        if published is None or published.pth is None or cfg["hf_hub_id"] != published.hub_source:
            raise
        _logger.info("%s; trying %s in %s", error, published.pth, HUB_PTH_REPO)
        try:
            cached_only = isinstance(error, hub.Unreachable)  # one attempt is long enough to wait for
            return hub.download(published.pth_source, (published.pth,), cache_dir, cached_only)
        except hub.DownloadError as second:
            collected = f"{published.pth} of {HUB_PTH_REPO}"
            if isinstance(error, hub.Unreachable):
                raise hub.DownloadError(f"{error} Nor is {collected} in the cache.") from second
            raise hub.DownloadError(f"{error}; nor could {collected} be had: {second}") from second
