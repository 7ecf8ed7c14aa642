# SPDX-License-Identifier: MIT
"""Creating the model of a command: by name, from a folder, or with a file of weights."""

import difflib
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import CheckpointError, UserError, list_some, one_line
from ..models.arguments import check_num_classes, check_whole_number, is_number
from ..models.attributes import pretrained_cfg
from ..models.families import families, family_of, known_models, list_models
from ..models.model_config import LARGEST_SIDE, ModelConfig, ModelConfigError, find_model_config, read_model_config
from ..models.parts import check_image_size
from ..weights import hub
from ..weights.comparison import check_plain
from ..weights.file_names import CONFIG, WEIGHT_FILES
from ..weights.load import count_classes
from ..weights.readers import existing_path, open_weights

_logger = logging.getLogger(__name__)

# how building a model fails on a user's mistake; timm's other models have no checks, and fail in any way
_FAILURES = (RuntimeError, ValueError, TypeError, OSError, MemoryError)
_FOREIGN_FAILURES = (*_FAILURES, KeyError, IndexError, AttributeError, AssertionError, ArithmeticError)


class ModelError(UserError, ValueError):
    """A model that does not exist, or that cannot do what was asked."""


def create_model(
    name: str,
    checkpoint: str | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    use_ema: bool = False,
    img_size: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """`timm.create_model` with a command's conveniences.

    Args:
        name: `internimage_SIZE[.TAG]`, any other timm name, `hf-hub:REPO`, `local-dir:FOLDER`, or a folder that
            `finetune` or `convert` has written.
        checkpoint: Weights for the architecture `name`. From a folder with timm's config.json everything is taken: the
            arguments of the model, image size, labels and preprocessing, as if `name` were that folder. From a file,
            only the weights and their number of classes, unless `num_classes` is given.
        pretrained: Load the weights that `name` refers to.
        num_classes: Instead of the weights' own.
        use_ema: Take the averaged weights of a checkpoint that has both.
        img_size: Image side, for models that are built for one size, such as ViTs. Others ignore it;
            `data_config(model, img_size)` checks both.
        kwargs: For `timm.create_model`.

    Raises:
        ModelError: There is no such model, and the message has the nearest names; or it cannot be built.
        internimage.CheckpointError: The weights, or the config.json beside them, cannot be read or do not fit.
    """
    name, config = _find(name, kwargs.get("cache_dir"))
    architecture = name.partition(".")[0] if config is None else config.architecture
    if checkpoint is not None:
        path = _existing_checkpoint(checkpoint)
        beside = find_model_config(path) if path.is_dir() else _config_beside(path)
        if beside is not None and path.is_dir():
            if beside.architecture != architecture:
                raise ModelError(
                    f"the checkpoint '{checkpoint}' is of the architecture '{beside.architecture}', and the model "
                    f"'{name}' is of '{architecture}': name '{beside.architecture}', or the folder itself, as the model"
                )
            name, config, checkpoint, pretrained = f"local-dir:{path}", beside, None, True
        elif beside is not None:
            _logger.warning(
                "'%s' is read without the %s beside it: name the folder to take image size and labels from there",
                checkpoint, CONFIG,
            )  # fmt: skip
    family = family_of(architecture)
    if kwargs.get("head_from_22k") and (family is None or "head_from_22k" not in family.options):
        ours = " and ".join(one.name for one in families() if "head_from_22k" in one.options)
        raise ModelError(f"'head_from_22k' is for {ours} models, which '{name}' is not")
    _check_img_size(img_size)
    try:
        if num_classes is not None:
            check_num_classes(num_classes)  # some models take any number, and fail later
            kwargs["num_classes"] = num_classes
        if family is None:
            return _create_foreign(name, config, checkpoint, pretrained, use_ema, img_size, kwargs)
        if use_ema:
            kwargs["use_ema"] = True
        if checkpoint is not None:
            weights = open_weights(checkpoint, use_ema)  # only here: an old pickle is read whole
            overlay: dict[str, Any] = dict(file=str(checkpoint), source="", state_dict=weights)
            if num_classes is None:
                kwargs["num_classes"] = overlay["num_classes"] = count_classes(weights, family.key_map)
            kwargs["pretrained_cfg_overlay"] = overlay
        model: nn.Module = timm.create_model(name, pretrained=pretrained or checkpoint is not None, **kwargs)
        pretrained_cfg(model).pop("state_dict", None)
        return model
    except UserError:
        raise
    except _FOREIGN_FAILURES as error:
        if family is not None and not isinstance(error, _FAILURES):
            raise
        size = f" for images of {img_size} x {img_size}" if "img_size" in kwargs else ""
        raise ModelError(f"cannot create '{name}'{size}: {_reason(error)}") from error


def _find(name: str, cache_dir: str | None) -> tuple[str, ModelConfig | None]:
    """timm's name of what a user names, and its config.json; None without one."""
    if not name:
        raise ModelError(f"the name of the model is empty; ours are {', '.join(list_models())}")
    source, colon, rest = name.partition(":")
    if not colon and (Path(name) / CONFIG).exists():
        source, colon, rest = "local-dir", ":", name
    if colon and source.lower() == "local-dir" and rest:
        if not Path(rest).is_dir():
            raise ModelError(f"there is no folder '{rest}'")
        return f"local-dir:{rest}", read_model_config(rest)
    if colon and source.lower() in ("hf-hub", "hf_hub") and rest:
        return name, read_model_config(hub.download(rest, (CONFIG,), cache_dir).parent)
    if colon:
        raise ModelError(f"there is no model '{name}': a name with a colon is hf-hub:OWNER/NAME or local-dir:FOLDER")
    if timm.is_model(name):
        return name, None
    if Path(name).is_dir():
        raise ModelError(f"the folder '{name}' has no {CONFIG}, so it is not a model that finetune has written")
    raise ModelError(f"there is no model '{name}'; {_instead_of(name)}")


def _instead_of(name: str) -> str:
    """Suggestions for a misspelled name, for a message; only our models if the nearest one is ours."""
    ours = known_models()
    near = difflib.get_close_matches(name, [*ours, *timm.list_models(include_tags=True)], n=3, cutoff=0.5)
    if near and near[0] in ours:
        near = difflib.get_close_matches(name, ours, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"ours are {', '.join(list_models())}"


def _existing_checkpoint(checkpoint: str | Path) -> Path:
    if not str(checkpoint):  # as a path, that would be this folder
        raise ModelError("the path of the checkpoint is empty")
    return existing_path(checkpoint)


def _config_beside(file: Path) -> ModelConfig | None:
    """The config.json that belongs to a file of weights; None without a usable one."""
    if file.name not in WEIGHT_FILES:
        return None
    try:
        return find_model_config(file.parent)
    except ModelConfigError as error:
        _logger.warning("%s; it is ignored, as a file of weights was named", error)
        return None


def _reason(error: BaseException) -> str:
    """Why timm could not build a model, in the user's terms."""
    text = one_line(error)
    if "weights_only" in text:  # torch advises programmers to let the file run code
        return "its weights are a pickle that holds something else than data, and nothing else is unpickled"
    if isinstance(error, LocalEntryNotFoundError):
        where = f"from {constants.ENDPOINT}, nor found in the cache"
        return f"its weights could not be downloaded {where}; use {hub.OWN_FILE}"
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        argument = text.rpartition("unexpected keyword argument ")[2]
        return f"it does not take the argument {argument}"
    return text


# ---- models of timm's that are not ours


def _create_foreign(
    name: str,
    config: ModelConfig | None,
    checkpoint: str | Path | None,
    pretrained: bool,
    use_ema: bool,
    img_size: int | None,
    kwargs: dict[str, Any],
) -> nn.Module:
    """A timm model that is not ours. Local weights are read by our reader, since timm's would show torch's advice."""
    registered = timm.get_pretrained_cfg(name) if config is None else None
    cfg = config.pretrained_cfg if config is not None else registered.to_dict() if registered is not None else {}
    if img_size is not None and (cfg.get("fixed_input_size") or "img_size" in getattr(config, "model_args", {})):
        kwargs["img_size"] = img_size
    folder = name.removeprefix("local-dir:") if name.startswith("local-dir:") else None
    weights = checkpoint or (folder if pretrained else None)
    if weights is None:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    opened = open_weights(weights, use_ema)
    check_plain(opened, opened, opened.origin)
    entries = clean_state_dict(dict(opened))  # removes the prefixes of parallel and compiled training
    overlay = dict(state_dict={key: entry.read() for key, entry in entries.items()}, source="", custom_load=False)
    classifier = cfg.get("classifier")
    first = classifier[0] if isinstance(classifier, (list, tuple)) and classifier else classifier
    head = entries.get(f"{first}.weight")
    asked = kwargs.pop("num_classes", None)
    in_file = head.shape[0] if head is not None and head.shape else asked
    if in_file is not None:
        # first with the weights' own number, since timm compares nothing if another is asked for
        kwargs["num_classes"] = overlay["num_classes"] = in_file
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        detail = one_line(RuntimeError(str(error).partition("\n")[2]))
        held = next((family.name for family in families() if family.key_map.is_in(opened)), None)
        hint = f"; it holds weights of {held}" if held is not None else ""
        raise CheckpointError(f"'{weights}' does not fit '{name}'; nothing was loaded{hint}: {detail}") from error
    pretrained_cfg(model).pop("state_dict", None)
    if asked is not None and asked != in_file:
        model.reset_classifier(asked)  # type: ignore[operator]  # a method of timm's models
        _logger.warning(
            "'%s' has %d classes and %d were asked for: the classifier is new and untrained", weights, in_file, asked
        )
    return model


# ---- what a model takes


def _check_img_size(img_size: int | None) -> None:
    try:
        if img_size is not None:
            check_whole_number("the image size", img_size, 1, LARGEST_SIDE)
    except ValueError as error:
        raise ModelError(str(error)) from error


def _check_takes(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Run a model on an image of a size that it may not take; on fake tensors, which cost nothing.

    Raises:
        ModelError: It does not take the size.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            try:
                with FakeTensorMode(allow_non_fake_inputs=True):
                    model(torch.zeros(1, *input_size))
                return
            except Exception as error:  # of the model, or because fake tensors cannot do what it does
                _logger.debug("%s: %s", type(model).__name__, error)
            model(torch.zeros(1, *input_size))
    except _FOREIGN_FAILURES as error:
        height, width = input_size[1:]
        own = pretrained_cfg(model).get("input_size")
        instead = f"; it was made for {own[1]} x {own[2]}" if own and tuple(own[1:]) != (height, width) else ""
        raise ModelError(f"the model does not take images of {height} x {width}{instead}: {one_line(error)}") from error
    finally:
        for module, training in modes:
            module.training = training


def data_config(model: nn.Module, img_size: int | None = None, crop_pct: float | None = None) -> dict[str, Any]:
    """timm's preprocessing for a model, with overrides; checks that the model takes the size.

    A model of one channel reads gray images, normalized by the mean of the three channels' means.

    Raises:
        ModelError: It does not, or takes neither one channel nor three; or an override is out of range.
    """
    _check_img_size(img_size)
    if crop_pct is not None and not (is_number(crop_pct) and 0 < crop_pct <= 2):  # timm takes 0 as not given
        raise ModelError(f"the share of the image that is kept must be above 0, at most 2, got {crop_pct}")
    config = resolve_data_config({"crop_pct": crop_pct}, model=model)
    channels = getattr(model, "in_chans", 3)
    if channels not in (1, 3):
        raise ModelError(f"the model takes {channels} channels; images have 1 or 3")
    size = config["input_size"][1:] if img_size is None else (img_size, img_size)
    config["input_size"] = (channels, *size)
    if channels == 1:
        for key in ("mean", "std"):
            config[key] = (sum(config[key]) / len(config[key]),)
    try:
        known = check_image_size(model, *size)
    except ValueError as error:
        raise ModelError(str(error)) from error
    if not known:
        _check_takes(model, config["input_size"])
    return config


def pick_device(name: str = "auto") -> torch.device:
    """A torch device by name; `auto` is the machine's accelerator, or the CPU.

    Raises:
        ModelError: There is no such device here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    there = _devices()
    if name == "cpu:0":  # torch accepts it, and treats it as a device other than cpu
        name = "cpu"
    if name not in there:
        raise ModelError(
            f"there is no device '{name}' here; there {'is' if len(there) == 1 else 'are'} {list_some(there)}"
        )
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device '{name}' cannot be used here: {one_line(error, 200)}") from error
    return device


def _devices() -> list[str]:
    """The names of all available devices."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    kind = "cpu" if accelerator is None else accelerator.type
    return ["cpu", kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
