# SPDX-License-Identifier: MIT
"""Datasets and models that would silently give wrong results: what is rejected, and what is reported."""

import json
import os
import pickle
import shutil
import struct

import pytest
import timm
import torch
from pictures import COLORS, CONFIG, ByColor, command, count, refuse_to_list, three, write, write_model
from PIL import Image
from torchvision.datasets import CIFAR10

from internimage.cli import main
from internimage.data import datasets as data_module
from internimage.data import image_sets
from internimage.data.datasets import class_names, open_dataset
from internimage.data.imagenet import open_labelled_folder, protocol
from internimage.data.images import DataError
from internimage.tasks.classification.config import FinetuneConfig
from internimage.tasks.classification.evaluate import evaluate
from internimage.tasks.classification.finetune import finetune


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


# ---- names of datasets


@pytest.mark.parametrize(
    "name, message",
    [
        ("imagenet", "there is no dataset 'imagenet': omit --dataset for class folders"),
        ("folder", "there is no dataset 'folder'"),
        ("hfds", "there is no dataset 'hfds'"),
        ("torch/", "there is no dataset 'torch/'"),
        ("torch/image_folder", "there is no dataset 'torch/image_folder'"),
        ("torch/cifar11", r"give torch/NAME of cifar10, cifar100, mnist"),
        ("wds/mine", "'wds/mine' is streamed and has no length or order"),
        ("tfds/mnist", "'tfds/mnist' is streamed"),
        ("HFIDS/mnist", "'HFIDS/mnist' is streamed"),
        ("torch/cifar10", "cannot open 'torch/cifar10' in .*not found"),
    ],
)
def test_names_of_datasets(tmp_path, name, message):
    """timm would take an unknown name for a folder, and find train and val below it."""
    write(tmp_path, "train/red/0.png", "val/red/0.png")
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, name=name)


def test_a_dataset_of_the_hub_names_the_package_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="'hfds/beans' needs the package datasets.*pip install datasets"):
        open_dataset(tmp_path, name="hfds/beans")
    assert capsys.readouterr().out == "", "timm prints there, where a JSON report may be"


def test_torchvision_datasets_have_their_splits_and_no_class_map(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = {"data": torch.zeros(4, 3072, dtype=torch.uint8).numpy(), "labels": [0, 3, 3, 9]}
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(batch))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    dataset = open_dataset(tmp_path, "val", "torch/CIFAR10")
    assert (
        class_names(dataset) == names
        and len(dataset) == 4
        and len(open_dataset(tmp_path, "train", "torch/cifar10")) == 20
    )
    result = evaluate(ByColor(names), open_dataset(tmp_path, "test", "torch/cifar10"), CONFIG, 4, 0, progress=False)
    assert result.images == 4 and not result.skipped
    with pytest.raises(DataError, match="'torch/cifar10' has no split 'nope'; it has train and validation"):
        open_dataset(tmp_path, "nope", "torch/cifar10")
    (tmp_path / "map.txt").write_text("\n".join(names))
    with pytest.raises(DataError, match="a class map is for folders, tars and hfds/"):
        open_dataset(tmp_path, "val", "torch/cifar10", tmp_path / "map.txt")


def test_a_dataset_of_the_hub_has_all_its_classes_in_the_map(tmp_path, monkeypatch):
    class Reader:
        _source_names = {0: "red", 1: "blue", 2: "green"}

    def create(name, class_map, **_):
        dataset = torch.utils.data.TensorDataset(torch.zeros(2))
        dataset.reader, dataset.given = Reader(), class_map
        return dataset

    monkeypatch.setattr(data_module.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(data_module, "create_dataset", create)
    (tmp_path / "map.txt").write_text("blue\n")
    with pytest.raises(DataError, match="lacks 2 of the classes of 'hfds/me/colors': green, red"):
        open_dataset(tmp_path, "val", "hfds/me/colors", tmp_path / "map.txt")
    (tmp_path / "map.txt").write_text("blue\ngreen\nred\n")
    dataset = open_dataset(tmp_path, "val", "hfds/me/colors", tmp_path / "map.txt")
    assert dataset.given == {"blue": 0, "green": 1, "red": 2}


# ---- splits


def test_splits_are_never_merged(tmp_path):
    write(tmp_path, "train/red/0.png", "train/blue/0.png", "val/red/0.png", "val/blue/1.png")
    assert len(open_dataset(tmp_path)) == len(open_dataset(tmp_path, "eval")) == 2
    for split in ("nope", "test"):
        with pytest.raises(DataError, match=f"has no split '{split}'; it has train, val"):
            open_dataset(tmp_path, split)
    with pytest.raises(DataError, match="has the splits train, val and no class folders"):
        open_dataset(tmp_path, "")
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(DataError, match="has no split 'validation'; it has train"):
        open_dataset(tmp_path)
    assert class_names(open_dataset(tmp_path / "train", "val")) == ["blue", "red"]
    with pytest.raises(DataError, match="has no split 'fold1'"):
        open_dataset(tmp_path / "train", "fold1")
    with pytest.raises(DataError, match="folder is empty"):
        open_dataset("")


def test_a_class_may_be_called_train(tmp_path):
    """As in CIFAR-100: a folder of trains beside other classes."""
    write(tmp_path, "train/0.png", "tank/0.png")
    for split in ("train", "validation"):
        assert class_names(open_dataset(tmp_path, split)) == ["tank", "train"]
    write(tmp_path / "both", "train/train/0.png", "train/tank/0.png", "val/0.png", "papers/notes.txt")
    assert len(open_dataset(tmp_path / "both", "train")) == 2
    with pytest.raises(DataError, match="val' has no class folders"):  # it is not taken for a class
        open_dataset(tmp_path / "both")


def test_finetune_names_what_its_splits_lack(tmp_path, capsys):
    names = [f"class-{i:03d}" for i in range(300)]
    write(tmp_path, *(f"train/{name}/0.png" for name in names), *(f"val/{name}/0.png" for name in names[2:]))
    line = command(capsys, "finetune", f"data={tmp_path}", f"output={tmp_path}/out", "batch_size=8", "device=cpu")
    assert "have different classes: only here: class-000, class-001; only there: nothing" in line
    shutil.rmtree(tmp_path / "train")
    line = command(capsys, "finetune", f"data={tmp_path}", f"output={tmp_path}/out", "batch_size=8", "device=cpu")
    assert "has the splits val and no class folders: give one of these folders" in line


# ---- contents of a folder


def test_ignored_files_are_reported_once(tmp_path, capsys):
    three(tmp_path)
    write(tmp_path, "red/a.webp", "red/notes.txt", "blue/b.heic", "blue/.DS_Store", "README.txt")
    os.mkfifo(tmp_path / "green" / "pipe.jpg")
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 7, "the WebP image counts"
    assert capsys.readouterr().err == (
        f"'{tmp_path}': ignoring 3 files that are not images: blue/b.heic, green/pipe.jpg (not a regular file), "
        f"red/notes.txt\n"
    )
    assert count(dataset).top1 == 100.0


def test_finetune_reports_ignored_files_of_both_splits(tmp_path, capsys):
    three(tmp_path / "train")
    three(tmp_path / "val", 1)
    write(tmp_path, "train/red/a.heic", "val/blue/b.heic")
    (tmp_path / "val" / "green" / "bad.png").write_bytes(b"nothing")
    config = FinetuneConfig(
        data=str(tmp_path), output=str(tmp_path / "out"), model="internimage_atto", pretrained=False, img_size=32,
        epochs=2, warmup_epochs=0, batch_size=6, workers=0, device="cpu",
    )  # fmt: skip
    finetune(config, progress=False)
    captured = capsys.readouterr()
    assert "ignoring 1 file that is not an image: red/a.heic" in captured.err
    assert "ignoring 1 file that is not an image: blue/b.heic" in captured.err
    assert captured.err.count("bad.png' cannot be read (not an image); it does not count") == 1, "of three validations"


def test_order_does_not_depend_on_sets(tmp_path):
    """1 and 01 have the same key in timm's order, and the order of a set differs between processes."""
    write(tmp_path, "10/0.png", "2/0.png", "1/0.png", "01/0.png", "1²/0.png", "a/10.png", "a/2.png", "a/02.png")
    dataset = open_dataset(tmp_path)
    assert class_names(dataset) == ["01", "1", "1²", "2", "10", "a"]
    assert [os.path.basename(dataset.filename(i)) for i in range(5, 8)] == ["02.png", "2.png", "10.png"]


def test_folders_are_read_in_timms_order(tmp_path):
    three(tmp_path, 12)
    theirs, ours = timm.data.create_dataset("", str(tmp_path)), open_dataset(tmp_path)
    assert ours.reader.samples == theirs.reader.samples and ours.reader.class_to_idx == theirs.reader.class_to_idx


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.png", "red/0.png"], "has images beside its class folders, which have no class: a.png"),
        (["x.tar"], r"has no class folders: .*found 1 files \(x.tar, ...\). Name a tar file itself"),
        (["red/0.png", "blue/x.tar"], r"class folder '.*/blue' contains no image \(only x.tar\)"),
        (["red/0.png", "blue/deep/x.png"], r"classes of their own \(deep, beside blue, red\)"),
        (["red/0.png", "blue/notes.txt"], r"class folder '.*/blue' contains no image \(only notes.txt\)"),
    ],
)
def test_folders_that_would_shift_the_classes(tmp_path, names, message):
    write(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


def test_a_class_folder_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch, capsys, model):
    refuse_to_list(monkeypatch, three(tmp_path) / "red")
    line = command(capsys, "evaluate", "--model", model, "--data", tmp_path, "--workers", 0)
    assert "red' cannot be listed: Permission denied" in line


def test_no_image_can_be_read(tmp_path):
    for color in COLORS:
        (tmp_path / color).mkdir()
        (tmp_path / color / "0.png").write_bytes(b"words")
    with pytest.raises(
        DataError, match=r"none of 3 images could be read; the first is '.*blue/0.png' \(not an image\)"
    ):
        count(open_dataset(tmp_path))


# ---- class maps


def test_a_class_map_that_lacks_a_class_is_rejected(tmp_path):
    three(tmp_path / "data", 5)
    (tmp_path / "map.txt").write_text("blue\ngreen\n")
    with pytest.raises(DataError, match=r"lacks 1 of the 3 classes of '.*', with 5 images \(red\)"):
        open_dataset(tmp_path / "data", class_map=tmp_path / "map.txt")


@pytest.mark.parametrize(
    "lines, message",
    [
        ("red\ngreen\nblue\n", "not in the model's order: 'red' is class 0 of the map and class 2 of the model; "
         "the model's classes are, in order, blue, green, red"),
        ("blue\ngreen\nred\npink\n", "has 4 classes and the model 3; the model does not know pink"),
        ("blue\nGreen\nred\n", None),
        ("green\nred\n", "not in the model's order: 'green' is class 0 of the map and class 1"),
    ],
)  # fmt: skip
def test_class_maps_are_compared_with_the_models_labels(tmp_path, lines, message):
    write(tmp_path / "data", "red/0.png")
    (tmp_path / "map.txt").write_text(lines)
    message = message or "does not fit the model; the model does not know Green"
    with pytest.raises(DataError, match=message):
        count(open_dataset(tmp_path / "data", class_map=tmp_path / "map.txt"), classes_from_map=True)


def test_class_maps_that_fit(tmp_path):
    write(tmp_path / "data", "green/0.png", "blue/0.png")
    for text in ("blue\ngreen\nred\n", "\ufeffblue\r\n green \r\n\r\n", "blue\ngreen"):
        (tmp_path / "map.txt").write_bytes(text.encode())
        result = count(open_dataset(tmp_path / "data", class_map=tmp_path / "map.txt"), classes_from_map=True)
        assert (result.images, result.top1) == (2, 100.0)
        assert [entry["class"] for entry in result.per_class] == ["blue", "green"]
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"green": 1, "blue": 0}))
    assert count(open_dataset(tmp_path / "data", class_map=tmp_path / "map.pkl"), classes_from_map=True).top1 == 100.0


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("map.txt", b"blue\n\nred\n", "line 2 of the class map .* is empty"),
        ("map.txt", b"blue\nred\nblue\n", "names a class twice: blue"),
        ("map.txt", b"bl\xfce\n", r"is not UTF-8 text \(byte 2\), so it is not a class map"),
        ("map.txt", b"", "is empty; it needs one class per line"),
        ("map.pkl", b"words", "is not a pickled class map"),
        ("map.pkl", pickle.dumps({"red": "first"}), "has no index from 0 to 3999999 for red"),
        ("map.pkl", pickle.dumps(["red"]), "is not a pickled class map"),
        ("map.pkl", b"", "is not a pickled class map"),
        ("map.pkl", pickle.dumps({"red": 1 << 40}), "has no index from 0 to 3999999 for red"),
        ("map.pkl", pickle.dumps({"red": True}), "it has the opcode NEWTRUE"),
        ("map.pkl", pickle.dumps({"red": -1}), "has no index from 0 to 3999999 for red"),
        ("map.pkl", b"cos\nmkdir\n(S'NAME'\ntR.", "not a pickled class map: it has the opcode GLOBAL"),
        ("map.pkl", b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93.", "it has the opcode STACK_GLOBAL"),
        ("map.pkl", b"\x80\x05\x96" + struct.pack("<Q", 8 << 30) + b".", "is not a pickled class map"),  # 8 GB of bytes
        ("map.pkl", b"\x80\x02}r\xff\xff\xff\x7f.", "it has the opcode LONG_BINPUT"),  # a memo of 16 GB
        ("map.pkl", b"\x80\x02" + b"]" * 100_000 + b".", "it has the opcode EMPTY_LIST"),
        (
            "map.pkl",
            b"\x80\x02" + b"}X\x01\0\0\0a" * 90_000 + b"K\x01" + b"s" * 90_000 + b".",
            "no index from .* for a",
        ),
        ("map.pkl", b"\x80\x02}}K\x01s.", "is not a pickled class map: unhashable"),
        ("map.pkl", b"}h\x07.", "is not a pickled class map: "),
        ("map.pkl", b"I" + b"9" * 9999 + b"\n.", "is not a pickled class map: "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_class_maps_that_cannot_be_used(tmp_path, name, content, message):
    write(tmp_path / "data", "red/0.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "data", class_map=tmp_path / name)


def test_a_pickled_class_map_runs_no_code(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    write(tmp_path / "data", "red/0.png")
    for version in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "map.pkl").write_bytes(pickle.dumps({"red": Evil()}, version))
        with pytest.raises(DataError, match="is not a pickled class map"):
            open_dataset(tmp_path / "data", class_map=tmp_path / "map.pkl")
        (tmp_path / "map.pkl").write_bytes(pickle.dumps({"red": 300, "blue": 0}, version))
        assert open_dataset(tmp_path / "data", class_map=tmp_path / "map.pkl").reader.samples[0][1] == 300
    assert not (tmp_path / "owned").exists()
    (tmp_path / "map.pkl").write_bytes(b"(dp0\nS'red'\np1\nI2\ns.")  # written by Python 2
    assert open_dataset(tmp_path / "data", class_map=tmp_path / "map.pkl").reader.samples[0][1] == 2


@pytest.mark.parametrize("option", ["--class-map", "--labels", "--real-labels"])
def test_lists_that_are_too_large_are_not_read(option, tmp_path, capsys, model, monkeypatch):
    three(tmp_path / "data", 1)
    path, more = tmp_path / "list.txt", ["--variant", "real"] * (option == "--real-labels")
    what = {"--class-map": "class map", "--labels": "file of labels", "--real-labels": "file of ReaL labels"}[option]
    with path.open("wb") as file:
        file.truncate(1 << 40)
    if more:
        with pytest.raises(DataError, match=f"list.txt' has more than 128 MiB, so it is not a {what}"):
            protocol("real", ByColor([str(i) for i in range(1000)]), torch.utils.data.TensorDataset(), path)
        path.write_text("[" * 100_000)
        with pytest.raises(DataError, match="list.txt' is not ReaL's list of 50000 labels: "):
            protocol("real", ByColor([str(i) for i in range(1000)]), torch.utils.data.TensorDataset(), path)
        return
    arguments = ["--model", model, "--data", tmp_path / "data", option, path]
    assert f"list.txt' has more than 128 MiB, so it is not a {what}" in command(capsys, "evaluate", *arguments)
    monkeypatch.setattr(image_sets, "_MOST_LINES", 10)
    path.write_text("\n" * 11)
    assert f"list.txt' has more than 10 lines, so it is not a {what}" in command(capsys, "evaluate", *arguments)


def test_class_maps_that_are_not_files(tmp_path, capsys, model):
    write(tmp_path / "data", "red/0.png")
    os.mkfifo(tmp_path / "pipe.txt")
    for path, message in (
        (tmp_path / "pipe.txt", "pipe.txt' is not a regular file, so it is not a class map"),
        (tmp_path / "data", "data' is not a regular file, so it is not a class map"),
        ("", "--class-map: must be text that is not empty"),
    ):
        line = command(capsys, "evaluate", "--model", model, "--data", tmp_path / "data", "--class-map", path)
        assert message in line


def test_many_other_classes_are_named_briefly(tmp_path):
    names = [f"class-{i:04d}" for i in range(900)]
    write(tmp_path, *(f"{name}/0.png" for name in names))
    other = ByColor([f"kind-{i:04d}" for i in range(900)])
    for problem, model in (("not those", other), ("900 classes and the model 2", ByColor(names[:2]))):
        with pytest.raises(DataError, match=problem) as error:
            count(open_dataset(tmp_path), model)
        assert "class-0003" not in str(error.value) or len(str(error.value)) < 400


# ---- labels


def test_labels_that_are_not_text_or_ambiguous(tmp_path, capsys):
    write(tmp_path / "val", "a.png", "b.png")
    labels = tmp_path / "labels.txt"
    for text, message in (
        (b"\xff\xfe1\n", "is not UTF-8 text .*, so it is not a file of labels"),
        (b"a.png 1\nb.png 2\na.png 3\n", "two labels for 'a.png': '1' and '3'"),
        ("a.png 1\nb.png ²\n".encode(), "neither an index nor a synset"),
        (b"a.png 1\nb.png " + b"9" * 5000, "neither an index nor a synset"),
    ):
        labels.write_bytes(text)
        with pytest.raises(DataError, match=message):
            open_labelled_folder(tmp_path / "val", labels)
    labels.write_text("1\n2\n")
    write(tmp_path / "val", "list.txt")
    dataset = open_labelled_folder(tmp_path / "val", labels)
    assert len(dataset) == 2 and not dataset.upright
    assert "ignoring 1 file that is not an image: list.txt" in capsys.readouterr().err
    write(tmp_path / "val", "deeper/a.jpg")
    with pytest.raises(DataError, match="several images of the same name.*: a"):
        open_labelled_folder(tmp_path / "val", labels)
    with pytest.raises(DataError, match="labels is empty"):
        open_labelled_folder(tmp_path / "val", "")


def test_invalid_real_labels(tmp_path):
    dataset = open_dataset(write(tmp_path / "data", "n01440764/0.png", "n01443537/0.png"))
    model = ByColor([f"{i}" for i in range(1000)])
    dataset.reader.class_to_idx = None  # as for a flat folder
    for text in ("[1, 2]", "words", json.dumps([1] * 50000), "7", '{"a": 1}'):
        (tmp_path / "real.json").write_text(text)
        with pytest.raises(DataError, match="is not ReaL's list of 50000 labels"):
            protocol("real", model, dataset, tmp_path / "real.json")


def test_options_that_would_be_ignored(tmp_path, capsys, model):
    write(tmp_path / "val", "a.png")
    (tmp_path / "labels.txt").write_text("0\n")
    start = ["--model", model, "--data", tmp_path / "val"]
    labels = ["--labels", tmp_path / "labels.txt"]
    for more, message in (
        ([*labels, "--dataset", "torch/mnist"], "--dataset has no effect with --labels"),
        ([*labels, "--class-map", tmp_path / "labels.txt"], "--class-map has no effect with --labels"),
        (["--real-labels", "real.json"], "--real-labels has no effect without --variant real"),
        (["--labels", ""], "--labels: must be text that is not empty"),
        (["--csv", ""], "--csv: must be the name of a file"),
    ):
        assert message in command(capsys, "evaluate", *start, *more)


# ---- unusual images, whole commands


@pytest.fixture
def unusual_images(tmp_path):
    """Each class has images that once crashed or were read incorrectly."""
    three(tmp_path, 1)
    Image.new("RGB", (1, 1), COLORS["red"]).save(tmp_path / "red" / "tiny.png")
    Image.new("RGB", (1, 600), COLORS["red"]).save(tmp_path / "red" / "tall.png")
    Image.new("RGB", (600, 1), COLORS["red"]).save(tmp_path / "red" / "wide.webp", lossless=True)
    frames = [Image.new("RGB", (9, 9), COLORS[name]) for name in ("blue", "red", "green")]
    frames[0].save(tmp_path / "blue" / "frames.gif", save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(tmp_path / "blue" / "cmyk.tiff")
    (tmp_path / "blue" / "empty.png").write_bytes(b"")
    Image.new("LA", (9, 9), (80, 10)).save(tmp_path / "green" / "la.png")
    Image.new("I;16", (9, 9), 40000).save(tmp_path / "green" / "deep.png")
    Image.new("F", (9, 9), 7.0).save(tmp_path / "green" / "float.tiff")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_unusual_images_through_all_verbs(unusual_images, tmp_path_factory, channels, capsys):
    output = tmp_path_factory.mktemp("run") / "out"
    os.mkdir(unusual_images.parent / f"{channels}")
    data = unusual_images.parent / f"{channels}"
    os.symlink(unusual_images, data / "train")
    os.symlink(unusual_images, data / "val")
    config = FinetuneConfig(
        data=str(data), output=str(output), model="internimage_atto", pretrained=False, img_size=32, in_chans=channels,
        epochs=1, warmup_epochs=0, batch_size=4, workers=0, device="cpu", report=False,
    )  # fmt: skip
    finetune(config, progress=False)
    capsys.readouterr()
    arguments = ["evaluate", "--model", str(output), "--data", str(data), "--workers", "0"]
    assert main([*arguments, "--json", str(data / "report.json")]) == 0
    err = capsys.readouterr().err
    assert "empty.png' cannot be read (an empty file)" in err
    assert "float.tiff' cannot be read (32-bit float pixels outside 0 to 1" in err
    assert json.loads((data / "report.json").read_text())["images"] == 10
    assert main([*arguments, "--strict"]) == 1
    capsys.readouterr()
    assert main(["predict", str(unusual_images), "--model", str(output), "--json"]) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 10 and captured.err.count("error:") == 2


def test_predict_prints_any_name(tmp_path, capsys, model):
    file = os.fsencode(tmp_path) + b"/\xff.png"
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    try:
        os.rename(tmp_path / "a.png", file)
    except OSError:  # macOS allows no such names
        return
    assert main(["predict", str(tmp_path), "--model", str(model)]) == 0
    assert "\\udcff.png" in capsys.readouterr().out
    assert "IMAGE: must be text that is not empty" in command(capsys, "predict", "", "--model", model)
