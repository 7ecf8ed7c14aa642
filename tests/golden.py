# SPDX-License-Identifier: MIT
"""The golden values and the rules that generate weights and inputs for them; see goldens/README.md.

Random numbers are drawn in float64, where torch's stream is the same on every CPU, and then rounded to float32.
"""

import gzip
import json
import zlib
from functools import cache, lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "goldens"

# official file name -> our model name
MODELS = {
    "internimage_t_1k_224": "internimage_tiny.ogvl_in1k",
    "internimage_s_1k_224": "internimage_small.ogvl_in1k",
    "internimage_b_1k_224": "internimage_base.ogvl_in1k",
    "internimage_l_22kto1k_384": "internimage_large.ogvl_in22k_ft_in1k_384",
    "internimage_l_22k_384": "internimage_large.ogvl_in22k_384",
    "internimage_xl_22kto1k_384": "internimage_xlarge.ogvl_in22k_ft_in1k_384",
    "internimage_xl_22k_384": "internimage_xlarge.ogvl_in22k_384",
    "internimage_h_22kto1k_640": "internimage_huge.ogvl_joint_in22k_ft_in1k_640",
    "internimage_h_22kto1k_384": "internimage_huge.ogvl_joint_in22k_ft_in1k_384",
    "internimage_h_jointto22k_384": "internimage_huge.ogvl_joint_in22k_384",
    "internimage_g_22kto1k_512": "internimage_giant.ogvl_joint_in22k_ft_in1k_512",
    "internimage_g_jointto22k_384": "internimage_giant.ogvl_joint_in22k_384",
}


@cache
def index() -> dict:
    return json.loads((FOLDER / "index.json").read_text())


@cache
def manifest() -> dict:
    with gzip.open(FOLDER / "manifest.json.gz", "rt") as file:
        return json.load(file)


def cases(kind: str) -> dict[str, dict]:
    """Cases by name; kind is "op", "module", "models" or "grad"."""
    return {case["name"]: case for case in index()[kind]}


@cache
def tensors(kind: str) -> dict[str, Tensor]:
    """The golden tensors of a kind, float64, as `<case>/<name>`."""
    with safe_open(FOLDER / f"{kind}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def randn(seed: int, shape) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def images(seed: int, shape) -> Tensor:
    """Model inputs, float32."""
    return randn(seed, shape).to(torch.float32)


def fill(key: str, shape) -> Tensor:
    """The float32 (or int64) tensor of an official checkpoint key, a function of key and shape only."""
    shape = tuple(shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    r = randn(zlib.crc32(key.encode()), shape)
    if leaf == "running_mean":
        value = 0.1 * r
    elif leaf == "running_var":
        value = 1.0 + 0.2 * r.abs()
    elif leaf in ("gamma1", "gamma2"):
        value = 0.3 + 0.1 * r
    elif leaf == "weight" and len(shape) == 1:
        value = 1.0 + 0.1 * r
    elif len(shape) >= 2:
        gain = 1.5 if key.endswith("offset.weight") else 1.0
        value = r * (gain / r[0].numel() ** 0.5)
    elif key.endswith(("offset.bias", "mask.bias", "center_feature_scale_proj_bias")):
        value = 0.5 * r
    else:
        value = 0.05 * r
    return value.to(torch.float32)


def fill_state_dict(shapes: dict) -> dict[str, Tensor]:
    return {key: fill(key, shape) for key, shape in shapes.items()}


@lru_cache(maxsize=1)
def released(file: str) -> dict[str, Tensor]:
    """All weights of a released model; must not be modified."""
    return fill_state_dict(manifest()[file]["shapes"])


def grad_probe(key: str, shape) -> Tensor:
    """The direction in which a parameter's gradient is probed: probe = (grad * direction).sum()."""
    return randn(zlib.crc32((key + "|grad").encode()), shape)
