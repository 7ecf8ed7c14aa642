# SPDX-License-Identifier: MIT
"""Every option of every verb: its type and range, what it has no effect with, and one line for what is wrong.

The tests walk the table and the parsers made of it, so an option that is added is tested, too.
"""

import argparse
import importlib
import os

import pytest
from PIL import Image

from internimage import cli
from internimage.cli import main, parser, verbs
from internimage.cli.options import (
    Group,
    KeyValue,
    Option,
    OutputFile,
    Parser,
    PictureFile,
    Pixel,
    Sides,
    Size,
    WordOr,
    Words,
)
from internimage.errors import UserError
from internimage.values import Choice, Number, Text, Whole

VERBS = {verb.name: verb for verb in verbs.VERBS} | {f"benchmark {verb.name}": verb for verb in verbs.BENCHMARKS}
# a command that is right, without the options under test
REQUIRED = {
    "evaluate": ["--model", "m", "--data", "d"],
    "predict": ["a.png", "--model", "m"],
    "analyze": ["a.png", "--model", "m"],
    "finetune": ["data=d", "output=o"],
    "convert": ["a", "b"],
    "push": ["folder", "me/mine"],
    "export": ["--model", "m", "--output", "m.onnx"],
}


def options_of(verb):
    for part in verb.options:
        yield from part.options if isinstance(part, Group) else (part,)


ALL = [(name, option) for name, verb in VERBS.items() for option in options_of(verb)]
VALUED = [(name, option) for name, option in ALL if option.kind is not None and option.name.startswith("-")]
GARBAGE = ["", " ", "abc", "nan", "inf", "-inf", "1e400", "0x10", "1_0", "٣", "9" * 20, "-" + "9" * 20, "9" * 5000]


def named(pairs):
    return dict(argvalues=pairs, ids=[f"{name} {option.name}" for name, option in pairs])


def sample(option) -> str:
    """A value that the option takes."""
    kind = option.kind.kind if isinstance(option.kind, WordOr) else option.kind
    if isinstance(kind, Whole):
        return str(max(kind.at_least, 1))
    if isinstance(kind, Choice):
        return str(kind.allowed[0])
    if isinstance(kind, PictureFile):
        return "points.png"
    samples = {
        Number: "0.5",
        Size: "2GB",
        KeyValue: "depths=[1, 2]",
        OutputFile: "out.file",
        Pixel: "7,9",
        Sides: "64x96",
    }
    if isinstance(kind, Words):
        return ",".join(kind.allowed)
    return samples.get(type(kind), "cpu" if option.name == "--device" else "text")


def wrong(kind) -> list[str]:
    """Texts that a kind of value must refuse."""
    if isinstance(kind, WordOr):
        return [text for text in wrong(kind.kind)]
    if isinstance(kind, Whole):
        limits = [kind.at_least - 1] + ([kind.at_most + 1] if kind.at_most is not None else [10**9 + 1])
        return [*GARBAGE, "1.5", *map(str, limits)]
    if isinstance(kind, Number):
        ends = [(kind.at_least, -1e-9), (kind.above, 0), (kind.at_most, 1e-9), (kind.below, 0)]
        return [*GARBAGE, *(str(limit + step) for limit, step in ends if limit is not None)]
    if isinstance(kind, Size):
        return [
            *(text for text in GARBAGE if text != "9" * 20),
            "9" * 20 + "GB",
            "0",
            "-5",
            "0GB",
            "5 XB",
            "nanGB",
            "1e3GB",
            "0.0001B",
            "GB",
        ]
    if isinstance(kind, KeyValue):
        return [
            "",
            "abc",
            "=1",
            "a b=1",
            "a='",
            "a=*x",
            "a=" + "[" * 5000,
            "in_chans=0",
            "num_classes=-3",
            "in_chans=x",
        ]
    if isinstance(kind, PictureFile):
        return ["", "p.xyz", "p", "p.png/", ".", "p.h5", "-", "p.xbm", __file__ + "/p.png"]
    if isinstance(kind, OutputFile):
        return ["", " ", ".", "/", __file__ + "/out.json", "a\0b"]
    if isinstance(kind, Choice):
        return GARBAGE
    if isinstance(kind, Words):
        return [*GARBAGE, ",", f"{kind.allowed[0]},", f"{kind.allowed[0]} {kind.allowed[1]}", kind.allowed[0].upper()]
    if isinstance(kind, Sides):
        return [*GARBAGE, "5x", "x5", "5x5x5", "0x5", "5x99999", "-5x5", "5*5", "5,5"]
    if isinstance(kind, Pixel):
        return [*GARBAGE, "5", "5,", ",5", "1,2,3", "a,b", "nan,1", "1;2"]
    assert isinstance(kind, Text), f"a kind that this test does not know: {kind}"
    return ["", " ", "a\0b", *(["not so", "/", "a/b/c"] if kind.pattern else [])]


def fails(capsys, *arguments) -> str:
    """The one line of a command that must fail."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and len(captured.err) < 600, captured.err
    return captured.err


# ---- each by itself


@pytest.mark.parametrize("name, option", **named(VALUED))
def test_an_option_refuses_what_is_out_of_its_range(name, option, capsys):
    for text in wrong(option.kind):
        message = fails(capsys, *name.split(), *REQUIRED.get(name, []), f"{option.name}={text}")
        assert message.startswith(f"internimage {name}: error: argument {option.name}: must be "), text
        assert ", got " in message


@pytest.mark.parametrize("name, option", **named([pair for pair in ALL if not pair[1].name.startswith("-")]))
def test_a_positional_argument_is_not_empty(name, option, capsys):
    values = [f"{o.name[0]}=x" for o in options_of(VERBS[name]) if not o.name.startswith("-")]
    places = [o.name for o in options_of(VERBS[name]) if not o.name.startswith("-")]
    values = ["" if place == option.name else value for place, value in zip(places, values)]
    message = fails(capsys, name, *values)
    assert "must be " in message and f"argument {option.metavar.split()[0]}" in message


def leaves(of: Parser):
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from leaves(sub)
            return
    yield of


def test_no_parser_has_an_argument_that_is_not_of_the_table():
    found = {leaf.prog.removeprefix("internimage "): leaf for leaf in leaves(parser())}
    assert found.keys() == VERBS.keys()
    for name, leaf in found.items():
        actions = [action for action in leaf._actions if not isinstance(action, argparse._HelpAction)]
        table = list(options_of(VERBS[name]))
        assert [action.dest for action in actions] == [option.dest for option in table]
        for action, option in zip(actions, table):
            assert (action.nargs == 0) if option.kind is None else (action.type.kind is option.kind)
            assert option.kind is None or option.kind.words


@pytest.mark.parametrize("name", VERBS)
def test_helps(name, capsys):
    """Every option is described, no default is empty, and the examples are commands that can be read."""
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    assert "(default: )" not in flat and "default None" not in flat and "default: None" not in flat
    for option in options_of(VERBS[name]):
        assert len(option.help) > 8 and not option.help.endswith("."), option.name
        if option.default not in (None, "", ()):
            assert "(default: " in flat
    head, examples, lines = text.partition("\nexamples:\n")
    assert examples and all(line.startswith("  ") for line in lines.splitlines())
    for line in lines.splitlines():
        assert f"internimage {name}" in line or "train_one_machine.sh" in line
        words = [word.strip('"') for word in line.replace('"First weights"', "text").split()]
        if words[0] == "internimage":
            parser().parse_args(words[1:])


def test_the_values_that_are_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, option in VALUED:
        values = parser().parse_args(
            [*name.split(), *REQUIRED.get(name, []), *needed(name, option), option.name, sample(option)]
        )
        assert hasattr(values, option.dest)
    read = parser().parse_args(["convert", "a", "b", "--shard-size", "1.5gb", "--dtype", "bf16"])
    assert (read.shard_size, read.dtype) == (1_500_000_000, "bfloat16")
    assert parser().parse_args(["convert", "a", "b", "--shard-size", "12345"]).shard_size == 12345
    read = parser().parse_args(["evaluate", "--model", "m", "--data", "d", "--dtype", "fp16", "--expect", "83.5"])
    assert (read.dtype, read.expect, read.batch_size, read.split, read.dataset) == (
        "float16",
        83.5,
        64,
        "validation",
        "",
    )
    assert read.json is None and read.flip is False
    read = parser().parse_args(["benchmark", "models", "--batches", "2", "3"])
    assert read.batches == [2, 3] and read.peers == ["official", "swin_tiny_patch4_window7_224", "convnext_tiny"]


def test_the_words_of_the_messages(capsys):
    start = "internimage evaluate: error: argument"
    for arguments, said in (
        (["--batch-size", "0"], f"{start} --batch-size: must be a whole number of at least 1, got '0'"),
        (["--batch-size", "9" * 20], f"{start} --batch-size: must be a whole number of at most 1000000000, got"),
        (["--workers", "-1"], f"{start} --workers: must be a whole number from 0 to 1024, got '-1'"),
        (["--crop-pct", "nan"], f"{start} --crop-pct: must be a number above 0 and at most 1, got 'nan'"),
        (["--expect", "good"], f"{start} --expect: must be 'published' or a number from 0 to 100, got 'good'"),
        (["--dtype", "int8"], f"{start} --dtype: must be float32 (fp32), bfloat16 (bf16) or float16 (fp16), got"),
        (["--csv", ""], f"{start} --csv: must be the name of a file to write"),
        (["--batchsize", "3"], f"{start[:-9]} there is no option '--batchsize'; did you mean --batch-size?"),
        (["more"], f"{start[:-9]} there is no argument 'more'; see internimage evaluate --help"),
    ):  # fmt: skip
        assert fails(capsys, "evaluate", *REQUIRED["evaluate"], *arguments).startswith(said)


def test_what_cannot_be_written_is_found_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "closed"
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(folder))
    for arguments in (
        ["predict", "a.png", "--model", "m", "--draw-points", str(folder / "new" / "points.png")],
        ["evaluate", "--model", "m", "--data", "d", "--json", str(folder / "result.json")],
        ["benchmark", "ops", "--csv", str(folder / "rows.csv")],
    ):
        assert f"the folder '{folder}' is write-protected" in fails(capsys, *arguments)
    assert "ending in .png, .jpg or another" in fails(capsys, "predict", "a", "--model", "m", "--draw-points", "p.xyz")
    assert not list(folder.iterdir())


def test_pictures_have_every_ending_that_pillow_writes_in_color(tmp_path):
    taken = set()
    for ending in Image.registered_extensions():
        try:
            PictureFile().check(str(tmp_path / f"a{ending}"))
        except ValueError:
            continue
        Image.new("RGB", (9, 7)).save(tmp_path / f"a{ending}")
        taken.add(ending)
    assert {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tiff", ".pdf"} <= taken
    assert PictureFile().check(str(tmp_path / "A.PNG"))


# ---- together


def needed(name, option) -> list[str]:
    """The options that another one needs."""
    words = []
    for other, value in option.requires.items():
        (needs,) = [o for o in options_of(VERBS[name]) if o.name == other]
        words += [*needed(name, needs), other, str(value if value is not None else sample(needs))]
    return words


def given(option) -> list[str]:
    return [option.name] if option.kind is None else [option.name, sample(option)]


EXCLUDED = [(name, option, other) for name, option in ALL for other in option.excludes]
REQUIRING = [(name, option, other, value) for name, option in ALL for other, value in option.requires.items()]


@pytest.mark.parametrize("name, option, other", EXCLUDED, ids=lambda value: getattr(value, "name", value))
def test_options_that_exclude_each_other(name, option, other, capsys):
    (second,) = [o for o in options_of(VERBS[name]) if o.name == other]
    for words in ([*given(option), *given(second)], [*given(second), *given(option)]):
        message = fails(capsys, *name.split(), *REQUIRED.get(name, []), *words)
        assert f"{option.name} has no effect with {other}" in message


@pytest.mark.parametrize("name, option, other, value", REQUIRING, ids=lambda value: getattr(value, "name", str(value)))
def test_options_that_need_another(name, option, other, value, capsys):
    needs = other if value is None else f"{other} {value}"
    start = [*name.split(), *REQUIRED.get(name, [])]
    assert f"{option.name} has no effect without {needs}" in fails(capsys, *start, *given(option))
    if value is not None:
        (second,) = [o for o in options_of(VERBS[name]) if o.name == other]
        odd = next(one for one in second.kind.allowed if one != value)
        assert f"{option.name} has no effect without {needs}" in fails(capsys, *start, *given(option), other, odd)


def test_the_table_has_the_known_ones():
    assert {(option.name, other) for _, option, other in EXCLUDED} >= {
        ("--class-map", "--labels"), ("--dataset", "--labels"), ("--split", "--labels"), ("--rounds", "--quick"),
        ("--batch", "--quick"), ("--batches", "--quick"), ("--img-size", "--quick"),
    }  # fmt: skip
    assert {(option.name, other) for _, option, other, _ in REQUIRING} == {
        ("--draw-layer", "--draw-points"), ("--real-labels", "--variant"), ("--calibrate", "--quantize"),
        ("--images", "--calibrate"),
    }  # fmt: skip


def test_what_the_table_cannot_say(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate, predict = ["evaluate", *REQUIRED["evaluate"]], ["predict", "a.png", "--model", "m"]
    labels = tmp_path / "labels.txt"
    labels.write_text("0.png 1\n")
    (tmp_path / "link.txt").symlink_to(labels)
    (tmp_path / "a.png").write_bytes(b"my only photo")
    for arguments, said in (
        ([*evaluate, "--use-ema"], "--use-ema has no effect without --checkpoint"),
        ([*predict, "--use-ema"], "--use-ema has no effect without --checkpoint"),
        ([*evaluate, "--expect", "published", "--checkpoint", "x"], "no ImageNet-1k top-1 is published for 'm'"),
        ([*evaluate, "--expect", "published", "--num-classes", "9"], "no ImageNet-1k top-1 is published for 'm'"),
        ([*evaluate, "--expect", "published", "--variant", "a"], "no ImageNet-1k top-1 is published for 'm'"),
        ([*evaluate, "--json", "x", "--csv", "./x"], "--json and --csv are the same file"),
        ([*evaluate, "--labels", "labels.txt", "--json", str(tmp_path / "link.txt")], "the file of --labels"),
        ([*evaluate, "--class-map", "labels.txt", "--csv", "labels.txt"], "the file of --class-map"),
        ([*predict, "--draw-points", "a.png"], "--draw-points would overwrite the image 'a.png'"),
        (["predict", ".", "--model", "m", "--draw-points", "a.png"], "--draw-points would overwrite the image 'a.png'"),
        (["convert", "a", "b", "--model-kwargs", "x=1", "x=2"], "--model-kwargs has 'x' twice"),
        (["convert", "a", "b", "--head", "22k-to-1k", "--model-kwargs", "num_classes=3"], "num_classes has no effect"),
        (["benchmark", "ops", "--official", "x", "--peers", "torchvision"], "--official has no effect"),
        (["benchmark", "models", "--peers", "--official", "x"], "--official has no effect"),
    ):  # fmt: skip
        assert said in fails(capsys, *arguments)
    assert labels.read_text() == "0.png 1\n" and (tmp_path / "a.png").read_bytes() == b"my only photo"


# ---- what main makes of errors


@pytest.fixture
def ending(monkeypatch):
    """`internimage info` that ends with an exception."""

    def end(error):
        def run(arguments):
            raise error

        monkeypatch.setattr(importlib.import_module("internimage.cli.info"), "run", run)
        return main(["info"])

    return end


def test_an_error_of_several_lines_is_one_line(ending, capsys):
    assert ending(UserError("the first\n   and the second\n")) == 2
    assert capsys.readouterr().err == "internimage info: error: the first and the second\n"


def test_interrupts(ending, capsys):
    assert ending(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert ending(KeyboardInterrupt("interrupted; the last checkpoint is 'x'")) == 130
    assert capsys.readouterr().err == "interrupted; the last checkpoint is 'x'\n"


def test_a_bug_is_not_called_bad_input(ending):
    with pytest.raises(ValueError, match="a bug"):
        ending(ValueError("a bug"))


def test_wrong_arguments_are_told_once_on_each_machine(ending, capsys, monkeypatch):
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    for rank, local, told in (("0", "0", 1), ("1", "1", 0), ("2", "0", 1)):
        for name, value in (("WORLD_SIZE", "4"), ("RANK", rank), ("LOCAL_RANK", local)):
            monkeypatch.setenv(name, value)
        assert main(["evaluate", "--batch-size", "0"]) == 2
        assert capsys.readouterr().err.count("argument --batch-size: must be") == told
        assert main(["finetune", "data=x"]) == 2
        assert capsys.readouterr().err.count("missing: output=...") == told
        assert ending(UserError("an error of this process")) == 2  # is its alone, wherever it is
        assert capsys.readouterr().err.count("an error of this process") == 1


def test_an_option_without_a_kind_is_a_switch():
    assert Option("--flip", "help").default_value is False and Option("--n", "help", Whole(1)).default_value is None
