# SPDX-License-Identifier: MIT
"""Conversion: the numbers of every source arrive whole in a folder that timm, transformers and the Hub take, or nothing
does."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import formats
import golden
import launched
import pytest
import timm
import timm.data
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from internimage import CheckpointError
from internimage.cli import main
from internimage.convert import convert as convert_module
from internimage.convert import detect
from internimage.convert.convert import check_folder, convert
from internimage.convert.detect import ConvertError
from internimage.models.internimage import FAMILY
from internimage.weights import hub, imagenet22k
from internimage.weights.safetensors_io import DTYPES, write_safetensors

SMALL = dict(channels=8, depths=(1, 1, 2, 1), groups=(1, 1, 2, 4))
ATTO = dict(model="internimage_atto", model_kwargs=SMALL)
ON_THE_COMMAND_LINE = ["--model-kwargs", "channels=8", "depths=[1, 1, 2, 1]", "groups=[1, 1, 2, 4]"]
HEAD = ("head.weight", "head.bias")
HUGE = "internimage_huge.ogvl_joint_in22k_ft_in1k_640"
SMALL_HUGE = dict(SMALL, stage3_post_norm_blocks=(1,))


def filled(name: str = "internimage_atto", **kwargs) -> dict[str, Tensor]:
    model = timm.create_model(name, device="meta", **{**SMALL, **kwargs})
    return golden.fill_state_dict({key: value.shape for key, value in model.state_dict().items()})


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return filled(layer_scale=1.0)


@pytest.fixture(scope="module")
def in22k(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of 21841 classes."""
    state_dict = filled(num_classes=21841)
    return formats.write("official", tmp_path_factory.mktemp("in22k"), state_dict), state_dict


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


def load(folder: Path, **kwargs) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def fails(capsys, *arguments) -> str:
    """The message of a command that must fail with a clear line and without a traceback."""
    assert main([str(a) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


# ---- every source


@pytest.mark.parametrize("kind", formats.KINDS)
def test_every_format(kind, weights, tmp_path):
    source = formats.write(kind, tmp_path / "source", weights)
    kwargs = dict(ATTO, model_kwargs=dict(SMALL, layer_scale=1.0))
    result = convert(source, tmp_path / "out", verify=True, **kwargs)
    expected = formats.headless(weights) if kind in formats.HEADLESS else weights
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert result.verified and result.tensors == len(expected)
    assert set(result.files) == {"model.safetensors", "config.json", "README.md"} == set(os.listdir(tmp_path / "out"))
    model = load(tmp_path / "out", features_only=True)
    actual = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    assert_equal(actual, {key: weights[key] for key in actual})
    if kind not in formats.HEADLESS:
        assert_equal(load(tmp_path / "out").state_dict(), weights)
    else:
        assert timm.create_model(f"local-dir:{tmp_path / 'out'}").num_classes == 0


def test_attentive_head(tmp_path):
    """Its pooling has a name that timm does not know, and writes into config.json all the same."""
    state_dict = filled(HUGE, **SMALL_HUGE)
    source = formats.write("Hub, shards", tmp_path / "source", state_dict)
    convert(source, tmp_path / "out", model=HUGE, model_kwargs=SMALL_HUGE, verify=True)
    model = load(tmp_path / "out")
    assert_equal(model.state_dict(), state_dict)
    assert model.attend and model.pretrained_cfg["input_size"] == (3, 640, 640)
    timm.models.save_for_hf(model, tmp_path / "again", safe_serialization=True)
    assert_equal(load(tmp_path / "again").state_dict(), state_dict)


def test_averaged_weights(weights, tmp_path):
    path = formats.save_official(tmp_path / "w.pth", {"model": weights, "model_ema": formats.shifted(weights)})
    convert(path, tmp_path / "out", use_ema=True, **ATTO)
    assert_equal(load(tmp_path / "out").state_dict(), formats.shifted(weights))


def test_folder_that_finetune_has_written(tmp_path):
    """Its config.json says what the model is, and the names of its classes go along."""
    model = timm.create_model("internimage_atto", num_classes=3, in_chans=1, **SMALL)
    names = dict(label_names=["a", "b", "c"])
    timm.models.save_for_hf(model, tmp_path / "mine", model_config=names, safe_serialization=True)
    convert(tmp_path / "mine", tmp_path / "out", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == ["a", "b", "c"] and config["num_classes"] == 3
    assert_equal(
        load(tmp_path / "out", dtype=torch.bfloat16).state_dict(), formats.cast(model.state_dict(), torch.bfloat16)
    )


@pytest.mark.parametrize("file", golden.MODELS)
def test_released_weights_are_known_by_their_shapes(file):
    shapes = {key: tuple(shape) for key, shape in golden.manifest()[file]["shapes"].items()}
    # the two of huge with 1000 classes are the same but for the image size; one of them has a file
    expected = HUGE if file == "internimage_h_22kto1k_384" else golden.MODELS[file]
    assert detect._guess(FAMILY, shapes, Path("w.pth")) == expected
    other = {**shapes, "head.weight": (7, shapes["head.weight"][1])}
    assert detect._guess(FAMILY, other, Path("w.pth")) == expected.partition(".")[0]


def test_size_that_was_not_released_must_be_named(weights, tmp_path):
    path = formats.save_safetensors(tmp_path / "w.safetensors", weights)
    with pytest.raises(ConvertError, match=r"of no released size \(channels=8, depths=\(1, 1, 2, 1\)\).*--model"):
        convert(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        convert(path, tmp_path / "out", model="internimage_atto")
    with pytest.raises(ConvertError, match="cannot build 'internimage_atto'.*colour"):
        convert(path, tmp_path / "out", model="internimage_atto", model_kwargs=dict(colour=1))
    assert not (tmp_path / "out").exists()


# ---- sources on the Hub


def test_hub_sources(local_hub, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "_guess", lambda family, shapes, path: "internimage_atto")
    cache, kwargs = str(tmp_path / "cache"), dict(SMALL, layer_scale=1.0)
    plain = filled()
    commit = local_hub.add("OpenGVLab/internimage_t_1k_224", {"model.safetensors": save(formats.hub_names(plain))})
    pth = formats.save_official(tmp_path / "w.pth", {"model": plain})
    local_hub.add("OpenGVLab/InternImage", {"internimage_t_1k_224.pth": pth})
    config = json.dumps(dict(architecture="internimage_atto", num_classes=1000, model_args=kwargs, pretrained_cfg={}))
    mine = {"config.json": config.encode(), "model.safetensors": save(weights)}
    local_hub.add("me/mine", mine, ref="v2")
    local_hub.add("me/other", {"pytorch_model.bin": formats.save_torch(tmp_path / "w.bin", weights)})
    for source, expected, name in (
        ("internimage_tiny.ogvl_in1k", plain, f"OpenGVLab/internimage_t_1k_224@{commit}/model.safetensors"),
        ("OpenGVLab/internimage_t_1k_224", plain, f"OpenGVLab/internimage_t_1k_224@{commit}/model.safetensors"),
        ("OpenGVLab/InternImage/internimage_t_1k_224.pth", plain, "OpenGVLab/InternImage@.*/internimage_t_1k_224.pth"),
        ("hf-hub:me/mine@v2", weights, "me/mine@.*/model.safetensors"),
        ("me/other", weights, "me/other@.*/pytorch_model.bin"),
    ):
        out = tmp_path / source.replace("/", "-")
        # the config.json of one's own repository says what differs
        convert(source, out, cache_dir=cache, verify=True, model_kwargs={} if "mine" in source else SMALL)
        assert_equal(load_file(out / "model.safetensors"), expected)
        card = ModelCard.load(out / "README.md")
        assert re.search(f"Converted from: `{name}`", card.text)
        assert (card.data.license == "mit") == source.startswith(("internimage", "OpenGVLab"))
    with pytest.raises(
        hub.DownloadError, match="there is no file 'me/nothing' here, and on the Hub: me/nothing was not"
    ):
        convert("me/nothing", tmp_path / "out", cache_dir=cache)
    for odd in ("internimage_tiny.ogvl", "nothing.pth", "./me/mine"):
        with pytest.raises(FileNotFoundError, match=f"no weights at '{odd}', and it is no OWNER/NAME"):
            convert(odd, tmp_path / "out")


# ---- types, shards, room


def test_sources_that_are_none(weights, tmp_path, capsys, local_hub):
    path = formats.write("official", tmp_path / "w", weights)
    assert "SRC: must be text that is not empty" in fails(capsys, "convert", "", tmp_path / "out")
    err = fails(capsys, "convert", "internimage_tiny", tmp_path / "out")
    assert "did you mean internimage_tiny.ogvl_in1k?" in err
    assert "did you mean internimage_base.ogvl_in1k" in fails(
        capsys, "convert", "internimage_bass.ogvl", tmp_path / "o"
    )
    model = ["--model", "internimage_atto", "--model-kwargs"]
    for odd in ("device=cuda", "pretrained=true", "cache_dir=/x", "pretrained_cfg_overlay={file: /x}"):
        err = fails(capsys, "convert", path, tmp_path / "out", *model, odd)
        assert f"'{odd.partition('=')[0]}' is no argument of a model" in err
    err = fails(capsys, "convert", path, tmp_path / "out", *model, "channels=1e9", "depths=[1,1,1,1]")
    assert "channels must be a whole number" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and local_hub.requests == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype, weights, tmp_path):
    path = formats.write("official", tmp_path, weights)
    convert(path, tmp_path / "out", dtype=dtype, verify=True, **ATTO)
    expected = formats.cast(weights, dtype)
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert expected["conv_head.1.0.num_batches_tracked"].dtype == torch.int64
    assert_equal(load(tmp_path / "out").state_dict(), formats.cast(expected, torch.float32))


@pytest.mark.parametrize("shard_size, several", [("100KB", True), (200_000, True), ("1GB", False)])
def test_shards(shard_size, several, weights, tmp_path):
    path = formats.write("Hub", tmp_path / "source", weights)
    result = convert(
        path, tmp_path / "out", shard_size=shard_size, verify=True, model="internimage_atto", model_kwargs=SMALL
    )
    files = [name for name in result.files if name.endswith(".safetensors")]
    assert (len(files) > 1) == several == ("model.safetensors.index.json" in result.files)
    together = {key: value for file in files for key, value in load_file(tmp_path / "out" / file).items()}
    assert_equal(together, weights)
    assert_equal(load(tmp_path / "out").state_dict(), weights)
    largest = max(value.nbytes for value in weights.values())
    limit = dict(zip(("100KB", 200_000, "1GB"), (100_000, 200_000, 10**9)))[shard_size]
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert sum(value.nbytes for value in tensors.values()) <= limit or (len(tensors) == 1 and largest > limit)


def test_writer_equals_the_librarys(tmp_path):
    """Every dtype and shape, read by safetensors itself."""
    torch.manual_seed(0)
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(3), "turned": torch.randn(4, 6).t()}
    for name, dtype in DTYPES.items():
        tensors[name] = torch.randint(0, 2, (3, 5), dtype=torch.uint8).to(dtype)
    specs = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    write_safetensors(tmp_path / "w.safetensors", specs, tensors.__getitem__, metadata={"a": "b"})
    read = load_file(tmp_path / "w.safetensors")
    assert set(read) == set(tensors)
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype and torch.equal(read[key].double(), value.double()), key
    tensors["turned"] = tensors["turned"].contiguous()
    save_file(tensors, tmp_path / "theirs", {"a": "b", "format": "pt"})
    assert (tmp_path / "w.safetensors").stat().st_size == (tmp_path / "theirs").stat().st_size
    with pytest.raises(ValueError, match="announced as"):
        write_safetensors(tmp_path / "w.safetensors", {"a": ((3,), torch.float32)}, lambda key: torch.ones(2))


def test_damage_on_the_disk_is_found(weights, tmp_path, monkeypatch):
    path = formats.write("official", tmp_path, weights)
    write = convert_module._write_config

    def damage(config, *args, **kwargs):
        file = config.parent / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        write(config, *args, **kwargs)

    monkeypatch.setattr(convert_module, "_write_config", damage)
    with pytest.raises(ConvertError, match="differs from the source in '"):
        convert(path, tmp_path / "out", verify=True, **ATTO)
    assert sorted(os.listdir(tmp_path)) == ["w.pth"]


def test_nan_is_carried_over_and_verified(weights, tmp_path):
    bad = {**weights, "patch_embed.conv1.bias": torch.tensor([float("nan"), -0.0, 0.0, 1.0])}
    path = formats.save_safetensors(tmp_path / "w.safetensors", bad)
    convert(path, tmp_path / "out", verify=True, **ATTO)
    assert load_file(tmp_path / "out" / "model.safetensors")["patch_embed.conv1.bias"].isnan().tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_disk_without_room(weights, tmp_path, monkeypatch):
    path = formats.write("official", tmp_path, weights)
    usage = convert_module.shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConvertError, match=r"has 0.00 GB of room, and the result takes 0.00 GB"):
        convert(path, tmp_path / "out", **ATTO)
    assert sorted(os.listdir(tmp_path)) == ["w.pth"]


def in_a_process(script: str, *arguments) -> str:
    done = launched.python("-c", textwrap.dedent(script), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_disk_that_gets_full(weights, tmp_path):
    path = formats.write("official", tmp_path / "source", weights)
    script = """
    import resource, signal, sys
    from internimage.cli import main
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
    sys.stderr = sys.stdout
    status = main(["convert", *sys.argv[1:], "--model", "internimage_atto",
                   "--model-kwargs", "channels=8", "depths=[1,1,2,1]", "groups=[1,1,2,4]"])
    print("status", status)
    """
    out = in_a_process(script, path, tmp_path / "out")
    assert f"'{tmp_path}' has no room for the result" in out and "status 2" in out and "Traceback" not in out
    assert os.listdir(tmp_path) == ["source"]


# ---- the folder's name


def test_existing_folders(weights, tmp_path):
    path = formats.write("official", tmp_path, weights)
    out = tmp_path / "out"
    out.mkdir()
    convert(path, out, **ATTO)  # an empty one is as good as none
    with pytest.raises(ConvertError, match="holds a model; overwrite replaces it"):
        convert(path, out, **ATTO)
    (out / "notes.txt").write_text("mine")
    convert(path, out, overwrite=True, dtype=torch.bfloat16, **ATTO)
    assert (out / "notes.txt").read_text() == "mine"
    assert load_file(out / "model.safetensors")["head.bias"].dtype == torch.bfloat16
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError):
        convert(path, out, overwrite=True, model="internimage_atto")
    assert (out / "model.safetensors").read_bytes() == before
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ConvertError, match="is not empty"):
        convert(path, other, overwrite=True, **ATTO)
    with pytest.raises(ConvertError, match="is not a folder"):
        convert(path, path, overwrite=True, **ATTO)
    assert sorted(os.listdir(tmp_path)) == ["out", "photos", "w.pth"]
    assert out.stat().st_mode == other.stat().st_mode
    with pytest.raises(ConvertError, match="cannot be written"):
        convert(path, path / "out", **ATTO)


# ---- pickles


def test_pickled_yacs_node_loads_without_yacs(weights, tmp_path):
    assert importlib.util.find_spec("yacs") is None, "the test means nothing where yacs is installed"
    path = formats.write("official", tmp_path, weights)
    assert b"yacs.config" in path.read_bytes()
    convert(path, tmp_path / "out", **ATTO)
    assert "yacs" not in sys.modules


def test_pickle_that_calls_subprocess_is_refused_by_name(weights, tmp_path, capsys):
    marker = tmp_path / "marker"
    call = formats.Call(subprocess.Popen, [sys.executable, "-c", f"open({str(marker)!r}, 'w')"])
    path = formats.save_torch(tmp_path / "w.pth", {"model": weights, "config": call})
    err = fails(capsys, "convert", path, tmp_path / "out", "--model", "internimage_atto")
    assert "subprocess.Popen" in err and str(path) in err
    assert not marker.exists() and os.listdir(tmp_path) == ["w.pth"]


# ---- ImageNet-22k


def lines(name: str) -> list[str]:
    return (Path(timm.data.__file__).parent / "_info" / name).read_text().split()


def rows_of_1k() -> list[int]:
    """By timm's lists, in another way than the package's: a search through the 22k for each of the 1k."""
    in22k = lines("imagenet22k_synsets.txt")
    return [in22k.index(synset) if synset in in22k else 11136 for synset in lines("imagenet_synsets.txt")]


def test_rows():
    rows = imagenet22k.rows(imagenet22k.imagenet_1k())
    assert rows == rows_of_1k() and len(rows) == 1000
    assert rows[849] == rows[850] == 11136 and len(set(rows)) == 999
    assert lines("imagenet_synsets.txt")[850] == "n04399382"
    with pytest.raises(CheckpointError, match="2 of 3 are not: cat, n99999999"):
        imagenet22k.rows(["n01440764", "cat", "n99999999"])


def test_head_reduces_on_request(in22k, tmp_path):
    path, state_dict = in22k
    convert(path, tmp_path / "out", head="22k-to-1k", verify=True, **ATTO)
    written = load_file(tmp_path / "out" / "model.safetensors")
    rows = rows_of_1k()
    expected = {**state_dict, **{key: torch.stack([state_dict[key][row] for row in rows]) for key in HEAD}}
    assert_equal(written, expected)
    assert_equal(load(tmp_path / "out").state_dict(), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_classes"] == 1000
    assert "rows of an ImageNet-22k one" in (tmp_path / "out" / "README.md").read_text()


def test_head_stays_without_request(in22k, tmp_path, caplog):
    path, state_dict = in22k
    convert(path, tmp_path / "out", **ATTO)
    assert_equal(load(tmp_path / "out").state_dict(), state_dict)
    model = load(tmp_path / "out", num_classes=1000)
    assert (model.head.bias == 0).all()
    assert (
        "21841 classes and 1000 were asked for: the classifier is new and untrained; head_from_22k=True" in caplog.text
    )


def test_head_by_argument(in22k, tmp_path):
    path, state_dict = in22k
    overlay = dict(file=str(path), num_classes=21841)
    arguments = dict(pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    model = timm.create_model("internimage_atto", head_from_22k=True, **arguments)
    assert torch.equal(model.head.weight, state_dict["head.weight"][rows_of_1k()]) and model.num_classes == 1000
    synsets = ["n04399382", "n00005787"]
    model = timm.create_model("internimage_atto", head_from_22k=synsets, **arguments)
    in22k_synsets = lines("imagenet22k_synsets.txt")
    assert torch.equal(model.head.bias, state_dict["head.bias"][[11136, in22k_synsets.index("n00005787")]])
    # saved with the arguments of create_model, among which timm counts this one
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    assert_equal(load(tmp_path / "saved").state_dict(), model.state_dict())
    assert load(tmp_path / "saved", num_classes=5).num_classes == 5
    with pytest.raises(CheckpointError, match="for 1000 synsets needs num_classes=1000, got 7"):
        timm.create_model("internimage_atto", head_from_22k=True, num_classes=7, **arguments)


def test_head_of_another_size_is_no_22k(weights, tmp_path):
    path = formats.write("official", tmp_path, weights)
    with pytest.raises(CheckpointError, match="has 1000 classes; a head from ImageNet-22k needs its 21841"):
        convert(path, tmp_path / "out", head="22k-to-1k", **ATTO)


def test_finetune_takes_rows_for_the_classes_at_hand(in22k, tmp_path, capsys):
    from PIL import Image

    path, state_dict = in22k
    arguments = [f"{key}={list(value) if isinstance(value, tuple) else value}" for key, value in SMALL.items()]
    assert (
        main(["convert", str(path), str(tmp_path / "m"), "--model", "internimage_atto", "--model-kwargs", *arguments])
        == 0
    )
    synsets = ["n01440764", "n04399382"]
    for synset in (*synsets, "cat"):
        for i in range(4):
            file = tmp_path / ("wrong" if synset == "cat" else "data") / "train" / synset / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i * 20, 90, 10)).save(file)
    (tmp_path / "wrong" / "train" / "dog").symlink_to(tmp_path / "wrong" / "train" / "cat")
    settings = [
        f"model={tmp_path / 'm'}", "head_from_22k=true", "epochs=1", "batch_size=4", "img_size=32", "workers=0", "lr=0",
        "warmup_epochs=0", "min_lr=0", "weight_decay=0", "eval_every=0",
    ]  # fmt: skip
    assert main(["finetune", f"data={tmp_path / 'data'}", f"output={tmp_path / 'run'}", *settings]) == 0
    expected = [lines("imagenet22k_synsets.txt").index("n01440764"), 11136]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    for key in HEAD:  # a learning rate of zero leaves what it began with
        assert torch.equal(saved[key], state_dict[key][expected]), key
    assert_equal(load(tmp_path / "run").state_dict(), saved)
    capsys.readouterr()
    err = fails(capsys, "finetune", f"data={tmp_path / 'wrong'}", f"output={tmp_path / 'run2'}", *settings)
    assert "named by its synsets" in err and "cat" in err
    err = fails(capsys, "finetune", "data=x", "output=y", "head_from_22k=true", "pretrained=false")
    assert "'head_from_22k' needs weights" in err
    other = ["model=resnet10t", *settings[1:]]
    err = fails(capsys, "finetune", f"data={tmp_path / 'data'}", f"output={tmp_path / 'run3'}", *other)
    assert "is for InternImage models, which 'resnet10t' is not" in err


# ---- the card


@pytest.mark.parametrize(
    "file, classes", [("internimage_t_1k_224.pth", 1000), ("internimage_t_1k_224.pth", 7), ("mine.pth", 1000)]
)
def test_card(file, classes, tmp_path):
    state_dict = filled("internimage_tiny", num_classes=classes)
    path = formats.save_official(tmp_path / file, {"model": state_dict})
    convert(path, tmp_path / "out", model="internimage_tiny.ogvl_in1k", model_kwargs=SMALL)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data
    assert data.library_name == "timm" and data.pipeline_tag == "image-classification" and "timm" in data.tags
    assert f"Converted from: `{file}`" in card.text and "import internimage" in card.text
    assert str(tmp_path) not in card.content, "paths of this machine are nobody's business"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if file == "mine.pth" or classes == 7:  # nothing is claimed of weights of one's own
        assert data.license is None and data.datasets is None and data.eval_results is None
        assert "83.5" not in card.content and "state them here" in card.text
        assert "tag" not in config["pretrained_cfg"]
    else:
        assert data.license == "mit" and data.datasets == ["imagenet-1k"] and data.metrics == ["accuracy"]
        (result,) = data.eval_results
        assert (result.dataset_type, result.metric_type, result.metric_value) == ("imagenet-1k", "accuracy", 83.5)
        assert data.base_model == "OpenGVLab/internimage_t_1k_224"
        assert config["pretrained_cfg"]["tag"] == "ogvl_in1k"


# ---- transformers


@pytest.mark.parametrize("shard_size", ["5GB", "50MB"])
def test_transformers(shard_size, tmp_path):
    """The real package, on the golden weights of tiny; `import internimage` is all that it needs."""
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    state_dict = golden.released("internimage_t_1k_224")
    path = formats.save_official(tmp_path / "internimage_t_1k_224.pth", {"model": state_dict})
    convert(path, tmp_path / "out", shard_size=shard_size)
    case = golden.cases("models")["t_2x64x96_full"]
    images = golden.images(case["input_seed"], case["input_shape"])
    model, report = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    with torch.inference_mode():
        logits = model.eval()(pixel_values=images).logits
    assert (logits - golden.tensors("models")[f"{case['name']}/logits"]).abs().max() < 1e-4
    assert model.config.num_labels == 1000 and model.config.id2label[0].startswith("tench")
    if shard_size == "5GB":
        features = AutoModel.from_pretrained(tmp_path / "out").eval()
        with torch.inference_mode():
            assert features(pixel_values=images).last_hidden_state.shape == (2, 512, 2, 3)
        from PIL import Image

        pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(Image.new("RGB", (300, 400)), return_tensors="pt")
        assert pixels["pixel_values"].shape == (1, 3, 224, 224)


def test_transformers_on_the_attentive_head_and_names_of_classes(tmp_path):
    from transformers import AutoModelForImageClassification

    model = timm.create_model(HUGE, num_classes=2, **SMALL_HUGE)
    labels = dict(label_names=["cat", "dog"])
    timm.models.save_for_hf(model, tmp_path / "mine", model_config=labels, safe_serialization=True)
    convert(tmp_path / "mine", tmp_path / "out")
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(wrapped(pixel_values=images).logits, model.eval()(images))
    assert wrapped.config.id2label == {0: "cat", 1: "dog"}


# ---- push


@pytest.fixture
def folder(weights, tmp_path) -> Path:
    path = formats.write("official", tmp_path / "source", weights)
    convert(path, tmp_path / "out", shard_size="100KB", **ATTO)
    (tmp_path / "out" / "notes.txt").write_text("private")
    return tmp_path / "out"


def test_dry_run_prints_and_uploads_nothing(folder, local_hub, capsys):
    assert main(["push", str(folder), "me/mine", "--dry-run", "--revision", "v1"]) == 0
    out = capsys.readouterr().out
    assert f"would upload to {local_hub.url}/me/mine (v1)" in out and "not uploaded: notes.txt" in out
    for file in folder.iterdir():
        if file.name != "notes.txt":
            assert f"{file.stat().st_size:>16,}  {file.name}" in out
    assert local_hub.requests == []


def test_push(folder, local_hub, weights, capsys, monkeypatch, tmp_path):
    local_hub.writer = "hf_writer"
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert main(["push", str(folder), "me/mine", "--private"]) == 0
    assert f"{local_hub.url}/me/mine/commit/" in capsys.readouterr().out
    repository = local_hub.repositories["me/mine"]
    assert repository.token == "hf_writer"
    name = "hf-hub:me/mine"
    assert_equal(timm.create_model(name, pretrained=True, cache_dir=str(tmp_path / "a")).state_dict(), weights)
    assert set(repository.commits[repository.refs["main"]]) == {f.name for f in folder.iterdir()} - {"notes.txt"}
    # another layout replaces the first, which readers would find first
    convert(folder, tmp_path / "half", dtype=torch.bfloat16)
    assert main(["push", str(tmp_path / "half"), "me/mine", "--message", "Half"]) == 0
    assert set(repository.commits[repository.refs["main"]]) == {"model.safetensors", "config.json", "README.md"}
    model = timm.create_model(name, pretrained=True, cache_dir=str(tmp_path / "b"))
    assert_equal(model.state_dict(), formats.cast(formats.cast(weights, torch.bfloat16), torch.float32))
    # a branch leaves the main one alone
    before = repository.refs["main"]
    assert main(["push", str(folder), "me/mine", "--revision", "fp32"]) == 0
    assert repository.refs["main"] == before != repository.refs["fp32"]
    branch = timm.create_model(f"{name}@fp32", pretrained=True, cache_dir=str(tmp_path / "c"))
    assert_equal(branch.state_dict(), weights)


def test_push_without_the_right(folder, local_hub, capsys, monkeypatch):
    local_hub.writer = "hf_writer"
    for token in (None, "hf_reader"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        err = fails(capsys, "push", folder, "me/mine")
        assert "refused the upload to me/mine" in err and "HF_TOKEN" in err
    assert "'me/not..mine' is no name for a repository" in fails(capsys, "push", folder, "me/not..mine")
    assert "argument OWNER/NAME: must be OWNER/NAME, got 'not a name'" in fails(capsys, "push", folder, "not a name")
    assert local_hub.repositories == {}


NO_REPOSITORIES = [
    "a", "a/", "/a", "a/b/c", "a b/c", "../a", "me/..", "a//b", "me/mine@v1", "me/" + "x" * 100, "", "-a/b",
]  # fmt: skip
NO_BRANCHES = [
    "", " ", "a b", "a..b", "-a", "/a", "a/", "a.lock", "a~1", "a:b", "a*", "@", "a@{1}", "a//b", ".a", "a\n",
]  # fmt: skip


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry run", "push"])
def test_names_are_checked_before_anything_is_done(dry, folder, local_hub, capsys):
    for name in NO_REPOSITORIES:
        err = fails(capsys, "push", *dry, "--", folder, name)
        assert f"'{name}' is no name for a repository: it must be OWNER/NAME" in err or "must be OWNER/NAME, got" in err
    for branch in NO_BRANCHES:
        err = fails(capsys, "push", folder, "me/mine", *dry, f"--revision={branch}")
        shown = branch.replace("\n", " ")  # a message is one line
        assert f"'{shown}' is no name for a branch" in err or "--revision: must be text that is not empty" in err
    assert "must be OWNER/NAME, got 'a'" in fails(capsys, "push", "no-such-folder", "a")
    assert local_hub.requests == []
    for revision in ("main", "v1.0", "feature/x", "refs/pr/1", None):
        hub.check_repository("me/mine", revision)
    with pytest.raises(hub.BadName, match="OWNER/NAME"):
        hub.push(folder, "a/b/c", [])


def test_folder_that_is_not_whole_is_not_pushed(folder, local_hub, capsys, tmp_path):
    files = check_folder(folder)
    shard = next(file for file in files if "00002-of" in file)
    (folder / shard).rename(tmp_path / shard)
    assert f"1 are missing: {shard}" in fails(capsys, "push", folder, "me/mine")
    (tmp_path / shard).rename(folder / shard)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["channels"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    assert "does not fit the model" in fails(capsys, "push", folder, "me/mine")
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "nothing"}))
    assert "has an architecture 'nothing'" in fails(capsys, "push", folder, "me/mine")
    (folder / "config.json").unlink()
    assert "no folder with timm's config.json" in fails(capsys, "push", folder, "me/mine")
    assert local_hub.requests == []


def test_command_line(in22k, tmp_path, capsys):
    path, state_dict = in22k
    command = ["convert", str(path), str(tmp_path / "out"), "--model", "internimage_atto", *ON_THE_COMMAND_LINE]
    assert main([*command, "--dtype", "bf16", "--shard-size", "2MB", "--head", "22k-to-1k", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "every tensor read back and compared" in out and f"local-dir:{tmp_path / 'out'}" in out
    expected = {**state_dict, **{key: state_dict[key][rows_of_1k()] for key in HEAD}}
    assert_equal(load(tmp_path / "out", dtype=torch.bfloat16).state_dict(), formats.cast(expected, torch.bfloat16))
    assert "overwrite replaces it" in fails(capsys, *command)
    assert "argument --shard-size: must be a positive number of bytes, with or without a unit, such as '5GB'" in fails(
        capsys, *command, "--overwrite", "--shard-size", "big"
    )
    assert "argument --model-kwargs: must be KEY=VALUE, got 'channels'" in fails(capsys, *command[:-3], "channels")
    assert "no weights at" in fails(capsys, "convert", tmp_path / "missing.pth", tmp_path / "other")
