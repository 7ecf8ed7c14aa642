# SPDX-License-Identifier: MIT
"""The inputs of what commit 9e55b57 has written: images, settings and tensors, the same on every machine."""

import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

SIDE = 32
CLASSES = ("dark", "gray", "light")
VALIDATION = [f"images/val/{name}" for name in CLASSES]
MODEL = "small"  # the settings record it, so the runs are resumed from the folder that holds it
MODEL_ARGS = dict(channels=4, depths=[1, 1, 1, 1], groups=[1, 2, 4, 4], mlp_ratio=1.0)
CONFIG = dict(
    architecture="internimage_atto",
    num_classes=3,
    model_args=MODEL_ARGS,
    pretrained_cfg=dict(input_size=[3, SIDE, SIDE], mean=[0.5] * 3, std=[0.25] * 3, crop_pct=1.0),
)
SETTINGS = dict(
    model=MODEL, pretrained="false", img_size=SIDE, epochs=4, batch_size=8, workers=0, seed=0, lr=0.03,
    warmup_epochs=1, drop_path=0.2, mixup=0.2, ema_decay=0.9, device="cpu", report="false",
)  # fmt: skip
STEPS_PER_EPOCH, STEPS, STOPPED = 3, 12, 8  # the runs were stopped after step 8


def settings(data: str, output: str, **more) -> list[str]:
    """The arguments of `internimage finetune`."""
    return [f"{key}={value}" for key, value in (SETTINGS | dict(data=data, output=output) | more).items()]


def write_images(folder: Path) -> str:
    """Noise of a brightness for each class, as folder/SPLIT/CLASS/N.png.

    Returns:
        The SHA-256 of all files' names and bytes.
    """
    digest = hashlib.sha256()
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                relative = f"{split}/{name}/{i}.png"
                noise = _noise(relative, SIDE * SIDE * 3).astype(np.uint16)
                content = _png(((noise * (120 + 60 * label)) >> 8).astype(np.uint8).tobytes())
                (folder / relative).write_bytes(content)
                digest.update(f"{relative}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def input_images() -> np.ndarray:
    """Normalized images for a model, (2, 3, SIDE, SIDE) in float64."""
    return (_noise("input", 2 * 3 * SIDE * SIDE).astype(np.float64).reshape(2, 3, SIDE, SIDE) - 128) / 64


def _noise(name: str, count: int) -> np.ndarray:
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(count), np.uint8)


def _png(pixels: bytes) -> bytes:
    """A PNG of SIDE x SIDE RGB pixels without compression: the bytes do not depend on a library's version."""
    row = 3 * SIDE
    rows = b"".join(b"\0" + pixels[i : i + row] for i in range(0, len(pixels), row))
    stored = struct.pack("<BHH", 1, len(rows), len(rows) ^ 0xFFFF) + rows
    data = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
