# SPDX-License-Identifier: MIT
"""Checkpoints in every format of InternImage weights, written from a state dict with our names."""

import argparse
import json
import pickle
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from internimage.weights import readers

HEAD = ("conv_head.", "dcnv3_head_x3.", "dcnv3_head_x4.", "clip_projector.", "fc_norm.", "head.")

# ---- names


def prefixed(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state_dict.items()}


def headless(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if not key.startswith(HEAD)}


def hub_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the official repositories on the Hub."""
    return prefixed("model.", {re.sub(r"\bgamma([12])$", r"layer_scale\1", key): v for key, v in state_dict.items()})


def shifted(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of the same shapes, which must not be read instead of the right ones."""
    return {key: value + 1 for key, value in state_dict.items()}


def cast(state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state_dict.items()}


# ---- what checkpoints hold besides weights


@contextmanager
def yacs() -> Iterator[type]:
    """Context in which a substitute for yacs' node can be imported, for pickling."""

    class CfgNode(dict):
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in values.items()})
            self.__dict__.update(
                __immutable__=True, __deprecated_keys__=set(), __renamed_keys__={}, __new_allowed__=False
            )

        def __getattr__(self, name: str) -> Any:
            if name in self:
                return self[name]
            raise AttributeError(name)

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
    package.config, module.CfgNode = module, CfgNode
    with mock.patch.dict(sys.modules, {"yacs": package, "yacs.config": module}):
        yield CfgNode


CONFIG = {
    "MODEL": {"TYPE": "intern_image", "INTERN_IMAGE": {"CHANNELS": 64, "DEPTHS": [4, 4, 18, 4]}},
    "AUG": {"MEAN": (0.5, 0.5, 0.5), "NAME": None},
}


def training_state(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a training run saves besides its weights."""
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)} for i in range(2)}
    return {
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}]},
        "lr_scheduler": {"base_values": [1e-3], "metric": None},
        "max_accuracy": 83.5,
        "epoch": 299,
    }


def save_official(path: Path, content: dict[str, Any], **options) -> Path:
    """An official training checkpoint: `content`, with the state and the pickled config of the run."""
    with yacs() as node:
        torch.save({**content, **training_state({}), "config": node(CONFIG)}, path, **options)
    return path


# ---- formats


def save_index(folder: Path, state_dict: Mapping[str, Tensor], shards: int = 3, suffix: str = "safetensors") -> Path:
    """Write shards and their index like transformers; returns the path of the index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(state_dict)}
    for name in names:
        part = {key: value for key, value in state_dict.items() if weight_map[key] == name}
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def save_torch(path: Path, content: Any, **options) -> Path:
    torch.save(content, path, **options)
    return path


def save_safetensors(path: Path, state_dict: Mapping[str, Tensor]) -> Path:
    save_file(dict(state_dict), path)
    return path


LEGACY = dict(_use_new_zipfile_serialization=False)  # the format of torch before 1.6
_NECK = {"neck.lateral_convs.0.conv.weight": torch.ones(4, 4, 1, 1), "rpn_head.rpn_conv.bias": torch.ones(4)}
_AVERAGED_FLAT = {"ema_backbone_patch_embed_conv1_weight": torch.ones(4)}  # mmdetection's ExpMomentumEMAHook
_DECODER = {"decode_head.conv_seg.weight": torch.ones(3, 4, 1, 1), "auxiliary_head.conv_seg.bias": torch.ones(3)}
_META = {"CLASSES": ("person", "car"), "PALETTE": [[0, 0, 0]], "config": "model = dict()", "epoch": 12}

# kind -> function of (empty folder, state dict with our names) that returns the path to load
KINDS = {
    "official": lambda folder, sd: save_official(folder / "w.pth", {"model": sd}),
    "official, before torch 1.6": lambda folder, sd: save_official(folder / "w.pth", {"model": sd}, **LEGACY),
    "official, with averages": lambda folder, sd: save_official(
        folder / "w.pth", {"model": sd, "model_ema": shifted(sd)}
    ),
    "official, averages only": lambda folder, sd: save_torch(folder / "w.pth", {"model_ema": sd}),
    "official, in module": lambda folder, sd: save_torch(folder / "w.pth", {"module": sd, "global_steps": 1}),
    "official, of DDP": lambda folder, sd: save_torch(folder / "w.pth", {"model": prefixed("module.", sd)}),
    "official, student": lambda folder, sd: save_torch(
        folder / "w.pth",
        {
            "model": {
                **prefixed("student.", sd),
                **prefixed("teacher.", shifted(sd)),
                "student_proj.weight": torch.ones(2, 2),
            }
        },
    ),
    "compiled": lambda folder, sd: save_torch(folder / "w.pt", prefixed("_orig_mod.", sd)),
    "bare": lambda folder, sd: save_torch(folder / "w.pth", OrderedDict(sd)),
    "timm's training script": lambda folder, sd: save_torch(
        folder / "w.pth.tar",
        {"state_dict": sd, "arch": "internimage_atto", "args": argparse.Namespace(lr=1e-3, opt="adamw"), "epoch": 3},
    ),
    "Hub": lambda folder, sd: save_safetensors(folder / "model.safetensors", hub_names(sd)),
    "Hub, folder": lambda folder, sd: save_safetensors(folder / "model.safetensors", hub_names(sd)).parent,
    "Hub, pickle": lambda folder, sd: save_torch(folder / "pytorch_model.bin", hub_names(sd)),
    "Hub, shards": lambda folder, sd: save_index(folder, hub_names(sd)).parent,
    "Hub, shard index": lambda folder, sd: save_index(folder, hub_names(sd)),
    "Hub, pickled shards": lambda folder, sd: save_index(folder, hub_names(sd), suffix="bin").parent,
    "ours": lambda folder, sd: save_safetensors(folder / "w.safetensors", sd),
    "detector": lambda folder, sd: save_torch(
        folder / "w.pth",
        {"meta": _META, "state_dict": {**prefixed("backbone.", headless(sd)), **_NECK, **_AVERAGED_FLAT}},
    ),
    "segmentor": lambda folder, sd: save_torch(
        folder / "w.pth",
        {"meta": _META, "state_dict": OrderedDict({**prefixed("backbone.", headless(sd)), **_DECODER})},
    ),
}
HEADLESS = {"detector", "segmentor"}


def write(kind: str, folder: Path, state_dict: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return KINDS[kind](folder, dict(state_dict))


def record_reads(monkeypatch) -> list[tuple[int, ...]]:
    """A list to which the shapes of tensors are added when they are read from safetensors files."""
    reads: list[tuple[int, ...]] = []
    read_tensor = readers.read_tensor

    def record(path, position, shape, dtype):
        reads.append(shape)
        return read_tensor(path, position, shape, dtype)

    monkeypatch.setattr(readers, "read_tensor", record)
    return reads


# ---- files that run code


class Call:
    """Its unpickling calls `function`."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


# format -> function of (path, content) that writes a pickle
PICKLERS = {
    "zip": lambda path, content: torch.save(content, path),
    "before torch 1.6": lambda path, content: torch.save(content, path, **LEGACY),
    "zip, protocol 4": lambda path, content: torch.save(content, path, pickle_protocol=4),
    "bare, protocol 2": lambda path, content: path.write_bytes(pickle.dumps(content, 2)),
    "bare, protocol 5": lambda path, content: path.write_bytes(pickle.dumps(content, 5)),
}
