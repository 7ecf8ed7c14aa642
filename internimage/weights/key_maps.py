# SPDX-License-Identifier: MIT
"""The parameter names of a family of models, as data, so that loading weights needs no model class.

Each model class has the `KeyMap` of its family as its attribute `key_map`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]

# What training, compilation and detectors put before a model's own names.
_PREFIX = re.compile(r"(?:(?:module|_orig_mod|student|model|backbone)\.)*")
# In a prefix: the model is a part of another, which has tensors beside it.
_PART = re.compile(r"(?:backbone|student)\.")

# What predicts the offsets of a deformable convolution, in all three spellings.
_OFFSET = re.compile(r"(?:\.conv_offset|\.conv_offset_mask|\.conv\d_offset)\.weight$")


@dataclass(frozen=True)
class KeyMap:
    """The parameter names of a family.

    Attributes:
        family: Name of the family, for messages.
        first_conv: Module of the first convolution, whose weight has the image channels on its second axis.
        anchors: Keys that weights of the family have; what precedes one of them in a file is a prefix.
        classifier: Module of the linear classifier.
        head: Modules of the whole head, which weights of a backbone lack.
        width: A key whose first axis is the number of channels that distinguishes the sizes of the family.
        block: Pattern of a block's keys, with the stage as its first group and the block as its second.
        renamings: Patterns of keys that other packages name differently, and their replacements.
        advice: Patterns of keys that a model may lack, and what to do about it.
    """

    family: str
    first_conv: str
    anchors: tuple[str, ...]
    classifier: str
    head: tuple[str, ...]
    width: str
    block: str
    renamings: tuple[tuple[str, str], ...] = ()
    advice: Mapping[str, str] = field(default_factory=dict)

    # ---- prefixes

    def prefixes(self, keys: Iterable[str]) -> set[str]:
        """The prefixes of the family's names in a file, one for each model in it."""
        return {
            key[: -len(anchor)]
            for key in keys
            for anchor in self.anchors
            if key.endswith(anchor) and _PREFIX.fullmatch(key[: -len(anchor)])
        }

    def is_in(self, keys: Iterable[str]) -> bool:
        """Whether a file has all anchors of the family under one prefix; other families may have some of them."""
        keys = set(keys)
        return any(all(f"{prefix}{anchor}" in keys for anchor in self.anchors) for prefix in self.prefixes(keys))

    @staticmethod
    def is_part(prefix: str) -> bool:
        """Whether a model with this prefix is part of a larger one, such as a detector's backbone or a student."""
        return _PART.search(prefix) is not None

    def own_name(self, key: str) -> str:
        """The model's name for a key without its prefix."""
        for pattern, replacement in self.renamings:
            key = re.sub(pattern, replacement, key)
        return key

    # ---- what names and shapes show

    @property
    def classifier_keys(self) -> tuple[str, str]:
        """Weight and bias of the classifier."""
        return f"{self.classifier}.weight", f"{self.classifier}.bias"

    @property
    def first_conv_key(self) -> str:
        """Weight of the first convolution."""
        return f"{self.first_conv}.weight"

    def is_head(self, key: str) -> bool:
        """Whether a key is one of the head."""
        return key.startswith(tuple(f"{module}." for module in self.head))

    def has_head(self, keys: Iterable[str]) -> bool:
        """Whether any of the keys is one of the head."""
        return any(map(self.is_head, keys))

    def num_classes(self, shapes: Mapping[str, Shape]) -> int:
        """Classes of the classifier; 0 without one."""
        shape = shapes.get(self.classifier_keys[0])
        return shape[0] if shape else 0

    def in_chans(self, shapes: Mapping[str, Shape]) -> int | None:
        """Image channels of the first convolution; None without one."""
        shape = shapes.get(self.first_conv_key)
        return shape[1] if shape is not None and len(shape) == 4 else None

    def size(self, shapes: Mapping[str, Shape]) -> str | None:
        """Channels and depths in words; None if names and shapes do not show them."""
        width = shapes.get(self.width)
        if not width:
            return None
        blocks = {match.groups() for key in shapes if (match := re.match(self.block, key))}
        depths = Counter(stage for stage, _ in sorted(blocks))
        return f"channels={width[0]}, depths={tuple(depths.values())}"

    def variant(self, shapes: Mapping[str, Shape]) -> str:
        """What distinguishes architectures of one size, in words; empty if nothing does."""
        return ""


class ResNetKeyMap(KeyMap):
    """The names of a ResNet's parameters, which a plain and a deformable one share."""

    def is_in(self, keys: Iterable[str]) -> bool:
        """Whether a file has a deformable ResNet; weights of a plain one are those of any other package."""
        keys = set(keys)
        return super().is_in(keys) and any(_OFFSET.search(key) for key in keys)

    def size(self, shapes: Mapping[str, Shape]) -> str | None:
        """Kind of the blocks, channels and depths in words; None if names and shapes do not show them."""
        size = super().size(shapes)
        kind = "bottleneck" if f"{self.width.removesuffix('conv1.weight')}conv3.weight" in shapes else "basic"
        return None if size is None else f"{kind} blocks, {size}"

    def variant(self, shapes: Mapping[str, Shape]) -> str:
        """The version of deformable convolution; "plain" without offsets."""
        offsets = [shape[0] for key, shape in shapes.items() if _OFFSET.search(key) and shape]
        if not offsets:
            return "plain"
        return "DCNv2" if all(channels % 27 == 0 for channels in offsets) else "DCNv1"  # 3 numbers for each of 9 points


INTERNIMAGE = KeyMap(
    family="InternImage",
    first_conv="patch_embed.conv1",
    anchors=("patch_embed.conv1.weight", "levels.0.blocks.0.dcn.offset.weight"),
    classifier="head",
    head=("conv_head", "dcnv3_head_x3", "dcnv3_head_x4", "clip_projector", "fc_norm", "head"),
    width="patch_embed.conv2.bias",
    block=r"levels\.(\d+)\.blocks\.(\d+)\.",
    renamings=((r"\.layer_scale([12])$", r".gamma\1"),),  # transformers' name, in the official Hub repositories
    advice={
        r"\.gamma1$": "The file has a layer scale (as the detectors' tiny has): create the model with layer_scale=1.0"
    },
)

DCN_RESNET = ResNetKeyMap(
    family="ResNet",
    first_conv="conv1",
    anchors=("conv1.weight", "layer1.0.conv1.weight"),
    classifier="fc",
    head=("fc",),
    width="layer1.0.conv1.weight",
    block=r"layer(\d+)\.(\d+)\.",
    renamings=((r"\.(conv\d)_offset\.", r".\1.conv_offset."),),  # mmcv before version 2 of its state dicts
)
