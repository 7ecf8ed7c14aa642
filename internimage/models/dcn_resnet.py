# SPDX-License-Identifier: MIT
"""ResNets with deformable convolutions, registered with timm: DCNv1 and DCNv2.

Papers: "Deformable Convolutional Networks", ICCV 2017, https://arxiv.org/abs/1703.06211, and "Deformable ConvNets v2:
More Deformable, Better Results", CVPR 2019, https://arxiv.org/abs/1811.11168. State-dict keys are timm's, and those of
mmcv for the deformable convolutions, as in mmdetection's backbones.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import timm
import torch
from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..layers.deform_conv import DeformConv, offset_layouts
from ..weights.key_maps import DCN_RESNET, KeyMap, Shape
from ..weights.readers import Entry
from .arguments import check_head, check_resnet
from .builder import build_model
from .deformable import check_deformation, deform_convolutions
from .families import FamilyModel, register_family

__all__ = ["DCNResNet", "deform_convolutions"]

_logger = logging.getLogger(__name__)

_BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
_OFFSETS = re.compile(r"layer([1-4])\.\d+\.conv\d\.(?:conv_offset|conv_offset_mask)\.weight")


class DCNResNet(ResNet, FamilyModel):
    """A timm ResNet whose 3x3 convolutions are deformable in some stages.

    A new model computes what a new ResNet does, and weights of a plain ResNet load too and give its logits: see
    `deform_convolutions`. Weights that have offsets load as they are.

    Args:
        block: "basic" or "bottleneck".
        layers: Blocks of each stage.
        num_classes: Classes of the linear layer; 0 for none.
        in_chans: Image channels.
        output_stride: 32, 16 or 8: with 16 the last stage, with 8 the last two are dilated instead of strided.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for an unpooled map (no classes then).
        channels: Of each stage; a bottleneck's output has four times as many.
        cardinality, base_width: Groups of the 3x3 convolutions, and their channels of 64, as in ResNeXt.
        stages: Stages that are deformable, 1 to 4.
        modulated: DCNv2, with a mask, instead of DCNv1.
        offset_groups: Groups of input channels with offsets of their own.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        drop_block_rate: DropBlock rate of the last two stages.
        zero_init_last: Begin every residual branch at zero.
        device, dtype: Of the parameters; "meta" allocates nothing.

    Shapes:
        (N, in_chans, H, W) -> (N, num_classes).

    Raises:
        ValueError: An argument is out of range or does not fit another; the message names it.
    """

    key_map: ClassVar[KeyMap] = DCN_RESNET

    def __init__(
        self,
        block: str = "bottleneck",
        layers: Sequence[int] = (3, 4, 6, 3),
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        channels: Sequence[int] = (64, 128, 256, 512),
        cardinality: int = 1,
        base_width: int = 64,
        stages: Sequence[int] = (2, 3, 4),
        modulated: bool = True,
        offset_groups: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        zero_init_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_resnet(
            block=block,
            layers=layers,
            num_classes=num_classes,
            in_chans=in_chans,
            output_stride=output_stride,
            global_pool=global_pool,
            channels=channels,
            cardinality=cardinality,
            base_width=base_width,
            rates=dict(drop_rate=drop_rate, drop_path_rate=drop_path_rate, drop_block_rate=drop_block_rate),
            zero_init_last=zero_init_last,
        )
        stages = check_deformation(stages, modulated, offset_groups)
        super().__init__(
            _BLOCKS[block],  # type: ignore[arg-type]  # timm's annotation is of an instance
            tuple(layers),
            num_classes=num_classes,
            in_chans=in_chans,
            output_stride=output_stride,
            global_pool=global_pool,
            channels=tuple(channels),
            cardinality=cardinality,
            base_width=base_width,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            drop_block_rate=drop_block_rate,
            zero_init_last=zero_init_last,
            device=device,
            dtype=dtype,
        )
        deform_convolutions(self, stages, bool(modulated), offset_groups)

    # ---- initial values

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """As timm's, and the deformable convolutions as if they had just been made of plain ones."""
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, DeformConv):
                module.reset_parameters()
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.modulated:
                    with torch.no_grad():
                        module.weight.mul_(2)

    @torch.jit.ignore
    def materialize(self, children: set[str], device: torch.device | str) -> None:
        """Give children of a model on the meta device memory on `device` and initial values; the others stay there.

        Args:
            children: Names of direct children, such as "fc".
            device: Where they go.
        """
        for name in sorted(children):
            child = self.get_submodule(name)
            child.to_empty(device=device)
            for module in child.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Create a new classifier, and another pooling if one is named.

        Args:
            num_classes: Classes of the new classifier; 0 for none.
            global_pool: As for the constructor. None keeps the pooling, except that a classifier after an unpooled map
                gets "avg".

        Raises:
            ValueError: As the constructor.
        """
        if global_pool is None:
            kept = str(self.global_pool.pool_type)
            global_pool = kept if kept or num_classes == 0 else "avg"
        check_head(num_classes, global_pool)
        super().reset_classifier(num_classes, global_pool)

    # ---- weights

    @torch.jit.ignore
    def _deformable(self) -> dict[str, DeformConv]:
        return {name: module for name, module in self.named_modules() if isinstance(module, DeformConv)}

    @torch.jit.ignore
    def own_arguments(self) -> dict[str, Any]:
        """`stages`, `modulated` and `offset_groups` of this model."""
        layers = self._deformable()
        if not layers:  # all were pruned
            return {}
        first = next(iter(layers.values()))
        return {
            "stages": tuple(sorted({int(name[len("layer")]) for name in layers})),
            "modulated": bool(first.modulated),
            "offset_groups": first.offset_groups,
        }

    @torch.jit.ignore
    def arguments_of(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """The arguments with which a model of this architecture has weights of these shapes, under our names.

        Those of a plain ResNet leave stages and offsets as they are.
        """
        arguments = super().arguments_of(shapes)
        keys = [key for key in shapes if _OFFSETS.fullmatch(key)]
        layouts = [
            offset_layouts(shapes[key][0], shapes[key][1], shapes[key][2:]) if len(shapes[key]) == 4 else []
            for key in keys
        ]
        if not keys or not all(layouts):
            return arguments
        modulated, groups = layouts[0][0]
        stages = tuple(sorted({int(key[len("layer")]) for key in keys}))
        return {**arguments, "stages": stages, "modulated": modulated, "offset_groups": groups}

    @torch.jit.ignore
    def prepare(self, found: dict[str, Entry], origin: str) -> None:
        """Make the tensors of a plain ResNet those of this model, and rename another spelling; see `load.Model`."""
        layers = self._deformable()
        for name, layer in layers.items():
            layer.adapt_keys(found, f"{name}.")
            bias = found.get(f"{name}.bias")
            if layer.bias is None and bias is not None and not bias.problem and len(bias.shape) == 1:
                if not bias.read().any():  # another implementation always has one, and zeros it for no_bias
                    del found[f"{name}.bias"]
        if any(_OFFSETS.fullmatch(key) for key in found):
            return
        for name, layer in layers.items():
            weight = found.get(f"{name}.weight")
            if weight is None or weight.shape != tuple(layer.weight.shape):
                continue  # no ResNet of this size, which is an error that the comparison names
            for key, value in layer.conv_offset.named_parameters():
                found[f"{name}.conv_offset.{key}"] = _zeros(tuple(value.shape), weight.dtype)
            if layer.modulated and not weight.problem:
                found[f"{name}.weight"] = _doubled(weight)
        _logger.info("%s has no offsets: they are zero, and the model computes what the plain ResNet does", origin)

    @torch.jit.ignore
    def advice(self, in_file: Mapping[str, Shape]) -> str:
        """With which arguments a model would fit the weights, if it is these that are wrong; see `load.Model`."""
        needed, own = self.arguments_of(in_file), self.own_arguments()
        wrong = {key: needed[key] for key in own if key in needed and needed[key] != own[key]}
        if not wrong:
            return ""
        arguments = ", ".join(f"{key}={value}" for key, value in wrong.items())
        return (
            f"The file has other deformable convolutions: create the model with {arguments}, as `internimage convert` "
            f"without --model does"
        )


def _zeros(shape: Shape, dtype: torch.dtype) -> Entry:
    return Entry(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def _doubled(weight: Entry) -> Entry:
    def read() -> Tensor:
        return weight.read().mul_(2)

    return Entry(weight.shape, weight.dtype, read)


# ---- registered models

_CITATION = """\
@inproceedings{dai2017deformable,
  title={Deformable Convolutional Networks},
  author={Dai, Jifeng and Qi, Haozhi and Xiong, Yuwen and Li, Yi and Zhang, Guodong and Hu, Han and Wei, Yichen},
  booktitle={Proceedings of the IEEE International Conference on Computer Vision (ICCV)},
  year={2017}
}
@inproceedings{zhu2019deformable,
  title={Deformable ConvNets v2: More Deformable, Better Results},
  author={Zhu, Xizhou and Hu, Han and Lin, Stephen and Dai, Jifeng},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2019}
}"""

FAMILY = register_family(
    "deformable ResNet", DCNResNet, options=("use_ema",), citation=_CITATION, example="offset_groups=4"
)

_PAPER_V1 = dict(paper_name="Deformable Convolutional Networks", paper_ids="arXiv:1703.06211")
_PAPER_V2 = dict(
    paper_name="Deformable ConvNets v2: More Deformable, Better Results", paper_ids="arXiv:1811.11168"
)  # fmt: skip


def _create_dcn_resnet(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model(DCNResNet, variant, pretrained, num_stages=5, **kwargs)  # the stem's map is the first


def _cfg(plain: str, paper: dict[str, str]) -> dict[str, Any]:
    """timm's cfg of a plain ResNet's weights, from which the deformable one starts: also their license and source."""
    cfg = timm.get_pretrained_cfg(plain)
    assert cfg is not None
    kept = cfg.to_dict()
    # a url would be tried before the repository; architecture and tag are those of the deformable one
    for key in ("url", "architecture", "tag"):
        kept.pop(key, None)
    return {**kept, **paper, "hf_hub_filename": "model.safetensors", "custom_load": "hf"}


default_cfgs = generate_default_cfgs(
    {
        f"{version}_{plain}.{tag}": _cfg(f"{plain}.{tag}", paper)
        for version, paper, starts in (
            ("dcnv1", _PAPER_V1, ("resnet50", "resnet101")),
            ("dcnv2", _PAPER_V2, ("resnet18", "resnet50", "resnet101")),
        )
        for plain in starts
        for tag in ("a1h_in1k" if plain == "resnet101" else "a1_in1k", "tv_in1k")
    }
)

_DCNV1 = dict(stages=(4,), modulated=False, offset_groups=4)
_DCNV2 = dict(stages=(2, 3, 4), modulated=True, offset_groups=1)
_RESNET18 = dict(block="basic", layers=(2, 2, 2, 2))
_RESNET50 = dict(block="bottleneck", layers=(3, 4, 6, 3))
_RESNET101 = dict(block="bottleneck", layers=(3, 4, 23, 3))


@FAMILY.register
def dcnv1_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with DCNv1 in the last stage, in 4 offset groups, as in its authors' networks."""
    return _create_dcn_resnet("dcnv1_resnet50", pretrained, **{**_RESNET50, **_DCNV1, **kwargs})


@FAMILY.register
def dcnv1_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 with DCNv1 in the last stage, in 4 offset groups, as in its authors' networks."""
    return _create_dcn_resnet("dcnv1_resnet101", pretrained, **{**_RESNET101, **_DCNV1, **kwargs})


@FAMILY.register
def dcnv2_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with DCNv2 in both 3x3 convolutions of every block of stages 2 to 4."""
    return _create_dcn_resnet("dcnv2_resnet18", pretrained, **{**_RESNET18, **_DCNV2, **kwargs})


@FAMILY.register
def dcnv2_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with DCNv2 in every 3x3 convolution of stages 2 to 4 (conv3 to conv5), as in the paper."""
    return _create_dcn_resnet("dcnv2_resnet50", pretrained, **{**_RESNET50, **_DCNV2, **kwargs})


@FAMILY.register
def dcnv2_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 with DCNv2 in every 3x3 convolution of stages 2 to 4 (conv3 to conv5), as in the paper."""
    return _create_dcn_resnet("dcnv2_resnet101", pretrained, **{**_RESNET101, **_DCNV2, **kwargs})
