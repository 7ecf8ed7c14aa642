# SPDX-License-Identifier: MIT
"""The options of each verb, with their types and ranges, and which have no effect with or without others.

Those of benchmarks are in `benchmark_tables.py`.
"""

import dataclasses

from ..data.variants import VARIANTS
from ..dtypes import DTYPE, FILE_DTYPE
from ..values import Choice, Number, Text, Whole
from .options import Group, KeyValue, Option, OutputFile, PictureFile, Pixel, Sides, Size, WordOr, Words

_BATCH, _WORKERS, _PIXELS, _CLASSES = Whole(1), Whole(0, 1024), Whole(1, 16384), Whole(1, 10**7)
_HUB_NAME = Text(r"[\w.-]+/[\w.-]+", "OWNER/NAME")

MODEL = Group(
    "model",
    (
        Option(
            "--model",
            "internimage_SIZE[.TAG], any timm model, hf-hub:OWNER/NAME, or a folder written by finetune",
            Text(),
            metavar="NAME",
            required=True,
        ),
        Option("--checkpoint", "file or folder of weights to load into the model", Text(), metavar="PATH"),
        Option("--use-ema", "use the averaged (EMA) weights of a checkpoint that has both"),
        Option("--num-classes", "number of classes; overrides that of the weights", _CLASSES),
        Option("--img-size", "image size; overrides the model's", _PIXELS, metavar="PIXELS"),
        Option(
            "--crop-pct",
            "center crop as a fraction of the resized image; overrides the model's",
            Number(above=0, at_most=1),
            metavar="FRACTION",
        ),
        Option(
            "--device",
            "cpu, cuda, cuda:1, mps, ...; auto takes an accelerator if there is one",
            Text(r"[a-z]+(:[0-9]{1,4})?", "a device such as auto, cpu, cuda or cuda:1"),
            default="auto",
            metavar="DEVICE",
        ),
        Option("--dtype", "dtype of the model, also as fp32, bf16 or fp16", DTYPE, default="float32"),
    ),
)

EVALUATE = (
    MODEL,
    Group(
        "data",
        (
            Option(
                "--data",
                "class folders, a tar file, or the root of a dataset",
                Text(),
                metavar="PATH",
                required=True,
            ),
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
                "the classes of the model, one per line, for data without some of them",
                Text(),
                metavar="FILE",
                excludes=("--labels",),
            ),
            Option(
                "--labels",
                "labels of a folder without class folders, in lines of 'FILE LABEL'",
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
                "real.json of ReaL, instead of timm's copy",
                Text(),
                metavar="FILE",
                requires={"--variant": "real"},
            ),
            Option("--flip", "average predictions over each image and its mirror image"),
            Option("--batch-size", "images per step and process", _BATCH, default=64),
            Option("--workers", "data loader processes; 0 loads in the main process", _WORKERS, default=2),
        ),
    ),
    Group(
        "report",
        (
            Option("--json", "write the result as JSON; - is standard output", OutputFile(stdout=True), metavar="FILE"),
            Option(
                "--csv", "write the result as a CSV row; - is standard output", OutputFile(stdout=True), metavar="FILE"
            ),
            Option("--per-class", "report the accuracy of every class"),
            Option(
                "--expect",
                "exit with 1 unless top-1 is within 0.1 of a number, or of the published one for these weights",
                WordOr("published", Number(at_least=0, at_most=100)),
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
            Option("--topk", "number of classes to print", Whole(1), default=5, metavar="K"),
            Option("--json", "print one JSON object per line"),
            Option(
                "--draw-points",
                "draw the sampling points of a DCNv3 layer on the images (the first 16)",
                PictureFile(),
                metavar="PICTURE",
            ),
            Option(
                "--draw-layer",
                "name of the layer; by default the last one of stage 3",
                Text(),
                metavar="NAME",
                requires={"--draw-points": None},
            ),
        ),
    ),
)

_FORMATS = ("onnx", "pt2", "aoti")  # of `internimage.export`, which imports torch
_VIEWS = ("erf", "points", "saliency")  # of `internimage.analysis.study`, which imports torch

ANALYZE = (
    Option("image", "image file", Text(), metavar="IMAGE"),
    Group(
        "model",
        (
            dataclasses.replace(
                MODEL.options[0], help=f"{MODEL.options[0].help}; given twice, side by side", repeated=True
            ),
            *MODEL.options[1:],
            Option("--control", "show beside each model the same one untrained, without which no view is evidence"),
        ),
    ),
    Group(
        "what to look at",
        (
            Option(
                "--at",
                "pixel of the image to explain a position of the map at; may be repeated (default: the middle)",
                Pixel(),
                default=(),
                metavar="X,Y",
                repeated=True,
            ),
            Option(
                "--layer",
                "map of the positions: name of a layer, or number of a stage; once, or for each model "
                "(default: the last stage)",
                Text(),
                default=(),
                metavar="NAME",
                repeated=True,
            ),
            Option(
                "--class", "class to explain, by name or index (default: the predicted one)", Text(), metavar="NAME"
            ),
            Option(
                "--views",
                "erf: effective receptive field; points: effective sampling points; saliency: smallest region "
                "(default: all that the models have)",
                Words(_VIEWS),
                metavar="erf,points,saliency",
            ),
            Option("--plain", "take plain 3x3 convolutions for the view of points too"),
        ),
    ),
    Group(
        "how",
        (
            Option(
                "--projections",
                "random projections of a position's vector, or exact",
                WordOr("exact", Whole(1, 4096)),
                default=8,
                metavar="N",
            ),
            Option("--bound", "error of the saliency region", Number(above=0, below=1), default=0.1),
            Option("--cell", "side of its cells in pixels", Whole(1, 16384), default=16, metavar="PIXELS"),
            Option(
                "--fill",
                "what stands in the masked part: median, blur, zero, or an image file",
                Text(),
                default="median",
                metavar="FILL",
            ),
            Option("--budget", "images that may be evaluated for a saliency region", Whole(3, 10**7), default=1000),
            Option("--seed", "of the projections, and of the untrained model", Whole(0, 2**63 - 1), default=0),
        ),
    ),
    Group(
        "report",
        (
            Option("--output", "folder to write", Text(), default="analysis", metavar="FOLDER"),
            Option("--json", "print the numbers as JSON"),
        ),
    ),
)

FINETUNE = (
    Option(
        "settings",
        "a recipe and settings, which override it, in any order",
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
    Option("destination", "folder to create", Text(), metavar="DST"),
    Option("--dtype", "dtype of the result, also as fp32, bf16 or fp16; by default each tensor keeps its own", DTYPE),
    Option(
        "--shard-size",
        "largest weights file; larger weights are split into shards",
        Size(),
        default="5GB",
        metavar="SIZE",
    ),
    Option("--verify", "read the result back and compare every tensor"),
    Option("--head", "keep the ImageNet-1k classes of an ImageNet-22k classifier", Choice(("22k-to-1k",))),
    Option("--use-ema", "use the averaged (EMA) weights of a source that has both"),
    Option("--overwrite", "replace a folder that contains a model"),
    Group(
        "model, if it cannot be detected from the weights",
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

_BY_NAME = {option.name: option for option in MODEL.options}

EXPORT = (
    Group(
        "model",
        tuple(
            _BY_NAME[name]
            for name in (
                "--model",
                "--checkpoint",
                "--use-ema",
                "--num-classes",
                "--img-size",
                "--crop-pct",
                "--device",
            )
        ),
    ),
    Group(
        "file",
        (
            Option("--output", "file to write: .onnx, or .pt2", Text(), metavar="FILE", required=True),
            Option("--format", "by default that of the suffix; aoti is an AOTInductor package", Choice(_FORMATS)),
            Option(
                "--size", "image size to trace at, and of a static file (default: the model's)", Sides(), metavar="HxW"
            ),
            Option("--static", "fix batch (1), height and width, which are open otherwise"),
            Option("--dtype", "dtype of the weights, also as fp32 or fp16", FILE_DTYPE, default="float32"),
            Option("--features", "export the maps of the stages instead of the logits"),
            Option("--overwrite", "replace a file that is there"),
            Option("--no-verify", "do not read the file back and compare it"),
        ),
    ),
    Group(
        "ONNX",
        (
            Option(
                "--operator",
                "how deformable layers are written (default: deform-conv); grid-sample is for TensorRT and OpenVINO",
                Choice(("deform-conv", "grid-sample")),
            ),
            Option("--opset", "opset (default: 20; 18 of grid-sample)", Whole(7, 99)),
            Option("--external-data", "write the weights to a file beside it; always beyond 2 GB"),
            Option("--quantize", "int8: dynamic needs no images", Choice(("dynamic", "static"))),
            Option(
                "--calibrate",
                "folder of images to calibrate with",
                Text(),
                metavar="FOLDER",
                requires={"--quantize": None},
            ),
            Option("--images", "how many of them", Whole(2), default=128, requires={"--calibrate": None}),
            Option("--with-preprocess", "images as bytes in, probabilities out", excludes=("--features", "--size")),
        ),
    ),
    Group(
        "pt2 and aoti",
        (Option("--decompose", "write our operators in plain torch, so that it runs without internimage"),),
    ),
)

PUSH = (
    Option("folder", "folder with model.safetensors or shards, config.json and README.md", Text(), metavar="FOLDER"),
    Option("repository", "repository on the Hub, created if it does not exist", _HUB_NAME, metavar="OWNER/NAME"),
    Option("--revision", "branch to commit to, instead of the main one", Text(), metavar="BRANCH"),
    Option("--private", "create a new repository as private"),
    Option("--message", "commit message", Text(), default="", metavar="TEXT"),
    Option("--dry-run", "print what would be uploaded, and upload nothing"),
)

INFO = (Option("--json", "print JSON"),)
