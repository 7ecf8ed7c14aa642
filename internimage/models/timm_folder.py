# SPDX-License-Identifier: MIT
"""Writing a model as a folder for timm: `config.json` beside `model.safetensors`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..atomic import replacing_files
from ..files import write_text
from ..weights.file_names import CONFIG, WEIGHTS
from ..weights.safetensors_io import write_safetensors


def write_config(
    path: Path,
    model: nn.Module,
    labels: dict[str, Any],
    data_config: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda config: None,
) -> None:
    """Write timm's config.json of a model.

    Args:
        path: The file.
        model: Its architecture and arguments are named in it.
        labels: `label_names` and `label_descriptions`, as far as they are known.
        data_config: timm's preprocessing; that of the model's `pretrained_cfg` if None.
        change: Is given the content before it is written, to change it.
    """
    save_config_for_hf(model, str(path), model_config=labels, data_config=data_config)
    config = json.loads(path.read_text(encoding="utf-8"))
    # is at the top level too; transformers passes both on, and Python refuses the same argument twice
    config.get("model_args", {}).pop("num_classes", None)
    change(config)
    write_text(path, json.dumps(config, indent=2) + "\n")


def save_model(
    model: nn.Module,
    folder: Path,
    label_names: Sequence[str],
    data_config: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write timm's `config.json` and then `model.safetensors` into a folder, each whole or not at all.

    Args:
        model: With the architecture and arguments to be named in the configuration.
        folder: Is there.
        label_names: The classes.
        data_config: timm's preprocessing.
        weights: Instead of the model's own state dict, where that is spread over processes.
    """
    tensors = {key: value.detach() for key, value in (model.state_dict() if weights is None else weights).items()}
    with replacing_files(folder, (CONFIG, WEIGHTS)) as partial:
        write_config(partial / CONFIG, model, dict(label_names=list(label_names)), data_config)
        specs = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
        write_safetensors(partial / WEIGHTS, specs, lambda key: tensors[key].cpu())
