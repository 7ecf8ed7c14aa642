# SPDX-License-Identifier: MIT
"""Files of torch.save: every tensor as torch itself reads it, and no damage that goes unnoticed."""

import dataclasses
import random
import zipfile
from collections import OrderedDict

import formats
import hostile
import pytest
import torch
from hostile import Record, mapping, pickled, storage, tensor, with_weights
from torch import nn

from internimage import CheckpointError
from internimage.weights.archive import ArchiveError, check_archive
from internimage.weights.readers import open_weights

STATE_DICT = {"a.weight": torch.arange(600.0).reshape(20, 30), "a.bias": torch.ones(2), "n": torch.tensor(7)}
WHOLE = torch.arange(24.0)
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip
NEWER_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)


def with_attribute(value: torch.Tensor) -> torch.Tensor:
    value.note = "kept beside"
    return value


TENSORS = {
    **{str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in DTYPES},
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "part": WHOLE[5:11],
    "other part": WHOLE[8:].view(4, 4),
    "every second": WHOLE[1::2],
    "transposed": WHOLE.view(4, 6).T,
    "channels last": torch.arange(48.0).reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
    "expanded": torch.arange(3.0).expand(4, 3),
    "diagonal": torch.arange(16.0).reshape(4, 4).diagonal(),
    "parameter": nn.Parameter(torch.arange(3.0)),
    "frozen": nn.Parameter(torch.arange(3.0), requires_grad=False),
    "tensor with an attribute": with_attribute(torch.arange(3.0)),
    "parameter with an attribute": with_attribute(nn.Parameter(torch.arange(3.0))),
    "buffer": nn.Buffer(torch.arange(3.0)),
}
OPTIONS = {"zip": {}, "before torch 1.6": formats.LEGACY}


def read_all(path) -> dict[str, torch.Tensor]:
    return {key: entry.read() for key, entry in open_weights(path).items()}


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert found[key].is_contiguous(), key
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[key], value)]
        assert torch.equal(*bits), key


@pytest.mark.parametrize("container", [dict, OrderedDict])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_tensor_is_what_torch_reads(options, container, tmp_path):
    newer = () if options == "zip" else NEWER_DTYPES
    tensors = {key: value for key, value in TENSORS.items() if value.dtype not in newer}
    path = formats.save_torch(tmp_path / "w.pth", {"model": container(tensors)}, **OPTIONS[options])
    assert_same(read_all(path), torch.load(path, weights_only=True)["model"])


def test_module_state_dict_with_metadata(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = formats.save_torch(tmp_path / "w.pth", model.state_dict())
    assert_same(read_all(path), model.state_dict())


@pytest.mark.parametrize("kind", ["ours", "official", "official, before torch 1.6"])
def test_default_device_is_not_where_they_are_read_to(kind, tmp_path):
    path = formats.write(kind, tmp_path, STATE_DICT)
    with torch.device("meta"):
        found = read_all(path)
    assert_same(dict(sorted(found.items())), dict(sorted(STATE_DICT.items())))


def test_archive_of_a_machine_with_the_other_byte_order(tmp_path):
    stored = {"0": torch.arange(6.0).numpy().byteswap().tobytes(), "1": (5).to_bytes(8, "big")}
    content = {"a": tensor(storage("0", 6), (2, 3), (3, 1)), "n": tensor(storage("1", 1, "torch.LongStorage"), (), ())}
    records = [Record("w/data.pkl", pickled(mapping(content))), Record("w/byteorder", b"big")]
    hostile.archive(tmp_path / "w.pth", records + [Record(f"w/data/{key}", data) for key, data in stored.items()])
    assert_same(read_all(tmp_path / "w.pth"), {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(5)})


def test_archive_without_crcs(tmp_path):
    """torch can leave them out, and writes zero then."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = formats.save_torch(tmp_path / "w.pth", STATE_DICT)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(read_all(path), STATE_DICT)
    check_archive(path)


# ---- damage


def spans(path) -> dict[str, range]:
    """Where each record's bytes lie."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        found = {}
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
            start = info.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            found[info.filename.partition("/")[2]] = range(start, start + info.file_size)
    return found


def flip(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << place % 8
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 1200, 2399])
@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_flipped_bit_in_the_numbers(packed, place, tmp_path):
    path = formats.save_torch(tmp_path / "w.pth", STATE_DICT)
    if packed != zipfile.ZIP_STORED:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pth", "w", packed) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        path = path.with_name("new.pth")
        place //= 10
    check_archive(path)
    flip(path, spans(path)["data/0"][place])
    entries = open_weights(path)
    assert torch.equal(entries["a.bias"].read(), STATE_DICT["a.bias"])  # the damage is elsewhere
    with pytest.raises(CheckpointError, match="record 'w/data/0' .*(CRC does not match|decompressed|cut off)") as error:
        entries["a.weight"].read()
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ArchiveError, match="w/data/0"):
        check_archive(path)


def test_flipped_bit_in_a_part_of_a_storage(tmp_path):
    """Also where it is outside of the part that is read: the CRC is of the whole."""
    path = formats.save_torch(tmp_path / "w.pth", {"a": WHOLE[5:11], "b": WHOLE[8:]})
    assert_same(read_all(path), {"a": WHOLE[5:11], "b": WHOLE[8:]})
    flip(path, spans(path)["data/0"][0])
    with pytest.raises(CheckpointError, match="CRC does not match"):
        open_weights(path)["a"].read()


@pytest.mark.parametrize("record", ["data.pkl", "byteorder"])
def test_flipped_bit_in_what_describes_the_numbers(record, tmp_path):
    path = formats.save_torch(tmp_path / "w.pth", STATE_DICT)
    flip(path, spans(path)[record][3])
    with pytest.raises(CheckpointError, match=f"record 'w/{record}' .*CRC does not match"):
        open_weights(path)


def test_zeroed_page(tmp_path):
    path = formats.save_torch(tmp_path / "w.pth", {"a": torch.rand(5000)})
    data = bytearray(path.read_bytes())
    data[8192:12288] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC does not match"):
        read_all(path)


WEIGHTS = [Record("w/data.pkl", with_weights(b"N")), Record("w/data/0", hostile.TWO), Record("w/data/1", bytes(64))]


def changed(index: int, **changes) -> list[Record]:
    records = list(WEIGHTS)
    records[index] = dataclasses.replace(records[index], **changes)
    return records


LYING = {
    "shorter than the pickle claims": (changed(1, content=hostile.TWO[:4]), "has 4 bytes, and 8 are needed"),
    "longer than the pickle claims": (changed(1, content=hostile.TWO + b"1234"), "has 12 bytes, and 8 are needed"),
    "missing": (WEIGHTS[:1], "record of its storage '0' is missing"),
    "twice": (WEIGHTS + WEIGHTS[1:2], "two records of the name 'w/data/0'"),
    "overlapping": (changed(2, shift=-20), "overlaps|reaches beyond"),
    "beyond the end": (changed(2, shift=1000), "overlaps|reaches beyond"),
    "elsewhere": (changed(1, shift=2), "not where the archive says"),
    "another name at its place": (changed(1, local_name="w/data/9"), "described in two ways"),
    "another method at its place": (changed(1, local_method=8), "described in two ways"),
    "another CRC at its place": (changed(1, local_crc=1), "described in two ways"),
    "no descriptor behind it": (changed(1, flags=8), "described in two ways"),
    "CRC of something else": (changed(1, crc=1), "CRC does not match"),
    "encrypted": (changed(1, flags=1), "encrypted"),
    "compressed by bzip2": (changed(1, method=12), "another method than deflate"),
    "size of more than is stored": (changed(1, size=9), "claims 9 bytes, and holds 8"),
    "compressed, size of more than deflate can": (changed(1, method=8, size=9000), "more than its 8 can hold"),
    "compressed, not by deflate": (changed(1, method=8, content=b"\xff" * 8, size=8), "cannot be decompressed"),
    "compressed, ends early": (
        [*WEIGHTS[:1], hostile.deflated("w/data/0", 1, hostile.TWO[:4], size=8)], "is cut off"
    ),
    "compressed, more than it claims": (
        [*WEIGHTS[:1], hostile.deflated("w/data/0", 3, hostile.TWO[:4], size=8)], "holds more than it claims"
    ),
    "two pickles": ([*WEIGHTS, Record("v/data.pkl", with_weights(b"N"))], "not by torch.save"),
}  # fmt: skip


@pytest.mark.parametrize("what", LYING)
def test_archive_that_lies(what, tmp_path):
    records, reason = LYING[what]
    path = hostile.archive(tmp_path / "w.pth", records)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_all(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_archive_whose_directory_is_empty(tmp_path):
    path = hostile.archive(tmp_path / "w.pth", WEIGHTS)
    data = bytearray(path.read_bytes())
    data[-14:-6] = bytes(8)  # how many records, and the directory's bytes
    data[-6:-2] = (len(data) - 22).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has no records"):
        open_weights(path)


def test_archive_that_does_not_lie(tmp_path):
    """Those above are refused for what was changed in this one."""
    path = hostile.archive(tmp_path / "w.pth", WEIGHTS)
    assert_same(read_all(path), {"a": torch.tensor([1.0, 2.0])})
    check_archive(path)


def view(shape=(2,), stride=(1,), offset=0) -> bytes:
    return mapping({"a": tensor(storage("0", 2), shape, stride, offset)})


CLAIMS = {
    "beyond the storage": (view(shape=(3,)), "beyond its 2 numbers"),
    "beyond the storage by its offset": (view(offset=1), "beyond its 2 numbers"),
    "beyond the storage by its stride": (view(stride=(2,)), "beyond its 2 numbers"),
    "overflow": (view(shape=(2**62, 2**62), stride=(2**62, 2**62)), "beyond its 2 numbers"),
    "negative side": (view(shape=(-2,)), "shape is none"),
    "negative offset": (view(offset=-1), "do not go together"),
    "more strides than sides": (view(stride=(1, 1)), "do not go together"),
    "side of 2,000 bits": (view(shape=(2**1999,)), "shape is none"),
    "65 dimensions": (view(shape=(1,) * 65, stride=(1,) * 65), "shape is none"),
    "empty, of sides without end": (view(shape=(0, 2**60, 2**60), stride=(0, 0, 0)), "shape that no tensor can have"),
    "two dtypes of one storage": (
        mapping({"a": storage("0", 2), "b": storage("0", 2, "torch.IntStorage")}),
        "describes the same numbers in two ways",
    ),
    "storage of another kind": (
        mapping({"a": hostile.many(hostile.text("module")) + b"Q"}), "something else than the numbers of a tensor"
    ),
    "name with escapes": (
        mapping({"\x1b[31ma\n": tensor(storage("0", 2), (2,), (1,))}), r"name is none.*\\x1b\[31ma\\n"
    ),
    "name without end": (mapping({"a" * 5000: tensor(storage("0", 2), (2,), (1,))}), "name is none"),
    "attributes of a tensor": (mapping({"a": tensor(storage("0", 2), (2,), (1,)) + b")b"}), "attributes"),
}  # fmt: skip


@pytest.mark.parametrize("what", CLAIMS)
def test_pickle_that_lies(what, tmp_path):
    content, reason = CLAIMS[what]
    path = hostile.torch_archive(tmp_path / "w.pth", pickled(content))
    with pytest.raises(CheckpointError, match=reason) as error:
        open_weights(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "start, before_16",
    [(b"\x80\x02", True), (b"\x80\x02}q\x00(X\x01\x00\x00\x00a", False), (b"\x80\x02](", False), (b"\x80\x02)", False)],
)
def test_every_instruction_is_followed_or_refused_with_a_reason(start, before_16, tmp_path):
    path = tmp_path / "w.pth"
    for code in range(256):
        content = start + bytes([code]) + b"\x01\x00\x00\x00a\nb\n."
        hostile.before_torch_16(path, content, {}) if before_16 else hostile.torch_archive(path, content)
        with pytest.raises(CheckpointError) as error:
            open_weights(path)
        message = str(error.value)
        assert "\n" not in message and message[-1] not in ":( ", message
        assert len(message.removeprefix(f"'{path}'")) > 20, message


# ---- damage at random


def mutate(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    kind, place = rng.randrange(6), rng.randrange(len(data))
    if kind == 0:
        del damaged[place:]
    elif kind == 1:
        length = rng.choice((1, 16, 512))
        damaged[place : place + length] = bytes(len(damaged[place : place + length]))
    elif kind == 2:
        other = rng.randrange(len(data))
        damaged[place : place + 8] = data[other : other + 8]
    elif kind == 3:
        del damaged[place : place + rng.randrange(1, 9)]
    else:
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(len(data))
            damaged[place] ^= 1 << rng.randrange(8)
    return bytes(damaged)


KINDS = {
    "zip": lambda path: formats.save_official(path, {"model": STATE_DICT}),
    "before torch 1.6": lambda path: formats.save_official(path, {"model": STATE_DICT}, **formats.LEGACY),
    "safetensors": lambda path: formats.save_safetensors(path, STATE_DICT),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cases", [170, pytest.param(7000, marks=pytest.mark.slow)])
def test_random_damage(cases, kind, tmp_path):
    """One line says what is wrong; where there are CRCs, what loads is what was saved."""
    data = KINDS[kind](tmp_path / "w.pth").read_bytes()
    path = tmp_path / "damaged"
    rng = random.Random(cases)
    refused = 0
    for _ in range(cases):
        path.write_bytes(mutate(data, rng))
        try:
            found = read_all(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1500
            continue
        if kind == "zip":
            assert_same(found, STATE_DICT)
    assert refused > cases // 3
