# SPDX-License-Identifier: MIT
"""The verbs of the command line: their help, and checks of combinations of options.

`tables.py` and `benchmark_tables.py` have the options of each verb. What a verb does is in the module of its name,
which is imported after the arguments have been checked.
"""

import argparse
import dataclasses
import json
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..config import load_config, split_arguments
from ..engine.config import settings_of
from ..tasks.classification.config import FinetuneConfig
from ..values import Number, Whole
from . import benchmark_tables, tables
from .options import Group, Option, Parser, UsageError, add_options

# ---- checks of combinations, beyond those of the tables


_EXPORTED = (".onnx", ".pt2")  # suffixes of `internimage.export.runtime`, which imports torch


def _check_model(arguments: argparse.Namespace, prog: str) -> None:
    if arguments.model.lower().endswith(_EXPORTED):
        options = {"--checkpoint": "checkpoint", "--use-ema": "use_ema", "--num-classes": "num_classes"}
        for option, name in options.items():
            if getattr(arguments, name):
                raise UsageError(f"{option} has no effect with an exported file, which has its own weights", prog)
    by_name = ":" not in arguments.model and not Path(arguments.model).is_dir()
    if arguments.use_ema and arguments.checkpoint is None and by_name:
        raise UsageError("--use-ema has no effect without --checkpoint: released weights have no EMA", prog)


def _check_evaluate(arguments: argparse.Namespace, prog: str) -> None:
    _check_model(arguments, prog)
    other_images = arguments.variant not in (None, "imagenet", "real")
    if arguments.expect == "published" and (arguments.checkpoint or arguments.num_classes or other_images):
        raise UsageError(
            f"no ImageNet-1k top-1 is published for '{arguments.model}' with these options: --expect published needs "
            f"released weights, without --checkpoint, --num-classes or another dataset",
            prog,
        )
    if arguments.json and arguments.csv and _same_file(arguments.json, arguments.csv):
        raise UsageError(f"--json and --csv are the same file, '{arguments.csv}'", prog)
    for option, source in (("--labels", arguments.labels), ("--class-map", arguments.class_map)):
        for target in (arguments.json, arguments.csv):
            if source and target and _same_file(source, target):
                raise UsageError(f"the report would overwrite '{target}', the file of {option}", prog)


def _check_predict(arguments: argparse.Namespace, prog: str) -> None:
    _check_model(arguments, prog)
    if arguments.draw_points:
        picture = Path(arguments.draw_points)
        for image in arguments.images:
            inside = (
                picture.exists() and Path(image).is_dir() and picture.resolve().is_relative_to(Path(image).resolve())
            )
            if image != "-" and (inside or _same_file(image, picture)):
                raise UsageError(f"--draw-points would overwrite the image '{picture}': choose another file", prog)


def _same_file(a: str, b: str | Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them does not exist yet
        return os.path.realpath(a) == os.path.realpath(b)


def _check_analyze(arguments: argparse.Namespace, prog: str) -> None:
    models = arguments.model
    if twice := [name for i, name in enumerate(models) if name in models[:i]]:
        raise UsageError(f"--model has '{twice[0]}' twice", prog)
    if arguments.checkpoint is not None and len(models) > 1:
        raise UsageError("--checkpoint is for a single --model: name a folder of finetune or convert instead", prog)
    if len(arguments.layer) not in (0, 1, len(models)):
        raise UsageError(f"--layer is given once, or once for each model, got {len(arguments.layer)} of them", prog)
    for name in models:
        _check_model(argparse.Namespace(**{**vars(arguments), "model": name}), prog)


def _check_export(arguments: argparse.Namespace, prog: str) -> None:
    _check_model(arguments, prog)
    if arguments.quantize == "static" and arguments.calibrate is None:
        raise UsageError("--quantize static needs --calibrate FOLDER, images to calibrate with", prog)
    if arguments.format is None:
        arguments.format = "pt2" if arguments.output.lower().endswith(".pt2") else "onnx"
    if arguments.format == "onnx" and arguments.decompose:
        raise UsageError("--decompose has no effect on ONNX, which has no operators of ours: it is for .pt2", prog)
    if arguments.operator is not None and arguments.format != "onnx":
        raise UsageError("--operator has no effect on .pt2: it is for ONNX", prog)


def _check_finetune(arguments: argparse.Namespace, prog: str) -> None:
    recipe, overrides = split_arguments(arguments.settings)
    arguments.config = load_config(FinetuneConfig, recipe, overrides)


def _check_convert(arguments: argparse.Namespace, prog: str) -> None:
    keys = [key for key, _ in arguments.model_kwargs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise UsageError(f"--model-kwargs has '{min(twice)}' twice", prog)
    if arguments.head and "num_classes" in keys:
        raise UsageError(f"num_classes has no effect with --head {arguments.head}: omit one of them", prog)
    arguments.model_kwargs = dict(arguments.model_kwargs)


def _check_benchmark(arguments: argparse.Namespace, prog: str) -> None:
    if getattr(arguments, "official", None) is not None and "official" not in arguments.peers:
        raise UsageError("--official has no effect if --peers does not include 'official'", prog)
    for option, values in (("--threads", arguments.threads), ("--models", getattr(arguments, "models", []))):
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise UsageError(f"{option} has {twice[0]} twice", prog)


def _no_check(arguments: argparse.Namespace, prog: str) -> None:
    pass


# ---- verbs


@dataclass(frozen=True)
class Verb:
    """A verb: its name, help, options, examples, and check of combinations of options."""

    name: str
    help: str
    options: tuple[Option | Group, ...]
    examples: str
    check: Callable[[argparse.Namespace, str], None] = _no_check


VERBS = (
    Verb(
        "evaluate",
        "Measure top-1, top-5 and loss of a model on a dataset.",
        tables.EVALUATE,
        """
        internimage evaluate --model internimage_tiny.ogvl_in1k --data imagenet --expect published
        internimage evaluate --model runs/mine --data photos --batch-size 128 --json result.json
        torchrun --nproc-per-node gpu -m internimage evaluate --model runs/mine --data photos
        """,
        _check_evaluate,
    ),
    Verb(
        "predict",
        "Print the classes of images and their probabilities.",
        tables.PREDICT,
        """
        internimage predict photo.jpg --model internimage_tiny.ogvl_in1k
        internimage predict photos/ --model runs/mine --topk 3 --json
        internimage predict photo.jpg --model runs/mine --draw-points points.png
        """,
        _check_predict,
    ),
    Verb(
        "analyze",
        "Show what a model looks at: receptive field, sampling points, the region that decides.",
        tables.ANALYZE,
        """
        internimage analyze photo.jpg --model internimage_tiny.ogvl_in1k
        internimage analyze photo.jpg --model runs/mine --control --at 120,80 --layer 3
        internimage analyze photo.jpg --model runs/a --model runs/b --views erf,saliency --output ab --json
        """,
        _check_analyze,
    ),
    Verb(
        "finetune",
        "Train a classifier on a folder of images.",
        tables.FINETUNE,
        """
        internimage finetune configs/own_data.yaml data=photos output=runs/photos
        internimage finetune data=photos output=runs/photos model=internimage_small.ogvl_in1k epochs=20
        scripts/launch/train_one_machine.sh configs/own_data.yaml data=photos output=runs/photos
        """,
        _check_finetune,
    ),
    Verb(
        "convert",
        "Convert weights of any format to a folder for timm, transformers and the Hub.",
        tables.CONVERT,
        """
        internimage convert OpenGVLab/internimage_g_22kto1k_512 giant/ --dtype bf16
        internimage convert internimage_t_1k_224.pth tiny/ --verify
        internimage convert mine.pth mine/ --model internimage_atto --model-kwargs channels=16
        """,
        _check_convert,
    ),
    Verb(
        "export",
        "Write a model as a file for onnxruntime, TensorRT, OpenVINO, torch.export or AOTInductor.",
        tables.EXPORT,
        """
        internimage export --model internimage_tiny.ogvl_in1k --output tiny.onnx
        internimage export --model runs/mine --output mine-int8.onnx --quantize dynamic
        internimage export --model runs/mine --output mine.pt2 --decompose
        """,
        _check_export,
    ),
    Verb(
        "push",
        "Upload a folder written by convert to the Hub.",
        tables.PUSH,
        """
        internimage push tiny/ me/tiny --dry-run
        internimage push tiny/ me/tiny --private --message "First weights"
        """,
    ),
    Verb(
        "info",
        "Print versions, devices and the backend of each.",
        tables.INFO,
        """
        internimage info
        internimage info --json
        """,
    ),
)

BENCHMARKS = (
    Verb(
        "ops",
        "Time DCNv3 against the reference, torchvision and the official function.",
        benchmark_tables.OPS,
        """
        internimage benchmark ops
        internimage benchmark ops --official ../InternImage --rounds 21 --csv ops.csv
        """,
        _check_benchmark,
    ),
    Verb(
        "deform",
        "Time deformable convolution v2 and a ResNet-50 that has it against torchvision's operator.",
        benchmark_tables.DEFORM,
        """
        internimage benchmark deform --quick
        internimage benchmark deform --threads 1 --csv deform.csv
        """,
        _check_benchmark,
    ),
    Verb(
        "models",
        "Time models of this package against the official ones and timm models.",
        benchmark_tables.MODELS,
        """
        internimage benchmark models --quick
        internimage benchmark models --peers convnext_tiny --batches 1 16 --threads 1 --no-memory
        internimage benchmark models --models internimage_small --peers convnext_small
        """,
        _check_benchmark,
    ),
    Verb(
        "export",
        "Time exported models in their runtimes against eager torch and exported timm models.",
        benchmark_tables.EXPORT,
        """
        internimage benchmark export --quick
        internimage benchmark export --no-aoti --csv export.csv
        internimage benchmark export --models internimage_small --peers convnext_small --batches 1
        """,
        _check_benchmark,
    ),
)

_BENCHMARK_HELP = "Time the operator and the models on this CPU against other implementations."


def parser() -> Parser:
    """The parser of the command line. Its result has `verb`, and `check`, to be called before the verb runs."""
    top = Parser(
        prog="internimage",
        description="InternImage for PyTorch and timm: evaluate, predict, analyze, fine-tune, convert, publish.",
        epilog="internimage VERB --help describes a verb, with examples.",
    )
    top.add_argument("--version", action="version", version=f"internimage {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        if verb.name == "info":  # benchmark is listed before it
            benchmark = verbs.add_parser("benchmark", help=_BENCHMARK_HELP, description=_BENCHMARK_HELP)
            benchmarks = benchmark.add_subparsers(dest="what", metavar="WHAT", required=True)
            for what in BENCHMARKS:
                _add_verb(benchmarks, what)
        sub = _add_verb(verbs, verb)
        if verb.name == "finetune":
            sub.epilog = f"settings:\n{_describe_settings()}\n\n{sub.epilog}"
            sub.hint = _setting_hint
    return top


def _setting_hint(option: str) -> str:
    return f"settings are written {option.lstrip('-').partition('=')[0].replace('-', '_')}=VALUE"


def _add_verb(verbs: "argparse._SubParsersAction[Parser]", verb: Verb) -> Parser:
    sub = verbs.add_parser(
        verb.name, help=verb.help, description=verb.help, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(verb.examples).strip(), "  "),
    )  # fmt: skip
    add_options(sub, verb.options)
    sub.set_defaults(check=lambda arguments: verb.check(arguments, sub.prog))
    return sub


def _describe_settings() -> str:
    """The settings of `finetune` with meaning, range and default, for the help."""
    lines = []
    for field in settings_of(FinetuneConfig):
        text = field.metadata["help"]
        if isinstance(field.metadata["kind"], (Whole, Number)):
            words = field.metadata["kind"].words.removeprefix("a whole number ").removeprefix("a number ")
            text += f"; {words.removeprefix('of ')}"
        if field.default is dataclasses.MISSING:
            text += "; required"
        else:
            text += f"; default {json.dumps(field.default).strip(chr(34))}"  # null and true as in YAML
        lines += textwrap.wrap(f"{field.name:<20}{text}", 118, initial_indent="  ", subsequent_indent=" " * 22)
    return "\n".join(lines)
