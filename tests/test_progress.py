# SPDX-License-Identifier: MIT
"""How far a long job is: frames for a terminal, lines for a log file, results alone on stdout."""

import io
import logging
import sys

import pytest
from runs import write_noise

from internimage import progress
from internimage.cli import main
from internimage.progress import message, progress_bar
from internimage.weights import hub


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(100, "evaluate", "img") as bar:
        bar.update(60)
        bar.refresh()
        message("something happened")
    shown = sys.stderr.getvalue()
    assert "evaluate:  60%" in shown and "\r" in shown and "something happened\n" in shown


def test_a_log_file_gets_a_line_every_30_seconds(clock, capsys):
    bar = progress_bar(50_000, "evaluate", "img")
    for second in range(1, 101):
        clock.now = float(second)
        bar.set_postfix(top1="83.10", refresh=False)
        bar.update(100)
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "evaluate: 6 %, 3000 of 50000 img, 100 img/s, 07:50 left, top1=83.10",
        "evaluate: 12 %, 6000 of 50000 img, 100 img/s, 07:20 left, top1=83.10",
        "evaluate: 18 %, 9000 of 50000 img, 100 img/s, 06:50 left, top1=83.10",
    ]


def test_lines_of_a_job_that_went_on_and_of_one_without_an_end(clock, capsys):
    bar = progress_bar(1000, "finetune", "img", initial=900)
    clock.now = 40.0
    bar.update(20)
    bar = progress_bar(None, "convert", "B", unit_scale=True)
    clock.now = 80.0
    bar.update(4_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "finetune: 92 %, 920 of 1000 img, 0.5 img/s, 02:40 left",
        "convert: 4.00GB, 100MB/s",
    ]


def test_a_line_of_its_own_puts_the_next_one_off(clock, capsys):
    bar = progress_bar(10, "finetune", "img")
    clock.now = 29.0
    bar.write("epoch 1/9", file=sys.stderr)
    clock.now = 58.0
    bar.update()
    assert capsys.readouterr().err == "epoch 1/9\n"


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_nothing_is_shown_where_nothing_was_asked_for(stream, monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", stream())
    bar = progress_bar(10, "evaluate", "img", shown=False)
    clock.now = 100.0
    bar.update(5)
    bar.close()
    assert sys.stderr.getvalue() == ""


def test_messages_go_to_stderr(capsys):
    message("'x.png' cannot be read")
    assert capsys.readouterr() == ("", "'x.png' cannot be read\n")


@pytest.mark.parametrize("rank, level, told", [("0", 30, True), ("1", 30, False), ("1", 40, True)])
def test_one_process_of_a_launch_warns(rank, level, told, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    handler = progress.MessageHandler()
    handler.handle(logging.LogRecord("internimage", level, __file__, 1, "checkpoint %s is damaged", ("x",), None))
    assert capsys.readouterr() == ("", "checkpoint x is damaged\n" if told else "")


def test_no_stderr_at_all(monkeypatch):
    """As under pythonw, or where it was closed."""
    monkeypatch.setattr(sys, "stderr", None)
    message("nobody hears this")
    assert not progress.on_terminal()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progress")
    data = write_noise(folder / "data", train=(6, 6), val=(3, 3))
    arguments = ["model=internimage_atto", "pretrained=false", "img_size=32", "epochs=2", "batch_size=4", "workers=0"]
    arguments += ["warmup_epochs=0", "device=cpu", "report=false"]
    return folder, data, arguments


def test_commands_print_results_to_stdout_and_no_frames_to_a_file(run, capsys, monkeypatch):
    folder, data, arguments = run
    monkeypatch.setattr(progress, "SECONDS", 0.0)  # as if every step took long
    assert main(["finetune", f"data={data}", f"output={folder / 'a'}", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["finetune"] * 3 + ["epoch 1/2"] + ["finetune"] * 3 + ["epoch 2/2"]
    assert all("train loss" in line and "val loss" in line and "val top-1" in line and "images/s" in line
               for line in lines if line.startswith("epoch"))  # fmt: skip
    assert [line.split(" ")[0] for line in out.splitlines()] == ["top-1", "model:"]

    assert main(["evaluate", "--model", str(folder / "a"), "--data", str(data), "--workers", "0"]) == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err and err.startswith("evaluate: 100 %, 6 of 6 img, ") and out.startswith("top-1")

    assert main(["convert", str(folder / "a"), str(folder / "b")]) == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err and err.startswith("convert: ") and "internimage_atto" in out


@pytest.mark.parametrize("stream, expected", [(Terminal, True), (io.StringIO, False)])
def test_downloads_draw_bars_on_a_terminal_alone(stream, expected, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        hub, "download_cached_file", lambda url, progress, cache_dir: seen.append(progress) or tmp_path / "x"
    )
    monkeypatch.setattr(sys, "stderr", stream())
    hub.download_url("https://example.org/x", str(tmp_path))
    assert seen == [expected]
