# SPDX-License-Identifier: MIT
"""timm's config.json of a model folder: read in one place, and checked before anything is built from it.

The file may come from anywhere, and timm does not check it: a wrong value would surface as an exception somewhere, or,
such as a mean of NaN, as a wrong result.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr  # shortens, so that a message stays on one line whatever the file contains
from typing import Any

import timm
from timm.data.transforms import str_to_interp_mode
from timm.models import PretrainedCfg

from .. import strict_json
from ..errors import CheckpointError
from ..weights.file_names import CONFIG
from .arguments import MOST_CLASSES, check_whole_number, is_number
from .families import family_of, is_ours

LARGEST_SIDE = 16384  # of an image; one of this size takes 3 GB as float32
_MOST_CHANNELS = 65536
_MOST_BLOCKS = 1000
# limits of the file: beyond, reading would take more than a second or a gigabyte
_LARGEST_FILE = 16 * 2**20  # a million classes with names of ten letters
_MOST_CONTAINERS = 10**6  # lists and objects: each takes 60 bytes, and two in the file
_DEEPEST = 32
_LONG_NUMBER = re.compile(rb"[0-9]{400}")  # more than the largest float has; Python's limit is 4300

# arguments of `timm.create_model` that are not about the model, but about its weights and their place
NOT_OF_A_MODEL = (
    "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path",
    "cache_dir", "scriptable", "exportable", "no_jit", "device", "dtype", "file", "url", "state_dict",
)  # fmt: skip


class ModelConfigError(CheckpointError, ValueError):
    """A config.json that cannot be used; the message says which value is wrong."""


@dataclass(frozen=True)
class ModelConfig:
    """The content of a config.json."""

    architecture: str  # timm's name, without a tag
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]  # with the number and names of classes, which the file has beside it

    @property
    def ours(self) -> bool:
        """Whether it is a model of this package."""
        return is_ours(self.architecture)


def find_model_config(folder: Path) -> ModelConfig | None:
    """The config.json of a folder; None without one, or if it is that of transformers, which has no architecture.

    Raises:
        ModelConfigError: It cannot be read, or a value is wrong.
    """
    path = Path(folder) / CONFIG
    if not path.exists():
        return None
    content = _read_object(path)
    return _checked(path, content) if "architecture" in content else None


def check_given(architecture: str, cfg: Any, model_args: Any) -> None:
    """Check what timm itself has read from a config.json and passes to the function that builds one of our models.

    Args:
        architecture: Of this package.
        cfg: timm's pretrained cfg; checked if it is a dict.
        model_args: Of the file; empty without one.

    Raises:
        ModelConfigError: A value is wrong.
    """
    cfg = cfg if isinstance(cfg, dict) else {}
    try:
        check_model_args(architecture, model_args)
        if not isinstance(cfg.get("state_dict", {}), (Mapping, type(None))):
            raise ValueError(f"state_dict must hold weights, got {repr(cfg['state_dict'])}")
        check_cfg(architecture, cfg)
    except ValueError as error:
        source = cfg.get("file") or cfg.get("hf_hub_id")
        what = f"the {CONFIG} of '{source}'" if isinstance(source, str) else "the pretrained_cfg"
        raise ModelConfigError(f"{what} cannot be used: {error}") from error


def read_model_config(folder: str | Path) -> ModelConfig:
    """The config.json of a model folder, after a check of every value that timm or this package uses.

    Args:
        folder: Written by `finetune`, `convert` or timm.

    Raises:
        ModelConfigError: There is none, it cannot be read, or a value is wrong; the message, one line, names it.
    """
    path = Path(folder).expanduser() / CONFIG
    content = _read_object(path)
    if "architecture" not in content:
        kind = "transformers' kind" if "model_type" in content or "architectures" in content else "another kind"
        raise ModelConfigError(
            f"'{path}' is not timm's: it has no 'architecture' (it is of {kind}). `internimage convert` makes a folder "
            f"that has it; released weights load by their names, such as internimage_tiny.ogvl_in1k"
        )
    return _checked(path, content)


def _checked(path: Path, content: dict[str, Any]) -> ModelConfig:
    try:
        return _check(content)
    except ValueError as error:
        raise ModelConfigError(f"'{path}' cannot be used: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = strict_json.read_bytes(path, _LARGEST_FILE)
    except FileNotFoundError as error:
        raise ModelConfigError(f"the folder '{path.parent}' has no {CONFIG}, so it holds no model") from error
    except OSError as error:
        raise ModelConfigError(f"'{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelConfigError(f"'{path}' is not a model's configuration: {error}") from error
    if data.startswith(b"\xef\xbb\xbf"):  # timm and transformers cannot read it either
        raise ModelConfigError(f"'{path}' is not JSON: it begins with a byte order mark; save it as UTF-8 without one")
    if data.count(b"[") + data.count(b"{") > _MOST_CONTAINERS:
        raise ModelConfigError(f"'{path}' has too many lists and objects for a model's configuration")
    if _LONG_NUMBER.search(data):
        raise ModelConfigError(f"'{path}' is not a model's configuration: it has a number of 400 digits or more")
    try:
        content = strict_json.parse(data)
    except ValueError as error:
        raise ModelConfigError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelConfigError(f"'{path}' must hold a JSON object, got a {type(content).__name__}")
    if _is_deep(content):  # copying it, as timm does, recurses
        raise ModelConfigError(f"'{path}' is not a model's configuration: it is nested too deeply")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_DEEPEST):
        parts = (value.values() if isinstance(value, dict) else value for value in level)
        level = [part for values in parts for part in values if isinstance(part, (dict, list))]
        if not level:
            return False
    return True


# ---- values


def _check(content: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for a value that cannot be used."""
    architecture = content["architecture"]
    if not isinstance(architecture, str):
        raise ValueError(f"architecture must be a model's name, got {repr(architecture)}")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"neither this package nor timm has an architecture {repr(architecture)}{hint}")
    architecture = architecture.partition(".")[0]
    model_args = content.get("model_args", {})
    check_model_args(architecture, model_args)
    if "pretrained_cfg" in content:
        cfg = content["pretrained_cfg"]
    else:  # as older versions of timm wrote it: everything in one object
        cfg = {key: value for key, value in content.items() if key not in ("architecture", "num_features", "labels")}
        if "labels" in content:
            cfg["label_names"] = content["labels"]
    if not isinstance(cfg, dict):
        raise ValueError(f"pretrained_cfg must be an object, got {repr(cfg)}")
    if "state_dict" in cfg:
        raise ValueError("pretrained_cfg holds a state_dict; weights belong in a file beside it")
    cfg = dict(cfg)
    for key in ("num_classes", "label_names", "label_descriptions"):
        if key in content:
            cfg[key] = content[key]
    check_cfg(architecture, cfg)
    return ModelConfig(architecture, model_args, cfg)


def check_model_args(architecture: str, model_args: Any) -> None:
    """Check a model's arguments from a config.json; raises ValueError, which names the first wrong one."""
    if not isinstance(model_args, dict):
        raise ValueError(f"model_args must be an object, got {repr(model_args)}")
    family = family_of(architecture)
    known = () if family is None else family.arguments
    for key, value in model_args.items():
        if key in NOT_OF_A_MODEL:
            raise ValueError(f"model_args has '{key}', which is no argument of a model")
        if family is not None and key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"model_args has {repr(key)}, which {family.name} does not take{hint}")
        blocks = "depth" in key or "layers" in key
        for number in _numbers(value):
            if not -math.inf < number <= (_MOST_BLOCKS if blocks else MOST_CLASSES):  # 1e999 is infinite in JSON
                raise ValueError(f"{repr(key)} of model_args is too large: {repr(value)}")
    if family is not None:
        _check_our_options(model_args)
    if "num_classes" in model_args:
        check_whole_number("num_classes of model_args", model_args["num_classes"], 0, MOST_CLASSES)
    if model_args.get("in_chans") is not None:
        check_whole_number("in_chans of model_args", model_args["in_chans"], 1, _MOST_CHANNELS)
    size = model_args.get("img_size")
    for side in size if isinstance(size, list) and len(size) == 2 else [size]:
        if side is not None:
            check_whole_number("img_size of model_args", side, 1, LARGEST_SIDE)


def _check_our_options(model_args: dict[str, Any]) -> None:
    if model_args.get("use_ema") not in (None, True, False):
        raise ValueError(f"use_ema of model_args must be true or false, got {repr(model_args['use_ema'])}")
    head = model_args.get("head_from_22k", False)
    if not isinstance(head, bool) and not (isinstance(head, list) and all(isinstance(name, str) for name in head)):
        raise ValueError(f"head_from_22k of model_args must be true, false or a list of synsets, got {repr(head)}")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, (list, dict)):
            left += part.values() if isinstance(part, dict) else part
        elif isinstance(part, (int, float)):
            yield part


# fields of timm's pretrained cfg that are strings; some may also be a list of strings
_TEXTS = ("file", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "license", "description",
          "origin_url", "paper_name")  # fmt: skip
_TEXTS_OR_LISTS = ("url", "first_conv", "classifier", "paper_ids", "notes")


def check_cfg(architecture: str, cfg: dict[str, Any]) -> None:
    """Check timm's pretrained cfg from a config.json; raises ValueError, which names the first wrong value."""
    fields = {field.name: field.default for field in dataclasses.fields(PretrainedCfg)}
    unknown = [key for key in cfg if key not in fields]
    if unknown:
        raise ValueError(f"pretrained_cfg has {repr(unknown[0])}, which timm {timm.__version__} does not know")
    missing = [key for key, value in cfg.items() if value is None and fields[key] is not None]
    if missing:
        raise ValueError(f"{missing[0]} must not be null; omit it")
    cfg = {key: value for key, value in cfg.items() if value is not None}
    classes = cfg.get("num_classes")
    if classes is not None:
        check_whole_number("num_classes", classes, 0, MOST_CLASSES)
    for key in ("input_size", "test_input_size", "min_input_size"):
        if key in cfg:
            _check_input_size(key, cfg[key])
    channels = cfg["input_size"][0] if "input_size" in cfg else 3
    for key in ("mean", "std"):
        if key in cfg:
            _check_per_channel(key, cfg[key], channels)
    for key in ("crop_pct", "test_crop_pct"):
        if key in cfg and not (is_number(cfg[key]) and 0 < cfg[key] <= 2):
            raise ValueError(f"{key} must be a number above 0, at most 2, got {repr(cfg[key])}")
    if "interpolation" in cfg and cfg["interpolation"] != "random":
        try:
            str_to_interp_mode(cfg["interpolation"])
        except (KeyError, TypeError):
            raise ValueError(f"interpolation must be such as 'bicubic', got {repr(cfg['interpolation'])}") from None
    if cfg.get("crop_mode", "center") not in ("center", "squash", "border"):
        raise ValueError(f"crop_mode must be center, squash or border, got {repr(cfg['crop_mode'])}")
    for key in (*_TEXTS, *_TEXTS_OR_LISTS):
        texts = cfg.get(key, "")
        listed = key in _TEXTS_OR_LISTS and isinstance(texts, (list, tuple))
        if not all(isinstance(text, str) for text in (texts if listed else [texts])):
            what = "a layer's name" if key in ("first_conv", "classifier") else "text"
            raise ValueError(f"{key} must be {what}, got {repr(texts)}")
    if not isinstance(cfg.get("custom_load", False), (bool, str)):
        raise ValueError(f"custom_load must be true, false or text, got {repr(cfg['custom_load'])}")
    if not isinstance(cfg.get("fixed_input_size", False), bool):
        raise ValueError(f"fixed_input_size must be true or false, got {repr(cfg['fixed_input_size'])}")
    family = family_of(architecture)
    if cfg.get("fixed_input_size") and family is not None:  # timm would give them an img_size
        raise ValueError(f"fixed_input_size must be false: {family.name} takes images of any size")
    if "label_offset" in cfg:
        check_whole_number("label_offset", cfg["label_offset"], 0, MOST_CLASSES)
    for key in ("pool_size", "test_pool_size"):
        sides = cfg.get(key, [1, 1])
        if not isinstance(sides, (list, tuple)) or len(sides) != 2:
            raise ValueError(f"{key} must be [height, width], got {repr(sides)}")
        for side in sides:
            check_whole_number(f"height and width of {key}", side, 1, LARGEST_SIDE)
    _check_labels(cfg, classes)


def _check_input_size(key: str, size: Any) -> None:
    if not isinstance(size, (list, tuple)) or len(size) != 3:
        raise ValueError(f"{key} must be [channels, height, width], got {repr(size)}")
    check_whole_number(f"channels of {key}", size[0], 1, _MOST_CHANNELS)
    for side in size[1:]:
        check_whole_number(f"height and width of {key}", side, 1, LARGEST_SIDE)


def _check_per_channel(key: str, values: Any, channels: int) -> None:
    if not isinstance(values, (list, tuple)) or not all(map(is_number, values)):
        raise ValueError(f"{key} must be a list of numbers, got {repr(values)}")
    if len(values) not in (1, 3, channels):  # 3 also for gray images, for which the mean is taken
        raise ValueError(f"{key} must have a number for each of {channels} channels, got {repr(values)}")
    if key == "std" and min(values) <= 0:
        raise ValueError(f"std must be above 0, got {repr(values)}")


def _check_labels(cfg: dict[str, Any], classes: int | None) -> None:
    names = cfg.get("label_names")
    if isinstance(names, dict):  # index -> name, where some have none
        if not all(isinstance(key, int) or key.isdecimal() for key in names):
            raise ValueError(f"the keys of label_names must be indices of classes, got {repr(list(names))}")
        names = list(names.values())
    elif names is not None and classes is not None and isinstance(names, (list, tuple)) and len(names) != classes:
        raise ValueError(f"label_names has {len(names)} names, and num_classes is {classes}")
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"label_names must be a list of names, got {repr(names)}")
    texts = cfg.get("label_descriptions", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"label_descriptions must be an object of texts, got {repr(texts)}")
