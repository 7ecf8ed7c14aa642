# SPDX-License-Identifier: MIT
"""The tables of a run, read after damage and edits."""

import itertools
import math
import os

import pytest
from runs import epochs, same_weights, steps, write_noise
from test_training import settings, stop_at

from internimage.cli import main
from internimage.engine.curves import curve
from internimage.engine.log import TrainingLog, read_steps
from internimage.files import WriteError
from internimage.tasks.classification.finetune import finetune

HEADER = b"step,epoch,loss,lr,grad_norm,images_per_second\n"
ROWS = [b"1,1,1.5,0.001,2.5,800\n", b"2,1,nan,0.002,inf,810.5\n", b"3,2,1.25,0.003,2.0,790\n"]


def read(folder, *parts, last=None):
    (folder / "steps.csv").write_bytes(b"".join(parts))
    return [int(row["step"]) for row in read_steps(folder, last)]


def test_a_table_as_it_was_written(tmp_path, caplog):
    assert read_steps(tmp_path) == []
    assert read(tmp_path, HEADER, *ROWS) == [1, 2, 3]
    assert read(tmp_path, HEADER, *ROWS, last=2) == [1, 2]
    second = read_steps(tmp_path)[1]
    assert second == dict(step="2", epoch="1", loss="nan", lr="0.002", grad_norm="inf", images_per_second="810.5")
    assert math.isnan(float(second["loss"]))
    assert not caplog.records


@pytest.mark.parametrize("incomplete", [b"4", b"4,2", b"4,2,1.2,0.0", b"4,2,1.2,0.003,2.0,", b"\n", b""])
def test_an_incomplete_last_line_is_ignored_without_a_warning(tmp_path, caplog, incomplete):
    assert read(tmp_path, HEADER, *ROWS, incomplete) == [1, 2, 3]
    assert not caplog.records


@pytest.mark.parametrize(
    "invalid",
    [
        b"\xff\xfe\x00binary\x80\n",
        b"4,2,about one,0.003,2.0,790\n",
        b"four,2,1.2,0.003,2.0,790\n",
        b"4,2,1.2,0.003,2.0\n",
        b"4,2,1.2,0.003,2.0,790,1\n",
        b"4,2,,0.003,2.0,790\n",
        b"0,2,1.2,0.003,2.0,790\n",
        b"-4,2,1.2,0.003,2.0,790\n",
        b"4,2,1.2,0.003,2.0,nan\n",
        b'"4,2\n',
        b"9" * 400 + b",2,1.2,0.003,2.0,790\n",
        b"4_0,2,1.2,0.003,2.0,790\n",
        b"4,2,1_2,0.003,2.0,790\n",
        "٤,2,1.2,0.003,2.0,790\n".encode(),
        b"4,2,1.2,1e999,2.0,790\n",
        b"4,2,1.\x002,0.003,2.0,790\n",
        b"x" * 200_000 + b"\n",  # more than the csv module allows in a field
    ],
    ids=lambda line: line[:12].decode("latin-1"),
)
def test_invalid_lines_are_ignored_with_one_warning(tmp_path, caplog, invalid):
    assert read(tmp_path, HEADER, ROWS[0], invalid, ROWS[1], invalid, ROWS[2]) == [1, 2, 3]
    assert [record.message for record in caplog.records] == [
        f"'{tmp_path / 'steps.csv'}': ignoring 2 lines that are not rows of the table"
    ]


@pytest.mark.parametrize(
    "text, invalid",
    [
        (b"", 0),
        (b"\n", 1),
        (b"\x00\x01\xff", 0),  # an incomplete line
        (b"PK\x03\x04\n\xde\xad\n", 2),
        (HEADER.replace(b"lr,", b""), 1),
        (HEADER.replace(b"lr,", b"") + b"1,1,1.5,2.5,800\n", 2),
        (b"".join(ROWS), 3),
    ],
)
def test_a_file_without_our_columns_has_no_rows(tmp_path, caplog, text, invalid):
    assert read(tmp_path, text) == []
    assert [f"ignoring {invalid} line" in record.message for record in caplog.records] == [True] * bool(invalid)


def test_a_table_that_a_spreadsheet_has_saved(tmp_path, caplog):
    table = (HEADER + b"".join(ROWS)).replace(b"\n", b"\r\n")
    assert read(tmp_path, b"\xef\xbb\xbf", table) == [1, 2, 3]
    assert read(tmp_path, b"note," + HEADER, b"mine,1,1,1.5,0.001,2.5,800\n") == [1]
    assert set(read_steps(tmp_path)[0]) == set(HEADER.decode().strip().split(","))
    assert not caplog.records


def test_a_log_line_of_each_epoch(tmp_path, capsys):
    def log(**more):
        return TrainingLog(tmp_path, [], 0, 4, 8, last_epoch=30, **more)

    row = dict(epoch=3, lr=0.1, train_loss=0.43123, images_per_second=811.7)
    for more in (dict(), dict(progress=False), dict(writes=False)):
        running = log(**more)
        running.epoch(dict(row), 4)
        running.epoch(row | dict(val_loss=0.39014, val_top1=91.254), 4, "val loss 0.3901, val top-1 91.25 %")
        running.close()
    assert capsys.readouterr() == (
        "",
        "epoch 3/30: train loss 0.4312, 812 images/s\n"
        "epoch 3/30: train loss 0.4312, val loss 0.3901, val top-1 91.25 %, 812 images/s\n",
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
@pytest.mark.parametrize("name", ["log.csv", "steps.csv"])
def test_a_pipe_in_a_tables_place_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(WriteError, match=f"{name}' is a pipe.*move the pipe away"):
        TrainingLog(tmp_path, [], 0, 4, 8, progress=False)


EXTREME = [0.0, -0.0, 1.0, 5e-324, 1e-320, -1e-300, 1e308, -1e308, 1.7e308, 3.4e38, 1e16, 1e16 + 2, 100.0, math.inf,
           -math.inf, math.nan]  # fmt: skip


@pytest.mark.parametrize("most", [math.inf, 100.0])
def test_any_numbers_make_a_curve_or_none(most):
    """A diverged run or an edited table does not prevent the report."""
    for values in itertools.product(EXTREME, repeat=2):
        for points in (list(zip((1.0, 2.0), values)), list(zip(values, (1.0, 2.0))), [values]):
            drawn = curve("loss", "step", "nats", [("", "main", points)], most=most)
            assert "nan" not in drawn and "inf" not in drawn.replace("info", "")


@pytest.mark.parametrize("name", ["log.csv", "steps.csv"])
def test_a_folder_in_a_tables_place_is_reported_before_training(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(WriteError, match=f"{name}' is a folder.*move the folder away"):
        TrainingLog(tmp_path, [], 0, 4, 8, progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("noise"), train=(9, 9, 9), val=(4, 4, 4))


def test_a_run_with_damaged_tables_resumes_and_rewrites_them(data, tmp_path, caplog, capsys):
    finetune(settings(data, tmp_path / "whole"), progress=False)
    config = settings(data, tmp_path / "run", report=True)
    stop_at(config, 5)
    table = (tmp_path / "run" / "steps.csv").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "steps.csv").write_bytes(b"".join([*table[:3], b"\xff\xfe,\n", *table[3:], b"6,2,1."]))
    (tmp_path / "run" / "log.csv").write_bytes(b"\x80garbage")
    arguments = [f"{k}={v}" for k, v in vars(config).items() if v is not None]
    assert main(["finetune", *arguments]) == 0
    assert caplog.text.count("ignoring 1 line that is not a row of the table") == 1 == caplog.text.count("ignoring")
    assert "Traceback" not in capsys.readouterr().err
    assert [row["step"] for row in steps(tmp_path / "run")] == [str(i) for i in range(1, 10)]
    assert epochs(tmp_path / "run") == epochs(tmp_path / "whole") and len(epochs(tmp_path / "run")) == 3
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()
