# SPDX-License-Identifier: MIT
"""`internimage convert`."""

import argparse
from typing import Any

import torch
import yaml

from ..errors import UserError
from ..models.convert import HEAD_22K_TO_1K, convert
from ..progress import progress_bar

HELP = "Weights in any format to a folder that timm, transformers and the Hub take."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="file or folder, internimage_SIZE.TAG, or OWNER/NAME[@REVISION][/FILE] of the Hub",
    )
    parser.add_argument("destination", metavar="DST", help="folder to make")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of all weights; as they are, if not given")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="largest file of weights")
    parser.add_argument("--verify", action="store_true", help="read the result again and compare every tensor")
    parser.add_argument(
        "--head", choices=[HEAD_22K_TO_1K], help="keep ImageNet-1k's rows of an ImageNet-22k classifier"
    )
    parser.add_argument("--use-ema", action="store_true", help="of two sets of weights take the averaged one")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that holds a model")
    group = parser.add_argument_group("model, where the weights do not tell")
    group.add_argument("--model", metavar="NAME", help="internimage_SIZE[.TAG]")
    group.add_argument(
        "--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the model, such as channels=16"
    )


def run(arguments: argparse.Namespace) -> int:
    kwargs = _parse_kwargs(arguments.model_kwargs)
    with progress_bar(None, "convert", "B", leave=False, unit_scale=True) as bar:
        result = convert(
            arguments.source,
            arguments.destination,
            model=arguments.model,
            model_kwargs=kwargs,
            dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
            shard_size=arguments.shard_size,
            head=arguments.head,
            use_ema=arguments.use_ema,
            verify=arguments.verify,
            overwrite=arguments.overwrite,
            progress=bar.update,
        )
    for file, size in result.files.items():
        print(f"{size:>16,}  {result.folder / file}")
    checked = "every tensor read again and compared" if result.verified else "not read again (--verify does)"
    size = f"{result.tensors} tensors, {result.parameters:,} parameters, {', '.join(result.dtypes)}"
    print(f"{result.model}: {size}; {checked}")
    print(f'load it with timm.create_model("local-dir:{result.folder}", pretrained=True)')
    return 0


def _parse_kwargs(settings: list[str]) -> dict[str, Any]:
    kwargs = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--model-kwargs takes KEY=VALUE, got '{setting}'")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"the value of '{key}' is not YAML: {text!r}") from error
        kwargs[key] = tuple(value) if isinstance(value, list) else value
    return kwargs
