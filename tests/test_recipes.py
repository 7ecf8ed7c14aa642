# SPDX-License-Identifier: MIT
"""The recipes in configs/: they load, are of released models, and have the official settings."""

import subprocess
from pathlib import Path

import pytest
import timm

import internimage
from internimage.config import load_config
from internimage.tasks.classification.config import FinetuneConfig

ROOT = Path(internimage.__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

# drop path and image size of the paper's models; the learning rate at 512 images; epochs; layer decay
OFFICIAL = {
    "imagenet_tiny": (0.1, 224, 5e-4, 300, None),
    "imagenet_small": (0.4, 224, 5e-4, 300, None),
    "imagenet_base": (0.5, 224, 5e-4, 300, None),
    "imagenet_large_384": (0.1, 384, 2e-5, 20, 0.9),
    "imagenet_xlarge_384": (0.2, 384, 2e-5, 20, 0.9),
    "imagenet_huge_640": (0.2, 640, 2e-5, 20, 0.9),
    "imagenet_giant_512": (0.4, 512, 2e-5, 20, 0.9),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_names_a_model_that_is_there(recipe):
    config = load_config(FinetuneConfig, recipe, ["data=data", "output=out"])
    assert timm.is_model(config.model)
    if config.pretrained:
        assert config.model in internimage.list_models(pretrained=True)
        model = timm.create_model(config.model, device="meta")
        assert not config.head_from_22k or model.num_classes == 21841
    for processes in (1, 2, 4, 8):
        if config.batch_size >= 64:
            config.check_batch(processes)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_settings(name):
    drop_path, size, lr, epochs, layer_decay = OFFICIAL[name]
    config = load_config(FinetuneConfig, ROOT / "configs" / f"{name}.yaml", ["data=data", "output=out"])
    assert (config.drop_path, config.img_size, config.epochs, config.layer_decay) == (
        drop_path,
        size,
        epochs,
        layer_decay,
    )
    assert config.offset_lr_factor == (1 if layer_decay is None else 0.1)
    assert config.lr * 512 / config.batch_size == pytest.approx(lr)
    assert (config.weight_decay, config.clip_grad, config.sched, config.ema_decay) == (0.05, 5.0, "cosine", 0.9999)
    assert config.auto_augment == "rand-m9-mstd0.5-inc1" and config.color_jitter == 0.4


@pytest.mark.parametrize("script", sorted((ROOT / "scripts" / "launch").glob("train_*.sh")), ids=lambda path: path.stem)
def test_launch_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    assert "-m internimage finetune" in text and text.startswith("#!/usr/bin/env bash\n")
