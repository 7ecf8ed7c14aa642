# SPDX-License-Identifier: MIT
"""Damaged and hostile checkpoints: none runs code, none is restored, and the one before is restored instead."""

import io
import os
import pickle
import shutil
import tarfile
import tempfile
import threading
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from internimage.config import ConfigError
from internimage.engine import checkpoint, integrity, shards
from internimage.engine.run_state import RunState
from internimage.engine.world import World
from internimage.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # shards of a single process

KINDS = ["file", "shards"]
DATA = {"samples": 9, "classes": ["0", "1"], "images": ["a", "b"]}


def make_state(kind, world=None):
    """The state of a run with a model of two layers, at step 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return RunState(world or World(), model, None, optimizer, None, scaler, kind == "shards", DATA, difference)


def difference(before, now):
    """As of a task: describes the data of a checkpoint if they differ from those of the run."""
    return None if before == now else f"{before['samples']} images"


def train(state, steps=1):
    for _ in range(steps):
        state.optimizer.zero_grad()
        state.model(torch.randn(5, 3, generator=torch.Generator().manual_seed(state.progress.step))).sum().backward()
        state.optimizer.step()
        state.progress.step += 1


def weights(state):
    return {key: value.clone() for key, value in state.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """The kind, a folder with checkpoints of steps 1 and 2, and the weights of both steps."""
    folder = tmp_path_factory.mktemp(request.param)
    state, seen = make_state(request.param), []
    for _ in range(2):
        train(state)
        state.save(folder)
        seen.append(weights(state))
    return request.param, folder, seen


@pytest.fixture
def spoiled(saved, tmp_path):
    kind, folder, seen = saved
    shutil.copytree(folder, tmp_path / "checkpoints")
    return kind, tmp_path / "checkpoints", seen


def flip(content, draw):
    content = bytearray(content)
    content[draw.integers(len(content))] ^= 1 << draw.integers(8)
    return bytes(content)


def zero(content, draw):
    """Replace an eighth of the content by zeros, as a lost page would be in a large file."""
    start = draw.integers(len(content) * 7 // 8)
    return content[:start] + bytes(len(content) // 8) + content[start + len(content) // 8 :]


def truncate(content, draw):
    return content[: draw.integers(len(content))]


DAMAGE = {"flip": flip, "zero": zero, "truncate": truncate}


def files(newest):
    return sorted(newest.iterdir()) if newest.is_dir() else [newest]


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def falls_back(kind, folder, seen, caplog):
    """Resume from a folder, which warns of what is skipped and names what is restored instead."""
    caplog.clear()
    newest, before = checkpoint.checkpoints(folder)
    state = make_state(kind)
    assert state.load(folder) == before
    assert state.progress.step == 1 and same(weights(state), seen[0])
    skipped, resumed = warnings_in(caplog)
    assert f"'{newest}' cannot be read and is skipped: " in skipped and "\n" not in skipped
    assert f"the run resumes from '{before}'" in resumed
    return skipped


def test_the_newest_is_restored_without_a_warning(saved, caplog):
    kind, folder, seen = saved
    state = make_state(kind)
    assert state.load(folder) == checkpoint.checkpoints(folder)[0]
    assert state.progress.step == 2 and same(weights(state), seen[1]) and not warnings_in(caplog)


@pytest.mark.parametrize("damage", [*DAMAGE, "delete"])
def test_if_the_newest_is_damaged_the_one_before_is_restored(spoiled, caplog, damage):
    kind, folder, seen = spoiled
    newest = checkpoint.checkpoints(folder)[0]
    for number, file in enumerate(files(newest)):
        content = file.read_bytes()
        if damage != "delete":
            draw = np.random.default_rng(number)
            for _ in range(6):
                file.write_bytes(DAMAGE[damage](content, draw))
                falls_back(kind, folder, seen, caplog)
        elif newest.is_dir():  # a single file that is deleted leaves no trace
            file.unlink()
            falls_back(kind, folder, seen, caplog)
        file.write_bytes(content)
    assert make_state(kind).load(folder) == newest


def test_every_bit_counts(tmp_path):
    """In a file with a checksum, including the line of the checksum."""
    path = tmp_path / "file"
    integrity.save(path, {"a": torch.ones(3)})
    content = path.read_bytes()
    file, checksum = integrity.open_checked(path)
    file.close()
    end = content.rindex(b"\ncrc32")
    assert checksum == zlib.crc32(content[:end])
    assert torch.load(path, weights_only=True)["a"].equal(torch.ones(3))  # torch reads it as well
    assert zipfile.ZipFile(path).testzip() is None
    with path.open("r+b") as file:
        for place in range(len(content)):
            for bit in range(8) if place >= end else [place % 8]:
                file.seek(place)
                file.write(bytes([content[place] ^ 1 << bit]))
                file.flush()
                with pytest.raises(integrity.DamagedError):
                    integrity.open_checked(path)
            file.seek(place)
            file.write(content[place : place + 1])
    for size in range(len(content)):
        path.write_bytes(content[:size])
        if size != end:  # there the archive is complete, and is checked as an older version's
            with pytest.raises(integrity.DamagedError):
                integrity.open_checked(path)
    for more in (b"\0", content[end:], bytes(5000)):
        path.write_bytes(content + more)
        with pytest.raises(integrity.DamagedError):
            integrity.open_checked(path)


def test_damage_anywhere_in_a_checkpoint_is_detected(spoiled):
    """Single bit flips all over its files, which are checked before anything is read."""
    kind, folder, _ = spoiled
    newest = checkpoint.checkpoints(folder)[0]
    state = make_state(kind)
    for file in files(newest):
        content = file.read_bytes()
        for place in range(0, len(content), 311 if len(content) > 5000 else 41):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            with pytest.raises(integrity.DamagedError):
                state._read(newest)
        file.write_bytes(content)
    state._read(newest)


def test_a_pipe_is_not_a_checkpoint(spoiled, caplog):
    """Opening it would wait for its writer."""
    kind, folder, seen = spoiled
    for file in files(checkpoint.checkpoints(folder)[0]):
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        falls_back(kind, folder, seen, caplog)
        file.unlink()
        file.write_bytes(content)


def test_an_archive_of_another_kind_is_not_unpacked(tmp_path, monkeypatch):
    """torch takes a tar for one of its oldest files, and unpacks it to a temporary folder."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    data = content.getvalue()
    (tmp_path / "x.pt").write_bytes(data + b"\ncrc32 %08x of %016d bytes\n" % (zlib.crc32(data), len(data)))
    made = []
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *_, **__: made.append(1) or str(tmp_path))
    with pytest.raises(integrity.DamagedError, match="^it is not a checkpoint$"):
        checkpoint.read_file(tmp_path / "x.pt")
    assert not made


# ---- saving a skipped step again


@pytest.mark.parametrize("before", [*KINDS, "both", "a folder with a stranger in it"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_is_saved_again(tmp_path, kind, before):
    """Also if both a file and a folder have this step: one checkpoint remains, and files that are not ours."""
    folder = tmp_path / "checkpoints"
    state = make_state(kind)
    train(state)
    state.save(folder)
    train(state)
    if before in ("file", "both"):
        (folder / "step-000000002.pt").write_bytes(b"nothing")
    if before != "file":
        (folder / "step-000000002").mkdir()
        (folder / "step-000000002" / "__0_0.distcp").write_bytes(b"nothing")
    if "stranger" in before:
        (folder / "step-000000002" / "notes.txt").write_text("mine")
        (folder / "not-of-step-000000002").mkdir()
        (folder / "not-of-step-000000002" / "notes.txt").write_text("mine")
    state.save(folder)
    end = "" if kind == "shards" else ".pt"
    assert [path.name for path in checkpoint.checkpoints(folder)] == [f"step-00000000{n}{end}" for n in (2, 1)]
    again = make_state(kind)
    again.load(folder)
    assert again.progress.step == 2 and same(weights(again), weights(state))
    notes = [path.read_text() for path in folder.rglob("notes.txt")]
    assert notes == (["mine", "mine"] if "stranger" in before else [])


def test_skipped_newer_checkpoints_do_not_displace_good_ones(tmp_path, monkeypatch):
    """Two damaged ones do not count as the two that are kept; a kill during removal may leave more than two."""
    state = make_state("file")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "KEEP", 9)
        for _ in range(5):
            train(state)
            state.save(tmp_path)
    for path in checkpoint.checkpoints(tmp_path)[:2]:
        path.write_bytes(b"nothing")
    again = make_state("file")
    again.load(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.integrity, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        train(again)
        with pytest.raises(checkpoint.CheckpointWriteError, match=r"the last good one is '.*step-000000003\.pt'"):
            again.save(tmp_path)
    again.save(tmp_path)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000000004.pt", "step-000000003.pt"]


def test_a_permission_error_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    for kind in KINDS:
        with pytest.raises(checkpoint.CheckpointWriteError, match="Permission denied") as error:
            make_state(kind).save(tmp_path / kind)
        assert "room" not in str(error.value) and "the same command" in str(error.value)


# ---- code


class Code:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def old_shards(folder, state, metadata=None):
    """Write shards as versions without checksums did."""
    partial = folder / f"step-{state.progress.step:09d}"
    dcp.save({"model": state.model.state_dict(), "optimizer": optimizer_state(state)}, checkpoint_id=partial)
    torch.save(state._metadata(), partial / "state.pt")
    return partial


def optimizer_state(state):
    return dcp.state_dict.get_optimizer_state_dict(state.model, state.optimizer)


@pytest.mark.parametrize("written", ["with checksums", "without"])
@pytest.mark.parametrize("where", ["metadata", "entry", "state", "file"])
def test_no_code_runs(tmp_path, caplog, where, written):
    """In the index of shards, in an entry that is not a tensor, in the state beside them, in a single file."""
    kind = "file" if where == "file" else "shards"
    folder, mark = tmp_path / "checkpoints", tmp_path / "mark"
    state = make_state(kind)
    state.optimizer.param_groups[0]["note"] = "harmless"
    train(state)
    state.save(folder)
    first = weights(state)
    train(state)
    metadata = state._metadata
    if where in ("state", "file"):
        state._metadata = lambda: metadata() | {"random": Code(mark)}
    if where == "entry":
        state.optimizer.param_groups[0]["note"] = Code(mark)
    if where == "metadata":
        dump = pickle.dump
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dcp.filesystem.pickle, "dump", lambda _, file: dump(Code(mark), file))
            save(state, folder, written)
    else:
        save(state, folder, written)
    again = make_state(kind)
    again.optimizer.param_groups[0]["note"] = ""
    again.load(folder)
    assert not mark.exists()
    assert again.progress.step == 1 and same(weights(again), first)
    assert "is skipped" in caplog.text


def save(state, folder, written):
    if written == "with checksums":
        state.save(folder)
    elif state.sharded:
        old_shards(folder, state)
    else:
        whole = {"model": state.model.state_dict(), "average": None, "optimizer": state.optimizer.state_dict()}
        torch.save(state._metadata() | whole, folder / f"step-{state.progress.step:09d}.pt")


# ---- checkpoints of older versions


@pytest.fixture(params=KINDS)
def old(request, tmp_path):
    """As `spoiled`, written without checksums."""
    folder, kind, seen = tmp_path / "checkpoints", request.param, []
    folder.mkdir()
    state = make_state(kind)
    for _ in range(2):
        train(state)
        save(state, folder, "without")
        seen.append(weights(state))
    return kind, folder, seen


def test_a_checkpoint_of_an_older_version_is_restored(old, caplog):
    kind, folder, seen = old
    state = make_state(kind)
    assert state.load(folder) == checkpoint.checkpoints(folder)[0]
    assert state.progress.step == 2 and same(weights(state), seen[1]) and not warnings_in(caplog)


def test_damaged_tensors_of_an_older_version_are_skipped(old, caplog):
    """Its archives have checksums of the tensors."""
    kind, folder, seen = old
    newest = checkpoint.checkpoints(folder)[0]
    file = newest / "__0_0.distcp" if kind == "shards" else newest
    content = file.read_bytes()
    for key in ("0.weight", "1.running_var"):
        where = content.index(seen[1][key].numpy().tobytes())
        file.write_bytes(content[: where + 5] + bytes([content[where + 5] ^ 1]) + content[where + 6 :])
        falls_back(kind, folder, seen, caplog)
    for end in (b"PK", bytes(100)):
        file.write_bytes(content[: -len(end)] + end)
        falls_back(kind, folder, seen, caplog)


# ---- the index of shards


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    state = make_state("shards")
    train(state)
    return (old_shards(tmp_path_factory.mktemp("index"), state) / ".metadata").read_bytes()


def plain(found):
    """The parts of an index that torch uses."""
    return found.state_dict_metadata, found.storage_data


def test_an_index_is_read_as_pickle_reads_it(index):
    assert plain(shards._read_index(index)) == plain(pickle.loads(index))


def by_getattr(member, protocol):
    """Pickle a member of an enumeration as Python 3.11.0 to 3.11.3 do."""
    return getattr, (type(member), member.name)


def test_an_index_of_another_python_is_read(index, monkeypatch):
    found = pickle.loads(index)
    monkeypatch.setattr(shards.dcp_metadata._MEM_FORMAT_ENCODING, "__reduce_ex__", by_getattr)
    content = pickle.dumps(found)
    assert b"getattr" in content
    assert plain(shards._read_index(content)) == plain(found)


@pytest.mark.parametrize(
    "owner, name", [(shards.dcp_metadata.Metadata, "__init__"), (shards.dcp_metadata._MEM_FORMAT_ENCODING, "mro")]
)
def test_an_index_cannot_get_attributes(index, owner, name):
    class Getter:
        def __reduce__(self):
            return getattr, (owner, name)

    found = pickle.loads(index)
    found.planner_data = Getter()
    with pytest.raises(integrity.DamagedError, match="is damaged$"):
        shards._read_index(pickle.dumps(found))


def test_a_damaged_index_has_one_kind_of_error(index):
    """Of all that pickle may raise, one kind of error remains; an accepted index is valid and covers its tensors."""
    accepted = 0
    for place in range(0, len(index), 41):
        for damaged in (
            index[:place] + bytes([index[place] ^ 1 << place % 8]) + index[place + 1 :],
            index[:place] + bytes(64) + index[place + 64 :],
            index[:place],
        ):
            try:
                found = shards._read_index(damaged)
            except integrity.DamagedError as error:
                assert "\n" not in str(error)
            else:
                accepted += 1
                assert shards._is_valid(found)
    assert accepted < len(index) // 41  # a letter of a name, an unused number


def corrupt(change):
    """Returns a function that changes an index."""

    def changed(index):
        found = pickle.loads(index)
        change(found)
        return pickle.dumps(found)

    return changed


def tensor(found, key="model.0.weight"):
    return found.state_dict_metadata[key]


def entry(found):
    return next(iter(found.storage_data.values()))


INVALID = {
    "a path out of the folder": corrupt(lambda found: setattr(entry(found), "relative_path", "../../x.distcp")),
    "a transform": corrupt(lambda found: setattr(entry(found), "transform_descriptors", ["stream.zstd"])),
    "a negative offset": corrupt(lambda found: setattr(entry(found), "offset", -1)),
    "a number for a name": corrupt(lambda found: setattr(entry(found), "relative_path", 3)),
    "half a tensor": corrupt(lambda found: setattr(tensor(found).chunks[0], "sizes", torch.Size([2, 3]))),
    "no part": corrupt(lambda found: tensor(found).chunks.clear()),
    "a part beyond the end": corrupt(lambda found: setattr(tensor(found).chunks[0], "offsets", torch.Size([1, 0]))),
    "a part that is nowhere": corrupt(lambda found: found.storage_data.popitem()),
    "a list for a table": corrupt(lambda found: setattr(found, "storage_data", [1])),
    "no table": corrupt(lambda found: setattr(found, "storage_data", None)),
    "a field that there is not": corrupt(lambda found: vars(found).update(more=1)),
    "a class of ours": lambda _: pickle.dumps(World()),
    "a function": lambda _: pickle.dumps(os.getcwd),
    "a number": lambda _: pickle.dumps(3),
    "text": lambda _: b"nothing",
    "nothing": lambda _: b"",
    "the old protocol": lambda index: pickle.dumps(pickle.loads(index), protocol=2),
    "a memory of 16 GB": lambda _: b"\x80\x04Nr\xff\xff\xff\x7f.",
    "8 GB of bytes": lambda _: b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b".",
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_index_is_rejected(index, name):
    with pytest.raises(
        integrity.DamagedError, match=r"its '\.metadata' (is damaged|names '.*', which does not belong there)"
    ):
        shards._read_index(INVALID[name](index))


@pytest.mark.parametrize("one", [b"})\x85K\x01s.", b"}()\x85K\x01u."], ids=["a key", "keys"])
def test_an_index_hashes_no_tuples(one):
    """A million nested tuples would crash the process."""
    with pytest.raises(integrity.DamagedError) as error:
        shards._read_index(b"\x80\x04" + one)
    assert "tuple for a key" in str(error.value.__cause__)


# ---- several processes


class Together(World):
    """One of two processes, which are threads here."""

    def gather(self, thing):
        ROOM.things[self.rank] = thing
        ROOM.barrier.wait(60)
        things = list(ROOM.things)
        ROOM.barrier.wait(60)
        return things


class ROOM:
    barrier = threading.Barrier(2)
    things = [None, None]


def both(first, second):
    """The results, or the errors, of two processes."""
    results = [None, None]

    def work(rank, run):
        try:
            results[rank] = run(Together(rank, 2))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "one process waits for the other"
    return results


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders with the same checkpoints of steps 1 to 3, as if two machines saw the same folder."""
    found = tmp_path / "first", tmp_path / "second"
    state = make_state("file")
    monkeypatch.setattr(checkpoint, "KEEP", 3)
    for _ in range(3):
        train(state)
        state.save(found[0])
    shutil.copytree(*found)
    return found


def resume(folders):
    states = [None, None]

    def run(folder):
        def load(world):
            states[world.rank] = make_state("file", world)
            return states[world.rank].load(folder)

        return load

    results = both(*map(run, folders))
    return [result.name if hasattr(result, "name") else result for result in results], states


@pytest.mark.parametrize("damage", ["flip", "delete", "not in the list"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_process_cannot_read_no_process_restores(folders, caplog, rank, damage):
    file = folders[rank] / "step-000000003.pt"
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(content[:500] + b"!" + content[501:])
    else:
        file.unlink()
        if damage == "delete":
            file.symlink_to("gone")
    names, states = resume(folders)
    assert names == ["step-000000002.pt"] * 2 and [state.progress.step for state in states] == [2, 2]
    skipped, resumed = warnings_in(caplog)  # of the first process alone
    assert "step-000000003.pt' cannot be read and is skipped: " in skipped
    assert "the run resumes from '" in resumed and "step-000000002.pt'" in resumed


def test_each_process_has_a_different_one_damaged(folders, caplog):
    for folder, step in zip(folders, (3, 2)):
        (folder / f"step-00000000{step}.pt").write_bytes(b"nothing")
    names, _ = resume(folders)
    assert names == ["step-000000001.pt"] * 2 and len(warnings_in(caplog)) == 3
    (folders[1] / "step-000000001.pt").write_bytes(b"nothing")
    errors, _ = resume(folders)
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert "resume=false starts over" in str(errors[0])


def test_checkpoints_of_two_runs_with_the_same_names_are_told_apart(folders):
    """Intact checkpoints of the same steps, but each process sees another folder."""
    shutil.rmtree(folders[1])
    state = make_state("file")
    state.model[0].weight.data.zero_()
    for _ in range(3):
        train(state)
        state.save(folders[1])
    errors, _ = resume(folders)
    assert [type(error) for error in errors] == [ConfigError] * 2
    assert "the processes find different checkpoints" in str(errors[0])
    shutil.rmtree(folders[1])
    errors, _ = resume(folders)
    assert "the processes find different checkpoints" in str(errors[0]) and type(errors[1]) is ConfigError


def test_other_data_in_one_process_stop_both(folders):
    def load(world):
        state = make_state("file", world)
        if world.rank == 1:
            state.data = DATA | {"samples": 7}
        return state.load(folders[0])

    errors = both(load, load)
    assert [type(error) for error in errors] == [ConfigError] * 2 and "trained on 9 images" in str(errors[0])
