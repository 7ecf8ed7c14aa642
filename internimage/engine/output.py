# SPDX-License-Identifier: MIT
"""The folder of a run: the names of its files, and when it may be written to."""

import shutil
from dataclasses import asdict
from pathlib import Path

import yaml

from ..files import write_text
from .checkpoint import checkpoints
from .config import ConfigError, dump, from_dict
from .settings import FinetuneConfig

CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE = "finetune.yaml", "model.safetensors", "report.html"
LOG_FILE, STEPS_FILE = "log.csv", "steps.csv"
CHECKPOINTS, BAD_BATCHES = "checkpoints", "bad-batches"

# may differ between a run and its continuation: where and how, not what is computed
_FREE = ("output", "overwrite", "resume", "workers", "device", "tensorboard", "report", "data",
         "checkpoint_every", "compile", "grad_checkpointing", "nan_limit")  # fmt: skip


def check_output(config: FinetuneConfig) -> bool:
    """Look at the result's folder and write nothing; a new result is not mixed with an old one.

    Returns:
        Whether it holds an unfinished run of these settings to go on with.

    Raises:
        ConfigError: It holds a finished result, an unfinished run of other settings, the model to start from, or what
            is not ours.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"'{output}' is a file; 'output' must name a folder")
    if not output.is_dir() or not any(output.iterdir()):
        config.check_schedule()
        return False
    if not (output / CONFIG_FILE).is_file():
        raise ConfigError(f"the folder '{output}' is not empty and not ours")
    if (output / WEIGHTS_FILE).is_file() and not config.overwrite:
        raise ConfigError(f"the folder '{output}' holds an earlier result; overwrite=true replaces it")
    for name in ("model", "checkpoint"):
        start = getattr(config, name)
        start = start and Path(start.removeprefix("local-dir:")).resolve()
        if start and start.exists() and output.resolve() in (start, *start.parents):
            raise ConfigError(f"'{name}' stands in '{output}', which this run would replace: set another output")
    if not (output / WEIGHTS_FILE).is_file() and config.resume and checkpoints(output / CHECKPOINTS):
        _check_same(config, output)
        return True
    config.check_schedule()
    return False


def prepare_output(config: FinetuneConfig) -> None:
    """Make the result's folder ready: removes an earlier run unless that is gone on with.

    Raises:
        ConfigError: As `check_output`.
    """
    output = Path(config.output)
    if check_output(config):
        return
    if output.is_dir():
        _clear(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / CONFIG_FILE, dump(config))


def _check_same(config: FinetuneConfig, output: Path) -> None:
    try:
        earlier = asdict(from_dict(FinetuneConfig, yaml.safe_load((output / CONFIG_FILE).read_text(encoding="utf-8"))))
    except (ConfigError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise ConfigError(f"'{output / CONFIG_FILE}' cannot be read, so the run cannot go on: {error}") from error
    differ = [f"{k} was {earlier[k]}, now {v}" for k, v in asdict(config).items() if k not in _FREE and earlier[k] != v]
    if differ:
        raise ConfigError(
            f"the folder '{output}' holds an unfinished run of other settings ({'; '.join(differ)}): set them back to "
            f"go on with it, or resume=false to begin anew"
        )


def _clear(output: Path) -> None:
    """Remove an earlier run; what makes it count as finished goes after its checkpoints, so a kill cannot mix runs."""
    for folder in (CHECKPOINTS, BAD_BATCHES, "tensorboard"):
        shutil.rmtree(output / folder, ignore_errors=True)
    for file in (LOG_FILE, STEPS_FILE, REPORT_FILE, "config.json", WEIGHTS_FILE):
        (output / file).unlink(missing_ok=True)
