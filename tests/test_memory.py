# SPDX-License-Identifier: MIT
"""How much memory loading and converting take: the resident set of a fresh process, at its peak.

The files are sparse, so that they take no room and no time to write; their weights are zeros.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import golden
import pytest
import timm
import torch
from torch._subclasses import FakeTensorMode

from internimage.weights.safetensors_io import DTYPES, nbytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")

GIB = 2**30
SMALL = "internimage_small.ogvl_in1k"
HUGE = "internimage_huge.ogvl_joint_in22k_ft_in1k_640"
GIANT = "internimage_giant.ogvl_joint_in22k_ft_in1k_512"
_FILES = {name: file for file, name in golden.MODELS.items()}

PRELUDE = """
import json, sys, time, timm, torch, internimage
from internimage.convert.convert import convert
def resident(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) * 1024
before, libraries = resident("VmRSS"), resident("RssFile")
start = time.perf_counter()
"""
# Pages of libraries are mapped as they are used, and a busy system takes them back and loads them again: how many there
# were before says nothing, and those that came since are not the script's.
EPILOGUE = """
before += max(0, resident("RssFile") - libraries)
print(json.dumps(dict(seconds=time.perf_counter() - start, before=before, peak=resident("VmHWM"))))
"""


def measure(script: str, *arguments) -> dict[str, float]:
    """Run a script in a fresh process: its seconds, and bytes resident without what it allocates and at its peak."""
    code = PRELUDE + textwrap.dedent(script) + EPILOGUE
    root = Path(__file__).parent.parent
    # glibc keeps what is freed for itself more and more, up to tensors of 32 MiB, unless its threshold is given
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print({key: f"{value / 1e9:.2f} GB" if key != "seconds" else f"{value:.1f} s" for key, value in result.items()})
    return result


def write_sparse(folder: Path, name: str, dtype: torch.dtype = torch.float32, shards: int = 3) -> int:
    """Weights of zeros in the layout of the official repository of `name`; gives their bytes."""
    folder.mkdir()
    code = next(key for key, value in DTYPES.items() if value == dtype)
    shapes = golden.manifest()[_FILES[name]]["shapes"]
    names = list(shapes)
    total, weight_map = 0, {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header, offset = {}, 0
        for key in names[len(names) * i // shards : len(names) * (i + 1) // shards]:
            whole = key.endswith("num_batches_tracked")
            size = nbytes(tuple(shapes[key]), torch.int64 if whole else dtype)
            hub_name = "model." + key.replace("gamma1", "layer_scale1").replace("gamma2", "layer_scale2")
            places = [offset, offset + size]
            header[hub_name] = {"dtype": "I64" if whole else code, "shape": shapes[key], "data_offsets": places}
            weight_map[hub_name] = file
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
        total += offset
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_sparse_pth(path: Path, name: str) -> int:
    """An official .pth of float32 zeros; gives the bytes of its weights."""
    with FakeTensorMode():
        shapes = golden.manifest()[_FILES[name]]["shapes"]
        whole = {key: key.endswith("num_batches_tracked") for key in shapes}
        content = {k: torch.empty(s, dtype=torch.int64 if whole[k] else torch.float32) for k, s in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"model": content}, path)
    return sum(value.nbytes for value in content.values())


CREATE = """
arguments = dict(pretrained_cfg_overlay=dict(file=sys.argv[2]), dtype=getattr(torch, sys.argv[3]))
model = timm.create_model(sys.argv[1], pretrained=True, **arguments)
assert not any(value.is_meta for value in model.state_dict().values())
"""
CONVERT = """
result = convert(sys.argv[2], sys.argv[3], model=sys.argv[1], dtype=torch.bfloat16, verify=True)
assert result.verified
"""

# ---- at a size for every day. What counts is what comes on top of the process: it is as large as a small model


@pytest.mark.parametrize("kind, dtype", [("safetensors", torch.float32), ("pth", torch.bfloat16)])
def test_weights_exist_once(kind, dtype, tmp_path):
    path = tmp_path / "w"
    stored = (write_sparse_pth if kind == "pth" else write_sparse)(path, SMALL)
    weights = stored // 4 * dtype.itemsize
    result = measure(CREATE, SMALL, path, str(dtype).removeprefix("torch."))
    # one tensor is there in the file's dtype as well
    assert 0.95 * weights < result["peak"] - result["before"] < 1.15 * weights + 48 * 2**20


def test_conversion_streams(tmp_path):
    weights = write_sparse(tmp_path / "w", SMALL)
    result = measure(CONVERT, SMALL, tmp_path / "w", tmp_path / "out")
    assert weights > 200e6 and result["peak"] - result["before"] < 100e6


# ---- the largest, as they are


@pytest.mark.slow
def test_giant_on_the_meta_device_takes_no_memory():
    result = measure("timm.create_model(sys.argv[1], device='meta')", GIANT)
    assert result["peak"] - result["before"] < 100e6


@pytest.mark.slow
def test_giant_in_bfloat16(tmp_path):
    weights = write_sparse(tmp_path / "w", GIANT, torch.bfloat16, shards=3)
    result = measure(CREATE, GIANT, tmp_path / "w", "bfloat16")
    assert weights > 6e9 and result["peak"] < 1.15 * weights


@pytest.mark.slow
def test_huge_in_bfloat16(tmp_path):
    write_sparse(tmp_path / "w", HUGE, torch.bfloat16)
    assert measure(CREATE, HUGE, tmp_path / "w", "bfloat16")["peak"] < 3e9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "pth"])
def test_giant_converts_in_two_gigabytes(kind, tmp_path):
    path = tmp_path / "w"
    if kind == "pth":
        weights = write_sparse_pth(path, GIANT)
    else:
        weights = write_sparse(path, GIANT, torch.float32, shards=3)
    result = measure(CONVERT, GIANT, path, tmp_path / "out")
    assert weights > 12e9 and result["peak"] < 2e9
    model = timm.create_model(GIANT, device="meta")
    assert sum(value.numel() for value in model.state_dict().values()) * 4 == weights
