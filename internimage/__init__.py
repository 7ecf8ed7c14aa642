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
    """Whether the command line imports the package: `internimage` or `python -m internimage`, and nothing else.

    Only then torch and timm are left for later, so that `--help` and wrong arguments do not wait for them.
    """
    command = sys.modules.get("internimage_command")
    if command is not None and getattr(command, "starting", False):
        return True
    # Python sets sys.argv[0] to "-m" while it looks for the module that it will run, and to a path before it runs it;
    # orig_argv tells whose module that is: `python -m pytest` looks for another
    arguments = sys.orig_argv
    looking = sys.argv[:1] == ["-m"] and "-m" in arguments
    return looking and arguments[arguments.index("-m") + 1 :][:1] == [__name__]


if not _is_command_starting():
    from . import models, ops  # noqa: E402


def __getattr__(name: str) -> ModuleType:
    if name in ("models", "ops"):  # not there yet, in the command line
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def list_models(pretrained: bool = False) -> list[str]:
    """Names for `timm.create_model`.

    Args:
        pretrained: The released weights, as `name.tag`; else the architectures.
    """
    from . import models  # noqa: F401  (registers them)
    from .models import families

    return families.list_models(pretrained)
