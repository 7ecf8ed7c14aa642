# SPDX-License-Identifier: MIT
"""Several processes, started by torchrun, do what one does: the same losses, weights and counts."""

import csv
import json
from pathlib import Path

import double
import numpy as np
import pytest
import torch
from double import bound, in_double
from runs import losses, torchrun, write_noise
from safetensors.torch import load_file

from internimage.cli import main

# clip_grad is small, so that gradients are clipped; drop path, mixing and averaging are on
LR, STEPS = 0.001, 10
SETTINGS = [
    "model=internimage_atto", "pretrained=false", "img_size=32", "epochs=2", "batch_size=8", "workers=0", f"lr={LR}",
    "warmup_epochs=1", "drop_path=0.2", "mixup=0.4", "cutmix=0.5", "clip_grad=0.5", "device=cpu", "report=false",
    "ema_decay=0.9",
]  # fmt: skip
SHARDED = ["parallel=fsdp", "grad_checkpointing=true"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """42 images to train on, of which some cannot be read, five steps an epoch; 17 to validate."""
    folder = write_noise(tmp_path_factory.mktemp("noise"), train=(14, 14, 14), val=(5, 5, 7))
    for file in damaged(folder):
        file.write_bytes(b"nothing")
    return folder


def damaged(folder):
    """So many that each of two processes meets some."""
    return [folder / "train" / str(label) / f"{i}.png" for label in range(3) for i in (3, 6, 10)]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folders of the same run, in float64: in one process, in two with DDP, in two with FSDP."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = ["finetune", f"data={data}", *SETTINGS]
    with in_double():
        assert main([*arguments, f"output={folder / 'one'}"]) == 0
    result = torchrun(2, double.__file__, *arguments, f"output={folder / 'ddp'}")
    (folder / "ddp.stdout").write_text(result.stdout), (folder / "ddp.stderr").write_text(result.stderr)
    torchrun(2, double.__file__, *arguments, f"output={folder / 'fsdp'}", *SHARDED)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(runs, kind):
    assert len(losses(runs / "one")) == STEPS
    np.testing.assert_allclose(losses(runs / kind), losses(runs / "one"), rtol=0, atol=bound(STEPS, LR))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_end_with_the_weights_of_one(runs, kind):
    """The averaged weights, with batch norm's statistics."""
    one, two = load_file(runs / "one" / "model.safetensors"), load_file(runs / kind / "model.safetensors")
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype in (torch.float64, torch.int64), key
        torch.testing.assert_close(
            two[key], one[key], rtol=0, atol=bound(STEPS, LR), msg=lambda text, key=key: f"{key}: {text}"
        )
    configs = [json.loads((runs / name / "config.json").read_text()) for name in ("one", kind)]
    assert configs[0] == configs[1]


def test_two_processes_validate_like_one(runs):
    rows = [list(csv.DictReader((runs / name / "log.csv").open(newline=""))) for name in ("one", "ddp", "fsdp")]
    for a, *others in zip(*rows, strict=True):
        for b in others:
            assert a["val_top1"] == b["val_top1"]
            # six digits are printed, which may be rounded either way
            assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-5, abs=0)


def test_one_of_two_processes_speaks_for_both(data, runs):
    """Of images that cannot be read, too: each is read by one process alone."""
    lines = (runs / "ddp.stderr").read_text().splitlines()
    for file in damaged(data):
        assert sum(line.startswith(f"'{file}' cannot be read (not an image)") for line in lines) == 1, lines
    told = [line.split(": ")[0] for line in lines if line.startswith("epoch ")]
    assert told == ["epoch 1/2", "epoch 2/2"]
    out = (runs / "ddp.stdout").read_text()
    assert [line.split(" ")[0] for line in out.splitlines()] == ["top-1", "model:"]
    assert " on 17 validation images" in out


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_batch_norm_of_two_processes_is_that_of_the_whole_batch(tmp_path, dtype):
    """Outputs, gradients and statistics against torch's BatchNorm2d on both halves at once."""
    script = tmp_path / "norm.py"
    script.write_text(
        """
import sys
import torch
from torch import nn
from internimage.engine.world import join, leave
from internimage.layers.sync_batch_norm import synchronize_batch_norm
world = join(torch.device("cpu"))
torch.manual_seed(0)
dtype = getattr(torch, sys.argv[1])
# a mean of 30 standard deviations: numbers of 110 rounded to 110 eps change normalized ones by 110 / 3 eps, and sums of
# 72 of them by 72 times as much
tolerance = 72 * 110 / 3 * torch.finfo(dtype).eps
x = torch.randn(6, 5, 3, 4, dtype=torch.float64).to(dtype) * 3 + 100
grad = torch.randn(6, 5, 3, 4, dtype=dtype)
whole, half = nn.BatchNorm2d(5, dtype=dtype), nn.Sequential(nn.BatchNorm2d(5, dtype=dtype))
close = lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
with torch.no_grad():
    for norm in (whole, half[0]):
        norm.weight.copy_(torch.linspace(0.5, 2, 5)), norm.bias.copy_(torch.linspace(-1, 1, 5))
synchronize_batch_norm(half, torch.device("cpu"))
mine = slice(3 * world.rank, 3 * world.rank + 3)
a, b = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
for _ in range(2):
    expected, found = whole(a), half(b)
expected.backward(grad), found.backward(grad[mine])
close(found, expected[mine])
close(b.grad, a.grad[mine])
close(world.sum(half[0].weight.grad.clone()), whole.weight.grad)
close(half[0].running_mean, whole.running_mean)
close(half[0].running_var, whole.running_var)
assert half[0].num_batches_tracked == 2
whole.eval(), half.eval()
close(half(x), whole(x))
leave()
"""
    )
    torchrun(2, script, dtype)


STOP = """
import sys
sys.path.insert(0, TESTS)
from double import in_double
from internimage.cli import main
from internimage.engine import trainer
run = trainer.Trainer.run
trainer.Trainer.run = lambda self, stop, progress=True: run(
    self, lambda: self.world.rank == 1 and self.progress.step + 1 >= 7, progress
)
with in_double():
    sys.exit(main(sys.argv[1:]))
""".replace("TESTS", repr(str(Path(__file__).parent)))


@pytest.mark.slow
def test_a_sharded_run_stops_and_resumes_bitwise(data, runs, tmp_path):
    """One of the processes is asked to stop: both save their shards, and go on from them. In float32 and bfloat16 the
    sharded runs of test_faults.py do so."""
    (tmp_path / "stop.py").write_text(STOP)
    arguments = ["finetune", f"data={data}", *SETTINGS, f"output={tmp_path / 'run'}", *SHARDED]
    result = torchrun(2, tmp_path / "stop.py", *arguments)
    assert f"saved after step 7 of {STEPS}" in result.stdout
    saved = tmp_path / "run" / "checkpoints" / "step-000000007"
    assert {".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"} == {file.name for file in saved.iterdir()}
    result = torchrun(2, double.__file__, *arguments)
    assert f"step 7 of {STEPS}" in result.stderr
    assert losses(tmp_path / "run") == losses(runs / "fsdp")
    whole, parts = (load_file(run / "model.safetensors") for run in (runs / "fsdp", tmp_path / "run"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.slow
def test_sharded_training_in_bfloat16_and_with_frozen_stages(data, runs, tmp_path):
    arguments = ["-m", "internimage", "finetune", f"data={data}", *SETTINGS, "parallel=fsdp", "precision=bfloat16"]
    torchrun(2, *arguments, f"output={tmp_path / 'low'}")
    # the same run, coarsely: the first loss, before any step, to the eight bits of ten rounded layers, and the last one
    # below it, as of the run in float64
    low, one = losses(tmp_path / "low"), losses(runs / "one")
    assert low[0] == pytest.approx(one[0], rel=10 * 2**-8)
    assert (np.mean(low[-5:]) < np.mean(low[:5])) == (np.mean(one[-5:]) < np.mean(one[:5]))
    torchrun(2, *arguments, f"output={tmp_path / 'frozen'}", "freeze=2", "accumulate=2")
    weights = load_file(tmp_path / "frozen" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_processes_that_do_not_fit_are_refused_once(data, tmp_path):
    result = torchrun(
        2, "-m", "internimage", "finetune", f"data={data}", *SETTINGS, f"output={tmp_path / 'x'}", "batch_size=9",
        "mixup=0", "cutmix=0", check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "'batch_size' must divide by 2 processes times accumulate=1, got 9" in result.stderr
    assert result.stderr.count("internimage finetune: error:") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("processes", [3])
def test_evaluate_counts_every_image_once(data, runs, tmp_path, processes):
    """17 images, one of them damaged, over three processes: no padding is counted and nothing is left out."""
    folder = tmp_path / "val"
    for file in (data / "val").rglob("*.png"):
        target = folder / file.relative_to(data / "val")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (folder / "1" / "3.png").write_bytes(b"nothing")
    arguments = [
        "evaluate",
        "--model",
        runs / "one",
        "--data",
        folder,
        "--batch-size",
        2,
        "--workers",
        0,
        "--per-class",
    ]
    assert main([*map(str, arguments), "--json", str(tmp_path / "one.json")]) == 0
    torchrun(processes, "-m", "internimage", *arguments, "--json", tmp_path / "many.json")
    one, many = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "many.json"))
    assert (one["images"], one["skipped"], many["processes"]) == (16, 1, processes)
    for key in ("images", "skipped", "top1", "top5", "per_class", "skipped_files"):
        assert one[key] == many[key], key
    assert one["loss"] == pytest.approx(many["loss"], abs=1e-5)
