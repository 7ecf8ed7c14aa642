# SPDX-License-Identifier: MIT
"""Names and texts of strangers on a terminal and in reports: not obeyed, no command stops for them, nothing is lost."""

import ast
import csv
import io
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image
from runs import ROOT, settings

from internimage.cli import info, main
from internimage.progress import MessageHandler, message, progress_bar
from internimage.terminal import printable, printable_warnings, say

EVIL = "a\x1b[2J\x9b31m\r\n\b\x00\t\x7f\u202eb\u2066\u2028\u2029\x85\udcff"
WRITTEN = r"a\x1b[2J\x9b31m\r\n\x08\x00\t\x7f\u202eb\u2066\u2028\u2029\x85\udcff"


def harmless(text):
    """Nothing in it but lines of letters that can be seen."""
    return all(line.isprintable() for line in text.split("\n"))


class Strict(io.TextIOWrapper):
    """As under PYTHONIOENCODING=ascii:strict and in many a cron job: what is not ASCII is an error."""

    def __init__(self, encoding="ascii"):
        super().__init__(io.BytesIO(), encoding, "strict", write_through=True)

    def value(self):
        return self.buffer.getvalue().decode(self.encoding)


def foreign_logger(name):
    """A logger without handlers: pytest gives its own to the root and to loggers that it finds when a test begins."""
    logger = logging.getLogger(f"a.package.of.somebody.{name}")
    logger.propagate = False
    assert not logger.handlers
    return logger


# ---- the one function


def test_control_characters_are_written_out():
    assert printable(EVIL) == WRITTEN
    for text in ("", "photo 1.jpg", "café", "猫", "עברית", "👩‍👩‍👧", "می‌خواهم", "a\u00a0b", "C:\\new"):
        assert printable(text) == text
    assert all(harmless(printable(chr(i)).replace("\u00a0", "")) or chr(i) in "\u200c\u200d" or chr(i).isspace()
               for i in range(0x11000))  # fmt: skip
    assert printable(7) == "7" and printable(Path("x")) == "x"


@pytest.mark.parametrize(
    "encoding, word", [("ascii", r"caf\xe9 \u732b"), ("cp1252", r"café \u732b"), ("utf-8", "café 猫")]
)
def test_a_strict_stream_takes_any_text(encoding, word):
    stream = Strict(encoding)
    say("café 猫", stream)
    say(EVIL, stream)
    assert stream.value() == f"{word}\n{WRITTEN}\n"


def test_messages_log_records_and_warnings_pass_it(monkeypatch):
    stream = Strict()
    monkeypatch.setattr(sys, "stderr", stream)
    message(EVIL)
    record = logging.LogRecord("internimage", 30, __file__, 1, "%s\nand more", ("\x1b[2J",), None)
    MessageHandler().handle(record)
    bar = progress_bar(1, "finetune")
    bar.write("\x1b", file=sys.stderr)
    assert stream.value() == f"{WRITTEN}\n\\x1b[2J and more\n\\x1b\n"


def test_other_packages_texts_pass_it_while_a_command_runs(monkeypatch):
    stream = Strict()
    monkeypatch.setattr(sys, "stderr", stream)
    logger = foreign_logger("first")
    before = logging.lastResort, warnings.formatwarning
    with printable_warnings(MessageHandler()):
        logger.warning("keys: %s", "\x1b[2J")
        logger.info("not this")
        warning = warnings.formatwarning("odd\n\x1b[2J file", UserWarning, "/x\n.py", 3)
    assert stream.value() == "keys: \\x1b[2J\n" and warning == "/x .py:3: UserWarning: odd \\x1b[2J file\n"
    assert (logging.lastResort, warnings.formatwarning) == before


def test_a_command_has_other_packages_texts_pass_it(monkeypatch):
    stream = Strict()
    monkeypatch.setattr(sys, "stderr", stream)
    logger = foreign_logger("second")
    monkeypatch.setattr(info, "run", lambda arguments: logger.warning("\x1b[2J") or 0)
    assert main(["info"]) == 0 and stream.value() == "\\x1b[2J\n"


def test_an_error_is_one_line_of_what_can_be_seen(capsys):
    for arguments in (
        ["predict", f"/none/{EVIL}".replace("\0", ""), "--model", "m"],
        [EVIL],
        ["push", EVIL, "a/b"],
        ["finetune", f"{EVIL}=1"],
        ["evaluate", "--model", "m", "--data", "d", "--split", "s", EVIL],
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("\n") and err.count("\n") == 1 and harmless(err) and r"\x1b" in err, err


def test_help_passes_a_strict_stdout(monkeypatch):
    for arguments in (["--help"], ["finetune", "--help"], ["evaluate", "--help"], ["predict", "--help"]):
        monkeypatch.setattr(sys, "stdout", Strict())
        with pytest.raises(SystemExit):
            main(arguments)
        assert sys.stdout.value().startswith("usage: internimage")


def test_nothing_prints_but_through_it():
    """`benchmark` prints what its user has typed, and JSON is ASCII without control characters."""
    allowed = {"terminal.py": 1, "progress.py": 1, "cli/analyze.py": 1, "cli/info.py": 1, "cli/predict.py": 1}
    found = {}
    for path in sorted((ROOT / "internimage").rglob("*.py")):
        name = path.relative_to(ROOT / "internimage").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and not name.startswith("benchmark/"):
                called = ast.unparse(node.func)
                if called == "print" or re.fullmatch(r"(sys\.std(out|err)|tqdm)\.write(lines)?", called):
                    found[name] = found.get(name, 0) + 1
    assert found == allowed


# ---- commands


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Two class folders and some images whose names are as bad as names of files can be; two images are damaged."""
    folder = tmp_path_factory.mktemp("names")
    classes = [os.fsdecode(b"caf\xe9\xff"), 'b\x1b[31m\x9b\r\n\u202e<b>,"']
    for split in ("train", "val"):
        for i, name in enumerate(classes):
            (folder / "data" / split / name).mkdir(parents=True)
            for j in range(4):
                file = f"{j}\x1b]0;owned\x07\n\u202e" + os.fsdecode(b"\xfe.png")
                Image.new("RGB", (8, 8), (250 * i, 0, 90)).save(folder / "data" / split / name / file)
        (folder / "data" / split / name / f"broken{file}").write_bytes(b"nothing")
    return folder, classes


@pytest.fixture(scope="module")
def run(names):
    folder, _ = names
    stream = Strict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        output = folder / "run\x1b"  # but UTF-8, which safetensors asks for
        arguments = settings(folder / "data", output, epochs=1, report=True, batch_size=4)
        code = main(["finetune", *(f"{k}={json.dumps(v)}" for k, v in vars(arguments).items() if v is not None)])
    return output, code, stream.value()


def strict(patch):
    out, err = Strict(), Strict()
    patch.setattr(sys, "stdout", out)
    patch.setattr(sys, "stderr", err)
    return out, err


def test_finetune_takes_names_of_any_bytes(names, run):
    output, code, said = run
    assert code == 0 and harmless(said), said
    assert r"broken3\x1b]0;owned\x07\n\u202e\udcfe.png' cannot be read (not an image)" in said
    assert r"run\x1b" in said
    report = (output / "report.html").read_text(encoding="utf-8")
    assert harmless(report) and r"caf\udce9\udcff" in report and r"b\x1b[31m\x9b\r\n\u202e&lt;b&gt;,&quot;" in report
    stored = json.loads((output / "config.json").read_text())["label_names"]
    assert sorted(stored) == sorted(names[1])


def test_evaluate_takes_names_of_any_bytes(names, run, monkeypatch, tmp_path):
    folder, classes = names
    out, err = strict(monkeypatch)
    json_file, csv_file = tmp_path / os.fsdecode(b"\xff.json"), tmp_path / "out.csv"
    arguments = ["--model", str(run[0]), "--data", str(folder / "data"), "--workers", "0", "--per-class"]
    assert main(["evaluate", *arguments, "--json", str(json_file), "--csv", str(csv_file)]) == 0
    assert harmless(out.value()) and harmless(err.value())
    assert r"  caf\udce9\udcff " in out.value() and r"broken3\x1b]0;owned" in err.value()
    report = json.loads(json_file.read_text(encoding="utf-8"))
    assert sorted(entry["class"] for entry in report["per_class"]) == sorted(classes)
    (skipped,) = report["skipped_files"]
    assert Path(skipped["file"]).read_bytes() == b"nothing"
    (row,) = csv.DictReader(io.StringIO(os.fsdecode(csv_file.read_bytes())))
    assert row["model"] == str(run[0])


def test_evaluate_prints_json_to_a_strict_stdout(names, run, monkeypatch):
    out, err = strict(monkeypatch)
    arguments = ["--model", str(run[0]), "--data", str(names[0] / "data"), "--workers", "0"]
    assert main(["evaluate", *arguments, "--json", "-"]) == 0
    assert harmless(out.value()) and json.loads(out.value())["model"] == str(run[0])


def test_predict_takes_names_of_any_bytes(names, run, monkeypatch, tmp_path):
    folder, classes = names
    arguments = [str(folder / "data" / "val"), "--model", str(run[0])]
    out, err = strict(monkeypatch)
    assert main(["predict", *arguments, "--draw-points", str(tmp_path / "points.png")]) == 2
    assert harmless(out.value()) and harmless(err.value()) and len(out.value().splitlines()) == 8 * 3
    assert (
        "internimage predict: error: '" in err.value() and r"\x07" in out.value() and r"caf\udce9\udcff" in out.value()
    )
    assert Image.open(tmp_path / "points.png").size[0] > 0
    out, err = strict(monkeypatch)
    assert main(["predict", *arguments, "--json"]) == 2
    found = [json.loads(line) for line in out.value().splitlines()]
    assert len(found) == 8 and all(Path(line["image"]).is_file() for line in found)
    assert {entry["label"] for line in found for entry in line["classes"]} == set(classes)


def test_errors_about_names_of_any_bytes(names, run, monkeypatch):
    """Classes that are not the model's, a class map that has one of them."""
    out, err = strict(monkeypatch)
    other = names[0] / "other" / os.fsdecode(b"\x1b[2J\xff")
    other.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(other / "0.png")
    assert main(["evaluate", "--model", str(run[0]), "--data", str(other.parent), "--workers", "0"]) == 2
    assert harmless(err.value()) and err.value().count("\n") == 1 and r"\x1b[2J\udcff" in err.value()
