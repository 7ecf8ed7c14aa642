# SPDX-License-Identifier: MIT
"""What each verb takes: its options with their types and ranges, and which have no effect without or with others."""

from ..benchmark import MODEL_PEERS, OPS_PEERS
from ..data.variants import VARIANTS
from ..dtypes import DTYPE
from ..values import Choice, Number, Text, Whole
from .options import Group, KeyValue, OneOf, Option, OutputFile, PictureFile, Size

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
            Option(
                "--csv", "write the result as a CSV row; - is standard output", OutputFile(stdout=True), metavar="FILE"
            ),
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
