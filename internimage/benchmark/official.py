# SPDX-License-Identifier: MIT
"""The official operator and model, from the user's checkout of OpenGVLab/InternImage; this package contains neither.

Their files import modules that are not used here: the compiled `DCNv3`, `pkg_resources` (removed in setuptools 82) and
`timm.models.layers` (deprecated in timm). Stubs replace them during the import.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm.layers
from torch import Tensor, nn

from ..models.classifier import InternImage
from .timing import BenchmarkError

NO_CHECKOUT = "'official' needs your checkout of OpenGVLab/InternImage: --official PATH"
FUNCTION = Path("classification", "ops_dcnv3", "functions", "dcnv3_func.py")
MODEL = Path("classification", "models", "intern_image.py")


def official_function(checkout: Path) -> Callable[..., Tensor]:
    """The checkout's `dcnv3_core_pytorch`.

    Raises:
        BenchmarkError: The checkout has no such file, or it cannot be imported.
    """
    function: Callable[..., Tensor] = _load(checkout, FUNCTION, "dcnv3_core_pytorch")
    return function


def official_model(checkout: Path, **arguments: Any) -> nn.Module:
    """The checkout's `InternImage` in eval mode, with its operator in plain torch.

    Raises:
        BenchmarkError: Like `official_function`.
    """
    build = _load(checkout, MODEL, "InternImage")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        model: nn.Module = build(core_op="DCNv3_pytorch", **arguments)
        return model.eval()


def official_arguments(model: InternImage) -> dict[str, Any]:
    """The arguments with which the official `InternImage` has the architecture of one of our models."""
    stages, block = model.get_stages(), model.get_blocks()[0]
    dcn = block.dcn
    arguments: dict[str, Any] = dict(
        channels=dcn.channels,
        depths=[len(stage.blocks) for stage in stages],
        groups=[stage.get_submodule("blocks.0.dcn").groups for stage in stages],
        mlp_ratio=block.mlp.fc1.out_features / dcn.channels,
        layer_scale=block.layer_scale,
        offset_scale=dcn.offset_scale,
        post_norm=block.post_norm,
    )
    if model.attentive:  # what huge and giant alone have, under its official name
        extra = list(stages[2].post_norm_blocks)
        arguments |= dict(
            use_clip_projector=True,
            dw_kernel_size=dcn.dw_kernel_size[0],
            center_feature_scale=dcn.center_feature_scale,
            res_post_norm=not isinstance(block.res_post_norm1, nn.Identity),
            level2_post_norm=bool(extra),
            level2_post_norm_block_ids=extra,
        )
    return arguments


def _load(checkout: Path, file: Path, name: str) -> Any:
    path = checkout / file
    if not path.is_file():
        raise BenchmarkError(
            f"'{checkout}' is not a checkout of OpenGVLab/InternImage: it has no {file}; "
            f"`git clone https://github.com/OpenGVLab/InternImage` makes one"
        )
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # it is called without `indexing`
    spec = importlib.util.spec_from_file_location(f"internimage_official_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the file ends in .py
    module = importlib.util.module_from_spec(spec)
    with _stubs(checkout / "classification"):
        try:
            spec.loader.exec_module(module)
            return getattr(module, name)
        except Exception as error:  # foreign code, of any version
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise BenchmarkError(f"{name} could not be loaded from '{path}': {reason}") from error


@contextlib.contextmanager
def _stubs(folder: Path) -> Iterator[None]:
    """Context in which the modules that the files import can be imported."""
    packages = types.ModuleType("pkg_resources")
    vars(packages)["get_distribution"] = lambda name: types.SimpleNamespace(version="1.1")
    stubs = {"DCNv3": types.ModuleType("DCNv3"), "pkg_resources": packages, "timm.models.layers": timm.layers}
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path.remove(str(folder))
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        for name in [name for name in sys.modules if name.split(".")[0] == "ops_dcnv3"]:
            del sys.modules[name]  # another checkout has its own
