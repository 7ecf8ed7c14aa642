# SPDX-License-Identifier: MIT
"""Folders of plainly colored images, a model that tells the colors apart, and commands that must fail with one line."""

import os

import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import nn

from internimage.cli import main
from internimage.models.timm_folder import save_model
from internimage.tasks.classification.evaluate import evaluate

COLORS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
CONFIG = dict(input_size=(3, 8, 8), interpolation="bicubic", crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


class ByColor(nn.Module):
    """Right on every image of COLORS, if its classes are in their order."""

    def __init__(self, names=("blue", "green", "red")):
        super().__init__()
        self.num_classes, self.pretrained_cfg = len(names), {"label_names": list(names)}
        self.weight = nn.Parameter(torch.zeros(len(names), 3))
        for i, name in enumerate(names):
            self.weight.data[i] = torch.tensor(COLORS.get(name, (1, 1, 1))) / 10.0

    def forward(self, x):
        return x.mean((2, 3)) @ self.weight.T


def write(folder, *names):
    """Images of the color of their class folder; other files where the name is not an image's."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".png", ".jpg", ".webp"):
            Image.new("RGB", (10, 9), COLORS.get(file.parent.name, (50, 50, 50))).save(file)
        else:
            file.write_text("words")
    return folder


def three(folder, count=2):
    return write(folder, *(f"{color}/{i}.png" for color in COLORS for i in range(count)))


def count(dataset, model=None, **more):
    return evaluate(model or ByColor(), dataset, CONFIG, 4, 0, progress=False, **more)


def write_model(folder):
    """A model folder with stored labels, as finetune writes it."""
    made = timm.create_model("internimage_atto", num_classes=3)
    save_model(made, folder, list(COLORS), resolve_data_config({"input_size": (3, 32, 32)}, model=made))
    return folder


def command(capsys, verb, *arguments, status=2):
    """What a command says on stderr, in one line if it fails."""
    assert main([verb, *map(str, arguments)]) == status
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if status:
        (line,) = [line for line in err.splitlines() if "error:" in line]
        assert len(line) < 700
        return line
    return err


def refuse_to_list(monkeypatch, folder):
    """As to anyone but root, whom no permission stops."""
    scandir = os.scandir

    def refusing(path="."):
        if os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
