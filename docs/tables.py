# SPDX-License-Identifier: MIT
"""Markdown tables of the site that are made from the code: models, recipes, and the help of the command line."""

import argparse
import functools
from pathlib import Path

import timm
import yaml

from internimage.cli import parser
from internimage.models.families import family_of, known_models
from internimage.weights.released import PUBLISHED

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def _table(header: str, rows: list[list[str]]) -> str:
    """A Markdown table; a column of `header` that ends in a colon is aligned to the right."""
    columns = [column.strip() for column in header.split("|")]
    names = [column.removesuffix(":") for column in columns]
    rule = ["--:" if column.endswith(":") else "---" for column in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, rule, *rows])


def _count(number: float) -> str:
    """A number of parameters, to three digits."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def model_names(family: str) -> list[str]:
    """Every name of a family with its tag: the smallest architecture first, and of each its default tag."""

    def key(name: str) -> tuple[int, bool, str]:
        architecture, _, tag = name.partition(".")
        return _parameters(architecture), tag != timm.get_pretrained_cfg(architecture).tag, name

    return sorted((name for name in known_models() if "." in name and family_of(name).name == family), key=key)


def _parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in timm.create_model(name, device="meta").parameters())


def models() -> str:
    """Every InternImage: counted parameters, and what was published about its weights."""
    rows = []
    for name in model_names("InternImage"):
        config, released = timm.get_pretrained_cfg(name), PUBLISHED.get(name)
        repository = released.hub_id if released else None
        rows.append(
            [
                f"`{name}`",
                _count(_parameters(name)),
                str(config.num_classes),
                str(config.input_size[-1]),
                f"{released.gmacs:g}" if released and released.gmacs else "",
                f"{released.top1}" if released and released.top1 else "",
                f"[{repository.split('/')[1]}](https://huggingface.co/{repository})" if repository else "none",
            ]
        )
    return _table("name | parameters: | classes: | image size: | GMACs: | top-1, %: | weights", rows)


def deformable_models() -> str:
    """Every deformable ResNet: where it is deformable, and the weights of the plain ResNet that it starts from."""
    rows = []
    for name in model_names("deformable ResNet"):
        config = timm.get_pretrained_cfg(name)
        arguments = timm.create_model(name, device="meta").own_arguments()
        rows.append(
            [
                f"`{name}`",
                _count(_parameters(name)),
                ", ".join(map(str, arguments["stages"])),
                str(arguments["offset_groups"]),
                f"[{config.hf_hub_id}](https://huggingface.co/{config.hf_hub_id})",
                config.license,
            ]
        )
    return _table("name | parameters: | stages: | offset groups: | starts from | license of these weights", rows)


def _recipe_paths() -> list[Path]:
    return sorted(CONFIGS.glob("*.yaml"))


def _purpose(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".")


def recipes() -> str:
    """Every recipe and its purpose."""
    rows = [[f"[`{path.name}`](#{path.stem})", _purpose(path)] for path in _recipe_paths()]
    return _table("recipe | purpose", rows)


def recipe_settings() -> str:
    """The settings that differ most between recipes; empty where a recipe leaves the default."""
    columns = ("model", "img_size", "epochs", "batch_size", "lr", "layer_decay", "freeze")
    rows = []
    for path in _recipe_paths():
        settings = yaml.safe_load(path.read_text())
        rows.append([f"`{path.stem}`", *(f"{settings.get(name, '')}" for name in columns)])
    return _table(" | ".join(("recipe", "model", *(f"{name}:" for name in columns[1:]))), rows)


def recipe_files() -> str:
    """Every recipe in full."""
    return "\n\n".join(
        f"({path.stem})=\n\n```{{rubric}} {path.name}\n```\n\n```{{literalinclude}} ../configs/{path.name}\n"
        ":language: yaml\n```"
        for path in _recipe_paths()
    )


def _leaves(command: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of the verbs below a parser that have none below them."""
    nested = [action for action in command._actions if isinstance(action, argparse._SubParsersAction)]
    children = [child for action in nested for child in action.choices.values()]
    return [leaf for child in children for leaf in _leaves(child)] or [command]


def commands() -> str:
    """The help text of every verb."""
    pages = []
    for verb in _leaves(parser()):
        verb.formatter_class = functools.partial(verb.formatter_class, width=100)
        verb.color = False  # Python 3.14 colors it
        pages.append(f"```{{rubric}} {verb.prog}\n```\n\n```text\n{verb.format_help().rstrip()}\n```")
    return "\n\n".join(pages)
