# SPDX-License-Identifier: MIT
"""Pickles as data: an interpreter of the instructions that torch.save writes, which imports and calls nothing.

Pickle lets a file call functions. `torch.load(weights_only=True)` restricts which, but what it allows can take any
amount of memory or time (`bytearray(8e9)`, a tensor of stride 0), and a key of nested tuples crashes the process. Here
names are not resolved: calls are recorded, and memory is bounded by a constant times the number of instructions.
"""

import _compat_pickle
import io
import itertools
import pickle
import pickletools
import re
import struct
import warnings
from collections.abc import Iterator
from typing import Any

from ..errors import list_some
from .stored import (
    Made,
    Named,
    PickleError,
    Storage,
    StoredTensor,
    can_rebuild,
    dtype_named,
    is_storage_type,
    rebuild,
    storage_of,
)

MOST_BYTES = 64 * 2**20  # of a pickle; the tensors' data is elsewhere in the file
_MOST_INSTRUCTIONS = 1_000_000  # 25,000 tensors, three times the largest model with its optimizer
_LONGEST_GLOBAL = 500

# Besides tensors and plain containers, official training checkpoints contain their configuration, a yacs node (a dict),
# and others their command line. No other name is accepted.
_MAPPINGS = ("collections.OrderedDict", "yacs.config.CfgNode")
_DATA = re.compile(
    r"argparse\.Namespace|collections\.Counter|_codecs\.encode|builtins\.(set|complex|bytearray)"
    r"|torch\.(Size|device|serialization\._get_layout|per_(tensor|channel)_\w+)"
)
_HARMLESS = re.compile(  # names in torch, or garbled ones, which the refusal does not list as code
    rf"{_DATA.pattern}|yacs\.config\.CfgNode|collections\.OrderedDict|torch\.(\w+|storage\.\w+Storage)"
    r"|torch\.nn\.parameter\.Parameter|torch\.(_utils|_tensor)\._rebuild\w+"
)

_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY = {ord("]"): list, ord("}"): dict, ord(")"): tuple}
_NUMBERS = {ord("K"): struct.Struct("B"), ord("M"): struct.Struct("<H"), ord("J"): struct.Struct("<i"),
            ord("G"): struct.Struct(">d")}  # fmt: skip
_PUT = {ord("q"): struct.Struct("B"), ord("r"): struct.Struct("<I")}
_GET = {ord("h"): struct.Struct("B"), ord("j"): struct.Struct("<I")}
_COUNTED = {ord("X"): struct.Struct("<I"), ord("U"): struct.Struct("B"), 0x8A: struct.Struct("B")}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


class RefusedError(PickleError):
    """A pickle that is not interpreted: it names something other than data, or has other instructions.

    Attributes:
        name: The name; None for an instruction.
    """

    def __init__(self, reason: str, name: str | None = None) -> None:
        super().__init__(reason)
        self.name = name


class Unpickler:
    """Interprets the pickles in a byte string, one after the other.

    Args:
        data: The bytes.
        start: Where the first pickle begins.

    Attributes:
        position: Where the next one begins.
        storages: The storages that tensors refer to, by key.
    """

    def __init__(self, data: bytes, start: int = 0) -> None:
        self.position = start
        self.storages: dict[str, Storage] = {}
        self._data = data
        self._left = _MOST_INSTRUCTIONS

    def load(self) -> Any:
        """The next pickle: plain containers, text, numbers, `StoredTensor`, `Made` and `Named`.

        Raises:
            RefusedError: It contains more than data.
            PickleError: It is damaged, or larger than any checkpoint's.
        """
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            while self._left:
                self._left -= 1
                self.position += 1
                if self._step(self._data[self.position - 1]):
                    return self._stack.pop()
        except (IndexError, KeyError, struct.error) as error:  # of the bytes, the stack, the memo
            if self.position >= len(self._data) or isinstance(error, struct.error):
                raise PickleError("it ends too early") from error
            raise PickleError("its pickle is not one that torch.save writes") from error
        raise PickleError(f"its pickle has more than {_MOST_INSTRUCTIONS} instructions")

    def _number(self, form: struct.Struct) -> Any:
        (number,) = form.unpack_from(self._data, self.position)
        self.position += form.size
        return number

    def _bytes(self, count: int) -> bytes:
        found = self._data[self.position : self.position + count]
        self.position += count
        if len(found) < count:
            raise PickleError("it ends too early")
        return found

    def _step(self, code: int) -> bool:
        """Interpret one instruction; returns whether it was the last."""
        stack = self._stack
        if code in _PUT:
            self._memo[self._number(_PUT[code])] = stack[-1]
        elif code in _GET:
            stack.append(self._memo[self._number(_GET[code])])
        elif code in _NUMBERS:
            stack.append(self._number(_NUMBERS[code]))
        elif code in _COUNTED:
            stack.append(_content(code, self._bytes(self._number(_COUNTED[code]))))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code in _TUPLES:
            stack.append(tuple([stack.pop() for _ in range(_TUPLES[code])][::-1]))
        elif code == ord("("):
            self._marks.append(stack)
            self._stack = []
        elif code == ord("t"):
            self._since_mark().append(tuple(stack))
        elif code == ord("c"):
            stack.append(self._global())
        elif code in (ord("R"), 0x81):  # call a function, create an instance
            arguments = stack.pop()
            stack.append(_make(stack.pop(), arguments))
        elif code == ord("Q"):
            stack.append(storage_of(stack.pop(), self.storages))
        elif code in (ord("s"), ord("u")):
            items = [stack.pop(), stack.pop()][::-1] if code == ord("s") else stack
            _set(self._stack[-1] if code == ord("s") else self._since_mark()[-1], items)
        elif code in (ord("a"), ord("e")):
            items = [stack.pop()] if code == ord("a") else stack
            target = self._stack[-1] if code == ord("a") else self._since_mark()[-1]
            if not isinstance(target, list):
                raise PickleError("its pickle appends to what is no list")
            target.extend(items)
        elif code == ord("b"):  # attributes, which contain no weights
            stack.pop()
            if isinstance(stack[-1], StoredTensor) or not isinstance(stack[-1], (dict, Made)):
                raise PickleError("its pickle sets attributes of what has none")
        elif code == 0x80:
            self._protocol(self._number(_NUMBERS[ord("K")]))
        elif code == ord("."):
            return True
        else:
            raise RefusedError(_unknown(code))
        return False

    def _since_mark(self) -> list[Any]:
        """Return to the stack as it was at the last mark."""
        self._stack = self._marks.pop()
        return self._stack

    def _global(self) -> Any:
        parts = []
        for _ in range(2):
            end = self._data.find(b"\n", self.position, self.position + _LONGEST_GLOBAL)
            if end < 0:
                raise PickleError("its pickle has a name that does not end")
            parts.append(self._data[self.position : end].decode("utf-8", "backslashreplace"))
            self.position = end + 1
        name = _modern(*parts)
        dtype = dtype_named(name)
        if dtype is not None:
            return dtype
        if name in _MAPPINGS or _DATA.fullmatch(name) or is_storage_type(name) or can_rebuild(name):
            return Named(name)
        raise RefusedError("it names something else than data", name)

    def _protocol(self, protocol: int) -> None:
        if protocol > 2:
            raise RefusedError(
                f"it was written with pickle protocol {protocol}, of which torch cannot tell data from code; save it "
                f"again without another pickle_protocol, or with pickle_protocol=2"
            )


def _content(code: int, content: bytes) -> Any:
    if code == 0x8A:
        return pickle.decode_long(content)
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        if code == ord("U"):  # Python 2's text, which may be any bytes
            return content
        raise PickleError("its pickle has text that is none") from error


def _make(what: Any, arguments: Any) -> Any:
    if not isinstance(what, Named) or not isinstance(arguments, tuple):
        raise PickleError("its pickle calls what is no function")
    if what.name in _MAPPINGS:
        mapping: dict[Any, Any] = {}
        for pair in arguments[0] if arguments and isinstance(arguments[0], (list, tuple)) else ():
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise PickleError("its pickle makes a dict of what are no pairs")
            _set(mapping, pair)
        if arguments and isinstance(arguments[0], dict):
            mapping.update(arguments[0])
        return mapping
    if what.name == "torch.Size" and arguments and isinstance(arguments[0], (list, tuple)):
        return tuple(arguments[0])
    if can_rebuild(what.name):
        return rebuild(what.name, arguments)
    return Made(what.name, arguments)


def _set(target: Any, items: Any) -> None:
    """Put keys and values into a dict. Hashing tuples can take forever or overflow the stack, and large numbers can
    share a hash: such keys, which are no names of tensors, are replaced by placeholders."""
    if not isinstance(target, dict) or len(items) % 2:
        raise PickleError("its pickle sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        plain = type(key) is str or (type(key) is int and abs(key) < 2**60)
        target[key if plain else Made(type(key).__name__)] = value


def _modern(module: str, name: str) -> str:
    """Python 3's name of a module; up to protocol 2, pickles have those of Python 2."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def _unknown(code: int) -> str:
    known = next((opcode for opcode in pickletools.opcodes if opcode.code == chr(code)), None)
    if known is None:
        return f"its pickle has the unknown instruction {code}"
    return f"its pickle has the instruction {known.name}, which torch.save does not write"


# ---- refusals


def refusal(error: RefusedError, data: bytes, starts: tuple[int, ...] = (0,)) -> str:
    """Why a pickle is refused, as a predicate for the file's name.

    Args:
        error: The reason.
        data: The byte string.
        starts: Where pickles begin in it.
    """
    found = dict.fromkeys([error.name] if error.name else [])
    for start in starts:
        found.update(dict.fromkeys(_imports(data[start:])))
    code = [shown(name) for name in found if not _HARMLESS.fullmatch(name)]
    if code:
        return (
            f"was refused: unpickling it would call {list_some(code)}, and this package unpickles nothing but data. "
            f"Nothing of it was run. If you trust its source, save its weights alone: "
            f"safetensors.torch.save_file(state_dict, PATH)"
        )
    if error.name:
        return (
            f"was refused: it names '{shown(error.name)}', which is not among the data that this package unpickles; "
            f"or it is damaged. Nothing of it was run"
        )
    return f"cannot be unpickled safely, or is damaged: {error}"


def shown(name: str) -> str:
    """A name from a file for a message: without control characters, and not too long."""
    return (name if name.isprintable() else ascii(name)[1:-1])[:200]


def _instructions(data: bytes) -> Iterator[tuple[Any, Any, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in text
        yield from pickletools.genops(io.BytesIO(data))


def _imports(data: bytes) -> list[str]:
    """The names that a pickle imports, from its first instructions; incomplete for a damaged one."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    found: list[str] = []
    count = itertools.count()
    try:
        for opcode, argument, _ in itertools.islice(_instructions(data), 300_000):
            if opcode.name in ("GLOBAL", "INST"):
                found.append(_modern(*argument.split(" ", 1)))
            elif opcode.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
            elif opcode.name == "MEMOIZE":
                memo[next(count)] = strings[-1] if strings else ""
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                strings.append(memo.get(argument, ""))
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, TypeError):  # of pickletools, for damaged bytes; only a message depends on it
        return found
    return found
