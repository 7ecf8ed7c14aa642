# SPDX-License-Identifier: MIT
"""The folder of a run: the names of its files, and when it may be written to.

A run is finished if its folder has the model and no file UNFINISHED. The model is written as soon as training is done;
a run that is killed in its last validation or its report resumes there.

Only what a run has written is ever removed, by name, and only where the folder is known to be a run's.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import yaml

from ..atomic import is_leftover, recover
from ..config import ConfigError, from_dict, parse_settings, read_text
from ..files import check_writable, write_text
from ..locks import LOCK_FILE, hold
from ..weights.file_names import CONFIG, WEIGHTS
from .checkpoint import checkpoints, remove_all, remove_if_empty
from .config import RunConfig, dump, settings_of

CONFIG_FILE, REPORT_FILE = "finetune.yaml", "report.html"
LOG_FILE, STEPS_FILE = "log.csv", "steps.csv"
UNFINISHED = ".internimage-unfinished"  # beside a model whose run has not validated or reported yet
CHECKPOINTS, BAD_BATCHES, TENSORBOARD = "checkpoints", "bad-batches", "tensorboard"
_OURS = {BAD_BATCHES: r"step-\d{9}-process-\d+\.pt", TENSORBOARD: r"events\.out\.tfevents\..+"}


def check_output(config: RunConfig) -> bool:
    """Look at the run's folder and write nothing; a new result is not mixed with an old one.

    Returns:
        Whether it holds an unfinished run of these settings to resume.

    Raises:
        ConfigError: It holds a finished result, an unfinished run of other settings, the model to start from, or
            files that are not ours.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"'{output}' is a file; 'output' must name a folder")
    check_writable(output / LOCK_FILE)  # which is the first to be written
    if not output.is_dir() or not _entries(output):
        config.check_schedule()
        return False
    if not (output / CONFIG_FILE).is_file():
        raise ConfigError(f"the folder '{output}' is not empty and not ours")
    resumes = not is_finished(output) and config.resume and bool(checkpoints(output / CHECKPOINTS))
    if (output / WEIGHTS).is_file() and not config.overwrite and not resumes:
        raise ConfigError(f"the folder '{output}' holds an earlier result; overwrite=true replaces it")
    for name, value in config.starts_from.items():
        start = Path(value.removeprefix("local-dir:")).resolve() if value else None
        if start is not None and start.exists() and output.resolve() in (start, *start.parents):
            raise ConfigError(f"'{name}' is inside '{output}', which this run would replace: set another output")
    if resumes:
        _check_same(config, output)
        return True
    if not _is_run(output, type(config)):
        raise ConfigError(
            f"the folder '{output}' is not empty, and its {CONFIG_FILE} is not one that finetune has written for this "
            f"folder, so nothing in it is replaced: name another output, or empty it yourself"
        )
    config.check_schedule()
    return False


@contextmanager
def own_output(config: RunConfig) -> Iterator[None]:
    """Context in which the run's folder is prepared, and locked for this run.

    Raises:
        ConfigError: As `check_output`.
        internimage.locks.LockedError: Another run writes there.
    """
    output = Path(config.output)
    Path(os.path.realpath(output)).mkdir(parents=True, exist_ok=True)  # a link may lead to what is not there yet
    with hold(output):
        prepare_output(config)
        yield


def prepare_output(config: RunConfig) -> None:
    """Prepare the run's folder: removes an earlier run unless this one resumes it.

    Raises:
        ConfigError: As `check_output`.
    """
    output = Path(config.output)
    resumes = check_output(config)
    if output.is_dir():
        for folder in (output, output / BAD_BATCHES):
            recover(folder, ours=True)
        if resumes:
            return
        _clear(output)
    write_text(output / CONFIG_FILE, f"{_mark(output)}\n{dump(config)}")


def _entries(output: Path) -> list[str]:
    """Names in a folder, without what a killed process may have left."""
    return [name for name in os.listdir(output) if not is_leftover(name)]


def is_finished(output: Path) -> bool:
    """Whether a folder holds the result of a finished run."""
    return (output / WEIGHTS).is_file() and not (output / UNFINISHED).exists()


def begin_result(output: Path) -> None:
    """To be called before the model is written."""
    write_text(output / UNFINISHED, "Training is done. The same command validates and reports.\n")


def end_result(output: Path) -> None:
    """To be called when the run is finished."""
    (output / UNFINISHED).unlink(missing_ok=True)


def remove_result(output: Path) -> None:
    """Remove a model that turned out to be useless, and the files that announce it."""
    for file in (WEIGHTS, CONFIG, UNFINISHED):
        (output / file).unlink(missing_ok=True)


def _mark(output: Path) -> str:
    """The first line of a run's settings. It has the folder's name: a copy proves nothing about another folder."""
    return f"# written by `internimage finetune` for its folder {json.dumps(output.resolve().name)}"


def _is_run(output: Path, cls: type[RunConfig]) -> bool:
    """Whether a folder's settings prove that `finetune` made it."""
    try:
        text = read_text(output / CONFIG_FILE)
        if text.startswith(_mark(output) + "\n"):
            return True
        # before there was that line: all the settings that there were as yaml writes them, which no recipe is
        values = parse_settings(text, "it", cls)
        return (
            len(values) >= 48
            and values.keys() <= {field.name for field in fields(cls)}
            and yaml.safe_dump(values, sort_keys=False) == text
            and Path(os.path.abspath(values["output"])).name == output.resolve().name
        )
    except (ConfigError, KeyError, TypeError):  # of an output that is no path, or is not there
        return False


def _read_config(path: Path, cls: type[RunConfig]) -> RunConfig:
    try:
        return from_dict(cls, parse_settings(read_text(path), "it", cls))
    except ConfigError as error:
        raise ConfigError(
            f"'{path}' cannot be read ({error}), so the run cannot resume: put the file back as it was, or name "
            f"another output"
        ) from error


def _check_same(config: RunConfig, output: Path) -> None:
    earlier = _read_config(output / CONFIG_FILE, type(config))
    compared = [field.name for field in settings_of(type(config)) if not field.metadata["free"]]
    pairs = [(name, getattr(earlier, name), getattr(config, name)) for name in compared]
    differ = [f"{name} was {before}, now {now}" for name, before, now in pairs if before != now]
    if differ:
        raise ConfigError(
            f"the folder '{output}' holds an unfinished run of other settings ({'; '.join(differ)}): set them back to "
            f"resume it, or resume=false to start over"
        )


def _clear(output: Path) -> None:
    """Remove an earlier run; what makes it count as finished goes after its checkpoints, so a kill cannot mix runs."""
    remove_all(output / CHECKPOINTS)
    for folder, names in _OURS.items():
        if (output / folder).is_dir():
            for file in list((output / folder).iterdir()):
                if re.fullmatch(names, file.name):
                    file.unlink()
            remove_if_empty(output / folder)
    for name in (LOG_FILE, STEPS_FILE, REPORT_FILE):
        (output / name).unlink(missing_ok=True)
    remove_result(output)
