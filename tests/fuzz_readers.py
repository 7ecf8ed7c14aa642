# SPDX-License-Identifier: MIT
"""Everything that reads a stranger's file, each with a corpus of files that are built here."""

import dataclasses
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import formats
import fuzz_mutations as change
import numpy as np
import yaml
from fuzz import Reader, Seed
from fuzz_weights import CONFIG, WEIGHTS
from PIL import Image

import internimage  # noqa: F401 - registers the models
from internimage.config import ConfigError, dump, load_config
from internimage.data import images
from internimage.data.datasets import class_names
from internimage.data.image_sets import read_class_map
from internimage.data.image_tars import open_tar
from internimage.data.imagenet import open_labelled_folder, protocol
from internimage.engine.log import read_steps
from internimage.engine.run_folder import check_output
from internimage.models.model_config import ModelConfigError, find_model_config
from internimage.tasks.classification.config import FinetuneConfig

# ---- settings and lists


def _config_seeds(folder: Path) -> list[Seed]:
    flat = {"architecture": "resnet18", "num_classes": 3, "input_size": [3, 64, 64], "classifier": "fc"}
    contents = {"ours": CONFIG, "flat": flat, "transformers": {"model_type": "internimage", "depths": [4, 4, 18, 4]}}
    edits = {".json": (change.edit_json,)}
    return [Seed(name, {"config.json": json.dumps(c, indent=2).encode()}, edits) for name, c in contents.items()]


def _read_config(folder: Path) -> object:
    config = find_model_config(folder)
    return config and dataclasses.asdict(config)


def _recipe_seeds(folder: Path) -> list[Seed]:
    everything = {f.name: f.default for f in dataclasses.fields(FinetuneConfig) if f.default is not dataclasses.MISSING}
    whole = yaml.safe_dump({"data": "photos", "output": "runs/a", **everything}, sort_keys=False)
    short = "# a recipe\ndata: photos\noutput: runs/a\nlr: 1e-3\nepochs: 3\nmodel: internimage_atto\n"
    edits = {".yaml": (change.edit_yaml,)}
    return [Seed(name, {"r.yaml": text.encode()}, edits) for name, text in (("whole", whole), ("short", short))]


def _settings_seeds(folder: Path) -> list[Seed]:
    text = dump(FinetuneConfig(data="photos", output="run"))
    files = {"run/finetune.yaml": text.encode(), "run/checkpoints/step-000000001.pt": b""}
    return [Seed("settings", files, {".yaml": (change.edit_yaml,)}, ("run/finetune.yaml",))]


def _read_settings(folder: Path) -> bool:
    return check_output(FinetuneConfig(data="photos", output=str(folder / "run")))


def _map_seeds(folder: Path) -> list[Seed]:
    lines = {"names": "cat\ndog\nowl\n", "synsets": "n01440764\nn01443537\n", "crlf": "\ufeffcat\r\ndog\r\n"}
    edits = {".txt": (change.edit_lines,), ".pkl": (change.edit_pickle,)}
    seeds = [Seed(name, {"map.txt": text.encode()}, edits) for name, text in lines.items()]
    for version in (0, 2, 4):
        mapping = pickle.dumps({"cat": 0, "dog": 1, "owl": 2}, version)
        seeds.append(Seed(f"pickle {version}", {"map.pkl": mapping}, edits))
        code = pickle.dumps({"cat": formats.Call(os.system, "true")}, version)
        seeds.append(Seed(f"hostile: pickle {version}", {"map.pkl": code}, edits))
    return seeds


def _read_map(folder: Path) -> list[str] | None:
    (path,) = folder.iterdir()
    return class_names(SimpleNamespace(class_to_idx=read_class_map(path)))


def _label_seeds(folder: Path) -> list[Seed]:
    pictures = {f"images/{name}.png": b"" for name in ("a", "b", "c")}
    lists = {
        "names": "a.png 3\nb.png 999\nc.png 0\n",
        "synsets": "ImageId,Labels\na,n01440764 1 2 3\nb,n01443537\nc,n01440764\n",
        "bare": "0\n1\n2\n",
    }
    edits = {".txt": (change.edit_lines,)}
    return [Seed(n, {**pictures, "labels.txt": t.encode()}, edits, ("labels.txt",)) for n, t in lists.items()]


def _read_labels(folder: Path) -> list:
    dataset = open_labelled_folder(folder / "images", folder / "labels.txt")
    return [(Path(path).name, target) for path, target in dataset.reader.samples]


def _real_seeds(folder: Path) -> list[Seed]:
    content = json.dumps([[i % 1000] if i % 7 else [] for i in range(50_000)])
    return [Seed("real", {"real.json": content.encode()}, {".json": (change.edit_json,)})]


def _read_real(folder: Path) -> object:
    return protocol("real", SimpleNamespace(num_classes=1000), SimpleNamespace(), folder / "real.json")


def _steps_seeds(folder: Path) -> list[Seed]:
    rows = "".join(f"{i},{1 + i // 5},{2 / i!r},0.001,{0.5 + i},812.5\n" for i in range(1, 12))
    text = f"step,epoch,loss,lr,grad_norm,images_per_second\n{rows}"
    return [Seed("steps", {"steps.csv": text.encode()}, {".csv": (change.edit_lines,)})]


# ---- images


def _picture(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    return picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)


def _image_seeds(folder: Path) -> list[Seed]:
    """A picture in every format that Pillow writes here, those among them that are refused."""
    Image.init()
    seeds, endings = [], {name: ending for ending, name in reversed(Image.registered_extensions().items())}
    variants = {"TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}], "WEBP": [{}, {"lossless": True}]}
    for name in sorted(Image.SAVE):
        for options in variants.get(name, [{}]):
            for mode in ("RGB", "L", "RGBA", "1", "P", "I;16", "F") if name in images.formats() else ("RGB", "1"):
                target = io.BytesIO()
                try:
                    picture = Image.new("F", (32, 24), 0.5) if mode == "F" else _picture(mode)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of formats that Pillow will not have for long
                        picture.save(target, format=name, **options)
                except Exception:  # a format that has not this mode, or needs another program
                    continue
                refused = () if name in images.formats() else ("refused:",)
                title = " ".join((*refused, name, mode, *map(str, options.values())))
                files = {f"picture{endings.get(name, '.' + name.lower())}": target.getvalue()}
                seeds.append(Seed(title, files, {".png": (change.edit_png,), ".apng": (change.edit_png,)}))
    exif = Image.Exif()
    exif[274] = 6
    target = io.BytesIO()
    _picture("RGB").save(target, format="JPEG", exif=exif)
    seeds.append(Seed("JPEG turned", {"picture.jpg": target.getvalue()}))
    frames = io.BytesIO()
    _picture("P").save(frames, format="GIF", save_all=True, append_images=[_picture("P")])
    seeds.append(Seed("GIF film", {"picture.gif": frames.getvalue()}))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    seeds.append(Seed("hostile: EPS", {"picture.png": postscript}))
    return seeds


def _read_image(folder: Path) -> tuple:
    (path,) = folder.iterdir()
    image = images.read_image(path)
    return image.size, image.tobytes()


def _png(value: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 10, 20)).save(target, format="PNG")
    return target.getvalue()


def _tar(members: dict[str, bytes], kind: int) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=kind) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


def _tar_seeds(folder: Path) -> list[Seed]:
    kinds = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    flat = {f"{label}/{i}.png": _png(i * 40) for label in ("cat", "dog") for i in range(3)}
    long = {f"{label}/{'x' * 120}{i}é.png": _png(i) for label in ("cat", "dog") for i in range(2)}
    edits = {".tar": (change.edit_tar_header, change.add_tar_header)}
    seeds = []
    for name, kind in kinds.items():
        inner = {f"{label}.tar": _tar({f"{i}.png": _png(i) for i in range(2)}, kind) for label in ("cat", "dog")}
        for title, members in (("folders", flat), ("tars", inner), ("long names", long if name != "ustar" else flat)):
            # the checksums are of headers: long names, which stand behind them, have none
            seeds.append(
                Seed(f"{name}, {title}", {"data.tar": _tar(members, kind)}, edits, sealed=title != "long names")
            )
    return seeds


# a tar does not say how many members it has, nor in which order: it cannot tell where whole blocks were moved, nor
# zeros at its end from those that every tar ends with
_REVEALED = (change.flip_bits, change.truncate, change.overwrite_number)


def _read_tar(folder: Path) -> list:
    """The images and classes; the pixels are left out, for a tar's checksums are of its headers alone."""
    reader, _ = open_tar(folder / "data.tar")
    for i in range(len(reader)):
        try:
            images.read_image(reader[i][0])
        except images.ImageError:
            continue
    return [(reader.filename(i), reader.samples[i][1], reader.samples[i][0].size) for i in range(len(reader))]


READERS = (
    *WEIGHTS,
    Reader("config.json", _config_seeds, _read_config, (ModelConfigError,), 2),
    Reader("recipes", _recipe_seeds, lambda f: load_config(FinetuneConfig, f / "r.yaml"), (ConfigError,), 2),
    Reader("settings of a run", _settings_seeds, _read_settings, (ConfigError,)),
    Reader("class maps", _map_seeds, _read_map, (images.DataError,)),
    Reader("labels", _label_seeds, _read_labels, (images.DataError,)),
    Reader("ReaL labels", _real_seeds, _read_real, (images.DataError,), 0.05),
    Reader("steps.csv", _steps_seeds, read_steps, ()),
    Reader("images", _image_seeds, _read_image, (images.ImageError,), 4),
    Reader("tars", _tar_seeds, _read_tar, (images.DataError,), 2, sealed=_REVEALED),
)
