# SPDX-License-Identifier: MIT
"""Files from the Hugging Face Hub. All settings of huggingface_hub (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, tokens) hold.

Reading a file once it is here is `models/checkpoints.py`.
"""

import json
import logging
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from timm.models._hub import download_cached_file

from .errors import UserError

_logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.json"  # of a file that maps tensors to shards
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class DownloadError(UserError, RuntimeError):
    """A repository or a file could not be had; the message says what was tried and what to set."""


def split_revision(repo_id: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> (`owner/name`, `revision`); None without one."""
    name, _, revision = repo_id.partition("@")
    return name, revision or None


def weight_map(index: Path) -> dict[str, str]:
    """Shard index -> tensor name: shard's file name.

    Raises:
        ValueError: It is not a shard index.
    """
    try:
        shard_of = dict(json.loads(index.read_text())["weight_map"])
        if not all(isinstance(shard, str) for shard in shard_of.values()):
            raise TypeError("its shards are not file names")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{index}' is not a shard index, json with a 'weight_map': {error}") from error
    return shard_of


def download(repo_id: str, filenames: tuple[str, ...] = WEIGHT_FILES, cache_dir: str | None = None) -> Path:
    """Download the first of `filenames` that a repository has.

    Args:
        repo_id: `owner/name` or `owner/name@revision`.
        filenames: In order of preference. After a shard index, its shards are downloaded too.
        cache_dir: Instead of huggingface_hub's own cache.

    Returns:
        The local file; beside a shard index lie its shards.

    Raises:
        DownloadError: None of them can be had.
    """
    name, revision = split_revision(repo_id)
    unreachable = None
    for filename in filenames:
        # once the Hub did not answer, only the cache is asked: it may hold the next one
        options = dict(revision=revision, cache_dir=cache_dir, local_files_only=unreachable is not None)
        try:
            path = Path(hf_hub_download(name, filename, **options))
            if filename.endswith(INDEX_SUFFIX):
                for shard in sorted(set(weight_map(path).values())):
                    hf_hub_download(name, shard, **options)
        except LocalEntryNotFoundError as error:  # before its parent class, EntryNotFoundError
            unreachable = unreachable or error
        except RepositoryNotFoundError as error:
            raise DownloadError(
                f"{name} was not found on the Hub, or needs a token (HF_TOKEN). Revision: {revision or 'main'}."
            ) from error
        except EntryNotFoundError as error:
            _logger.debug("%s: %s", name, error)
        except Exception as error:  # also whatever the HTTP library of huggingface_hub raises
            raise DownloadError(f"{name}: downloading '{filename}' failed: {error}") from error
        else:
            _logger.info("%s: using %s", name, filename)
            return path
    if unreachable:
        raise DownloadError(
            f"{name}: {', '.join(filenames)} could not be downloaded, nor is any of them in the cache. Without a "
            f"network, load a local file: create_model(..., pretrained_cfg_overlay=dict(file=PATH)); with a mirror, "
            f"set HF_ENDPOINT; HF_HUB_OFFLINE must not be 1 for a download. ({unreachable})"
        ) from unreachable
    raise DownloadError(f"{name} (revision {revision or 'main'}) has none of {', '.join(filenames)}")


def download_url(url: str, cache_dir: str | None = None) -> Path:
    """Download from anywhere, into timm's cache or `cache_dir`.

    Raises:
        DownloadError: It could not be had.
    """
    try:
        return Path(download_cached_file(url, cache_dir=cache_dir))
    except (OSError, RuntimeError, ValueError) as error:
        raise DownloadError(f"{url} could not be downloaded: {error}") from error
