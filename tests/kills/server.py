# SPDX-License-Identifier: MIT
"""Run by `kills.Server` with shim.c preloaded: commands of ours in forked processes that are killed on the way.

Reads a request a line from stdin and answers each in a line. Everything is imported once, and each command runs in a
fork, which takes a hundredth of a start.
"""

import json
import os
import sys
import tempfile
from ctypes import CDLL, c_char_p, c_int, c_long
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm  # noqa: E402
import torch  # noqa: E402
from runs import write_noise  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from torch import nn  # noqa: E402

from internimage import files, locks  # noqa: E402, F401
from internimage.benchmark.timing import append_csv  # noqa: E402
from internimage.cli import convert, evaluate, finetune, main  # noqa: E402, F401
from internimage.engine import checkpoint  # noqa: E402
from internimage.engine.create import data_config  # noqa: E402
from internimage.engine.run_state import RunState  # noqa: E402
from internimage.engine.world import World  # noqa: E402
from internimage.models.timm_folder import save_model  # noqa: E402


class Tiny(nn.Module):
    """Stands in for a model: its checkpoints have few tensors, and its steps take no time."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, **_) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 4
        self.conv, self.norm = nn.Conv2d(in_chans, 4, 3, 4, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).mean((-1, -2)))


default_cfgs = generate_default_cfgs({"kills_tiny": dict(classifier="head", first_conv="conv")})


@register_model
def kills_tiny(pretrained: bool = False, **kwargs) -> Tiny:
    return build_model_with_cfg(Tiny, "kills_tiny", pretrained, **kwargs)


# ---- the commands; each is given a folder to work in


def run_finetune(folder: Path, *more: str) -> int:
    return main(
        ["finetune", "model=kills_tiny", "pretrained=false", f"data={DATA}", f"output={folder / 'run'}", "img_size=32",
         "epochs=3", "batch_size=4", "workers=0", "lr=0.003", "device=cpu", *more]
    )  # fmt: skip


def run_convert(folder: Path, source: str, *more: str) -> int:
    return main(["convert", str(WORK / source), str(folder / "out"), "--model", "internimage_atto", *more])


def run_evaluate(folder: Path) -> int:
    return main(
        ["evaluate", "--model", str(MODEL), "--data", str(DATA / "val"), "--workers", "0", "--device", "cpu", "--json",
         str(folder / "new" / "a.json"), "--csv", str(folder / "b.csv")]
    )  # fmt: skip


def run_append(folder: Path) -> int:
    for i in range(2):
        append_csv(folder / "rows.csv", [{"a": i, "b": "x" * 9}, {"a": -i, "b": "y" * 9}])
    return 0


def run_shards(folder: Path) -> int:
    """Sharded checkpoints of four steps, as `Trainer` saves them, from where an earlier run got to."""
    folder = folder / "checkpoints"
    torch.manual_seed(0)
    model = Tiny(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    data = {"samples": 8, "classes": ["0", "1"], "images": None}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = RunState(World(), model, None, optimizer, None, scaler, True, data, lambda before, now: None)
    checkpoint.recover(folder, state.load(folder))
    while state.progress.step < 4:
        optimizer.zero_grad()
        model(torch.ones(2, 3, 8, 8) * state.progress.step).square().sum().backward()
        optimizer.step()
        state.progress.step += 1
        state.save(folder)
    return 0


COMMANDS = {
    "finetune": run_finetune,
    "finetune again": lambda folder: run_finetune(folder, "overwrite=true", "lr=0.002"),
    "convert": lambda folder: run_convert(folder, "a.pth"),
    "convert again": lambda folder: run_convert(folder, "a.pth", "--overwrite"),
    "convert shards": lambda folder: run_convert(folder, "b.pth", "--shard-size", "1MB"),
    "evaluate": run_evaluate,
    "append": run_append,
    "shards": run_shards,
}  # fmt: skip


# ---- the server


def run(name: str, folder: Path, n: int = 0, torn: bool = False) -> dict:
    """Run a command in a fork, killed at its n-th call that changes something below the folder."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as calls:
        child = os.fork()
        if not child:
            code = 99
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                torch.set_num_threads(1)  # makes the pool anew; two threads of a backward pass at once would fail at it
                SHIM.arm(os.fsencode(folder), n, torn, calls.fileno())
                code = COMMANDS[name](folder)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                SHIM.arm(b"", 0, 0, -1)
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        for file in (said, calls):
            file.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "calls": calls.read().decode().splitlines(),
            "said": said.read().decode(errors="replace"),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)  # before the forks; threads of a pool do not survive them
    SHIM = CDLL(os.environ["LD_PRELOAD"])
    SHIM.arm.argtypes = [c_char_p, c_long, c_long, c_int]
    with tempfile.TemporaryDirectory() as work:
        WORK = Path(work)
        DATA = write_noise(WORK / "data", train=(4, 4), val=(2, 2))
        for seed, weights in enumerate(("a.pth", "b.pth")):
            torch.manual_seed(seed)
            torch.save(timm.create_model("internimage_atto", num_classes=3).state_dict(), WORK / weights)
        MODEL = WORK / "model"
        MODEL.mkdir()
        tiny = timm.create_model("kills_tiny", num_classes=2)
        save_model(tiny, MODEL, ["0", "1"], data_config(tiny, 32))
        print("ready", flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(run(request["name"], Path(request["folder"]), request["n"], request["torn"])), flush=True)
