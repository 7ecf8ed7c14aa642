# SPDX-License-Identifier: MIT
"""Files from the Hugging Face Hub. All settings of huggingface_hub (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, tokens) hold.

Reading a file once it is here is `models/checkpoints.py`.
"""

import json
import logging
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

_logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.json"  # of a file that maps tensors to shards
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class DownloadError(RuntimeError):
    """A repository or a file could not be had; the message says what was tried and what to set."""


def split_revision(repo_id: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> (`owner/name`, `revision`); None without one."""
    name, _, revision = repo_id.partition("@")
    return name, revision or None


def download(repo_id: str, filenames: tuple[str, ...] = WEIGHT_FILES, cache_dir: str | None = None) -> Path:
    """Download the first of `filenames` that a repository has.

    Args:
        repo_id: `owner/name` or `owner/name@revision`.
        filenames: In order of preference. After a shard index, its shards are downloaded too.
        cache_dir: Instead of huggingface_hub's own cache.

    Returns:
        The local file; for a shard index, the folder that holds it and its shards.

    Raises:
        DownloadError: None of them can be had.
    """
    name, revision = split_revision(repo_id)
    for filename in filenames:
        try:
            path = Path(hf_hub_download(name, filename, revision=revision, cache_dir=cache_dir))
            if filename.endswith(INDEX_SUFFIX):
                for shard in sorted(set(json.loads(path.read_text())["weight_map"].values())):
                    hf_hub_download(name, shard, revision=revision, cache_dir=cache_dir)
                path = path.parent
        except LocalEntryNotFoundError as error:  # before its parent class, EntryNotFoundError
            raise DownloadError(
                f"{name}: '{filename}' is not in the cache and could not be downloaded. Without a network, load a "
                f"local file: create_model(..., pretrained_cfg_overlay=dict(file=PATH)); with a mirror, set "
                f"HF_ENDPOINT; HF_HUB_OFFLINE must not be 1 for a download. ({error})"
            ) from error
        except RepositoryNotFoundError as error:
            raise DownloadError(
                f"{name} was not found on the Hub, or needs a token (HF_TOKEN). Revision: {revision or 'main'}."
            ) from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise DownloadError(f"{name}: downloading '{filename}' failed: {error}") from error
        _logger.info("%s: using %s", name, filename)
        return path
    raise DownloadError(f"{name} (revision {revision or 'main'}) has none of {', '.join(filenames)}")
