# SPDX-License-Identifier: MIT
"""InternImage for timm: the DCNv3 operator and the models built on it.

Importing this package registers the models, so that `timm.create_model("internimage_tiny.ogvl_in1k")` finds them.
"""

import importlib
import sys
from types import ModuleType

from .errors import CheckpointError

__version__ = "0.1.0"

__all__ = ["CheckpointError", "__version__", "list_models", "models", "ops"]


def _is_command_starting() -> bool:
    """Whether the package is being imported by the command line, `internimage` or `python -m internimage`.

    Only then are torch and timm imported later, so that `--help` and errors in arguments do not wait for them.
    """
    command = sys.modules.get("internimage_command")
    if command is not None and getattr(command, "starting", False):
        return True
    # with `python -m MODULE`, sys.argv[0] is "-m" until the module is found, which imports its package; orig_argv has
    # the name of the module
    arguments = sys.orig_argv
    is_finding_module = sys.argv[:1] == ["-m"] and "-m" in arguments
    return is_finding_module and arguments[arguments.index("-m") + 1 :][:1] == [__name__]


if not _is_command_starting():
    from . import models, ops  # noqa: E402


def __getattr__(name: str) -> ModuleType:
    if name in ("models", "ops"):  # in the command line, not imported yet
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def list_models(pretrained: bool = False) -> list[str]:
    """The names of the models for `timm.create_model`.

    Args:
        pretrained: List released weights, as `name.tag`, instead of architectures.
    """
    from . import models  # noqa: F401  (registers them)
    from .models import families

    return families.list_models(pretrained)
