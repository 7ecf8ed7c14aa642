# SPDX-License-Identifier: MIT
"""A second task for the engine: regression of a digit's center of mass. As a script, it trains with the settings of its
command line, under torchrun too."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from internimage.config import load_config
from internimage.engine.config import RunConfig, setting
from internimage.engine.curves import curve
from internimage.engine.report import Page, column
from internimage.engine.rng import PlanSampler
from internimage.engine.run import train
from internimage.engine.samples import SeededDataset, sample_loader
from internimage.engine.task import Task
from internimage.engine.world import World
from internimage.values import Whole

# the digits 0 to 9, five rows of three pixels each
_ROWS = ("757 727 717 717 557 747 747 717 757 757", "525 262 111 111 551 441 441 111 555 551",
         "525 222 727 717 757 717 717 122 757 757", "525 222 441 111 117 117 557 222 557 117",
         "757 777 747 717 111 717 757 222 757 717")  # fmt: skip


@dataclass(kw_only=True)
class CenterConfig(RunConfig):
    digits: int = setting(Whole(8), 24, "training images")
    lost: int = setting(Whole(0), 0, "so many of the first images cannot be read")


class Digits(Dataset):
    """(1, 32, 32) images of digits of noisy brightness at random places, and their (2,) centers of mass in 0 to 1."""

    def __init__(self, count: int, seed: int, lost: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images, self.lost = torch.zeros(count, 1, 32, 32), lost
        for image in self.images:
            digit = int(torch.randint(10, (), generator=generator))
            bits = [[int(x) for x in f"{int(row.split()[digit][0]):03b}"] for row in _ROWS]
            pixels = torch.tensor(bits).float().repeat_interleave(3, 0).repeat_interleave(3, 1)
            top, left = (int(torch.randint(32 - side, (), generator=generator)) for side in pixels.shape)
            noise = 0.5 + torch.rand(pixels.shape, generator=generator)
            image[0, top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels * noise
        places = torch.arange(32) / 31
        mass = self.images[:, 0]
        self.centers = torch.stack([(mass.sum(1) * places).sum(1), (mass.sum(2) * places).sum(1)], 1)
        self.centers /= mass.sum((1, 2))[:, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple:
        if index < self.lost:
            return None, None, (f"digit {index}", "lost")
        gain = 0.5 + torch.rand(())  # augmentation: drawn anew in every epoch
        return self.images[index] * gain, self.centers[index], None


class CenterTask(Task[CenterConfig, Tensor]):
    model_name = "internimage_atto"
    loss_unit = "squared distance"

    def open_data(self) -> None:
        self.train_set, self.val_set = Digits(self.config.digits, 1, self.config.lost), Digits(10, 2)

    def create_model(self) -> nn.Module:
        return timm.create_model(self.model_name, in_chans=1, num_classes=2, drop_path_rate=0.2)

    @property
    def train_size(self) -> int:
        return len(self.train_set)

    @property
    def identity(self) -> dict[str, Any]:
        return {"samples": len(self.train_set)}

    def difference(self, before: dict[str, Any], now: dict[str, Any]) -> str | None:
        if "samples" not in before:
            raise ValueError("no digits")
        return None if before["samples"] == now["samples"] else f"{before['samples']} digits, here are {now['samples']}"

    def train_loader(self, sampler: PlanSampler, pin_memory: bool) -> DataLoader:
        placeholder = (torch.zeros(1, 32, 32), torch.zeros(2))
        seeded = SeededDataset(self.train_set, self.config.seed, placeholder)
        return sample_loader(seeded, sampler, self.config.workers, pin_memory)

    def loss(self, model: nn.Module, data: list[Tensor]) -> Tensor:
        images, centers = data
        return F.mse_loss(model(images).float(), centers)

    def record(self, batches: list[list[Tensor]]) -> dict[str, Tensor]:
        return {"digits": torch.cat([images for images, _ in batches]).cpu()}

    @property
    def has_validation(self) -> bool:
        return True

    @torch.no_grad()
    def validate(self, model: nn.Module, world: World, unreadable: set[str], last: bool) -> Tensor:
        return model.eval()(self.val_set.images.to(world.device)).cpu()

    def metrics(self, result: Tensor) -> dict[str, float]:
        away = (result - self.val_set.centers).square().sum(1)
        return {"loss": away.mean().item() / 2, "pixels": away.sqrt().mean().item() * 31}

    def describe(self, metrics: dict[str, float]) -> str:
        return f"{metrics['pixels']:.2f} pixels off"

    def save(self, model: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
        save_file({key: value.detach().contiguous() for key, value in weights.items()}, folder / "model.safetensors")

    def page(self, result: Tensor, model: nn.Module | None, epochs: list[dict]) -> Page:
        pixels = self.metrics(result)["pixels"]
        rows = "".join(f"<tr><td>{x:.3f}</td><td>{y:.3f}</td></tr>" for x, y in result.tolist())
        return Page(
            title="Centers",
            heading="Centers of <digits>",
            summary=f"<p>{pixels:.2f} pixels off</p>",
            curves=[curve("Distance", "epoch", "pixels", [("", "main", column(epochs, "val_pixels"))])],
            sections=[("places", "Places", f"<table>{rows}</table>")],
        )


if __name__ == "__main__":
    train(CenterTask(load_config(CenterConfig, None, sys.argv[1:])))
