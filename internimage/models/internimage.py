# SPDX-License-Identifier: MIT
"""The released InternImage models, registered with timm. Hyper-parameters are those of the official configurations."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs
from torch import nn

from ..weights.imagenet22k import NUM_CLASSES as IN22K
from ..weights.released import PUBLISHED
from .builder import build_model
from .classifier import InternImage
from .families import register_family

_CITATION = """\
@inproceedings{wang2023internimage,
  title={InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions},
  author={Wang, Wenhai and Dai, Jifeng and Chen, Zhe and Huang, Zhenhang and Li, Zhiqi and Zhu, Xizhou and Hu, Xiaowei
    and Lu, Tong and Lu, Lewei and Li, Hongsheng and Wang, Xiaogang and Qiao, Yu},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2023}
}"""

FAMILY = register_family("InternImage", InternImage, citation=_CITATION)


def _create_internimage(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model(InternImage, variant, pretrained, **kwargs)


def _cfg(name: str, size: int = 224, num_classes: int = 1000, stride: int = 32) -> dict[str, Any]:
    """timm's pretrained cfg. Upstream resizes the shorter side to the image size: crop_pct 1.0, not timm's 0.875."""
    published = PUBLISHED.get(name)
    source = {}
    if published is not None and published.hub_id is not None:
        source = dict(hf_hub_id=published.hub_source, hf_hub_filename="model.safetensors", custom_load="hf")
    return {
        **source,
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "pool_size": (size // stride, size // stride),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/OpenGVLab/InternImage",
        "paper_name": "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions",
        "paper_ids": "arXiv:2211.05778",
    }


default_cfgs = generate_default_cfgs(
    {
        name: _cfg(name, **arguments)
        for name, arguments in {
            "internimage_atto.untrained": dict(),
            "internimage_tiny.ogvl_in1k": dict(),
            "internimage_small.ogvl_in1k": dict(),
            "internimage_base.ogvl_in1k": dict(),
            "internimage_large.ogvl_in22k_ft_in1k_384": dict(size=384),
            "internimage_large.ogvl_in22k_384": dict(size=384, num_classes=IN22K),
            "internimage_xlarge.ogvl_in22k_ft_in1k_384": dict(size=384),
            "internimage_xlarge.ogvl_in22k_384": dict(size=384, num_classes=IN22K),
            "internimage_huge.ogvl_joint_in22k_ft_in1k_640": dict(size=640, stride=16),
            "internimage_huge.ogvl_joint_in22k_ft_in1k_384": dict(size=384, stride=16),
            "internimage_huge.ogvl_joint_in22k_384": dict(size=384, stride=16, num_classes=IN22K),
            "internimage_giant.ogvl_joint_in22k_ft_in1k_512": dict(size=512, stride=16),
            "internimage_giant.ogvl_joint_in22k_384": dict(size=384, stride=16, num_classes=IN22K),
        }.items()
    }
)


@FAMILY.register
def internimage_atto(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A very small one of our own, for demos and tests: under a million parameters at 10 classes. No weights."""
    model_args = dict(channels=16, depths=(1, 1, 3, 1), groups=(1, 2, 4, 8))
    return _create_internimage("internimage_atto", pretrained, **dict(model_args, **kwargs))


@FAMILY.register
def internimage_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InternImage-T, 30M parameters."""
    model_args = dict(channels=64, depths=(4, 4, 18, 4), groups=(4, 8, 16, 32))
    return _create_internimage("internimage_tiny", pretrained, **dict(model_args, **kwargs))


_POST_NORM = dict(post_norm=True, layer_scale=1e-5)


@FAMILY.register
def internimage_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InternImage-S, 50M parameters."""
    model_args = dict(channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), **_POST_NORM)
    return _create_internimage("internimage_small", pretrained, **dict(model_args, **kwargs))


@FAMILY.register
def internimage_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InternImage-B, 97M parameters."""
    model_args = dict(channels=112, depths=(4, 4, 21, 4), groups=(7, 14, 28, 56), **_POST_NORM)
    return _create_internimage("internimage_base", pretrained, **dict(model_args, **kwargs))


@FAMILY.register
def internimage_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InternImage-L, 223M parameters at 1000 classes."""
    model_args = dict(channels=160, depths=(5, 5, 22, 5), groups=(10, 20, 40, 80), offset_scale=2.0, **_POST_NORM)
    return _create_internimage("internimage_large", pretrained, **dict(model_args, **kwargs))


@FAMILY.register
def internimage_xlarge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InternImage-XL, 335M parameters at 1000 classes."""
    model_args = dict(channels=192, depths=(5, 5, 24, 5), groups=(12, 24, 48, 96), offset_scale=2.0, **_POST_NORM)
    return _create_internimage("internimage_xlarge", pretrained, **dict(model_args, **kwargs))


_ATTENTIVE = dict(dw_kernel_size=5, center_feature_scale=True, attentive_head=True)


@FAMILY.register
def internimage_huge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InternImage-H, 1.09B parameters at 1000 classes; image sides must be multiples of 32 (see `check_fusable`)."""
    model_args = dict(
        channels=320,
        depths=(6, 6, 32, 6),
        groups=(10, 20, 40, 80),
        res_post_norm=True,
        stage3_post_norm_blocks=(5, 11, 17, 23, 29),
        **_ATTENTIVE,
    )
    return _create_internimage("internimage_huge", pretrained, **dict(model_args, **kwargs))


@FAMILY.register
def internimage_giant(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """InternImage-G, 3.08B parameters at 1000 classes; image sides must be multiples of 32 (see `check_fusable`)."""
    model_args = dict(
        channels=512,
        depths=(2, 2, 48, 4),
        groups=(16, 32, 64, 128),
        post_norm=True,
        stage3_post_norm_blocks=(5, 11, 17, 23, 29, 35, 41, 47),
        **_ATTENTIVE,
    )
    return _create_internimage("internimage_giant", pretrained, **dict(model_args, **kwargs))
