# SPDX-License-Identifier: MIT
"""Containers: files and folders of every format open, broken ones are named, and none of them runs."""

import argparse
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import zipfile

import formats
import pytest
import torch
from safetensors.torch import save_file

from internimage import CheckpointError
from internimage.weights.readers import open_weights
from internimage.weights.torch_file import TorchFile

STATE_DICT = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "n": torch.tensor(7)}


def assert_opens(path, expected=STATE_DICT, **options) -> None:
    entries = open_weights(path, **options)
    assert set(entries) == set(expected)
    for key, entry in entries.items():
        assert entry.shape == tuple(expected[key].shape)
        assert torch.equal(entry.read(), expected[key])


# ---- formats


@pytest.mark.parametrize("options", [{}, formats.LEGACY], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", "model_ema", "state_dict_ema", None])
def test_pickles(wrapper, options, tmp_path):
    content = STATE_DICT if wrapper is None else {wrapper: STATE_DICT, "epoch": 3}
    assert_opens(formats.save_torch(tmp_path / "w.pth", content, **options))


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w"])
def test_safetensors_open_whatever_the_size_of_their_header_and_their_name(name, tmp_path):
    first_bytes = set()
    for length in range(0, 256, 8):  # one header's size begins as a pickle does
        save_file(STATE_DICT, tmp_path / name, metadata={"note": "x" * length})
        first_bytes.add((tmp_path / name).read_bytes()[:1])
        assert_opens(tmp_path / name)
    assert b"\x80" in first_bytes


def test_pickle_inside_of_safetensors_is_no_zip(tmp_path):
    """A tensor may hold any bytes, those of an archive too."""
    with zipfile.ZipFile(tmp_path / "small.zip", "w") as archive:
        archive.writestr("data.pkl", b"x")
    state_dict = {"a": torch.frombuffer(bytearray((tmp_path / "small.zip").read_bytes()), dtype=torch.uint8)}
    save_file(state_dict, tmp_path / "w.safetensors")
    assert zipfile.is_zipfile(tmp_path / "w.safetensors")
    assert_opens(tmp_path / "w.safetensors", state_dict)


def test_archive_packed_anew_with_compression_gives_the_right_numbers(tmp_path):
    state_dict = {"a": torch.arange(10000.0)}
    formats.save_torch(tmp_path / "w.pth", state_dict)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "w.pth") as old, zipfile.ZipFile(tmp_path / "new.pth", "w", method) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        assert_opens(tmp_path / "new.pth", state_dict)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(suffix, tmp_path):
    index = formats.save_index(tmp_path, STATE_DICT, suffix=suffix)
    assert_opens(index)
    assert_opens(tmp_path)


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    formats.save_safetensors(tmp_path / "w.safetensors", STATE_DICT)
    assert_opens("~/w.safetensors")


@pytest.mark.parametrize(
    "files, expected",
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.safetensors", "other.safetensors", "config.json"], "model.safetensors"),
        (["only.safetensors", "last.pth", "optimizer.pt"], "only.safetensors"),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin"),
        (["best.pth"], "best.pth"),
        (["best.ckpt", "readme.md"], "best.ckpt"),
        (["best.pth", "last.pt"], None),
    ],
)
def test_folder_holds_one_that_is_meant(files, expected, tmp_path):
    for file in files:
        marked = {file: torch.ones(1)}
        if file.endswith(".safetensors"):
            save_file(marked, tmp_path / file)
        else:
            torch.save(marked, tmp_path / file)
    if expected is not None:
        assert list(open_weights(tmp_path)) == [expected]
    else:
        with pytest.raises(CheckpointError, match=r"several weight files \(best.pth, last.pt\)"):
            open_weights(tmp_path)


# ---- lazy


def test_safetensors_are_read_tensor_by_tensor(monkeypatch, tmp_path):
    reads = formats.record_reads(monkeypatch)
    entries = open_weights(formats.save_index(tmp_path, STATE_DICT))
    assert len(entries) == 3 and reads == []
    entries["a.bias"].read()
    assert reads == [(2,)]


@pytest.mark.parametrize("kind", ["ours", "official", "official, before torch 1.6"])
def test_tensors_are_the_callers_own(kind, tmp_path):
    """They outlive the file, and what is done to one is done to no other."""
    path = formats.write(kind, tmp_path, STATE_DICT)
    entries = open_weights(path)
    first = entries["a.weight"].read()
    first.zero_()
    assert torch.equal(entries["a.weight"].read(), STATE_DICT["a.weight"])
    kept = {key: entry.read() for key, entry in entries.items()}
    path.write_bytes(b"x" * 5000)
    assert all(torch.equal(value, STATE_DICT[key]) for key, value in kept.items())


@pytest.mark.parametrize("kind", ["ours", "official"])
@pytest.mark.parametrize("change", ["replaced", "cut", "removed"])
def test_file_that_changes_while_it_is_read(change, kind, tmp_path):
    path = formats.write(kind, tmp_path, STATE_DICT)
    entries = open_weights(path)
    if change == "replaced":
        formats.write(kind, tmp_path / "other", formats.shifted(STATE_DICT)).replace(path)
    elif change == "cut":
        os.truncate(path, path.stat().st_size - 8)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="was changed while it was being read|cannot be read: No such file"):
        entries["a.weight"].read()


@pytest.mark.parametrize("options", [{}, formats.LEGACY], ids=["zip", "before torch 1.6"])
def test_pickles_are_read_tensor_by_tensor_and_never_unpickled(options, monkeypatch, tmp_path):
    path = formats.save_torch(tmp_path / "w.pth", STATE_DICT, **options)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    entries = open_weights(path)
    read = []
    monkeypatch.setattr(TorchFile, "read", lambda file, tensor: read.append(tensor.shape))
    assert len(entries) == 3 and read == []
    entries["a.bias"].read()
    assert read == [(2,)]


# ---- averaged weights


def test_averaged_weights_are_taken_when_asked_for(tmp_path, caplog):
    averaged = formats.shifted(STATE_DICT)
    for plain, other in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        path = formats.save_torch(tmp_path / "w.pth", {plain: STATE_DICT, other: averaged})
        for use_ema, took in ((False, plain), (True, other)):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                assert_opens(path, averaged if use_ema else STATE_DICT, use_ema=use_ema)
            assert f"took '{took}'" in caplog.text and plain in caplog.text and other in caplog.text


def test_averaged_weights_that_are_not_there(tmp_path, caplog):
    path = formats.save_torch(tmp_path / "w.pth", {"model": STATE_DICT, "model_ema": None, "epoch": 1})
    assert_opens(path)
    with pytest.raises(CheckpointError, match="no averaged weights .* has epoch, model, model_ema"):
        open_weights(path, use_ema=True)
    # one set of weights and no other: nothing to choose from, as in what is saved after training
    for path in (
        formats.save_torch(tmp_path / "bare.pth", STATE_DICT),
        formats.save_safetensors(tmp_path / "w.safetensors", STATE_DICT),
    ):
        caplog.clear()
        assert_opens(path, use_ema=True)
        assert "use_ema has no choice" in caplog.text


# ---- pickles: what is let in


@pytest.mark.parametrize("options", [{}, formats.LEGACY], ids=["zip", "before torch 1.6"])
def test_configuration_and_command_line_are_let_in_without_yacs(options, tmp_path):
    path = formats.save_official(tmp_path / "w.pth", {"model": STATE_DICT}, **options)
    assert b"yacs.config" in path.read_bytes()
    assert_opens(path)
    args = argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=[1]))
    assert_opens(formats.save_torch(tmp_path / "args.pth", {"state_dict": STATE_DICT, "args": args}, **options))


class Harmless:
    pass


def test_what_a_process_has_allowed_is_neither_used_nor_lost(tmp_path):
    path = formats.save_torch(tmp_path / "w.pth", {"model": STATE_DICT, "x": Harmless()})
    mine = [Harmless, argparse.Namespace]
    with torch.serialization.safe_globals(mine):
        before = set(torch.serialization.get_safe_globals())
        with pytest.raises(CheckpointError, match="Harmless"):
            open_weights(path)
        assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_environment_does_not_open_the_door(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match="Harmless"):
        open_weights(formats.save_torch(tmp_path / "w.pth", {"model": STATE_DICT, "x": Harmless()}))


CALLS = {
    "posix.system": lambda marker: formats.Call(os.system, f'echo 1 > "{marker}"'),
    "subprocess.Popen": lambda marker: formats.Call(
        subprocess.Popen, [sys.executable, "-c", f"open({str(marker)!r}, 'w')"]
    ),
    "builtins.eval": lambda marker: formats.Call(eval, f"open({str(marker)!r}, 'w').close()"),
    "builtins.exec": lambda marker: formats.Call(exec, f"open({str(marker)!r}, 'w').close()"),
    "builtins.getattr": lambda marker: formats.Call(getattr, formats.Call(__import__, "os"), "getcwd"),
}
if os.name == "nt":
    CALLS["nt.system"] = CALLS.pop("posix.system")


@pytest.mark.parametrize("pickler", formats.PICKLERS)
@pytest.mark.parametrize("name", CALLS)
def test_pickle_that_runs_code_is_refused_and_named(name, pickler, tmp_path):
    path, marker = tmp_path / "w.pth", tmp_path / "marker"
    content = {"model": dict(STATE_DICT), "epoch": [{"deep": (CALLS[name](marker),)}]}
    formats.PICKLERS[pickler](path, content)
    with pytest.raises(CheckpointError, match="refused") as error:
        open_weights(path)
    assert str(path) in str(error.value)
    assert name in str(error.value)
    assert not marker.exists()


def test_those_pickles_would_run(tmp_path):
    marker = tmp_path / "marker"
    path = formats.save_torch(tmp_path / "w.pth", {"model": STATE_DICT, "x": CALLS["builtins.eval"](marker)})
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_shard_that_runs_code_is_refused(tmp_path):
    index = formats.save_index(tmp_path, STATE_DICT, suffix="bin")
    shard = sorted(tmp_path.glob("*.bin"))[1]
    torch.save({"a.bias": torch.ones(2), "x": CALLS["builtins.eval"](tmp_path / "marker")}, shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*builtins.eval"):
        open_weights(index)
    assert not (tmp_path / "marker").exists()


def test_whole_pickled_model_is_refused_and_named(tmp_path):
    path = formats.save_torch(tmp_path / "w.pth", torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="torch.nn.modules.linear.Linear"):
        open_weights(path)


def assert_reason(path, reason) -> None:
    """One line with a reason of our own: torch's advice is for programmers, and opens the door to code."""
    with pytest.raises(CheckpointError, match=reason) as error:
        open_weights(path)
    message = str(error.value)
    assert "\n" not in message and not message.rstrip().endswith((":", "()"))
    for advice in ("weights_only", "add_safe_globals", "PyTorch 2.6", "miniz", "file an issue", "torch.load("):
        assert advice not in message


@pytest.mark.parametrize("options", [{}, formats.LEGACY], ids=["zip", "before torch 1.6"])
def test_newer_pickle_protocol_is_explained(options, tmp_path):
    torch.save(STATE_DICT, tmp_path / "w.pth", pickle_protocol=4, **options)
    assert_reason(tmp_path / "w.pth", "pickle protocol 4.*pickle_protocol=2")


def archive_of(**files: bytes | str):
    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(f"archive/{name}", content)

    return write


REFUSED = {
    "unknown instruction": (lambda path: path.write_bytes(b"\x80\x02" + b"\xff" * 50), "instruction 255"),
    "instruction torch does not follow": (
        lambda path: path.write_bytes(b"\x80\x02c__main__\nx\n)\x81i" + b"a\nb\n."), "damaged|refused",
    ),
    "pickle that torch did not write": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)), "not by torch.save"),
    "one byte": (lambda path: path.write_bytes(b"\x80"), "damaged, truncated"),
    "function that torch does not allow": (
        lambda path: torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, path),
        r"refused.*torch\._utils\._rebuild_nested_tensor",
    ),
    "name that damage made": (
        archive_of(**{"data.pkl": b"\x80\x02ctorch\nFloatSt\n.", "version": "3"}), r"refused.*'torch\.FloatSt'"
    ),
    "TorchScript": (
        lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), "TorchScript.*state_dict"
    ),
    "archive without data": (archive_of(**{"version": "3"}), "ZIP archive.*not by torch.save"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", REFUSED)
def test_every_refusal_has_a_reason(what, tmp_path):
    write, reason = REFUSED[what]
    write(tmp_path / "w.pth")
    assert_reason(tmp_path / "w.pth", reason)


# ---- broken files


def text(content: str | bytes):
    return lambda folder: (folder / "w.pth").write_bytes(content.encode() if isinstance(content, str) else content)


def cut(kind: str, share: float):
    def write(folder):
        path = formats.write(kind, folder / "whole", STATE_DICT)
        data = path.read_bytes()
        (folder / "w.pth").write_bytes(data[: int(len(data) * share)])

    return write


def packed(folder):
    with zipfile.ZipFile(folder / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")


BROKEN = {
    "empty": (text(""), "not a checkpoint.*empty"),
    "text": (text("see the readme\n" * 40), "not a checkpoint"),
    "json": (text(json.dumps({"weights": list(range(100))})), "not a checkpoint"),
    "python": (text('weights={"a": 1}'), "not a checkpoint"),
    "web page": (text("\n<!DOCTYPE html><html>"), "not a checkpoint.*web page.*/blob/"),
    "git-lfs pointer": (text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "random bytes": (text(random.Random(1).randbytes(5000)), "not a checkpoint"),
    "random bytes, as a pickle": (text(b"\x80\x02" + random.Random(2).randbytes(5000)), "damaged|not a state dict"),
    "random bytes, as an archive": (text(b"PK\x03\x04" + random.Random(3).randbytes(5000)), "damaged"),
    "random bytes, as safetensors": (text(b"\x40" + b"\0" * 7 + b"{" + random.Random(4).randbytes(500)), "damaged"),
    "other archive": (packed, "no torch checkpoint"),
    "safetensors, header cut": (cut("ours", 0.3), "damaged or truncated"),
    "safetensors, one byte short": (cut("ours", 0.999), "damaged or truncated"),
    "safetensors, seven bytes": (cut("ours", 0.03), "not a checkpoint"),
    "archive, cut": (cut("official", 0.5), "damaged, truncated"),
    "archive, end cut": (cut("official", 0.99), "damaged, truncated"),
    "before torch 1.6, cut": (cut("official, before torch 1.6", 0.5), "damaged"),
    "before torch 1.6, end cut": (cut("official, before torch 1.6", 0.99), "damaged"),
    "no tensors": (
        lambda folder: torch.save({"epoch": 1, "lr": 0.1}, folder / "w.pth"),
        "no tensors; it has epoch, lr",
    ),
    "wrapped nothing": (lambda folder: torch.save({"model": {}}, folder / "w.pth"), "no tensors; it has nothing"),
    "list": (lambda folder: torch.save([torch.ones(1)], folder / "w.pth"), "holds a list, not a state dict"),
    "tensor": (lambda folder: torch.save(torch.ones(1), folder / "w.pth"), "holds a Tensor"),
    "unnamed tensors": (lambda folder: torch.save({0: torch.ones(1)}, folder / "w.pth"), "no tensors; it has 0"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_file_is_named(what, tmp_path):
    write, message = BROKEN[what]
    write(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        open_weights(tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(error.value)


@pytest.mark.parametrize("kind", ["ours", "official", "official, before torch 1.6"])
def test_damage_anywhere_is_an_error_or_harmless(kind, tmp_path):
    data = formats.write(kind, tmp_path / "whole", STATE_DICT).read_bytes()
    path = tmp_path / "w"
    rng = random.Random(0)
    for i in range(60):
        damaged = bytearray(data)
        if i % 2:
            del damaged[rng.randrange(len(data)) :]
        else:
            for _ in range(3):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            entries = open_weights(path)
        except CheckpointError as error:
            assert "\n" not in str(error) and "weights_only" not in str(error) and "safe_globals" not in str(error)
            continue
        assert i % 2 == 0, f"{kind}: cut to {len(damaged)} of {len(data)} bytes"
        assert len(entries) > 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
@pytest.mark.parametrize("where", ["named", "in a folder", "shard", "index"])
def test_pipe_is_refused_and_not_waited_for(where, tmp_path):
    names = {"shard": "model-1.safetensors", "index": "model.safetensors.index.json"}
    path = tmp_path / names.get(where, "model.safetensors")
    os.mkfifo(path)
    if where == "shard":
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises(CheckpointError, match="not a regular file|missing: model-1"):
        open_weights(path if where in ("named", "index") else tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no device files like these")
@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_device_is_refused(path):
    with pytest.raises(CheckpointError, match=f"'{path}' is not a regular file"):
        open_weights(path)


def test_nothing_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no checkpoint at.*missing.pth"):
        open_weights(tmp_path / "missing.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        open_weights("missing.pth")
    assert str(tmp_path) in str(error.value)


def lying(change):
    """A safetensors file whose header was changed: function of (header, bytes of data)."""

    def write(folder):
        path = formats.save_safetensors(folder / "w.pth", STATE_DICT)
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        header.pop("__metadata__", None)
        text = change(header, body)
        text = json.dumps(header).encode() if text is None else text
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)

    return write


LYING = {
    "larger shape": lambda header, body: header["a.weight"].update(shape=[3, 3]),
    "smaller shape": lambda header, body: header["a.weight"].update(shape=[2, 2]),
    "huge shape": lambda header, body: header["a.weight"].update(shape=[2**40, 2**40]),
    "negative shape": lambda header, body: header["a.weight"].update(shape=[-2, -3]),
    "wider dtype": lambda header, body: header["a.weight"].update(dtype="F64"),
    "unknown dtype": lambda header, body: header["a.weight"].update(dtype="F99"),
    "beyond the end": lambda header, body: header["a.weight"].update(data_offsets=[len(body), len(body) + 24]),
    "backwards": lambda header, body: header["a.weight"].update(data_offsets=[24, 0]),
    "overlapping": lambda header, body: header["a.weight"].update(data_offsets=header["n"]["data_offsets"]),
    "a hole": lambda header, body: header.pop("n") and None,
    "no offsets": lambda header, body: header["a.weight"].pop("data_offsets") and None,
    "two of one name": lambda header, body: json.dumps(header).encode()[:-1] + b", " + json.dumps(header).encode()[1:],
    "nested without end": lambda header, body: b'{"a":' + b"[" * 100_000,
    "nested in what is passed over": lambda header, body: header["n"].update(x=json.loads("[" * 900 + "]" * 900)),
    "numbers that are no numbers": lambda header, body: header["a.weight"].update(shape=[float("nan")]),
    "no json": lambda header, body: b"{" + b"x" * 200,
    "longer than the file": lambda header, body: b"{" + b" " * 10,
}


@pytest.mark.parametrize("what", LYING)
def test_header_that_lies(what, tmp_path):
    lying(LYING[what])(tmp_path)
    if what == "longer than the file":
        data = bytearray((tmp_path / "w.pth").read_bytes())
        data[:8] = (10**7).to_bytes(8, "little")
        (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged or truncated") as error:
        open_weights(tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(error.value)


# ---- broken folders


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no weights: no .safetensors, .pth"):
        open_weights(tmp_path)


def test_several_files_without_index(tmp_path):
    formats.save_index(tmp_path, STATE_DICT).unlink()
    with pytest.raises(
        CheckpointError, match="several weight files .*00001-of-00003.*no 'model.safetensors.index.json'"
    ):
        open_weights(tmp_path)


def test_missing_shard(tmp_path):
    index = formats.save_index(tmp_path, STATE_DICT)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names 3 shards; 1 are missing: model-00002-of-00003"):
        open_weights(index)


def test_truncated_shard(tmp_path):
    index = formats.save_index(tmp_path, STATE_DICT)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="00002-of-00003.safetensors' is damaged"):
        open_weights(index)


@pytest.mark.parametrize("change", ["unlisted", "listed", "elsewhere", "twice"])
def test_index_that_disagrees_with_its_shards(change, tmp_path):
    index = formats.save_index(tmp_path, STATE_DICT)
    content = json.loads(index.read_text())
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    if change == "unlisted":
        del content["weight_map"]["a.bias"]
        content["weight_map"]["other"] = second
        name = "a.bias"
    elif change == "listed":
        content["weight_map"]["ghost"] = first
        name = "ghost"
    elif change == "elsewhere":
        content["weight_map"]["a.bias"] = first
        name = "a.bias"
    else:
        save_file({"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}, tmp_path / first)
        name = "a.bias"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"disagree about .*{name}"):
        open_weights(index)


@pytest.mark.parametrize(
    "content",
    ["", "<html>", "{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', '{"weight_map": null}',
     '{"weight_map": ' + "[" * 100_000, "\udcff", '{"weight_map": {"a": "../w.safetensors"}}',
     '{"weight_map": {"a": "/w.safetensors"}}', '{"weight_map": {"a": "x/../../w.safetensors"}}',
     '{"weight_map": {"a": "w\\n.safetensors"}}', '{"weight_map": {"a": "w\\u0000"}}',
     '{"weight_map": {"a\\u001b": "w"}}',
     '{"weight_map": {"a": "' + "w" * 300 + '"}}', '{"weight_map": {"' + "a" * 5000 + '": "w"}}',
     '{"weight_map": {"a": "w", "a": "v"}}', '{"weight_map": {"a": "w"}, "weight_map": {"a": "v"}}'],
    ids=lambda content: content[:30],
)  # fmt: skip
def test_broken_index(content, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="is not a shard index") as error:
        open_weights(tmp_path)
    assert str(index) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_index_that_is_too_large_is_not_read(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    with index.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="is not a shard index.*larger than"):
        open_weights(tmp_path)
