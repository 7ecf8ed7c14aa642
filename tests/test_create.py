# SPDX-License-Identifier: MIT
"""Models for commands: a checkpoint's folder brings all it knows, sizes devices are checked."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from internimage import CheckpointError
from internimage.cli import main
from internimage.convert.convert import convert
from internimage.engine.create import ModelError, create_model, data_config, pick_device
from internimage.models.attributes import label_names
from internimage.weights.hub import DownloadError

SMALL = dict(channels=8, depths=(1, 1, 1, 1), groups=(1, 1, 2, 4), num_classes=3)
DATA = dict(input_size=(3, 48, 48), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.9)
LABELS = dict(label_names=["x", "y", "z"], label_descriptions={"x": "the first", "y": "the second", "z": "the third"})


def save(model: nn.Module, folder: Path, config: dict | None = None, data: dict | None = None, safe=True) -> Path:
    save_for_hf(model, folder, dict(LABELS if config is None else config), None, safe, data or DATA)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return save(timm.create_model("internimage_atto", **SMALL), tmp_path_factory.mktemp("models") / "ours")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return save(timm.create_model("resnet10t", num_classes=3), tmp_path_factory.mktemp("models") / "resnet")


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A ViT that was trained on images of 48 pixels, three patches a side."""
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, num_classes=3)
    return save(model, tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in LABELS["label_names"]:
        (folder / "train" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), (ord(name) * 2, 40 * i, 90)).save(folder / "train" / name / f"{i}.png")
    return folder


def equal(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def fails(capsys, *arguments) -> str:
    """The one line of a command that must fail."""
    assert main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"internimage {arguments[0]}: error: ") and err.count("\n") == 1, err
    assert len(err) < 600
    return err


def refused(call, message: str, kind=ModelError) -> None:
    with pytest.raises(kind, match=message) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    for advice in ("weights_only", "safe_globals", "create_model("):  # for programmers
        assert advice not in str(error.value)


# ---- a folder as the checkpoint


@pytest.mark.parametrize("fixture, name", [("ours", "internimage_atto"), ("resnet", "resnet10t")])
@pytest.mark.parametrize("safe", ["finetune's", "convert's", "pickle"])
def test_checkpoint_folder_is_the_same_as_the_folder_as_model(fixture, name, safe, request, tmp_path):
    folder = request.getfixturevalue(fixture)
    if safe == "convert's":
        if fixture != "ours":
            return
        convert(folder, tmp_path / "converted")
        folder = tmp_path / "converted"
    elif safe == "pickle":
        folder = Path(shutil.copytree(folder, tmp_path / "pickle"))
        torch.save(create_model(str(folder)).state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    expected = create_model(str(folder))
    for model in (create_model(name, str(folder)), create_model(f"local-dir:{folder}"), create_model(name, folder)):
        assert equal(model, expected)
        assert data_config(model) == data_config(expected)
        assert label_names(model) == label_names(expected) == ["the first", "the second", "the third"]
    config = data_config(expected)
    assert tuple(config["input_size"]) == (3, 48, 48) and config["crop_pct"] == 0.9
    assert tuple(config["mean"]) == DATA["mean"] and tuple(config["std"]) == DATA["std"]
    assert "state_dict" not in expected.pretrained_cfg  # would keep the weights a second time


def test_predict_with_a_checkpoint_folder_names_the_classes(ours, data, capsys):
    image = data / "train" / "x" / "0.png"
    outputs = []
    for arguments in (["--model", ours], ["--model", "internimage_atto", "--checkpoint", ours]):
        assert main(["predict", str(image), "--json", *map(str, arguments)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and "the second" in outputs[0]


@pytest.mark.parametrize("fixture, name", [("ours", "internimage_tiny"), ("ours", "resnet18"), ("resnet", "resnet18"),
                                           ("resnet", "internimage_atto")])  # fmt: skip
def test_checkpoint_folder_of_another_architecture_names_both(fixture, name, request, data, capsys):
    folder = request.getfixturevalue(fixture)
    err = fails(capsys, "predict", data / "train/x/0.png", "--model", name, "--checkpoint", folder)
    held = "internimage_atto" if fixture == "ours" else "resnet10t"
    assert f"is of the architecture '{held}'" in err and f"'{name}'" in err


def test_folder_as_the_model_and_another_as_the_checkpoint(ours, resnet, tmp_path):
    other = save(timm.create_model("internimage_atto", **SMALL), tmp_path / "other", {})
    assert equal(create_model(str(other), str(ours)), create_model(str(ours)))
    refused(lambda: create_model(str(resnet), str(ours)), "'internimage_atto'.*'resnet10t'")


def test_number_of_classes_goes_before_that_of_the_folder(ours, resnet, caplog):
    for name, folder in (("internimage_atto", ours), ("resnet10t", resnet)):
        caplog.clear()
        model = create_model(name, str(folder), num_classes=5)
        assert model.num_classes == 5
        assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 5)
        assert "3 classes and 5 were asked for: the classifier is new and untrained" in caplog.text


def test_file_beside_a_config_is_weights_alone_and_says_so(ours, caplog):
    arguments = {key: value for key, value in SMALL.items() if key != "num_classes"}
    model = create_model("internimage_atto", str(ours / "model.safetensors"), **arguments)
    assert model.num_classes == 3 and data_config(model)["input_size"] == (3, 224, 224)
    assert "name the folder" in caplog.text


def test_finetune_from_a_checkpoint_folder(ours, data, tmp_path, capsys):
    settings = ["model=internimage_atto", f"checkpoint={ours}", "epochs=1", "batch_size=2", "workers=0", "lr=0",
                "min_lr=0", "warmup_epochs=0", "weight_decay=0", "eval_every=0"]  # fmt: skip
    assert main(["finetune", f"data={data}", f"output={tmp_path / 'run'}", *settings]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48] and config["model_args"]["channels"] == 8
    trained, start = create_model(str(tmp_path / "run")), create_model(str(ours))
    assert torch.equal(trained.head.weight, start.head.weight)  # the same classes: the classifier stays


def test_names_that_name_nothing():
    refused(lambda: create_model(""), "name of the model is empty")
    refused(lambda: create_model("internimage_atto", ""), "path of the checkpoint is empty")
    refused(lambda: create_model("local-dir:"), "hf-hub:OWNER/NAME or local-dir:FOLDER")
    refused(lambda: create_model("hf-hub:"), "hf-hub:OWNER/NAME or local-dir:FOLDER")
    refused(lambda: create_model("local-dir:/no/such"), "no folder '/no/such'")
    refused(lambda: create_model("s3:bucket"), "hf-hub:OWNER/NAME or local-dir:FOLDER")


def test_models_of_the_hub(ours, resnet, local_hub, tmp_path, monkeypatch):
    def create(name: str, **kwargs) -> nn.Module:
        return create_model(name, cache_dir=str(tmp_path / "cache"), **kwargs)

    for name, folder in (("ours", ours), ("resnet", resnet)):
        local_hub.add(f"me/{name}", folder)
        model = create(f"hf-hub:me/{name}")
        assert equal(model, create_model(str(folder))) and label_names(model)[0] == "the first"
    assert create("hf-hub:me/resnet", num_classes=2)(torch.zeros(1, 3, 48, 48)).shape == (1, 2)
    local_hub.add("me/damaged", {"config.json": b'{"architecture": "internimage_atto", "model_args": []}'})
    refused(lambda: create("hf-hub:me/damaged"), "config.json' cannot be used: model_args must be", CheckpointError)
    (tmp_path / "pickle").mkdir()
    torch.save({"x": Harmless()}, tmp_path / "pickle" / "pytorch_model.bin")
    shutil.copy(resnet / "config.json", tmp_path / "pickle")
    local_hub.add("me/pickle", tmp_path / "pickle")
    refused(lambda: create("hf-hub:me/pickle"), "a pickle that holds something else than data")
    refused(lambda: create("hf-hub:me/none"), "was not found", DownloadError)
    refused(lambda: create("hf-hub:a/b/c"), "a/b/c", DownloadError)
    refused(lambda: create("hf-hub:me/ours@no/such"), "no revision 'no/such'", DownloadError)
    # not there, or not to be reached: in timm's own repositories
    refused(lambda: create("resnet10t.c3_in1k"), "cannot create 'resnet10t.c3_in1k'")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    local_hub.stop()
    refused(lambda: create("resnet10t.c3_in1k"), "cannot create 'resnet10t.c3_in1k': its weights could not be downl")


# ---- weights of timm models that are not ours


class Harmless:
    """Something else than data, for pickles."""


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "parallel"])
def test_checkpoint_file_of_another_model(kind, resnet, tmp_path):
    expected = create_model(str(resnet))
    state_dict = expected.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state_dict, path)
    elif kind == "parallel":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state_dict.items()}}, path)
    else:
        torch.save(state_dict if kind == "pth" else {"state_dict": state_dict, "epoch": 3}, path)
    model = create_model("resnet10t", str(path))
    assert model.num_classes == 3 and equal(model, expected)
    assert "state_dict" not in model.pretrained_cfg


def test_checkpoint_of_another_model_that_cannot_be_used(ours, resnet, tmp_path, data, capsys):
    def message(file: Path, name: str = "resnet10t") -> str:
        return fails(capsys, "predict", data / "train/x/0.png", "--model", name, "--checkpoint", file)

    state_dict = create_model(str(resnet)).state_dict()
    path = tmp_path / "w.pth"
    shutil.copy(ours / "model.safetensors", tmp_path / "w.safetensors")
    err = message(tmp_path / "w.safetensors")
    assert "does not fit 'resnet10t'; nothing was loaded; it holds weights of InternImage" in err
    torch.save({**state_dict, "x": Harmless()}, path)
    assert "Harmless" in message(path)
    (tmp_path / "damaged.pth").write_bytes(path.read_bytes()[:3000])
    assert "damaged, truncated" in message(tmp_path / "damaged.pth")
    torch.save({k: v for k, v in state_dict.items() if k != "layer1.0.conv1.weight"}, path)
    assert 'Missing key(s) in state_dict: "layer1.0.conv1.weight"' in message(path)
    torch.save({**state_dict, "conv1.0.weight": torch.ones(2, 2)}, path)
    assert "size mismatch for conv1.0.weight" in message(path)
    torch.save({**state_dict, "conv1.0.weight": state_dict["conv1.0.weight"].to_sparse()}, path)
    assert "tensor 'conv1.0.weight' is sparse" in message(path)
    # with another number of classes timm itself would compare nothing
    torch.save({f"a.{k}" if k != "fc.weight" else k: v for k, v in state_dict.items()}, path)
    refused(lambda: create_model("resnet10t", str(path), num_classes=2), "does not fit 'resnet10t'", CheckpointError)


def test_folder_of_another_model_with_a_pickle_that_runs_code(resnet, tmp_path):
    folder = Path(shutil.copytree(resnet, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save({"x": Harmless()}, folder / "pytorch_model.bin")
    refused(lambda: create_model(str(folder)), "refused: unpickling it would call.*Harmless", CheckpointError)


def test_head_from_22k_is_for_ours(resnet):
    refused(lambda: create_model("resnet10t", pretrained=False, head_from_22k=["a"]), "is for InternImage models")


def test_arguments_that_a_model_does_not_have(capsys, data):
    refused(lambda: create_model("internimage_atto", pretrained=False, colour=1), "does not take the argument 'colour'")
    refused(lambda: create_model("vgg11", pretrained=False, drop_path_rate=0.1), "the argument 'drop_path_rate'")
    refused(lambda: create_model("internimage_atto", pretrained=False, channels=15), "channels must be even")
    refused(lambda: create_model("resnet10t", pretrained=False, num_classes=-3), "cannot create 'resnet10t'")


# ---- sizes


def test_model_of_one_size_is_built_for_the_size_asked_for(vit, data, tmp_path, capsys):
    model = create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=1)
    assert data_config(model, 64)["input_size"] == (3, 64, 64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    refused(lambda: data_config(model, 32), "does not take images of 32 x 32")
    # one that was saved for another size, with its weights
    model = create_model(str(vit), img_size=64)
    assert model.pos_embed.shape[1] == 1 + 16
    assert data_config(model, 64)["input_size"] == (3, 64, 64)
    assert data_config(create_model("vit_tiny_patch16_224", str(vit)))["input_size"] == (3, 48, 48)


def test_commands_with_a_model_of_one_size(data, tmp_path, capsys):
    settings = ["model=vit_tiny_patch16_224", "pretrained=false", "epochs=1", "batch_size=2", "workers=0",
                "warmup_epochs=0", "eval_every=0"]  # fmt: skip
    run = tmp_path / "run"
    assert main(["finetune", f"data={data}", f"output={run}", "img_size=32", *settings]) == 0
    assert json.loads((run / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 32, 32]
    image = data / "train" / "x" / "0.png"
    assert main(["predict", str(image), "--model", str(run)]) == 0
    assert main(["predict", str(image), "--model", str(run), "--img-size", "48"]) == 0
    assert main(["evaluate", "--model", str(run), "--data", str(data / "train"), "--workers", "0"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("name, size", [("convnext_atto", 1), ("xcit_nano_12_p16_224", 40),
                                        ("vit_tiny_patch16_224", 5)])  # fmt: skip
def test_size_that_a_model_does_not_take_is_one_line_before_anything_is_written(name, size, data, tmp_path, capsys):
    err = fails(capsys, "finetune", f"data={data}", f"output={tmp_path / 'run'}", f"model={name}", "pretrained=false",
                f"img_size={size}", "batch_size=2", "drop_path=0")  # fmt: skip
    assert f"{size} x {size}" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, size", [("resnet10t", 17), ("convnext_atto", 32), ("test_vit", 64),
                                        ("swin_tiny_patch4_window7_224", 64)])  # fmt: skip
def test_sizes_that_models_take(name, size):
    model = create_model(name, pretrained=False, img_size=size)
    assert data_config(model, size)["input_size"] == (3, size, size)
    assert model.training and all(module.training for module in model.modules())
    assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 1000)


class OddAboutNumbers(nn.Module):
    """A model whose path depends on numbers, which tensors without numbers do not have."""

    in_chans = 3

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.norm.training = False  # some of it frozen

    def forward(self, x):
        return self.norm(x).mean((2, 3)) if x.sum().item() == 0 else x[:, :, 5, 5]


def test_model_whose_path_depends_on_numbers_is_run_on_some():
    model = OddAboutNumbers()
    assert data_config(model, 4)["input_size"] == (3, 4, 4)
    assert model.training and not model.norm.training and model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("size", [0, -3, 10**9, 2.5, "64"])
def test_sizes_that_no_image_has(size):
    model = timm.create_model("internimage_atto", device="meta")
    refused(lambda: data_config(model, size), "image size must be a whole number from 1")


@pytest.mark.parametrize("share", [0, -1, float("nan"), 3])
def test_shares_that_no_crop_has(share):
    model = timm.create_model("internimage_atto", device="meta")
    refused(lambda: data_config(model, crop_pct=share), "share of the image")


def test_labels_by_index():
    model = timm.create_model("internimage_atto", device="meta", num_classes=3)
    model.pretrained_cfg["label_names"] = {"0": "a", "2": "c"}
    assert label_names(model) == ["a", "1", "c"]


# ---- devices


@pytest.mark.parametrize(
    "name", ["meta", "mps", "cuda:7", "abacus", "", "xla", "cpu:1", "cuda:-1", "hpu", "CPU", "cuda:"]
)
def test_device_that_is_not_here_is_one_short_line(name, capsys, ours, data, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    err = fails(capsys, "predict", data / "train/x/0.png", "--model", ours, "--device", name)
    start, there_is = "internimage predict: error: ", f"there is no device '{name}' here; there is cpu\n"
    if name in ("", "cuda:-1", "CPU", "cuda:"):  # no device anywhere
        assert err == f"{start}argument --device: must be a device such as auto, cpu, cuda or cuda:1, got '{name}'\n"
    else:
        assert err == start + there_is
        assert there_is in fails(capsys, "finetune", f"data={data}", "output=x", f"device={name}")


def test_devices_that_are_here(monkeypatch):
    assert pick_device("cpu") == pick_device("cpu:0") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    refused(lambda: pick_device("cuda:1"), "no device 'cuda:1' here; there are cpu, mps, mps:0$")
    if not torch.backends.mps.is_available():
        refused(lambda: pick_device("mps"), "device 'mps' cannot be used here: .{,200}$")  # said to be, and is not


@pytest.mark.gpu
def test_cuda_devices():
    assert pick_device("cuda").type == pick_device("cuda:0").type == "cuda"
    refused(lambda: pick_device("cuda:99"), "there are cpu, cuda, cuda:0")
