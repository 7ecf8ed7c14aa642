# SPDX-License-Identifier: MIT
"""The official operator and model, from the user's own checkout of OpenGVLab/InternImage: never a part of this package.

Their files ask for things that they do not use here: the compiled `DCNv3`, `pkg_resources` (gone from setuptools since
82) and `timm.models.layers` (deprecated in timm). Stand-ins serve while the files are imported.
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

import timm.layers
from torch import nn

from .timing import BenchmarkError

NO_CHECKOUT = "the peer 'official' needs your checkout of OpenGVLab/InternImage: --official PATH"
FUNCTION = Path("classification", "ops_dcnv3", "functions", "dcnv3_func.py")
MODEL = Path("classification", "models", "intern_image.py")


def official_function(checkout: Path) -> Callable:
    """The checkout's `dcnv3_core_pytorch`.

    Raises:
        BenchmarkError: The checkout has no such file, or it cannot be imported.
    """
    return _load(checkout, FUNCTION, "dcnv3_core_pytorch")


def official_model(checkout: Path, **arguments) -> nn.Module:
    """The checkout's `InternImage` with its operator in plain torch, for evaluation.

    Raises:
        BenchmarkError: As `official_function`.
    """
    build = _load(checkout, MODEL, "InternImage")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        return build(core_op="DCNv3_pytorch", **arguments).eval()


def _load(checkout: Path, file: Path, name: str):
    path = checkout / file
    if not path.is_file():
        raise BenchmarkError(
            f"'{checkout}' is no checkout of OpenGVLab/InternImage: it has no {file}; "
            f"`git clone https://github.com/OpenGVLab/InternImage` makes one"
        )
    warnings.filterwarnings("ignore", message="torch.meshgrid")  # it calls that in a way that torch warns of
    spec = importlib.util.spec_from_file_location(f"internimage_official_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with _stand_ins(checkout / "classification"):
        try:
            spec.loader.exec_module(module)
            return getattr(module, name)
        except Exception as error:  # foreign code, of any version
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise BenchmarkError(f"{name} could not be had from '{path}': {reason}") from error


@contextlib.contextmanager
def _stand_ins(folder: Path) -> Iterator[None]:
    """What the files import is there inside, and gone after."""
    packages = types.ModuleType("pkg_resources")
    packages.get_distribution = lambda name: types.SimpleNamespace(version="1.1")
    stand_ins = {"DCNv3": types.ModuleType("DCNv3"), "pkg_resources": packages, "timm.models.layers": timm.layers}
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
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
            del sys.modules[name]  # so that another checkout is not served by this one
