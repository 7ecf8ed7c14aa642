# SPDX-License-Identifier: MIT
"""Commands that are killed at a system call that changes a file, at each of them in turn, and then run again.

The end is compared with that of a command that nobody disturbed. `kills/shim.c` does the killing.
"""

import csv
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kills
import pytest
import torch
from runs import listing

from internimage.atomic import PARTIAL
from internimage.convert.convert import check_folder
from internimage.errors import CheckpointError

pytestmark = pytest.mark.skipif(
    kills.COMPILER is None, reason="needs a C compiler (cc, or CC) for a library to preload"
)
SPEEDS = ("images_per_second", "model_images_per_second", "peak_memory")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = kills.Server(tmp_path_factory.mktemp("shim"))
    yield server
    server.close()


def table(text: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in csv.DictReader(io.StringIO(text))]


def content(path: Path, folder: Path):
    """Of a file, without what depends on the clock and on where it stands."""
    if path.is_dir() or path.name == ".metadata":  # which has a number drawn by torch
        return None
    if path.suffix == ".csv" and path.name != "rows.csv":
        return table(path.read_text())
    if path.name == "a.json":
        return {k: v for k, v in json.loads(path.read_text()).items() if k not in SPEEDS}
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        state.get("checksums", {}).pop(".metadata", None)
        return {name: str(value) for name, value in state.items() if name not in ("progress", "random")}
    return path.read_bytes().replace(bytes(folder), b"HERE")


def tree(folder: Path) -> dict:
    return {name: content(folder / name, folder) for name in listing(folder)}


@dataclass
class Case:
    """A command that is killed.

    Args:
        command: Of `kills.Server`.
        before: Commands that were run in the folder before.
        check: Is given the folder after each kill, the one of before and the one of an end that nobody disturbed.
    """

    command: str
    before: tuple[str, ...] = ()
    check: Callable[[Path, Path, Path], None] = lambda here, old, new: None
    quick: int = 1  # places that are tried where there is no time for all
    exact: bool = True  # the same command once more ends the same


def old_or_new(name):
    """A file that is the old one or the new one, or is not there if there was none."""

    def check(here, old, new):
        states = [content(folder / name, folder) if (folder / name).exists() else None for folder in (here, old, new)]
        assert states[0] in states[1:]

    return check


def loads(folder: Path):
    try:
        check_folder(folder)
    except CheckpointError:
        return None
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


def old_new_or_none(here, old, new):
    """A model folder is the old one, the new one, or is refused."""
    found = loads(here / "out")
    assert found is None or found in (loads(old / "out"), loads(new / "out"))


def whole_model(here, old, new):
    """Training that was done has its model under its name before anything else is looked at."""
    if (here / "run" / "model.safetensors").exists():
        old_or_new("run/model.safetensors")(here, old, new)
        assert (here / "run" / "config.json").exists()


def whole_rows(here, old, new):
    """Of a table that others write to as well."""
    text = (here / "rows.csv").read_text() if (here / "rows.csv").exists() else ""
    assert re.fullmatch(f"(a,b\n({'|'.join(ROWS)})*)?", text), text


ROWS = ("0,x{9}\n0,y{9}\n", "1,x{9}\n-1,y{9}\n")  # each two are written at once
CASES = {
    "finetune": Case("finetune", check=whole_model, quick=6),
    "finetune, anew": Case("finetune again", ("finetune",), whole_model, quick=2),
    "convert": Case("convert", check=old_new_or_none),
    "convert, shards replaced": Case("convert again", ("convert shards",), old_new_or_none, quick=4),
    "evaluate": Case("evaluate", check=old_or_new("new/a.json")),
    "evaluate, replaced": Case("evaluate", ("evaluate",), old_or_new("b.csv")),
    "append": Case("append", check=whole_rows, exact=False),
    "shards": Case("shards", quick=2),
}


def prepare(server, case: Case, folder: Path) -> tuple[list[str], Path, Path]:
    """The calls of a command that nobody kills, the folder before it and the one after it."""
    old, new = folder / "old", folder / "new"
    old.mkdir()
    for command in case.before:
        assert server.run(command, old).code == 0
    if case.before:
        (old / "notes.txt").write_text("mine")
    shutil.copytree(old, new)
    whole = server.run(case.command, new)
    assert whole.code == 0, whole.said
    assert not leftovers(new)
    return whole.calls, old, new


def leftovers(folder: Path) -> list[str]:
    return [name for name in listing(folder) if Path(name).name.startswith((PARTIAL, ".internimage"))]


def kill(server, case: Case, old: Path, new: Path, *places: tuple[int, bool]) -> None:
    """Run a command, killed at a place, and again, killed at the next place, and at last to its end."""
    here = old.with_name("here")
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(old, here)
    last = []
    for n, torn in places:
        run = server.run(case.command, here, n, torn)
        if not run.killed:  # the second one had less to do
            break
        last.append(run.calls[-1])
        case.check(here, old, new)
    run = server.run(case.command, here)
    done = run.code == 2 and "overwrite" in run.said  # a result that is there is not replaced without being asked
    assert run.code == 0 or done, f"killed at {last}: {run.said}"
    there, expected = tree(here), tree(new)
    if not case.exact:
        case.check(here, old, new)
        expected["rows.csv"] = there["rows.csv"]
    assert there.keys() == expected.keys(), f"killed at {last}: {run.said}"
    wrong = [name for name in expected if there[name] != expected[name]]
    assert not wrong, f"killed at {last}: {wrong} {run.said}"


def interesting(calls: list[str]) -> list[int]:
    """The first and the last of the calls of each kind on each kind of file."""
    kinds: dict[str, list[int]] = {}
    for n, call in enumerate(calls, 1):
        kinds.setdefault(re.sub(r"-?[0-9a-f]{8,}", "", call), []).append(n)
    return sorted({n for places in kinds.values() for n in (places[0], places[-1])})


def torn_or_not(call: str) -> tuple[bool, ...]:
    return (False, True) if call.startswith("write") else (False,)


@pytest.mark.parametrize("name", CASES)
def test_killed_at_some_calls_the_same_command_ends_the_same(server, tmp_path, name):
    case = CASES[name]
    calls, old, new = prepare(server, case, tmp_path)
    places = interesting(calls)
    for i in range(case.quick):
        n = places[-1 - i * len(places) // case.quick]
        kill(server, case, old, new, (n, torn_or_not(calls[n - 1])[-1]))
    if case.quick > 3:  # and in what mends it
        kill(server, case, old, new, (places[-len(places) // 4], False), (2 * case.quick, True))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_call_the_same_command_ends_the_same(server, tmp_path, name):
    calls, old, new = prepare(server, CASES[name], tmp_path)
    for n, call in enumerate(calls, 1):
        for torn in torn_or_not(call):
            kill(server, CASES[name], old, new, (n, torn))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
def test_killed_again_while_the_first_kill_is_mended(server, tmp_path, name):
    calls, old, new = prepare(server, CASES[name], tmp_path)
    draw = random.Random(0)
    places = interesting(calls)
    for _ in range(30):
        # the start is where the first one is mended
        second = draw.choice((draw.randint(1, 25), draw.choice(places)))
        kill(server, CASES[name], old, new, (draw.choice(places), draw.random() < 0.5), (second, draw.random() < 0.5))
