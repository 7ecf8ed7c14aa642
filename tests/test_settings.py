# SPDX-License-Identifier: MIT
"""Every setting of finetune against values that it cannot have, and recipes that are none."""

import dataclasses
import os
import typing

import pytest

from internimage.cli import main
from internimage.config import ConfigError, dump, load_config, split_arguments
from internimage.engine.run_folder import check_output
from internimage.tasks.classification.config import FinetuneConfig
from internimage.values import Choice, Number, Text, Whole

FIELDS = {field.name: field for field in dataclasses.fields(FinetuneConfig)}
TYPES = typing.get_type_hints(FinetuneConfig)
NAMES = sorted(FIELDS)
HUGE = "9" * 20
BASE = ["data=d", "output=o"]


def refused(*overrides, path=None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(FinetuneConfig, path, [*BASE, *overrides])
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) < 700
    return message


def wrong(field) -> list[str]:
    """What a setting must refuse, by its type."""
    kind = field.metadata["kind"]
    if isinstance(kind, Whole):
        limits = [str(kind.at_least - 1)] + ([str(kind.at_most + 1)] if kind.at_most is not None else [])
        return [
            HUGE,
            f"-{HUGE}",
            "9" * 5000,
            ".nan",
            ".inf",
            "nan",
            "1.5",
            "abc",
            "''",
            "true",
            "[1]",
            "1e400",
            *limits,
        ]
    if isinstance(kind, Number):
        return [".nan", "nan", ".inf", "-.inf", "inf", "1e400", "9" * 400, f"-{HUGE}", "abc", "''", "true", "{a: 1}"]
    if isinstance(kind, Choice):
        return ["abc", "''", "true", "2", HUGE, ".nan", "[1]"]
    if isinstance(kind, Text):
        return ["''", "' '", '"a\\0b"']
    return ["abc", "1", HUGE, ".nan", "''", "[true]"]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_refuses_what_it_cannot_be(name):
    for text in wrong(FIELDS[name]):
        message = refused(f"{name}={text}")
        assert f"'{name}'" in message, text


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_a_help_and_takes_its_default(name):
    field = FIELDS[name]
    assert len(field.metadata["help"]) > 8 and not field.metadata["help"].endswith(".")
    optional = type(None) in typing.get_args(TYPES[name])
    assert field.metadata["optional"] == optional
    if optional:
        assert getattr(load_config(FinetuneConfig, None, [*BASE, f"{name}=null"]), name) is None
    elif field.default is not dataclasses.MISSING:
        assert field.metadata["kind"].check(field.default) == field.default
        assert f"'{name}' must be" in refused(f"{name}=null")
    else:
        assert f"'{name}' must be text, got null" in refused(f"{name}=")


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_given_in_python_is_checked_too(name):
    odd = "text" if TYPES[name] is not str and str not in typing.get_args(TYPES[name]) else 3
    with pytest.raises(ConfigError, match=f"^'{name}' must be .*, got {odd!r}$"):
        FinetuneConfig(**{"data": "d", "output": "o", name: odd})


def test_the_message_names_the_range():
    assert refused(f"seed={HUGE}") == f"'seed' must be a whole number from 0 to 4294967295, got {HUGE}"
    assert refused("epochs=0") == "'epochs' must be a whole number of at least 1, got 0"
    assert refused(f"epochs={HUGE}") == f"'epochs' must be a whole number of at most 1000000000, got {HUGE}"
    assert refused("drop_path=1") == "'drop_path' must be a number of at least 0 and below 1, got 1.0"
    assert refused("in_chans=2") == "'in_chans' must be 1 or 3, got 2"
    assert refused("parallel=horovod") == "'parallel' must be ddp or fsdp, got 'horovod'"


@pytest.mark.parametrize("short, long", [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_short_names_of_types_are_taken_and_the_long_ones_kept(short, long):
    assert load_config(FinetuneConfig, None, [*BASE, f"precision={short}"]).precision == long


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    for name, field in FIELDS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {name} ")]
        assert field.metadata["help"].split()[0] in line
    flat = " ".join(text.split())
    assert "image side in pixels; null: the model's own; from 1 to 16384; default null" in flat
    assert "start from the weights that the name refers to; default true" in flat and "default None" not in flat
    assert "folder for the result; required" in flat


# ---- warmup


def test_a_warmup_that_takes_all_epochs_is_refused_of_a_new_run(tmp_path, capsys):
    for epochs, warmup, advice in ((1, 2, "Set warmup_epochs to 0"), (5, 5, "at most 4, or to 0")):
        config = load_config(FinetuneConfig, None, ["data=d", f"output={tmp_path}", f"epochs={epochs}",
                                                    f"warmup_epochs={warmup}"])  # fmt: skip
        with pytest.raises(ConfigError, match="'warmup_epochs' must be below 'epochs'") as error:
            check_output(config)
        assert f"warmup_epochs={warmup} and epochs={epochs}" in str(error.value) and advice in str(error.value)
    (tmp_path / "data").mkdir()
    assert main(["finetune", f"data={tmp_path / 'data'}", f"output={tmp_path / 'run'}", "epochs=1"]) == 2
    assert "Set warmup_epochs to 0" in capsys.readouterr().err and not (tmp_path / "run").exists()
    for more in (["warmup_epochs=0"], ["sched=none"]):
        assert not check_output(
            load_config(FinetuneConfig, None, ["data=d", f"output={tmp_path / 'x'}", "epochs=1", *more])
        )


def test_a_run_that_began_so_goes_on(tmp_path):
    """Its settings stand in finetune.yaml, and it has a checkpoint."""
    config = load_config(FinetuneConfig, None, ["data=d", f"output={tmp_path}", "epochs=2"])
    (tmp_path / "finetune.yaml").write_text(dump(config))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000000003.pt").write_bytes(b"")
    assert check_output(config)
    config.resume = False
    with pytest.raises(ConfigError, match="'warmup_epochs' must be below 'epochs'"):
        check_output(config)


# ---- recipes


def test_the_order_of_recipe_and_settings_is_free(tmp_path, capsys):
    assert split_arguments(["data=x", "recipe.yaml", "lr=1"]) == ("recipe.yaml", ["data=x", "lr=1"])
    assert split_arguments(["runs/lr=0.1/finetune.yaml"]) == ("runs/lr=0.1/finetune.yaml", [])
    assert split_arguments(["./lr=0.1.yaml", " lr = 1"]) == ("./lr=0.1.yaml", [" lr = 1"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 0.5\nepochs: 7\ndata: nowhere\n")
    for words in ([str(recipe), "lr=0.25"], ["lr=0.25", str(recipe)]):
        assert main(["finetune", *words]) == 2
        assert "error: missing: output=..." in capsys.readouterr().err
        config = load_config(FinetuneConfig, *split_arguments(["output=o", *words]))
        assert (config.lr, config.epochs) == (0.25, 7)
    assert main(["finetune", "a.yaml", "data=x", "b.yaml"]) == 2
    assert capsys.readouterr().err.endswith(
        "only one recipe is allowed, got 'a.yaml' and 'b.yaml'; settings are KEY=VALUE\n"
    )
    assert main(["finetune", "--warmup-epochs", "3", "data=x"]) == 2
    assert "no option '--warmup-epochs'; settings are written warmup_epochs=VALUE" in capsys.readouterr().err


BOMB = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghijk", "bcdefghijkl"))
MERGES = "a: &a {lr: 1}\n" + "".join(
    f"{c}: &{c} {{<<: [*{p}, *{p}, *{p}, *{p}]}}\n" for p, c in zip("abcdefghijklmnop", "bcdefghijklmnopq")
)
RECIPES = {
    "empty": ("", "must hold a mapping of keys to values, got nothing"),
    "a list": ("- 1\n- 2\n", "must hold a mapping of keys to values, got a list"),
    "a word": ("hello", "must hold a mapping of keys to values, got a single value"),
    "an open bracket": ("lr: [1, 2\nepochs: 3\n", "must be flat"),
    "an open quote": ("lr: 'abc\nepochs: 3\n", "is not YAML: found unexpected end of stream in line 3, column 1"),
    "a tab": (
        "lr:\t1\n\tepochs: 3\n",
        "cannot start any token in line 1, column 4",
    ),
    "two documents": ("lr: 1\n---\nlr: 2\n", "is not YAML"),
    "a control character": ("lr: \x01\n", "is not YAML: unacceptable character"),
    "deep": ("lr: " + "[" * 50000, "must be flat"),
    "deep mappings": ("lr: " + "{a: " * 10000, "must be flat"),
    "aliases": (BOMB, "must be flat: line 1 has a list"),
    "merges": (MERGES, "must be flat: line 1 has a list or a mapping"),
    "itself": ("&r\nlr: *r\n", "has the alias *r, which does not refer to a single value"),
    "no anchor": ("lr: *x\n", "has the alias *x"),
    "an object": ("lr: !!python/object/apply:os.system ['true']\n", "must be flat"),
    "a tag": ("lr: !!python/name:os.system\n", "is not YAML: could not determine a constructor"),
    "a number as key": ("1: 2\n", "there is no setting '1'"),
    "truth as key": ("on: 2\n", "there is no setting 'on'"),
    "null as key": ("null: 2\n", "there is no setting 'null'"),
    "a list as key": ("? [a, b]\n: 2\n", "must be flat: line 1 has a list"),
    "a key twice": ("lr: 1\nepochs: 3\nlr: 2\n", "has 'lr' twice"),
    "no month": ("lr: 2024-13-45\n", "cannot be read: month must be in 1..12"),
    "digits": (f"epochs: {'9' * 5000}\n", "cannot be read: it has too many digits"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_no_recipe(name, tmp_path, capsys):
    text, message = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["finetune", str(path), "data=x", "output=y"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and len(err) < 1000
    assert err.startswith("internimage finetune: error: ") and message in err


def test_a_recipe_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    (tmp_path / "latin.yaml").write_bytes(b"data: caf\xe9\n")
    for path, message in (
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.yaml", "there is no recipe"),
        (tmp_path / "large.yaml", "is too large for a recipe"),
        (tmp_path / "latin.yaml", "is not YAML: it is not text in UTF-8"),
        ("/dev/zero", "is not a regular file"),
    ):
        assert message in refused(path=path)


def test_an_alias_of_a_single_value_is_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("lr: &rate 0.25\nmin_lr: *rate\n")
    config = load_config(FinetuneConfig, tmp_path / "recipe.yaml", BASE)
    assert (config.lr, config.min_lr) == (0.25, 0.25)


@pytest.mark.parametrize("text", ["007", "1e3", "on", "0x1f", "1_000", "2024-01-02", "1:30"])
def test_text_in_a_recipe_stays_as_it_was_written(text, tmp_path):
    """YAML would make other numbers, truth and dates of such names, and data would be looked for elsewhere."""
    (tmp_path / "recipe.yaml").write_text(f"data: {text}\noutput: '{text}'\ncheckpoint: null\n")
    config = load_config(FinetuneConfig, tmp_path / "recipe.yaml")
    assert (config.data, config.output, config.checkpoint) == (text, text, None)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load_config(FinetuneConfig, tmp_path / "again.yaml") == config


def test_an_override_that_is_no_yaml():
    assert "the value of 'lr' is not YAML" in refused("lr='abc")
    assert "the value of 'lr' must be flat" in refused("lr=[1]")
    assert "the value of 'lr' has the alias *x" in refused("lr=*x")
    assert "there is no setting" in refused(f"{'x' * 3000}=1")
