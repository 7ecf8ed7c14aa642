# SPDX-License-Identifier: MIT
"""Building models of all families: by timm's builder, with weights loaded by our reader."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from ..errors import CheckpointError
from ..weights import imagenet22k
from ..weights.resolve import resolve_source
from .families import FamilyModel
from .model_config import check_given


def build_model(
    model_class: type[FamilyModel],
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    use_ema: bool = False,
    head_from_22k: bool | Sequence[str] = False,
    num_stages: int = 4,
    **kwargs: Any,
) -> nn.Module:
    """Build a model, and load its weights by our own reader whatever their source.

    timm's reader would unpickle before any check, read one shard only and load non-strictly where the number of classes
    differs, so timm is asked for a model without weights, built by a function that loads them.

    Args:
        model_class: Of the model.
        variant: Its registered name.
        pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir: As for `timm.create_model`.
        use_ema: Take the averaged weights of a source that has both.
        head_from_22k: Make the classifier of an ImageNet-22k one's rows for these synsets; True for ImageNet-1k's.
        num_stages: Of the class; by default `features_only` returns the maps of all.
        kwargs: Of the class, and timm's own.

    Returns:
        The model, or with `features_only` timm's wrapper of it.
    """
    check_given(variant, pretrained_cfg, kwargs.get("pretrained_model_args") or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    features_only = kwargs.get("features_only", False)
    if "head_from_22k" in (kwargs.get("pretrained_model_args") or {}):
        head_from_22k = False  # was applied before the folder was saved, whose config.json has all arguments
    if head_from_22k and pretrained:
        synsets = imagenet22k.imagenet_1k() if head_from_22k is True else head_from_22k
        kwargs.setdefault("num_classes", len(synsets))
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    if pretrained and device.type == "meta":
        raise CheckpointError(
            "device='meta' holds no weights: use pretrained=False there, or pretrained=True on another device"
        )
    # before the model is built: missing weights are found out quickly
    source = resolve_source(variant, cfg, cache_dir) if pretrained else None

    def build(**model_kwargs: Any) -> FamilyModel:
        if source is None:
            return model_class(**model_kwargs)
        # on the meta device first: no memory or time for initial values that the weights replace
        model = model_class(**{**model_kwargs, "device": "meta"})
        model.load_pretrained(
            source,
            backbone_only=features_only,
            use_ema=use_ema,
            pretrained_cfg=cfg,
            head_from_22k=head_from_22k,
            device=device,
        )
        return model

    model: nn.Module = build_model_with_cfg(
        build,
        variant,
        pretrained=False,
        pretrained_cfg=pretrained_cfg,  # type: ignore[arg-type]  # timm also passes the name of a tag
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        feature_cfg=dict(out_indices=tuple(range(num_stages)), feature_cls="getter"),
        **kwargs,
    )
    return model
