# SPDX-License-Identifier: MIT
"""The command line, run as a user runs it: what it prints, writes and returns, and what it says to bad input."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import internimage
from internimage.cli import main
from internimage.cli import predict as predict_module

SIZE = 16
COLORS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def write_colors(folder, per_class, shades=(0, 40)):
    """Folders of images in one color each, which a few steps learn to classify."""
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            shade = shades[0] + (shades[1] - shades[0]) * i // per_class
            image = Image.new("RGB", (SIZE, SIZE), tuple(abs(c - shade) for c in color))
            image.save(folder / name / f"{i:03d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colors")
    write_colors(folder / "train", 16)
    write_colors(folder / "val", 5, shades=(5, 30))
    return folder


SETTINGS = [
    "model=internimage_atto", "pretrained=false", "img_size=32", "epochs=6", "batch_size=16", "workers=0", "lr=0.003",
    "warmup_epochs=1", "color_jitter=0", "drop_path=0", "scale_min=0.8",
]  # fmt: skip
ONE_EPOCH = ["epochs=1", "warmup_epochs=0"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished finetune run, which most tests start from."""
    folder = tmp_path_factory.mktemp("runs") / "colors"
    assert main(["finetune", f"data={data}", f"output={folder}", *SETTINGS]) == 0
    return folder


def fails(capsys, *arguments, status=2):
    """The message of a command that must fail with a clear line and without a traceback."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as error:  # argparse
        code = error.code
    captured = capsys.readouterr()
    assert code == status
    assert "Traceback" not in captured.err
    return captured.err


def evaluate(run, data, *more):
    return main(["evaluate", "--model", str(run), "--data", str(data), "--workers", "0", *map(str, more)])


# ---- finetune


def test_finetune_learns_and_writes_everything(run, data):
    assert {file.name for file in run.iterdir()} == {
        "model.safetensors", "config.json", "finetune.yaml", "log.csv", "steps.csv", "report.html", "checkpoints",
    }  # fmt: skip
    assert [file.name for file in sorted((run / "checkpoints").iterdir())] == ["step-000000015.pt", "step-000000018.pt"]
    rows = list(csv.DictReader((run / "log.csv").open()))
    assert len(rows) == 6
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[-1]["val_top1"]) == 100.0
    config = json.loads((run / "config.json").read_text())
    assert config["architecture"] == "internimage_atto"
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["crop_pct"] == 1.0
    assert "num_classes" not in config["model_args"]  # transformers would pass it twice


def test_timm_loads_the_result(run):
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert model.num_classes == 3
    saved = load_file(run / "model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, saved[key]), key
    path = str(run / "model.safetensors")
    same = timm.create_model(
        "internimage_atto", pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(file=path, num_classes=3)
    )
    assert torch.equal(same.head.weight, model.head.weight)


def test_finetune_same_seed_same_weights_other_seed_others(data, tmp_path):
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = [*SETTINGS, *ONE_EPOCH, f"seed={seed}", "eval_every=0"]
        assert main(["finetune", f"data={data}", f"output={tmp_path / name}", *settings]) == 0
        results.append(load_file(tmp_path / name / "model.safetensors"))
    same = [torch.equal(results[0][key], results[1][key]) for key in results[0]]
    other = [torch.equal(results[0][key], results[2][key]) for key in results[0]]
    assert all(same)
    assert not all(other)


@pytest.mark.parametrize(
    "more",
    [
        ["mixup=0.5", "cutmix=0.5"],
        ["ema_decay=0.9", "precision=bfloat16"],
        ["layer_decay=0.7", "auto_augment=rand-m5", "random_erasing=0.2", "grad_checkpointing=true"],
        ["in_chans=1", "workers=2", "opt=sgd", "sched=none", "clip_grad=null"],
    ],
    ids=lambda more: more[0].split("=")[0],
)
def test_finetune_options(data, tmp_path, more, capsys):
    output = tmp_path / "run"
    assert main(["finetune", f"data={data}", f"output={output}", *SETTINGS, *ONE_EPOCH, *more]) == 0
    assert evaluate(output, data) == 0
    assert "top-1" in capsys.readouterr().out


def test_finetune_from_own_weights(run, data, tmp_path):
    """A second run on other classes starts from the first one's backbone, with a new classifier."""
    output = tmp_path / "second"
    (tmp_path / "data" / "train").mkdir(parents=True)
    for name in ("red", "green"):
        os.symlink(data / "train" / name, tmp_path / "data" / "train" / name)
    settings = ["pretrained=true", f"model={run}", "lr=1e-12", *ONE_EPOCH, "weight_decay=0", "min_lr=0"]
    assert main(["finetune", f"data={tmp_path / 'data'}", f"output={output}", *SETTINGS, *settings]) == 0
    first, second = load_file(run / "model.safetensors"), load_file(output / "model.safetensors")
    torch.testing.assert_close(
        first["levels.2.blocks.1.mlp.fc1.weight"], second["levels.2.blocks.1.mlp.fc1.weight"], rtol=1e-5, atol=1e-6
    )
    assert second["head.weight"].shape[0] == 2


def test_finetune_recipe_and_overrides(data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join(["lr: 1e-3", *(s.replace("=", ": ") for s in SETTINGS if not s.startswith("lr"))]))
    output = tmp_path / "run"
    assert main(["finetune", str(recipe), f"data={data}", f"output={output}", *ONE_EPOCH]) == 0
    resolved = (output / "finetune.yaml").read_text()
    assert "epochs: 1\n" in resolved and "lr: 0.001\n" in resolved and "img_size: 32\n" in resolved


def test_finetune_refusals(data, run, tmp_path, capsys):
    out = f"output={tmp_path / 'new'}"
    assert "did you mean 'epochs'" in fails(capsys, "finetune", f"data={data}", out, "epoch=3")
    assert "'epochs' must be a whole number, got 'many'" in fails(
        capsys, "finetune", f"data={data}", out, "epochs=many"
    )
    assert "'pretrained' must be true or false" in fails(capsys, "finetune", f"data={data}", out, "pretrained=3")
    assert "missing: data=..." in fails(capsys, "finetune", out)
    assert "there is no recipe" in fails(capsys, "finetune", tmp_path / "none.yaml", f"data={data}", out)
    assert "no data at" in fails(capsys, "finetune", f"data={tmp_path / 'none'}", out)
    assert "batch_size" in fails(capsys, "finetune", f"data={data}", out, *SETTINGS, "batch_size=1000")
    assert "must be even" in fails(capsys, "finetune", f"data={data}", out, *SETTINGS, "batch_size=3", "mixup=1.0")
    assert "did you mean internimage_tiny" in fails(
        capsys, "finetune", f"data={data}", out, *SETTINGS, "model=internimage_tinny"
    )
    assert "earlier result" in fails(capsys, "finetune", f"data={data}", f"output={run}", *SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    message = fails(capsys, "finetune", f"data={data}", f"output={tmp_path / 'mine'}", *SETTINGS, "overwrite=true")
    assert "not empty and not ours" in message
    assert "device" in fails(capsys, "finetune", f"data={data}", out, *SETTINGS, "device=abacus")
    assert not (tmp_path / "new").exists(), "something was written before the input was checked"


def test_finetune_stops_at_nan(data, tmp_path, capsys):
    message = fails(
        capsys, "finetune", f"data={data}", f"output={tmp_path / 'run'}", *SETTINGS, "lr=1e30", "clip_grad=null",
        "warmup_epochs=0", "opt=sgd",
    )  # fmt: skip
    # which of the two is seen first depends on the machine's rounding: losses, or weights at the end of an epoch
    assert "the loss is" in message or "training diverged" in message
    assert "smaller lr than 1e+30" in message
    assert not (tmp_path / "run" / "model.safetensors").exists()


# ---- evaluate


def test_evaluate_counts(run, data, tmp_path, capsys):
    report, table = tmp_path / "out" / "report.json", tmp_path / "report.csv"
    assert evaluate(run, data, "--json", report, "--csv", table, "--per-class", "--batch-size", 4) == 0
    out = capsys.readouterr().out
    assert "top-1 100.00 %" in out and "15 images at 32 px" in out
    result = json.loads(report.read_text())
    assert (result["images"], result["skipped"], result["top1"], result["top5"]) == (15, 0, 100.0, 100.0)
    assert [entry["class"] for entry in result["per_class"]] == ["blue", "green", "red"]
    assert [entry["images"] for entry in result["per_class"]] == [5, 5, 5]
    assert result["published_top1"] is None
    (row,) = csv.DictReader(table.open())
    assert float(row["top1"]) == 100.0


def test_evaluate_agrees_with_a_loop_of_its_own(run, data, tmp_path):
    """On images that the model does not get right: against timm's transform and a plain loop."""
    folder = tmp_path / "noise"
    generator = torch.Generator().manual_seed(0)
    for name in COLORS:
        (folder / name).mkdir(parents=True)
        for i in range(7):
            pixels = (torch.rand(20, 31, 3, generator=generator) * 255).byte().numpy()
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    report = tmp_path / "report.json"
    assert evaluate(run, folder, "--json", report, "--batch-size", 4) == 0
    result = json.loads(report.read_text())

    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    transform = timm.data.create_transform(
        input_size=(3, 32, 32), interpolation="bicubic", crop_pct=1.0, mean=model.pretrained_cfg["mean"],
        std=model.pretrained_cfg["std"],
    )  # fmt: skip
    right, loss = 0, 0.0
    for label, name in enumerate(sorted(COLORS)):
        for file in sorted((folder / name).iterdir()):
            with torch.no_grad():
                logits = model(transform(Image.open(file)).unsqueeze(0))[0]
            right += int(logits.argmax() == label)
            loss -= logits.log_softmax(0)[label].item()
    assert 0 < right < 21
    assert result["top1"] == pytest.approx(100 * right / 21, abs=1e-3)
    assert result["loss"] == pytest.approx(loss / 21, abs=1e-4)


def test_evaluate_checkpoint_and_sizes(run, data, capsys):
    """A file of weights brings its own number of classes."""
    arguments = ["--checkpoint", str(run / "model.safetensors"), "--data", str(data), "--workers", "0"]
    code = main(["evaluate", "--model", "internimage_atto", *arguments, "--img-size", "48", "--dtype", "bfloat16"])
    assert code == 0
    out = capsys.readouterr().out
    assert "at 48 px" in out and "bfloat16" in out


def test_evaluate_json_to_stdout_is_json_alone(run, data, capsys):
    assert evaluate(run, data, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 15


def test_corrupt_images_are_counted_named_and_skipped(run, data, tmp_path, capsys):
    folder = tmp_path / "data"
    write_colors(folder, 4, shades=(5, 30))
    (folder / "red" / "001.png").write_bytes((folder / "red" / "001.png").read_bytes()[:50])
    (folder / "green" / "002.jpg").write_text("not an image")
    report = tmp_path / "report.json"
    assert evaluate(run, folder, "--json", report, "--batch-size", 2) == 0
    err = capsys.readouterr().err
    assert "2 images could not be read" in err
    assert "002.jpg' cannot be read (not an image); it does not count" in err
    assert err.count("001.png") == 1, "each file is named once"
    result = json.loads(report.read_text())
    assert (result["images"], result["skipped"], result["top1"]) == (11, 2, 100.0)
    assert sorted(entry["file"].rsplit("/", 1)[1] for entry in result["skipped_files"]) == ["001.png", "002.jpg"]
    assert evaluate(run, folder, "--strict") == 1


def test_evaluate_reads_a_tar(run, data, tmp_path, capsys):
    archive = tmp_path / "val.tar"
    subprocess.run(["tar", "cf", archive, "-C", data / "val", "."], check=True)
    assert evaluate(run, archive) == 0
    assert "top-1 100.00 %   top-5 100.00 %" in capsys.readouterr().out


def test_evaluate_refusals(run, data, tmp_path, capsys):
    def message(*arguments):
        return fails(capsys, "evaluate", "--workers", "0", *arguments)

    assert "did you mean internimage_tiny" in message("--model", "internimage_tinny", "--data", data)
    assert "no dataset at" in message("--model", run, "--data", tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no class folders" in message("--model", run, "--data", empty)
    (empty / "photo.png").write_bytes(b"")
    assert "found 1 files (photo.png" in message("--model", run, "--data", empty)
    write_colors(tmp_path / "gap", 2)
    (tmp_path / "gap" / "yellow").mkdir()
    assert "contains no image (it is empty)" in message("--model", run, "--data", tmp_path / "gap")
    (tmp_path / "gap" / "yellow" / "notes.txt").write_text("")
    assert "only notes.txt" in message("--model", run, "--data", tmp_path / "gap")
    (tmp_path / "gap" / "yellow" / "0.png").write_bytes((tmp_path / "gap" / "red" / "000.png").read_bytes())
    assert "4 classes and the model 3" in message("--model", run, "--data", tmp_path / "gap")
    os.rename(tmp_path / "gap" / "yellow", tmp_path / "gap" / "azure")
    (tmp_path / "gap" / "blue").rename(tmp_path / "blue")
    assert "'azure' here, 'blue' there" in message("--model", run, "--data", tmp_path / "gap")
    truncated = tmp_path / "model.safetensors"
    truncated.write_bytes((run / "model.safetensors").read_bytes()[:-100])
    assert "truncated" in message("--model", "internimage_atto", "--checkpoint", truncated, "--data", data)
    text = tmp_path / "weights.pth"
    text.write_text("hello")
    assert "not a checkpoint" in message("--model", "internimage_atto", "--checkpoint", text, "--data", data)
    assert "does not fit" in message(
        "--model", "internimage_tiny", "--checkpoint", run / "model.safetensors", "--data", data
    )
    missing = message("--model", "internimage_atto", "--checkpoint", tmp_path / "none.pth", "--data", data)
    assert "no checkpoint at" in missing
    assert "no class map at" in message("--model", run, "--data", data, "--class-map", tmp_path / "none.txt")
    assert "no weights were released" in message("--model", "internimage_atto", "--data", data)
    assert not (tmp_path / "report.json").exists()


def test_class_map_for_a_part_of_the_classes(run, data, tmp_path, capsys):
    (tmp_path / "part").mkdir()
    os.symlink(data / "val" / "red", tmp_path / "part" / "red")
    assert "pass a class map" in fails(capsys, "evaluate", "--model", run, "--data", tmp_path / "part")
    (tmp_path / "map.txt").write_text("blue\ngreen\nred\n")
    assert evaluate(run, tmp_path / "part", "--class-map", tmp_path / "map.txt") == 0
    assert "top-1 100.00 %" in capsys.readouterr().out


# ---- predict


def test_predict_files_folders_and_stdin(run, data, tmp_path, capsys, monkeypatch):
    red = data / "val" / "red" / "000.png"
    assert main(["predict", str(red), str(data / "val" / "blue"), "--model", str(run), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["classes"][0]["label"] for line in lines] == ["red"] + ["blue"] * 5
    assert sum(c["probability"] for c in lines[0]["classes"]) == pytest.approx(1, abs=1e-4)

    result = subprocess.run(
        [sys.executable, "-m", "internimage", "predict", "-", "--model", run, "--topk", "1"],
        input=red.read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    assert result.stdout.decode().split()[0] == "-" and "red" in result.stdout.decode()


class Endless(io.RawIOBase):
    """Standard input that has no end, such as `yes |`."""

    def __init__(self):
        self.given = 0

    def readable(self):
        return True

    def readinto(self, buffer):
        buffer[:] = bytes(len(buffer))
        self.given += len(buffer)
        return len(buffer)


def test_standard_input_without_an_end(run, data, capsys, monkeypatch):
    """As from /dev/zero. The other images are classified."""
    endless = Endless()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(endless)))
    monkeypatch.setattr(predict_module, "MOST_ON_STDIN", 3 << 20)
    red = data / "val" / "red" / "000.png"
    assert main(["predict", "-", str(red), "--model", str(run), "--topk", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "internimage predict: error: '-' cannot be read: more than 3 MiB on standard input; use a file\n"
    )
    assert captured.out.startswith(str(red)) and endless.given < 4 << 20


# not the peak of getrusage, which begins with that of the process that started this one
WATCHED = """
import sys
from internimage.cli import main
code = main(sys.argv[1:])
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak) >> 10, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory counts")
@pytest.mark.parametrize("source", [["cat", "/dev/zero"], ["yes"]], ids=" ".join)
def test_standard_input_without_an_end_takes_little_memory(source, run):
    """256 MiB are read, beside what torch takes."""
    with subprocess.Popen(source, stdout=subprocess.PIPE) as endless:
        result = subprocess.run(
            [sys.executable, "-c", WATCHED, "predict", "-", "--model", str(run)],
            stdin=endless.stdout, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        endless.kill()
    line, memory = result.stderr.splitlines()
    assert result.returncode == 2 and "more than 256 MiB on standard input" in line and int(memory) < 1500


def test_predict_names_imagenet_classes(tmp_path, capsys):
    """A model of 1000 classes without names of its own gets timm's ImageNet names."""
    model = timm.create_model("internimage_atto")
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data[24] = 10.0
    torch.save({"model": model.state_dict()}, tmp_path / "atto.pth")
    image = tmp_path / "owl.png"
    Image.new("L", (40, 30)).save(image)
    arguments = ["--model", "internimage_atto", "--checkpoint", str(tmp_path / "atto.pth"), "--img-size", "64"]
    assert main(["predict", str(image), *arguments]) == 0
    assert "great grey owl" in capsys.readouterr().out


def test_predict_draws_points(run, data, tmp_path, capsys):
    picture = tmp_path / "points.png"
    code = main(["predict", str(data / "val"), "--model", str(run), "--draw-points", str(picture)])
    assert code == 0
    assert "sampling points of levels.2.blocks.2.dcn" in capsys.readouterr().err
    assert Image.open(picture).size == (4 * 240 + 16, 117 + 4 * 259)
    assert "levels.0.blocks.0.dcn" in fails(
        capsys, "predict", data / "val", "--model", run, "--draw-points", picture, "--draw-layer", "levels.9"
    )


def test_predict_refusals(run, data, tmp_path, capsys):
    assert "no image at" in fails(capsys, "predict", tmp_path / "none.png", "--model", run)
    assert "contains no image" in fails(capsys, "predict", tmp_path, "--model", run)
    text = tmp_path / "a.png"
    text.write_text("hello")
    good = data / "val" / "red" / "000.png"
    assert main(["predict", str(text), str(good), "--model", str(run)]) == 2
    captured = capsys.readouterr()
    assert "a.png' is not an image" in captured.err
    assert "red" in captured.out, "the good image was not classified"
    assert "no config.json" in fails(capsys, "predict", good, "--model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "internimage", "num_classes": 1000}')
    assert "not timm's" in fails(capsys, "predict", good, "--model", tmp_path)


def test_huge_names_sizes_that_fit():
    """Without its weights: the check itself, as the commands call it."""
    from internimage.engine.create import ModelError, data_config

    model = timm.create_model("internimage_huge", device="meta")
    with pytest.raises(ModelError, match="the next are 128 x 128"):
        data_config(model, img_size=100)
    assert data_config(model, img_size=128)["input_size"] == (3, 128, 128)


# ---- info and the rest


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"internimage {internimage.__version__}" in out and torch.__version__ in out
    assert "DCNv3 is served by" in out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"][0]["device"] == "cpu"
    assert facts["models"] == internimage.list_models()
    assert f"export: onnx {facts['export']['onnx']}, " in out
    assert facts["export_needs"]["onnx"] == [name for name in ("onnx", "onnxscript") if not facts["export"][name]]


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["finetune", "--help"], ["--version"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert "internimage" in out
    if arguments[0] == "finetune":
        assert (
            "learning rate factor from each layer to the one below it; above 0 and at most 1; default null"
            in " ".join(out.split())
        )


def test_module_runs():
    result = subprocess.run([sys.executable, "-m", "internimage", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and internimage.__version__ in result.stdout
    result = subprocess.run([sys.executable, "-m", "internimage", "fly"], capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
