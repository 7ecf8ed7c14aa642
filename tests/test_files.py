# SPDX-License-Identifier: MIT
"""What is written: whole or not at all, and never in the place of a device, a pipe or a link."""

import errno
import io
import json
import os
import signal
import socket
import stat
import sys
import threading

import pytest
import timm
import torch
from PIL import Image
from runs import write_noise

from internimage import files
from internimage.atomic import partial_folder
from internimage.benchmark.timing import append_csv, check_csv
from internimage.cli import main
from internimage.engine import integrity
from internimage.engine.create import data_config
from internimage.errors import UserError
from internimage.files import WriteError, appending, check_writable, is_stdout, write_text, writing
from internimage.models.timm_folder import save_model

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices with names")
pytestmark = posix


@pytest.fixture
def pipe():
    """The name of a pipe's writing end, as a shell's >(...) gives, and its reading end."""
    reader, writer = os.pipe()
    yield f"/dev/fd/{writer}", reader
    for end in (reader, writer):
        try:
            os.close(end)
        except OSError:
            pass


@pytest.fixture
def device():
    """A terminal's name, and the end to read from. Not /dev/null: run by root, a failure would replace that for all."""
    reader, writer = os.openpty()
    yield os.ttyname(writer), reader
    os.close(writer)
    os.close(reader)


def fifo(folder):
    path = folder / "fifo"
    os.mkfifo(path)
    return path


def read_in_thread(path):
    found = []
    thread = threading.Thread(target=lambda: found.append(path.read_text()), daemon=True)
    thread.start()
    return thread, found


# ---- what is not a regular file stays what it is


def test_a_device_is_written_to_and_stays(tmp_path, device):
    name, reader = device
    link = tmp_path / "terminal"
    link.symlink_to(name)
    for path in (name, link):
        check_writable(path)
        write_text(path, "text\n")
        assert os.read(reader, 100) == b"text\r\n" and stat.S_ISCHR(os.stat(name).st_mode)
    assert link.is_symlink() and os.listdir(tmp_path) == ["terminal"]


def test_a_fifo_is_not_opened_by_the_check_and_gets_the_text(tmp_path):
    path = fifo(tmp_path)
    check_writable(path)  # would wait forever for a reader
    thread, found = read_in_thread(path)
    write_text(path, "text")
    thread.join(20)
    assert found == ["text"] and stat.S_ISFIFO(path.stat().st_mode) and os.listdir(tmp_path) == ["fifo"]


def test_a_pipe_that_a_shell_has_opened(pipe):
    name, reader = pipe
    check_writable(name)
    write_text(name, "text")
    assert os.read(reader, 100) == b"text"


def test_a_descriptor_of_a_file_is_written_through(tmp_path):
    """As `--json /dev/stdout > file`: others write to that file too, through the same descriptor."""
    with (tmp_path / "out").open("wb", buffering=0) as file:
        file.write(b"before ")
        write_text(f"/dev/fd/{file.fileno()}", "text")
        file.write(b" after")
    assert (tmp_path / "out").read_text() == "before text after"


def test_a_socket_behind_a_descriptor():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write_text(f"/dev/fd/{ours.fileno()}", "text")
        assert theirs.recv(100) == b"text"


def test_standard_output(capfd):
    write_text("-", "one\n")
    write_text("/dev/stdout", "two\n")
    assert capfd.readouterr().out == "one\ntwo\n"
    assert is_stdout("-") and is_stdout("/dev/stdout") and is_stdout("/dev/fd/1")
    assert not is_stdout("/dev/stderr") and not is_stdout("./-") and not is_stdout(None)


def test_a_reader_that_has_gone_is_one_line(pipe):
    name, reader = pipe
    os.close(reader)
    with pytest.raises(WriteError, match=rf"^'{name}' was closed by its reader before everything was written$"):
        write_text(name, "text")


@pytest.mark.parametrize("there", [True, False])
def test_links_stay_and_their_targets_are_written(tmp_path, there):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to("far/target")
    check_writable(link)
    write_text(link, "new")
    assert os.readlink(link) == "far/target" and target.read_text() == "new" and not target.is_symlink()
    assert os.listdir(tmp_path / "far") == ["target"]


def test_rows_are_appended_to_files_and_pipes(tmp_path, pipe, device):
    name, reader = pipe
    for path in (tmp_path / "new" / "rows.csv", name):
        for _ in range(2):
            check_csv(files.Path(path), ["a"])
            append_csv(files.Path(path), [{"a": 1}])
    assert (tmp_path / "new" / "rows.csv").read_text() == "a\n1\n1\n"
    assert os.read(reader, 100) == b"a\n1\na\n1\n"
    append_csv(files.Path(device[0]), [{"a": 1}])
    assert os.read(device[1], 100) == b"a\r\n1\r\n" and stat.S_ISCHR(os.stat(device[0]).st_mode)
    with appending(tmp_path / "new" / "rows.csv") as file:
        file.write(b"2\n")
    assert (tmp_path / "new" / "rows.csv").read_text() == "a\n1\n1\n2\n"


# ---- what cannot be written to is said before


def test_names_that_cannot_be_written_to(tmp_path, pipe):
    name, reader = pipe
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for path, message in {
            tmp_path: "is a folder; the name of a file is needed",
            f"{tmp_path}/new/": "is a folder; the name of a file is needed",
            tmp_path / "file" / "x": "cannot be written to: ",
            tmp_path / "loop": "cannot be written to: ",
            tmp_path / "s": "is a socket; the name of a file is needed",
            f"/dev/fd/{reader}": "cannot be written to: it is open for reading",
            "/dev/fd/987": "cannot be written to: it is not open",
            "": "has no name",
        }.items():
            with pytest.raises(UserError, match=message) as error:
                check_writable(path)
            assert len(str(error.value).splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_block_device_is_refused(tmp_path, monkeypatch):
    """Nobody wants a report on a disk, and root could."""
    monkeypatch.setattr(files, "_mode", lambda path: stat.S_IFBLK | 0o600)
    for write in (check_writable, lambda path: write_text(path, "text")):
        with pytest.raises(UserError, match="is a block device"):
            write(tmp_path / "disk")
    assert os.listdir(tmp_path) == []


def test_write_protection_is_seen_before_and_the_check_makes_nothing(tmp_path, monkeypatch):
    """Asked of the system, which allows root everything."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(UserError, match="file' cannot be written to: it is write-protected"):
        check_writable(tmp_path / "file")
    with pytest.raises(UserError, match=f"the folder '{tmp_path}' is write-protected"):
        check_writable(tmp_path / "a" / "b")
    monkeypatch.undo()
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["file"]


# ---- whole or not at all


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report"
    path.write_text("old")
    for failure in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        with pytest.raises(type(failure)), writing(path) as file:
            file.write(b"half")
            raise failure
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report"]


def test_a_file_that_is_mounted_on_its_own(tmp_path, monkeypatch):
    """In a container; a rename onto it is refused with EBUSY."""
    (tmp_path / "report").write_text("an older and longer text")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
    write_text(tmp_path / "report", "new")
    assert (tmp_path / "report").read_text() == "new" and os.listdir(tmp_path) == ["report"]


def test_a_file_that_may_be_written_to_in_a_folder_that_may_not(tmp_path, monkeypatch):
    (tmp_path / "report").write_text("an older and longer text")
    opened = files.Path.open

    def refusing(path, mode="r", *arguments, **keywords):
        if "x" in mode:
            raise PermissionError(errno.EACCES, "not here", str(path))
        return opened(path, mode, *arguments, **keywords)

    monkeypatch.setattr(files.Path, "open", refusing)
    write_text(tmp_path / "report", "new")
    assert (tmp_path / "report").read_text() == "new"
    with pytest.raises(PermissionError):
        write_text(tmp_path / "other", "new")


# ---- modes


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_modes_are_the_umask_s_and_an_owner_s_stay(tmp_path, umask):
    write_text(tmp_path / "new" / "text", "text")
    with partial_folder(tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert not folder.exists()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "new" / "text").stat().st_mode) == 0o640
    (tmp_path / "new" / "text").chmod(0o600)
    write_text(tmp_path / "new" / "text", "secret")
    assert stat.S_IMODE((tmp_path / "new" / "text").stat().st_mode) == 0o600


# ---- Ctrl-C in torch's archive writer


class Failing(io.RawIOBase):
    """A file that raises after some bytes."""

    def __init__(self, failure):
        self.left, self.failure = 2, failure

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise self.failure
        return len(data)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=["Ctrl-C", "full"])
def test_what_stopped_torch_s_writer_is_what_is_raised(tmp_path, monkeypatch, failure):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda thing, file: save(thing, Failing(failure)))
    with pytest.raises(type(failure)):
        integrity.save(tmp_path / "x.pt", {"a": torch.ones(10), "b": torch.ones(1000)})


def test_a_signal_in_torch_s_writer(tmp_path, monkeypatch):
    """The signal itself, at moments of which some are inside of the writer's C++."""
    tensors = {str(i): torch.ones(20_000) for i in range(200)}
    handler = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        interrupted = 0
        for delay in (0.0005, 0.001, 0.002, 0.004, 0.008):
            signal.setitimer(signal.ITIMER_REAL, delay)
            try:
                integrity.save(tmp_path / "x.pt", tensors)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert interrupted


# ---- the command line


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("data"), val=(1, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model, folder = timm.create_model("internimage_atto", num_classes=2), tmp_path_factory.mktemp("model")
    save_model(model, folder, ["0", "1"], data_config(model, 32))
    return ["--model", str(folder), "--device", "cpu"]


@pytest.fixture
def evaluate(model, data):
    arguments = ["evaluate", *model, "--workers", "0", "--data", str(data / "val")]
    return lambda *more: main([*arguments, *map(str, more)])


def test_reports_of_evaluate(evaluate, pipe, device, capfd):
    name, reader = pipe
    assert evaluate("--json", name, "--csv", device[0]) == 0
    assert json.loads(os.read(reader, 60_000))["images"] == 2
    assert os.read(device[1], 4000).startswith(b"model,") and stat.S_ISCHR(os.stat(device[0]).st_mode)
    capfd.readouterr()
    for stdout in ("-", "/dev/stdout"):
        assert evaluate("--json", stdout) == 0
        assert json.loads(capfd.readouterr().out)["images"] == 2  # and nothing else
    assert evaluate("--csv", "-") == 0
    assert len(capfd.readouterr().out.splitlines()) == 2


def test_reports_that_cannot_be_written_are_one_line(evaluate, tmp_path, pipe, capsys, monkeypatch):
    name, reader = pipe
    os.close(reader)
    assert evaluate("--json", name) == 2
    err = capsys.readouterr().err
    assert "was closed by its reader" in err and "Traceback" not in err
    monkeypatch.setattr(sys.modules["internimage.cli.evaluate"], "load_model", lambda *_: pytest.fail("too late"))
    assert evaluate("--csv", tmp_path) == 2 and evaluate("--json", "") == 2
    assert "is a folder" in capsys.readouterr().err


def test_pictures_of_predict(model, data, tmp_path, capsys, monkeypatch):
    image = data / "val" / "0" / "0.png"
    path = fifo(tmp_path)
    found = []
    thread = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    thread.start()
    arguments = ["predict", str(image), *model]
    assert main([*arguments, "--draw-points", str(path)]) == 0
    thread.join(20)
    assert Image.open(io.BytesIO(found[0])).format == "PNG" and stat.S_ISFIFO(path.stat().st_mode)
    monkeypatch.setattr(sys.modules["internimage.cli.predict"], "load_model", lambda *_: pytest.fail("too late"))
    assert main([*arguments, "--draw-points", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
