# SPDX-License-Identifier: MIT
"""What upstream published about each of the released weights, and where the files are.

Figures as printed in the README of OpenGVLab/InternImage (2025-03-25); none was measured here. FLOPs are
multiply-accumulates at the released resolution. Where a figure is None, none was printed.
"""

from dataclasses import dataclass

HUB_PTH_REPO = "OpenGVLab/InternImage"  # has all official .pth files


@dataclass(frozen=True)
class Published:
    """One set of released weights."""

    hub_id: str | None  #: per-model repository with safetensors, in transformers' key naming
    pth: str | None  #: file name in HUB_PTH_REPO, with the official key naming
    top1: float | None = None  #: ImageNet-1k top-1 accuracy in percent
    gmacs: float | None = None  #: multiply-accumulates in billions, at the released resolution; printed as FLOPs
    pretrain: str = "ImageNet-1k"  #: pre-training data
    # The commits of the two repositories that the weights are taken from; None takes their main branch. All are None
    # because the Hub could not be reached where this was written.
    revision: str | None = None  #: commit of the per-model repository; None is its main branch
    pth_revision: str | None = None  #: likewise of HUB_PTH_REPO

    @property
    def hub_source(self) -> str | None:
        """The per-model repository, as `owner/name` or `owner/name@revision`."""
        return _pinned(self.hub_id, self.revision) if self.hub_id else None

    @property
    def pth_source(self) -> str:
        """The repository of the .pth files, as `owner/name` or `owner/name@revision`."""
        return _pinned(HUB_PTH_REPO, self.pth_revision)


def _pinned(repo_id: str, revision: str | None) -> str:
    return repo_id if revision is None else f"{repo_id}@{revision}"


PUBLISHED: dict[str, Published] = {
    "internimage_tiny.ogvl_in1k": Published(
        "OpenGVLab/internimage_t_1k_224", "internimage_t_1k_224.pth", top1=83.5, gmacs=5
    ),
    "internimage_small.ogvl_in1k": Published(
        "OpenGVLab/internimage_s_1k_224", "internimage_s_1k_224.pth", top1=84.2, gmacs=8
    ),
    "internimage_base.ogvl_in1k": Published(
        "OpenGVLab/internimage_b_1k_224", "internimage_b_1k_224.pth", top1=84.9, gmacs=16
    ),
    "internimage_large.ogvl_in22k_ft_in1k_384": Published(
        "OpenGVLab/internimage_l_22kto1k_384",
        "internimage_l_22kto1k_384.pth",
        top1=87.7,
        gmacs=108,
        pretrain="ImageNet-22k",
    ),
    "internimage_large.ogvl_in22k_384": Published(
        "OpenGVLab/internimage_l_22k_384", "internimage_l_22k_192to384.pth", pretrain="ImageNet-22k"
    ),
    "internimage_xlarge.ogvl_in22k_ft_in1k_384": Published(
        "OpenGVLab/internimage_xl_22kto1k_384",
        "internimage_xl_22kto1k_384.pth",
        top1=88.0,
        gmacs=163,
        pretrain="ImageNet-22k",
    ),
    "internimage_xlarge.ogvl_in22k_384": Published(
        "OpenGVLab/internimage_xl_22k_384", "internimage_xl_22k_192to384.pth", pretrain="ImageNet-22k"
    ),
    "internimage_huge.ogvl_joint_in22k_ft_in1k_640": Published(
        "OpenGVLab/internimage_h_22kto1k_640",
        "internimage_h_22kto1k_640.pth",
        top1=89.6,
        gmacs=1478,
        pretrain="joint 427M, ImageNet-22k",
    ),
    # upstream has the configuration of this one, but no file
    "internimage_huge.ogvl_joint_in22k_ft_in1k_384": Published(None, None, pretrain="joint 427M, ImageNet-22k"),
    "internimage_huge.ogvl_joint_in22k_384": Published(
        "OpenGVLab/internimage_h_jointto22k_384",
        "internimage_h_jointto22k_384.pth",
        pretrain="joint 427M, ImageNet-22k",
    ),
    "internimage_giant.ogvl_joint_in22k_ft_in1k_512": Published(
        "OpenGVLab/internimage_g_22kto1k_512",
        "internimage_g_22kto1k_512.pth",
        top1=90.1,
        gmacs=2700,
        pretrain="joint 427M, ImageNet-22k",
    ),
    "internimage_giant.ogvl_joint_in22k_384": Published(
        "OpenGVLab/internimage_g_jointto22k_384",
        "internimage_g_pretrainto22k_384.pth",
        pretrain="joint 427M, ImageNet-22k",
    ),
}
