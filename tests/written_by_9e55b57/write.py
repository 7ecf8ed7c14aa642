# SPDX-License-Identifier: MIT
"""Writes `folders.zip` and `expected.json` with the package of commit 9e55b57 (see README.md).

Runs in that commit only. Called with `cli` it is one command of it, which gets SIGTERM after a step.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import written_by_9e55b57 as inputs  # noqa: E402

COMMIT = "9e55b57"


def cli(last_step: int, arguments: list[str]) -> int:
    """`internimage ARGUMENTS`, with a real SIGTERM to the first process after a step; 0 sends none."""
    from internimage.engine.training_log import TrainingLog

    from internimage.cli import main

    log = TrainingLog.step

    def step(self, number: int, *more) -> None:
        log(self, number, *more)
        if number == last_step and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    TrainingLog.step = step
    return main(arguments)


def run(*arguments, stop: int = 0, processes: int = 1) -> str:
    """A command of that commit; returns what it prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(HERE / "write.py"), "cli", str(stop)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def logits(folder: str) -> list[list[float]]:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).double().eval()
    with torch.no_grad():
        return model(torch.from_numpy(inputs.input_images())).tolist()


def made_up_checkpoint(path: str) -> None:
    """Weights that are not initial values: of those some are zero, and the logits do not depend on others."""
    import timm
    import torch

    torch.manual_seed(7)
    model = timm.create_model("internimage_atto", num_classes=3, **inputs.MODEL_ARGS)
    state = {
        key: value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    torch.save({"model": state}, path)


def write() -> None:
    import numpy
    import PIL
    import timm
    import torch

    import internimage
    from internimage.extension import backend

    source = Path(internimage.__file__).parent.parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, check=True, stdout=subprocess.PIPE, text=True)
    assert head.stdout.startswith(COMMIT), f"{source} is at {head.stdout.strip()}"

    Path(inputs.MODEL).mkdir()
    Path(inputs.MODEL, "config.json").write_text(json.dumps(inputs.CONFIG, indent=2) + "\n")
    checksum = inputs.write_images(Path("images"))

    fsdp = dict(parallel="fsdp")
    run("finetune", *inputs.settings("images", "whole"))
    run("finetune", *inputs.settings("images", "stopped"), stop=inputs.STOPPED - 1)
    run("finetune", *inputs.settings("images", "whole-sharded", **fsdp), processes=2)
    run("finetune", *inputs.settings("images", "stopped-sharded", **fsdp), stop=inputs.STOPPED - 1, processes=2)
    made_up_checkpoint("made-up.pth")
    model_kwargs = [f"{key}={value}" for key, value in inputs.MODEL_ARGS.items()]
    run("convert", "made-up.pth", "converted", "--model", "internimage_atto", "--model-kwargs", *model_kwargs,
        "--shard-size", "30KB", "--verify")  # fmt: skip
    run("evaluate", "--model=whole", "--data=images", "--workers=0", "--per-class", "--json=evaluation.json")
    predictions = run("predict", "--model=whole", *inputs.VALIDATION, "--json", "--topk=3")

    expected = {
        "written_with": {
            "commit": head.stdout.strip(), "python": platform.python_version(), "torch": torch.__version__,
            "timm": timm.__version__, "numpy": numpy.__version__, "pillow": PIL.__version__,
            "machine": platform.machine(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "dcnv3": backend("cpu").name,
        },
        "images_sha256": checksum,
        "evaluation": json.loads(Path("evaluation.json").read_text()),
        "predictions": [json.loads(line) for line in predictions.splitlines()],
        "logits": {folder: logits(folder) for folder in ("whole", "whole-sharded", "converted")},
    }  # fmt: skip
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    with zipfile.ZipFile(HERE / "folders.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for folder in (inputs.MODEL, "whole", "whole-sharded", "stopped", "stopped-sharded", "converted"):
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and not (folder.startswith("whole") and "checkpoints" in path.parts):
                    archive.write(path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["cli"]:
        sys.exit(cli(int(sys.argv[2]), sys.argv[3:]))
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        write()
