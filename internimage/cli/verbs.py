# SPDX-License-Identifier: MIT
"""The verbs of the command line: what each takes, what it says about itself, and what cannot be asked for together.

What a verb does is in the module of its name, which is imported once the arguments are known to be right.
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
from ..benchmark import MODEL_PEERS, OPS_PEERS
from ..config import load_config, split_arguments
from ..dtypes import DTYPE
from ..settings import FinetuneConfig
from ..values import Choice, Number, Text, Whole
from ..variants import VARIANTS
from .options import Group, KeyValue, OneOf, Option, OutputFile, Parser, PictureFile, Size, UsageError, add_options

_BATCH, _WORKERS, _PIXELS, _CLASSES = Whole(1), Whole(0, 1024), Whole(1, 16384), Whole(1, 10**7)
_HUB_NAME = Text(r"[\w.-]+/[\w.-]+", "OWNER/NAME")

MODEL = Group(
    "model",
    (
        Option(
            "--model",
            "internimage_SIZE[.TAG], any timm name, hf-hub:OWNER/NAME, or a folder that finetune has written",
            Text(),
            metavar="NAME",
            required=True,
        ),
        Option("--checkpoint", "file or folder of weights to load into the model", Text(), metavar="PATH"),
        Option("--use-ema", "take the averaged (EMA) weights of a checkpoint that has both"),
        Option("--num-classes", "number of classes, instead of the weights' own", _CLASSES),
        Option("--img-size", "image side, instead of the model's own", _PIXELS, metavar="PIXELS"),
        Option(
            "--crop-pct",
            "share of the resized image's side that the center crop keeps, instead of the model's own",
            Number(above=0, most=1),
            metavar="SHARE",
        ),
        Option(
            "--device",
            "cpu, cuda, cuda:1, mps, ...; auto takes an accelerator if there is one",
            Text(r"[a-z]+(:[0-9]{1,4})?", "a device such as auto, cpu, cuda or cuda:1"),
            default="auto",
            metavar="DEVICE",
        ),
        Option("--dtype", "what the model runs in; fp32, bf16 and fp16 for short", DTYPE, default="float32"),
    ),
)

EVALUATE = (
    MODEL,
    Group(
        "data",
        (
            Option("--data", "class folders, a tar, or a dataset's root", Text(), metavar="PATH", required=True),
            Option(
                "--dataset",
                "timm's name of a dataset, such as hfds/OWNER/NAME",
                Text(),
                default="",
                metavar="NAME",
                excludes=("--labels",),
            ),
            Option(
                "--split",
                "split to evaluate, if the data has several",
                Text(),
                default="validation",
                metavar="NAME",
                excludes=("--labels",),
            ),
            Option(
                "--class-map",
                "the model's classes, one per line, for data that lacks some of them",
                Text(),
                metavar="FILE",
                excludes=("--labels",),
            ),
            Option(
                "--labels",
                "labels of a folder without class folders: lines of 'FILE LABEL'",
                Text(),
                metavar="FILE",
            ),
            Option(
                "--variant",
                "; ".join(f"{name}: {what}" for name, what in VARIANTS.items()),
                Choice(tuple(VARIANTS)),
            ),
            Option(
                "--real-labels",
                "ReaL's real.json, instead of timm's copy",
                Text(),
                metavar="FILE",
                requires={"--variant": "real"},
            ),
            Option("--flip", "average over each image and its mirror image"),
            Option("--batch-size", "images per step of each process", _BATCH, default=64),
            Option("--workers", "loader processes; 0 loads in the process itself", _WORKERS, default=2),
        ),
    ),
    Group(
        "report",
        (
            Option("--json", "write the result as JSON; - is standard output", OutputFile(stdout=True), metavar="FILE"),
            Option("--csv", "write the result as a CSV row", OutputFile(), metavar="FILE"),
            Option("--per-class", "report every class"),
            Option(
                "--expect",
                "exit with 1 if top-1 is more than 0.1 from what was published for these weights, or from a number",
                OneOf("published", Number(least=0, most=100)),
                metavar="published | TOP1",
            ),
            Option("--strict", "exit with 1 if an image could not be read"),
        ),
    ),
)

PREDICT = (
    Option("images", "image files, folders, or - for an image on standard input", Text(), metavar="IMAGE", nargs="+"),
    MODEL,
    Group(
        "report",
        (
            Option("--topk", "how many classes to print", Whole(1), default=5, metavar="K"),
            Option("--json", "print one JSON object per line"),
            Option(
                "--draw-points",
                "draw where a DCNv3 layer samples the images (the first 16)",
                PictureFile(),
                metavar="PICTURE",
            ),
            Option(
                "--draw-layer",
                "which layer; the last one of stage 3 if not given",
                Text(),
                metavar="NAME",
                requires={"--draw-points": None},
            ),
        ),
    ),
)

FINETUNE = (
    Option(
        "settings",
        "a recipe and settings in any order; a setting overrides the recipe's",
        Text(),
        metavar="RECIPE.yaml | KEY=VALUE",
        nargs="+",
    ),
)

CONVERT = (
    Option(
        "source",
        "file or folder, internimage_SIZE.TAG, or OWNER/NAME[@REVISION][/FILE] of the Hub",
        Text(),
        metavar="SRC",
    ),
    Option("destination", "folder to make", Text(), metavar="DST"),
    Option(
        "--dtype", "convert the weights to this type (fp32, bf16, fp16 for short); without it each keeps its own", DTYPE
    ),
    Option(
        "--shard-size",
        "largest file of weights; what is larger is split into shards",
        Size(),
        default="5GB",
        metavar="SIZE",
    ),
    Option("--verify", "read the result again and compare every tensor"),
    Option("--head", "keep ImageNet-1k's rows of an ImageNet-22k classifier", Choice(("22k-to-1k",))),
    Option("--use-ema", "take the averaged (EMA) weights of a source that has both"),
    Option("--overwrite", "replace a folder that holds a model"),
    Group(
        "model, where the weights do not tell",
        (
            Option("--model", "internimage_SIZE[.TAG]", Text(), metavar="NAME"),
            Option(
                "--model-kwargs",
                "arguments of the model, such as channels=16",
                KeyValue({"in_chans": Whole(1), "num_classes": Whole(0, 10**7)}),
                default=(),
                metavar="KEY=VALUE",
                nargs="+",
            ),
        ),
    ),
)

PUSH = (
    Option("folder", "folder with model.safetensors or shards, config.json and README.md", Text(), metavar="FOLDER"),
    Option("repository", "repository on the Hub; it is made if there is none", _HUB_NAME, metavar="OWNER/NAME"),
    Option("--revision", "branch to commit to, instead of the main one", Text(), metavar="BRANCH"),
    Option("--private", "make a new repository private"),
    Option("--message", "commit message", Text(), default="", metavar="TEXT"),
    Option("--dry-run", "print what would be uploaded, and upload nothing"),
)

_QUICK = Option("--quick", "one round of little work: whether it runs, not how fast it is")


def _common(rounds: int) -> tuple[Option, ...]:
    return (
        Option("--official", "your checkout of OpenGVLab/InternImage, for its code as a peer", Text(), metavar="PATH"),
        Option("--rounds", "timed calls of each", Whole(1), default=rounds, excludes=("--quick",)),
        Option("--wall-threads", "threads of the wall times; 0 leaves them out", Whole(0, 1024), default=2),
        Option("--csv", "append the rows to this file", OutputFile(), metavar="FILE"),
        _QUICK,
    )


BENCHMARK_OPS = (
    *_common(rounds=9),
    Option("--batch", "images per call", _BATCH, default=8, excludes=("--quick",)),
    Option("--peers", "those to time", Choice(OPS_PEERS), default=OPS_PEERS, nargs="*"),
)

BENCHMARK_MODELS = (
    *_common(rounds=7),
    Option(
        "--batches",
        "images per call of inference, one or more numbers",
        _BATCH,
        default=(8, 1),
        nargs="+",
        excludes=("--quick",),
    ),
    Option("--training-batch", "images per training step; 0 leaves training out", Whole(0), default=4),
    Option("--img-size", "image side", Whole(32, 16384), default=224, metavar="PIXELS", excludes=("--quick",)),
    Option("--peers", "official, and names of timm models", Text(), default=MODEL_PEERS, metavar="NAME", nargs="*"),
    Option("--no-memory", "do not measure peak memory"),
)

INFO = (Option("--json", "print JSON"),)


# ---- what cannot be asked for together, beyond the table


def _check_model(arguments: argparse.Namespace, prog: str) -> None:
    named = ":" not in arguments.model and not Path(arguments.model).is_dir()
    if arguments.use_ema and arguments.checkpoint is None and named:
        raise UsageError("--use-ema has no effect without --checkpoint: the weights of a name are of one kind", prog)


def _check_evaluate(arguments: argparse.Namespace, prog: str) -> None:
    _check_model(arguments, prog)
    other = arguments.variant not in (None, "imagenet", "real")
    if arguments.expect == "published" and (arguments.checkpoint or arguments.num_classes or other):
        raise UsageError(
            f"no top-1 on ImageNet-1k was published for '{arguments.model}' as it is asked for here: --expect "
            f"published takes released weights, without --checkpoint, --num-classes or another dataset",
            prog,
        )
    if arguments.json and arguments.csv and _same(arguments.json, arguments.csv):
        raise UsageError(f"--json and --csv are one file, '{arguments.csv}': name two", prog)
    for option, read in (("--labels", arguments.labels), ("--class-map", arguments.class_map)):
        for written in (arguments.json, arguments.csv):
            if read and written and _same(read, written):
                raise UsageError(f"'{written}' is read as {option}, and the report would replace it", prog)


def _check_predict(arguments: argparse.Namespace, prog: str) -> None:
    _check_model(arguments, prog)
    if arguments.draw_points:
        for image in arguments.images:
            if image != "-" and _same(image, arguments.draw_points):
                raise UsageError(f"--draw-points would replace the image '{image}': name another file", prog)


def _same(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them is not there yet
        return os.path.realpath(a) == os.path.realpath(b)


def _check_finetune(arguments: argparse.Namespace, prog: str) -> None:
    recipe, overrides = split_arguments(arguments.settings)
    arguments.config = load_config(FinetuneConfig, recipe, overrides)


def _check_convert(arguments: argparse.Namespace, prog: str) -> None:
    keys = [key for key, _ in arguments.model_kwargs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise UsageError(f"--model-kwargs has '{min(twice)}' twice", prog)
    if arguments.head and "num_classes" in keys:
        raise UsageError(f"num_classes has no effect with --head {arguments.head}: leave one of them out", prog)
    arguments.model_kwargs = dict(arguments.model_kwargs)


def _check_benchmark(arguments: argparse.Namespace, prog: str) -> None:
    wanted = "official" in arguments.peers
    if arguments.official is not None and not wanted:
        raise UsageError("--official has no effect if --peers leaves 'official' out", prog)


def _no_check(arguments: argparse.Namespace, prog: str) -> None:
    pass


# ---- verbs


@dataclass(frozen=True)
class Verb:
    """A verb: its name, what it is for, its options, examples, and a check of what was given together."""

    name: str
    help: str
    options: tuple[Option | Group, ...]
    examples: str
    check: Callable[[argparse.Namespace, str], None] = _no_check


VERBS = (
    Verb(
        "evaluate",
        "Measure top-1, top-5 and loss of a model on a dataset.",
        EVALUATE,
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
        PREDICT,
        """
        internimage predict photo.jpg --model internimage_tiny.ogvl_in1k
        internimage predict photos/ --model runs/mine --topk 3 --json
        internimage predict photo.jpg --model runs/mine --draw-points points.png
        """,
        _check_predict,
    ),
    Verb(
        "finetune",
        "Train a classifier on a folder of images.",
        FINETUNE,
        """
        internimage finetune configs/own_data.yaml data=photos output=runs/photos
        internimage finetune data=photos output=runs/photos model=internimage_small.ogvl_in1k epochs=20
        scripts/train_one_machine.sh configs/own_data.yaml data=photos output=runs/photos
        """,
        _check_finetune,
    ),
    Verb(
        "convert",
        "Convert weights in any format to a folder that timm, transformers and the Hub take.",
        CONVERT,
        """
        internimage convert OpenGVLab/internimage_g_22kto1k_512 giant/ --dtype bf16
        internimage convert internimage_t_1k_224.pth tiny/ --verify
        internimage convert mine.pth mine/ --model internimage_atto --model-kwargs channels=16
        """,
        _check_convert,
    ),
    Verb(
        "push",
        "Upload a folder that convert has written to the Hub.",
        PUSH,
        """
        internimage push tiny/ me/tiny --dry-run
        internimage push tiny/ me/tiny --private --message "First weights"
        """,
    ),
    Verb(
        "info",
        "Print versions, devices, and which backend serves each.",
        INFO,
        """
        internimage info
        internimage info --json
        """,
    ),
)

BENCHMARKS = (
    Verb(
        "ops",
        "Time DCNv3 beside our reference, torchvision and the official function.",
        BENCHMARK_OPS,
        """
        internimage benchmark ops
        internimage benchmark ops --official ../InternImage --rounds 21 --csv ops.csv
        """,
        _check_benchmark,
    ),
    Verb(
        "models",
        "Time InternImage-T beside the official model and models of timm.",
        BENCHMARK_MODELS,
        """
        internimage benchmark models --quick
        internimage benchmark models --peers convnext_tiny --batches 1 16 --no-memory
        """,
        _check_benchmark,
    ),
)

_BENCHMARK_HELP = "Time the operator and InternImage-T on this CPU, beside their peers."


def parser() -> Parser:
    """The whole command line's parser. What it returns has `verb`, and `check`, to be called before the verb runs."""
    top = Parser(
        prog="internimage",
        description="InternImage for PyTorch and timm: evaluate, predict, fine-tune, convert, publish.",
        epilog="internimage VERB --help describes a verb, with examples.",
    )
    top.add_argument("--version", action="version", version=f"internimage {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        if verb.name == "info":  # benchmark stands before it
            benchmark = verbs.add_parser("benchmark", help=_BENCHMARK_HELP, description=_BENCHMARK_HELP)
            whats = benchmark.add_subparsers(dest="what", metavar="WHAT", required=True)
            for what in BENCHMARKS:
                _add_verb(whats, what)
        sub = _add_verb(verbs, verb)
        if verb.name == "finetune":
            sub.epilog = f"settings:\n{_describe_settings()}\n\n{sub.epilog}"
            sub.hint = _as_setting
    return top


def _as_setting(option: str) -> str:
    return f"settings are written {option.lstrip('-').partition('=')[0].replace('-', '_')}=VALUE"


def _add_verb(verbs: argparse._SubParsersAction, verb: Verb) -> Parser:
    sub = verbs.add_parser(
        verb.name, help=verb.help, description=verb.help, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(verb.examples).strip(), "  "),
    )  # fmt: skip
    add_options(sub, verb.options)
    sub.set_defaults(check=lambda arguments: verb.check(arguments, sub.prog))
    return sub


def _describe_settings() -> str:
    """A line or more for each setting: what it is for, what it may be, and its default."""
    lines = []
    for field in dataclasses.fields(FinetuneConfig):
        text = field.metadata["help"]
        if isinstance(field.metadata["kind"], (Whole, Number)):
            words = field.metadata["kind"].words.removeprefix("a whole number ").removeprefix("a number ")
            text += f"; {words.removeprefix('of ')}"
        if field.default is dataclasses.MISSING:
            text += "; required"
        else:
            text += f"; default {json.dumps(field.default).strip(chr(34))}"  # as YAML has it: null, true
        lines += textwrap.wrap(f"{field.name:<20}{text}", 118, initial_indent="  ", subsequent_indent=" " * 22)
    return "\n".join(lines)
