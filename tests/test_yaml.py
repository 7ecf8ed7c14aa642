# SPDX-License-Identifier: MIT
"""YAML from anywhere: whatever is in it is read or named in one line, soon and in little memory."""

import pytest
import yaml

from internimage.config import ConfigError, dump, load_config, parse_settings, read_text
from internimage.tasks.classification.config import FinetuneConfig

BASE = ["data=d", "output=o"]
TAGS = ("int", "float", "bool", "null", "timestamp", "binary", "str", "set", "omap", "pairs", "merge", "value", "foo")
WORDS = (
    "",
    "x",
    "é",
    "'a b'",
    "0x",
    "0b2",
    "-",
    "+",
    ".",
    "1:2:x",
    "0o9",
    "_",
    "2024-02-30",
    "2024-01-01 1:1:1 +99:99",
)
SIZE = 60_000  # characters, near the largest file that is read
LONG = {
    "base 60": "1" + ":1" * (SIZE // 2),
    "base 60, with a point": "1" + ":1" * (SIZE // 2) + ".5",
    "base 16": "0x" + "f" * SIZE,
    "base 2": "0b" + "1" * SIZE,
    "base 8": "0" + "1" * SIZE,
    "base 10": "1" * SIZE,
    "an exponent": "1.0e+" + "1" * SIZE,
    "a date": f"2024-01-01 00:00:00.{'1' * SIZE}",
}
FILES = {
    "lines": b"\n" * SIZE,
    "dashes": b"- " * (SIZE // 2),
    "question marks": b"? " * (SIZE // 2),
    "anchors": b"&a " * (SIZE // 3),
    "documents": b"---\n" * (SIZE // 4),
    "keys": b"".join(b"k%d: 1\n" % i for i in range(SIZE // 12)),
    "a key": b"a" * SIZE + b": 1\n",
    "a version": b"%YAML 1." + b"9" * SIZE + b"\n---\nlr: 1\n",
    "NUL": b"lr: 1\0\n",
    "UTF-16": "lr: 0.5\n".encode("utf-16"),
    "escapes": b'"\\e[31m\\n": 1\n',
    "half a character": b'data: d\n"\\ud800": 1\n',
}


def outcome(text: bytes, tmp_path) -> str:
    """The message of a refusal, "" where there is none; nothing else may come out."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    try:
        load_config(FinetuneConfig, path, BASE)
    except ConfigError as error:
        message = str(error)
        assert len(message) < 700 and message.isprintable(), ascii(message)
        return message
    return ""


@pytest.mark.parametrize("tag", TAGS)
def test_every_tag_on_everything(tag, tmp_path):
    """PyYAML's constructors trust their tags: !!bool of no truth is a KeyError, !!int of nothing an IndexError."""
    for word in WORDS:
        for key in ("epochs", "lr", "data", "clip_grad", "pretrained"):
            outcome(f"{key}: !!{tag} {word}\n".encode(), tmp_path)
            try:
                load_config(FinetuneConfig, None, [*BASE, f"{key}=!!{tag} {word}"])
            except ConfigError as error:
                assert str(error).isprintable()


@pytest.mark.parametrize("what", LONG)
def test_numbers_without_end(what, tmp_path):
    """Of base 60, PyYAML takes minutes for a megabyte."""
    assert "'lr' in '" in (message := outcome(f"lr: {LONG[what]}\n".encode(), tmp_path))
    assert message.endswith("cannot be read: it has too many digits")
    with pytest.raises(ConfigError, match="the value of 'lr' cannot be read: it has too many digits"):
        load_config(FinetuneConfig, None, [*BASE, f"lr={LONG[what]}"])


@pytest.mark.parametrize("what", FILES)
def test_files_without_end(what, tmp_path):
    assert outcome(FILES[what], tmp_path)


def test_files_beyond_the_bound_are_not_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: 0.5\n" + "#" * (1 << 16))
    with pytest.raises(ConfigError, match="is too large"):
        load_config(FinetuneConfig, path, BASE)
    path.write_text("lr: 0.5\n" + "#" * 60_000)
    assert load_config(FinetuneConfig, path, BASE).lr == 0.5


def test_settings_are_read_as_they_were_written(tmp_path):
    """What `dump` writes comes back through the one reader, with every kind of value and of path."""
    paths = (
        "a" * 3000,
        "a b  c",
        "007",
        "1e3",
        "on",
        "null",
        "~",
        "2024-01-02",
        "\udcff.png",
        "é\n",
        "- a",
        "{a}",
        "&a",
    )
    for path in paths:
        config = FinetuneConfig(data=path, output="o", lr=1e-5, clip_grad=None, layer_decay=0.1, pretrained=False)
        text = dump(config)
        assert list(parse_settings(text, "it", FinetuneConfig).items()) == list(yaml.safe_load(text).items())
        (tmp_path / "finetune.yaml").write_text(text)
        assert read_text(tmp_path / "finetune.yaml") == text
        assert load_config(FinetuneConfig, tmp_path / "finetune.yaml") == config
