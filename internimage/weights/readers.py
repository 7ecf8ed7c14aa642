# SPDX-License-Identifier: MIT
"""Files of weights: safetensors, shards, pickles. Opened lazily, read tensor by tensor, never executed."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CheckpointError, list_some, one_line
from .file_names import INDEX_SUFFIX, WEIGHTS, WEIGHTS_INDEX
from .safetensors_io import DTYPES, check_length, nbytes, read_header, read_tensor
from .shard_index import weight_map
from .stored import MOST_DIMENSIONS, Made, StoredTensor
from .torch_file import TorchFile

_logger = logging.getLogger(__name__)

_WRAPPERS = ("model", "module", "state_dict")  # keys of a pickle's weights, in upstream's order
_AVERAGED = ("model_ema", "state_dict_ema")  # upstream's and timm's averaged weights
_PICKLES = ("*.pth", "*.pt", "*.bin", "*.ckpt")
_LONGEST_HEADER = 100_000_000  # bytes of json in a safetensors file, by its specification
_LONGEST_NAME = 1000  # of a tensor


@dataclass(frozen=True)
class Entry:
    """One tensor of weights. `read` returns a contiguous copy that the caller owns."""

    shape: tuple[int, ...]  #: in the file
    dtype: torch.dtype  #: in the file
    read: Callable[[], Tensor]  #: reads it
    problem: str = ""  #: what it is instead of plain numbers in memory; `read` must not be called then


class Weights(Mapping[str, Entry]):
    """Opened weights: tensors by name, of which none has been read. Not a dataclass, since timm copies those by fields.

    Attributes:
        origin: What messages call them, such as "'model.safetensors'".
        files: The files that they are in, a shard index first; none for a state dict.
    """

    def __init__(self, entries: Mapping[str, Entry], origin: str, files: tuple[Path, ...] = ()) -> None:
        self._entries = entries
        self.origin, self.files = origin, files

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weights":
        return self


def existing_path(path: str | Path) -> Path:
    """A path of weights, with `~` expanded; raises FileNotFoundError if nothing is there."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}'" + ("" if path.is_absolute() else f" in '{Path.cwd()}'"))
    return path


def open_weights(path: str | Path, use_ema: bool = False) -> Weights:
    """The tensors of a file or folder; nothing of a safetensors file but its header is read before `Entry.read`.

    Args:
        path: A safetensors file, a shard index, a pickle (`.pth`, `.pt`, `.bin`, `.ckpt`), or a folder with one.
        use_ema: Take the averaged weights of a pickle that has both.

    Raises:
        CheckpointError: It is none of these, damaged, incomplete, or a pickle that contains more than data.
        FileNotFoundError: Nothing is at `path`.
    """
    origin, path = f"'{path}'", existing_path(path)
    if path.is_dir():
        path = _find_in_folder(path)
    if path.name.endswith(INDEX_SUFFIX):
        entries, shards = _open_shards(path, use_ema)
        return Weights(entries, origin, (path, *shards))
    return Weights(_open_file(path, use_ema), origin, (path,))


def from_state_dict(data: object, origin: str = "the state dict", use_ema: bool = False) -> Weights:
    """The tensors of a state dict, wrapped or not; `origin` names it in messages."""
    tensors = _tensors(data, origin, use_ema, Tensor)
    return Weights({key: _entry(value, partial(_own, value)) for key, value in tensors.items()}, origin)


def _entry(tensor: Tensor, read: Callable[[], Tensor]) -> Entry:
    problem = _problem(tensor)
    shapeless = tensor.is_nested or is_lazy(tensor)  # asking for it raises
    return Entry(() if shapeless else tuple(tensor.shape), tensor.dtype, read, problem)


def _problem(tensor: Tensor) -> str:
    """Why a tensor is not an ordinary dense one; checked before any is read, since reading would fail half way."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}, not a plain torch.Tensor"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return "quantized; save it after .dequantize()"
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')}); save it after .to_dense()"
    if tensor.is_meta:
        return "on the meta device, so it holds no numbers"
    extent = tensor.storage_offset() + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride())) + 1
    if tensor.numel() and tensor.untyped_storage().nbytes() < extent * tensor.itemsize:  # as FSDP leaves what it shards
        return "without its memory, which was freed"
    return ""


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class _Unchanged:
    """Detects that a file was replaced or written to between two reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._look()

    def check(self) -> None:
        if self._look() != self._state:
            raise CheckpointError(f"'{self._path}' was changed while it was being read")

    def _look(self) -> tuple[int, ...]:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise CheckpointError(f"'{self._path}' cannot be read: {error.strerror}") from error
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


# ---- folders and shards


def _find_in_folder(folder: Path) -> Path:
    for patterns in (
        [WEIGHTS_INDEX],
        ["*.safetensors" + INDEX_SUFFIX],
        ["*.bin" + INDEX_SUFFIX],
        [WEIGHTS],
        ["*.safetensors"],
        ["pytorch_model.bin"],
        _PICKLES,
    ):
        found = [file for pattern in patterns for file in folder.glob(pattern)]
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(
                f"'{folder}' holds several weight files ({list_some(file.name for file in found)}) and no "
                f"'{WEIGHTS_INDEX}' that says how they belong together; name one file"
            )
    raise CheckpointError(f"'{folder}' holds no weights: no .safetensors, {', '.join(p[1:] for p in _PICKLES)} file")


def _open_shards(index: Path, use_ema: bool) -> tuple[dict[str, Entry], list[Path]]:
    try:
        shard_of = weight_map(index)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"'{index}' names {len(shards)} shards; {len(missing)} are missing: {list_some(missing)}")
    entries: dict[str, Entry] = {}
    for shard in shards:
        found = _open_file(index.parent / shard, use_ema)
        mismatched = set(found) ^ {key for key, name in shard_of.items() if name == shard}
        if mismatched:
            raise CheckpointError(
                f"'{index}' and its shard '{shard}' disagree about {len(mismatched)} tensors: {list_some(mismatched)}"
            )
        entries.update(found)
    return entries, [index.parent / shard for shard in shards]


# ---- single files


def _open_file(path: Path, use_ema: bool) -> dict[str, Entry]:
    """By content, not by name: a safetensors file called .bin opens as what it is."""
    if not path.is_file():  # opening a pipe would block
        raise CheckpointError(f"'{path}' is not a regular file")
    with path.open("rb") as file:
        start = file.read(64)
    # before the pickles: the first bytes, a header's size, may look like one
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        if use_ema:
            _logger.warning("'%s' holds one set of weights; use_ema has no choice", path)
        return _plausible(_open_safetensors(path), path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _plausible(_open_pickle(path, use_ema), path)
    hint = ""
    if not start:
        hint = ": it is empty"
    elif start.lstrip()[:1] == b"<":
        hint = ": it looks like a web page; a download link with /blob/ gives one"
    elif start.startswith(b"version https://git-lfs"):
        hint = ": it is the pointer that git leaves without git-lfs; `git lfs pull` fetches the file itself"
    raise CheckpointError(f"'{path}' is not a checkpoint (no safetensors, no torch file){hint}")


def _plausible(entries: dict[str, Entry], path: Path) -> dict[str, Entry]:
    """Refuse names and shapes that no tensor has: messages would repeat them, and torch may not accept them."""
    for key, entry in entries.items():
        if not key.isprintable() or len(key) > _LONGEST_NAME:
            shown = ascii(key[:50])[1:-1]
            raise CheckpointError(f"'{path}' has a tensor whose name is none, as it begins with '{shown}'")
        # beside a 0, the other sides may have any size
        if len(entry.shape) > MOST_DIMENSIONS or nbytes(tuple(side or 1 for side in entry.shape), entry.dtype) >= 2**63:
            raise CheckpointError(f"'{path}' has a tensor '{key}' of a shape that no tensor can have")
    return entries


def _open_safetensors(path: Path) -> dict[str, Entry]:
    try:
        check_length(path)
        safe_open(path, framework="pt", device="cpu")  # checks the header
        header, start = read_header(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' is damaged or truncated: {one_line(error)}") from error
    unknown = {item["dtype"] for item in header.values()} - set(DTYPES)
    if unknown:
        raise CheckpointError(f"'{path}' has tensors of {list_some(unknown)}, which are no weights of this package")
    unchanged = _Unchanged(path)

    def entry(key: str, item: Mapping[str, Any]) -> Entry:
        shape, dtype, position = tuple(item["shape"]), DTYPES[item["dtype"]], start + item["data_offsets"][0]

        def read() -> Tensor:
            unchanged.check()
            try:
                return read_tensor(path, position, shape, dtype)
            except (OSError, EOFError) as error:
                raise CheckpointError(f"reading '{key}' of '{path}' failed: {error}") from error

        return Entry(shape, dtype, read)

    return {key: entry(key, item) for key, item in header.items()}


def _open_pickle(path: Path, use_ema: bool) -> dict[str, Entry]:
    unchanged = _Unchanged(path)
    file = TorchFile(path)
    tensors = _tensors(file.data, f"'{path}'", use_ema, StoredTensor)
    file.check(tensors.values())

    def read(key: str) -> Tensor:
        unchanged.check()
        return file.read(tensors[key])

    return {key: Entry(value.shape, value.dtype, partial(read, key), value.problem) for key, value in tensors.items()}


# ---- unpickled content


_T = TypeVar("_T", Tensor, StoredTensor)


def _tensors(data: object, origin: str, use_ema: bool, kind: type[_T]) -> dict[str, _T]:
    """The named tensors, which are of `kind`."""
    state_dict = _unwrap(data, origin, use_ema)
    tensors = {k: v for k, v in state_dict.items() if isinstance(k, str) and isinstance(v, kind)}
    if not tensors:
        raise CheckpointError(f"{origin} holds no tensors; it has {list_some(state_dict)}")
    return tensors


def _unwrap(data: object, origin: str, use_ema: bool) -> Mapping[Any, Any]:
    if not isinstance(data, Mapping):
        kind = "Tensor" if isinstance(data, StoredTensor) else data if isinstance(data, Made) else type(data).__name__
        raise CheckpointError(f"{origin} holds a {kind}, not a state dict")
    plain = [name for name in _WRAPPERS if isinstance(data.get(name), Mapping)]
    averaged = [name for name in _AVERAGED if isinstance(data.get(name), Mapping)]
    if use_ema and not averaged:
        if plain:
            raise CheckpointError(f"{origin} has no averaged weights ('model_ema'); it has {list_some(data)}")
        _logger.warning("%s holds one set of weights; use_ema has no choice", origin)
    wrappers = averaged + plain if use_ema else plain + averaged
    if plain and averaged:
        other = plain[0] if use_ema else averaged[0]
        _logger.info("%s holds '%s' and '%s': took '%s'", origin, wrappers[0], other, wrappers[0])
    return data[wrappers[0]] if wrappers else data
