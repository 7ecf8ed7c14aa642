# SPDX-License-Identifier: MIT
"""The index of weights that are split over several files: JSON that names the file of each tensor."""

from pathlib import Path, PurePosixPath

from .. import strict_json
from ..errors import one_line

_LARGEST_INDEX = 16 * 2**20  # bytes; a hundred thousand tensors


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of its shard, relative to the folder of the index.

    Raises:
        ValueError: It is not a shard index.
    """
    what = f"'{index}' is not a shard index, JSON with a 'weight_map'"
    try:
        content = strict_json.parse(strict_json.read_bytes(index, _LARGEST_INDEX))
    except ValueError as error:
        raise ValueError(f"{what}: {one_line(error, 100)}") from error
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict):
        raise ValueError(f"{what}: it has none")
    if not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ValueError(f"{what}: its shards are not file names")
    unusable = [shard for shard in shard_of.values() if len(shard.encode(errors="replace")) > 255]
    unusable += [name for name in shard_of if len(name) > 1000]
    unusable += [name for name in (*shard_of, *shard_of.values()) if not name.isprintable()]
    if unusable:
        raise ValueError(f"{what}: '{ascii(unusable[0][:50])[1:-1]}' is the start of an invalid file or tensor name")
    outside = [s for s in shard_of.values() if PurePosixPath(s).is_absolute() or ".." in PurePosixPath(s).parts]
    if outside:
        raise ValueError(f"{what}: its shard '{outside[0]}' lies outside of its folder")
    return shard_of
