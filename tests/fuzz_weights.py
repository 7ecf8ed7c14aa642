# SPDX-License-Identifier: MIT
"""What reads weights, a run's checkpoints and the Hub's cache, each with a corpus of files that are built here."""

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import formats
import fuzz_mutations as change
import numpy as np
import timm
import torch
from fuzz import Reader, Seed
from safetensors.torch import save
from torch import nn

import internimage  # noqa: F401 - registers the models
from internimage.engine.run_state import RunState
from internimage.engine.world import World
from internimage.errors import CheckpointError
from internimage.tasks.classification.config import FinetuneConfig
from internimage.tasks.classification.task import ClassificationTask
from internimage.weights import hub
from internimage.weights.load import load_pretrained
from internimage.weights.readers import open_weights
from internimage.weights.shard_index import weight_map

CONFIG = {
    "architecture": "internimage_tiny",
    "num_classes": 3,
    "num_features": 512,
    "label_names": ["cat", "dog", "owl"],
    "label_descriptions": {"cat": "a cat"},
    "model_args": {"channels": 8, "depths": [1, 1, 1, 1], "groups": [1, 1, 2, 4], "drop_path_rate": 0.1},
    "pretrained_cfg": {
        "input_size": [3, 64, 64], "crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2], "first_conv": "patch_embed.conv1", "classifier": "head", "tag": "x",
    },
}  # fmt: skip


# ---- weights


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(6, 4, generator=generator)
    return {
        "patch_embed.conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "levels.0.a": shared,
        "levels.0.b": shared.t(),  # of the same bytes
        "levels.0.c": shared[1:3],
        "levels.1.half": torch.randn(4000, generator=generator).bfloat16(),
        "levels.1.steps": torch.tensor(7),
        "head.empty": torch.zeros(0, 3),
    }


def _bytes(write: Callable[[Path], object], folder: Path) -> bytes:
    path = folder / "made"
    write(path)
    content = path.read_bytes()
    path.unlink()
    return content


_PTH = (change.in_zip(change.edit_pickle, "data.pkl"), change.edit_zip_header, change.repack_zip)


def _torch_seeds(folder: Path) -> list[Seed]:
    weights = _tensors()
    made = {
        "official": lambda path: formats.save_official(path, {"model": weights}),
        "before torch 1.6": lambda path: formats.save_official(path, {"model": weights}, **formats.LEGACY),
        "bare": lambda path: torch.save(OrderedDict(weights), path),
        "bare, before torch 1.6": lambda path: torch.save(weights, path, **formats.LEGACY),
        "parameters": lambda path: torch.save({k: nn.Parameter(v.float()) for k, v in weights.items()}, path),
        "timm": lambda path: torch.save({"state_dict": weights, "args": argparse.Namespace(lr=0.1), "epoch": 3}, path),
    }
    seeds = {name: _bytes(write, folder) for name, write in made.items()}
    whole = {key: value.contiguous().clone() for key, value in weights.items()}
    source, packed = io.BytesIO(_bytes(lambda path: torch.save(whole, path), folder)), io.BytesIO()
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for info in archive.infolist():
            other.writestr(zipfile.ZipInfo(info.filename), archive.read(info), zipfile.ZIP_DEFLATED)
    seeds["compressed"] = packed.getvalue()
    for kind in formats.PICKLERS:  # a call of what does nothing, beside the weights
        code = formats.Call(os.system, "true")
        seeds[f"hostile: {kind}"] = _bytes(
            lambda path, kind=kind, code=code: formats.PICKLERS[kind](path, {"model": weights, "x": code}), folder
        )
    shared = torch.zeros(1).expand(20_000_000, 64)  # of one number
    seeds["hostile: large by its strides"] = _bytes(lambda path: torch.save({"head.weight": shared}, path), folder)
    edits = {name: _PTH if content[:2] == b"PK" else (change.edit_pickle,) for name, content in seeds.items()}
    return [Seed(name, {"w.pth": content}, {"w.pth": edits[name]}) for name, content in seeds.items()]


def _zip_seeds(folder: Path) -> list[Seed]:
    return [s for s in _torch_seeds(folder) if s.files["w.pth"][:2] == b"PK" and not s.name.startswith("hostile")]


def _read_weights(path: Path) -> dict:
    return {key: _content(entry.read()) for key, entry in open_weights(path).items() if not entry.problem}


def _content(tensor: torch.Tensor) -> tuple:
    plain = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _safetensors_seeds(folder: Path) -> list[Seed]:
    weights = {key: value.contiguous().clone() for key, value in _tensors().items()}
    contents = {
        "weights": save(weights, {"format": "pt"}),
        "one": save({"head.bias": torch.ones(3)}),
        "none": save({}),
    }
    edits = {".safetensors": (change.edit_safetensors,)}
    return [Seed(name, {"w.safetensors": content}, edits) for name, content in contents.items()]


def _shard_seeds(folder: Path) -> list[Seed]:
    weights = {key: value.contiguous().clone() for key, value in _tensors().items()}
    seeds = []
    for suffix in ("safetensors", "bin"):
        formats.save_index(folder, weights, shards=2, suffix=suffix)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        shutil.rmtree(folder)
        folder.mkdir()
        edits = {".json": (change.edit_json,), ".safetensors": (change.edit_safetensors,), ".bin": _PTH}
        seeds.append(Seed(suffix, files, edits))
    return seeds


def _index_seeds(folder: Path) -> list[Seed]:
    content = {"metadata": {"total_size": 24}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    return [Seed("index", {"index.json": json.dumps(content).encode()}, {".json": (change.edit_json,)})]


@cache
def _model() -> nn.Module:
    return timm.create_model("internimage_tiny", channels=8, depths=(1, 1, 1, 1), groups=(1, 1, 2, 4), num_classes=2)


def _model_seeds(folder: Path) -> list[Seed]:
    weights = formats.shifted(_model().state_dict())  # others than the model has
    pickled = _bytes(lambda path: torch.save({"model": weights}, path), folder)
    return [
        Seed("safetensors", {"w": save(weights)}, {"w": (change.edit_safetensors,)}),
        Seed("zip", {"w": pickled}, {"w": _PTH}),
    ]


def _load_model(folder: Path) -> None:
    """Whole or not at all: after an error the model is as it was."""
    model = _model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_pretrained(model, folder / "w", pretrained_cfg={"num_classes": 2})
    except Exception:
        changed = [k for k, v in model.state_dict().items() if _content(v) != _content(before[k])]
        if changed:
            model.load_state_dict(before)
            raise AssertionError(f"{len(changed)} tensors were overwritten before the error") from None
        raise
    model.load_state_dict(before)


# ---- a run's checkpoints


class _Run:
    """A run of a small model, with one checkpoint."""

    def __init__(self, sharded: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model(torch.ones(3, 64)).sum().backward()
        optimizer.step()
        data = {"samples": 3, "classes": ["cat", "dog"], "images": ["1", "2"]}
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.model, self.optimizer, self.sharded = model, optimizer, sharded
        task = ClassificationTask(FinetuneConfig(data="data", output="run"))  # which compares the data of checkpoints
        self.state = RunState(World(), model, None, optimizer, None, scaler, sharded, data, task.difference)
        self.state.progress.step = 7

    def content(self) -> list:
        moments = self.optimizer.state_dict()["state"]
        parts = [*self.model.state_dict().items(), *((f"{i} {k}", v) for i in moments for k, v in moments[i].items())]
        return [(key, *_content(value)) for key, value in parts] + [
            self.state.progress.step,
            self.state.progress.epochs,
        ]


def _draws() -> tuple:
    """What the generators give next, so that their states can be compared."""
    return random.random(), np.random.random(), _content(torch.rand(2))


@cache
def _run(sharded: bool) -> _Run:
    return _Run(sharded)


def _run_seeds(sharded: bool) -> Callable[[Path], list[Seed]]:
    def seeds(folder: Path) -> list[Seed]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, that this is one process
            _run(sharded).state.save(folder / "checkpoints")
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        edits = {".pt": _PTH, ".metadata": (change.edit_pickle,), ".distcp": _PTH}
        return [Seed("sharded" if sharded else "file", files, edits)]

    return seeds


def _restore(sharded: bool) -> Callable[[Path], list]:
    def read(folder: Path) -> list:
        run = _run(sharded)
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(1)
        with torch.no_grad():  # what was not read must not look as if it was
            for parameter in run.model.parameters():
                parameter.zero_()
        run.state.progress = type(run.state.progress)()
        run.state.load(folder / "checkpoints")
        return run.content()

    return read


# ---- the Hub's cache

_REPO, _COMMIT = "me/mine", "c0ffee" + "0" * 34


def _cache_seeds(folder: Path) -> list[Seed]:
    large = save({"head.bias": torch.arange(300.0)})
    small = json.dumps(CONFIG).encode()
    sha256, sha1 = hashlib.sha256(large).hexdigest(), hashlib.sha1(b"blob %d\0" % len(small) + small).hexdigest()
    files = {
        "models--me--mine/refs/main": _COMMIT.encode(),
        f"models--me--mine/blobs/{sha256}": large,
        f"models--me--mine/blobs/{sha1}": small,
        f"models--me--mine/.internimage/{sha256}.json": json.dumps({"etag": sha256, "size": len(large)}).encode(),
    }
    return [Seed("cache", files, {".json": (change.edit_json,)})]


def _read_cache(folder: Path) -> list[bytes]:
    repository = folder / "models--me--mine"
    snapshot = repository / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True)
    for blob in (repository / "blobs").iterdir():
        name = "model.safetensors" if len(blob.name) == 64 else "config.json"
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    names = ("model.safetensors", "config.json")
    return [hub.download(_REPO, (name,), str(folder), cached_only=True).read_bytes() for name in names]


WEIGHTS = (
    Reader("torch files", _torch_seeds, lambda folder: _read_weights(folder / "w.pth"), (CheckpointError,), 4),
    Reader(
        "torch ZIP",
        _zip_seeds,
        lambda folder: _read_weights(folder / "w.pth"),
        (CheckpointError,),
        2,
        sealed=change.BLIND,
    ),
    Reader("safetensors", _safetensors_seeds, lambda f: _read_weights(f / "w.safetensors"), (CheckpointError,), 2),
    Reader("shards", _shard_seeds, _read_weights, (CheckpointError,), 2),
    Reader("index.json", _index_seeds, lambda folder: weight_map(folder / "index.json"), (ValueError,)),
    Reader("model", _model_seeds, _load_model, (CheckpointError,)),
    Reader("checkpoint", _run_seeds(False), _restore(False), (CheckpointError,), 2, sealed=change.BLIND),
    Reader("sharded checkpoint", _run_seeds(True), _restore(True), (CheckpointError,), 2, sealed=change.BLIND),
    Reader("Hub cache", _cache_seeds, _read_cache, (hub.DownloadError,), 1, sealed=change.BLIND, writes=True),
)
