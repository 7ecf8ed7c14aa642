# SPDX-License-Identifier: MIT
"""`internimage convert`."""

import argparse

from ..convert.convert import convert
from ..dtypes import torch_dtype
from ..progress import progress_bar
from ..terminal import say


def run(arguments: argparse.Namespace) -> int:
    with progress_bar(None, "convert", "B", leave=False, unit_scale=True) as bar:
        result = convert(
            arguments.source,
            arguments.destination,
            model=arguments.model,
            model_kwargs=arguments.model_kwargs,
            dtype=torch_dtype(arguments.dtype) if arguments.dtype else None,
            shard_size=arguments.shard_size,
            head=arguments.head,
            use_ema=arguments.use_ema,
            verify=arguments.verify,
            overwrite=arguments.overwrite,
            progress=bar.update,
        )
    for file, size in result.files.items():
        say(f"{size:>16,}  {result.folder / file}")
    checked = "every tensor read back and compared" if result.verified else "not verified (see --verify)"
    contents = f"{result.tensors} tensors, {result.parameters:,} parameters, {', '.join(result.dtypes)}"
    say(f"{result.model}: {contents}; {checked}")
    say(f'load it with timm.create_model("local-dir:{result.folder}", pretrained=True)')
    return 0
