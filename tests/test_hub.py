# SPDX-License-Identifier: MIT
"""Weights from a Hub: the unmodified client, on a server whose repositories are laid out as the official ones.

Every download goes through huggingface_hub and HTTP to `hub_server.py`, and every fault is one that a network, a disk
or another process can bring about.
"""

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import formats
import golden
import launched
import pytest
import timm
import torch
from conftest import HUB
from hub_server import Fault, Hub
from runs import ROOT, environment
from safetensors.torch import load_file, save
from torch import Tensor, nn

from internimage import CheckpointError
from internimage.models import PUBLISHED, Published, internimage
from internimage.weights import hub
from internimage.weights import resolve as sources

SMALL = dict(channels=8, depths=(1, 1, 2, 1), groups=(1, 1, 2, 4))
TINY, TINY_REPO = "internimage_tiny.ogvl_in1k", "OpenGVLab/internimage_t_1k_224"
GIANT, GIANT_REPO = "internimage_giant.ogvl_joint_in22k_ft_in1k_512", "OpenGVLab/internimage_g_22kto1k_512"
SMALL_GIANT = dict(SMALL, stage3_post_norm_blocks=(1,))
PTH_REPO, TINY_PTH = "OpenGVLab/InternImage", "internimage_t_1k_224.pth"
CARD = {"README.md": b"---\nlicense: mit\n---\n", "config.json": b'{"model_type": "internimage"}'}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    shapes = timm.create_model("internimage_tiny", device="meta", **SMALL).state_dict()
    return golden.fill_state_dict({key: value.shape for key, value in shapes.items()})


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """How long the client would have waited; it does not."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


def publish(server: Hub, state_dict: dict[str, Tensor], repo: str = TINY_REPO, **options) -> str:
    """A per-model repository with its weights in one file, as the official ones of tiny to huge."""
    return server.add(repo, {**CARD, "model.safetensors": save(formats.hub_names(state_dict))}, **options)


def create(cache: Path, name: str = TINY, **kwargs) -> nn.Module:
    arguments = SMALL_GIANT if "giant" in name else SMALL
    return timm.create_model(name, pretrained=True, cache_dir=str(cache), **{**arguments, **kwargs})


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def blobs(cache: Path) -> list[Path]:
    """Files of weights in a cache, whole or in parts, by whatever name."""
    return [file for file in cache.rglob("blobs/*") if file.stat().st_size > 1000]


# ---- by name


def test_name_loads_and_is_cached(local_hub, cache, weights, caplog):
    publish(local_hub, weights)
    with caplog.at_level(logging.INFO, logger="internimage"):
        assert_equal(create(cache).state_dict(), weights)
    assert "using model.safetensors" in caplog.text
    assert [request.path for request in local_hub.requests if request.cdn] == [f"/blobs/{blobs(cache)[0].name}"]
    local_hub.requests.clear()
    assert_equal(create(cache).state_dict(), weights)
    assert [request.method for request in local_hub.requests] == ["HEAD"], "asked whether there is a newer one, no more"


@pytest.mark.parametrize("in_chans", [3, 1])
@pytest.mark.parametrize("num_classes", [None, 5, 0])
def test_name_with_other_classes_and_channels(num_classes, in_chans, local_hub, cache, weights, caplog):
    publish(local_hub, weights)
    model = create(cache, num_classes=num_classes, in_chans=in_chans)
    expected = {key: value for key, value in weights.items() if num_classes is None or not key.startswith("head.")}
    if in_chans == 1:
        expected["patch_embed.conv1.weight"] = weights["patch_embed.conv1.weight"].sum(1, keepdim=True)
    actual = model.state_dict()
    assert_equal({key: actual[key] for key in expected}, expected)
    assert set(actual) - set(expected) == ({"head.weight", "head.bias"} if num_classes == 5 else set())
    assert ("the classifier is new" in caplog.text) == (num_classes == 5)


def test_name_as_features(local_hub, cache, weights):
    publish(local_hub, weights)
    model = create(cache, features_only=True, out_indices=(1, 3))
    actual = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    assert_equal(actual, {key: weights[key] for key in actual})
    assert [tuple(x.shape[1:]) for x in model(torch.zeros(1, 3, 64, 64))] == [(16, 8, 8), (64, 2, 2)]


@pytest.mark.parametrize("kind, suffix", [("Hub, shards", "safetensors"), ("Hub, pickled shards", "bin")])
@pytest.mark.parametrize("name, repo", [(TINY, TINY_REPO), (GIANT, GIANT_REPO)])
def test_shards(name, repo, kind, suffix, local_hub, cache, tmp_path):
    """As transformers lays out what is over its shard size: giant."""
    arguments = SMALL_GIANT if name == GIANT else SMALL
    shapes = timm.create_model(name, device="meta", **arguments).state_dict()
    state_dict = golden.fill_state_dict({key: value.shape for key, value in shapes.items()})
    local_hub.add(repo, formats.write(kind, tmp_path / "repo", state_dict))
    assert_equal(create(cache, name).state_dict(), state_dict)
    assert len({request.path for request in local_hub.requests if f"-of-00003.{suffix}" in request.path}) == 3


def test_pickle_of_transformers(local_hub, cache, weights, tmp_path):
    local_hub.add(TINY_REPO, formats.write("Hub, pickle", tmp_path / "repo", weights).parent)
    assert_equal(create(cache).state_dict(), weights)


@pytest.mark.parametrize("why", ["no weights in the repository", "no repository"])
def test_collected_files_are_the_second_choice(why, local_hub, cache, weights, tmp_path):
    if why != "no repository":
        local_hub.add(TINY_REPO, CARD)
    path = formats.save_official(tmp_path / TINY_PTH, {"model": weights})
    local_hub.add(PTH_REPO, {TINY_PTH: path})
    assert_equal(create(cache).state_dict(), weights)
    with pytest.raises(hub.DownloadError) as error:
        create(cache, "internimage_small.ogvl_in1k")
    for part in ("OpenGVLab/internimage_s_1k_224 was not found", f"{PTH_REPO} .* none of internimage_s_1k_224.pth"):
        assert re.search(part, str(error.value))
    local_hub.add("OpenGVLab/internimage_s_1k_224", CARD)
    with pytest.raises(hub.DownloadError, match="has none of model.safetensors, .*pytorch_model.bin"):
        create(cache, "internimage_small.ogvl_in1k")


def test_repository_of_ones_own(local_hub, cache, weights):
    local_hub.add("me/mine", {"w.safetensors": save(weights)}, ref="v2")
    overlay = dict(hf_hub_id="me/mine@v2", hf_hub_filename="w.safetensors")
    assert_equal(create(cache, pretrained_cfg_overlay=overlay).state_dict(), weights)
    overlay["hf_hub_filename"] = "other.safetensors"
    with pytest.raises(hub.NothingThere, match=r"me/mine \(revision v2\) has none of other.safetensors"):
        create(cache, pretrained_cfg_overlay=overlay)
    assert {request.path.split("/")[1] for request in local_hub.requests if request.method == "HEAD"} <= {"me", "api"}


def test_hf_hub_name(local_hub, cache, weights):
    config = dict(architecture="internimage_tiny", num_classes=1000, model_args=SMALL, pretrained_cfg={})
    local_hub.add("me/mine", {"config.json": json.dumps(config).encode(), "model.safetensors": save(weights)})
    model = timm.create_model("hf-hub:me/mine", pretrained=True, cache_dir=str(cache))
    assert_equal(model.state_dict(), weights)


@pytest.mark.parametrize("source", ["safetensors", "pth"])
def test_logits_after_a_download(source, local_hub, cache, tmp_path):
    case = golden.cases("models")["t_2x64x96_full"]
    released = golden.released("internimage_t_1k_224")
    if source == "pth":
        local_hub.add(PTH_REPO, {TINY_PTH: formats.save_official(tmp_path / "w.pth", {"model": released})})
    else:
        local_hub.add(TINY_REPO, formats.write("Hub, folder", tmp_path / "repo", released))
    model = timm.create_model(TINY, pretrained=True, cache_dir=str(cache)).eval()
    with torch.inference_mode():
        logits = model(golden.images(case["input_seed"], case["input_shape"]))
    assert (logits - golden.tensors("models")[f"{case['name']}/logits"]).abs().max() < 1e-4


# ---- revisions


def test_revisions(local_hub, cache, weights):
    other = formats.shifted(weights)
    first = publish(local_hub, other)
    publish(local_hub, formats.shifted(other), ref="v2")
    publish(local_hub, weights)
    for revision, expected in ((first, other), ("v2", formats.shifted(other)), ("main", weights)):
        overlay = dict(hf_hub_id=f"{TINY_REPO}@{revision}")
        assert_equal(create(cache, pretrained_cfg_overlay=overlay).state_dict(), expected)
    local_hub.stop()
    overlay = dict(hf_hub_id=f"{TINY_REPO}@{first}")
    assert_equal(create(cache, pretrained_cfg_overlay=overlay).state_dict(), other)  # a commit does not change


def test_revision_that_is_not_there_is_an_error_and_has_no_second_choice(local_hub, cache, weights, tmp_path):
    publish(local_hub, weights)
    local_hub.add(PTH_REPO, {TINY_PTH: formats.save_official(tmp_path / "w.pth", {"model": weights})})
    with pytest.raises(hub.DownloadError, match=f"{TINY_REPO} has no revision 'v9'"):
        create(cache, pretrained_cfg_overlay=dict(hf_hub_id=f"{TINY_REPO}@v9"))
    assert not local_hub.seen("HEAD", PTH_REPO)


def test_tags_can_pin_revisions(local_hub, cache, weights, monkeypatch, tmp_path):
    path = formats.save_official(tmp_path / "w.pth", {"model": weights})
    commit = local_hub.add(PTH_REPO, {TINY_PTH: path})
    local_hub.add(PTH_REPO, {TINY_PTH: b"a later one"})
    pinned = dataclasses.replace(PUBLISHED[TINY], revision="a" * 40, pth_revision=commit)
    assert isinstance(pinned, Published) and pinned.hub_source == f"{TINY_REPO}@{'a' * 40}"
    for module in (internimage, sources):
        monkeypatch.setitem(module.PUBLISHED, TINY, pinned)
    cfg = internimage._cfg(TINY)
    assert cfg["hf_hub_id"] == pinned.hub_source
    assert_equal(create(cache, pretrained_cfg_overlay=dict(hf_hub_id=cfg["hf_hub_id"])).state_dict(), weights)


# ---- tokens


def test_token(local_hub, cache, weights, monkeypatch):
    publish(local_hub, weights, "me/secret", token="hf_right")
    overlay = dict(hf_hub_id="me/secret")
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(hub.NothingThere, match=r"me/secret was not found at .*127.0.0.1.*HF_TOKEN.*main"):
            create(cache, pretrained_cfg_overlay=overlay)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert_equal(create(cache, pretrained_cfg_overlay=overlay).state_dict(), weights)
    sent = {request.cdn: request.headers.get("authorization") for request in local_hub.requests}
    assert sent == {False: "Bearer hf_right", True: None}, "the token stays with the Hub"


def test_gated_repository(local_hub, cache, weights):
    publish(local_hub, weights, "me/gated", token="hf_right", gated=True)
    with pytest.raises(hub.NothingThere, match=r"accepted its terms at http.*me/gated.*HF_TOKEN"):
        create(cache, pretrained_cfg_overlay=dict(hf_hub_id="me/gated"))


# ---- a network that fails


MANY = 40_000  # classes: 15 MB, more than the client reads at once


@pytest.fixture(scope="module")
def many(weights) -> dict[str, Tensor]:
    shapes = {"head.weight": (MANY, 96), "head.bias": (MANY,)}
    return {**weights, **golden.fill_state_dict(shapes)}


def create_many(cache: Path) -> nn.Module:
    return create(cache, pretrained_cfg_overlay=dict(num_classes=MANY, hf_hub_id=TINY_REPO))


@pytest.mark.parametrize("ignore_range", [False, True])
def test_cut_connection_is_resumed_or_begun_again(ignore_range, local_hub, cache, many, waits):
    publish(local_hub, many)
    local_hub.faults = [Fault("/blobs/", cut=12_000_000), Fault("/blobs/", ignore_range=ignore_range)]
    assert_equal(create_many(cache).state_dict(), many)
    first, second = local_hub.seen("GET", "/blobs/")
    assert "range" not in first.headers
    assert 0 < int(second.headers["range"].removeprefix("bytes=").removesuffix("-")) <= 12_000_000


BROKEN = {
    "always cut": (Fault("/blobs/", cut=0, times=99), "downloading 'model.safetensors' failed"),
    "shorter than it says": (Fault("/blobs/", short=100), "another size than announced and has been deleted"),
    "longer than it says": (Fault("/resolve/", "HEAD", size=3000), "another size than announced"),
    "damaged": (Fault("/blobs/", damage=5000, times=2), "'model.safetensors' was corrupted again and has been deleted"),
    "damaged header": (Fault("/blobs/", damage=30, times=2), "corrupted again.*the expected checksum is"),
    "forbidden": (Fault("/blobs/", status=403), "403"),
    "bad token": (
        Fault("/resolve/", "HEAD", 99, 401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        r"the token was refused \(HF_TOKEN\)",
    ),
    "a web page in between": (Fault("/resolve/", "HEAD", status=200, times=99), "does not seem to be served by"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_download_leaves_nothing_and_the_next_one_is_right(what, local_hub, cache, weights, waits, tmp_path):
    fault, message = BROKEN[what]
    publish(local_hub, weights)
    # not a reason for the second choice: the first one is there
    local_hub.add(PTH_REPO, {TINY_PTH: formats.save_official(tmp_path / "w.pth", {"model": formats.shifted(weights)})})
    local_hub.faults = [dataclasses.replace(fault)]
    with pytest.raises(hub.DownloadError, match=message):
        create(cache)
    assert blobs(cache) == [] and not local_hub.seen("GET", TINY_PTH)
    local_hub.faults = []
    assert_equal(create(cache).state_dict(), weights)


def test_damaged_shard_leaves_the_others(local_hub, cache, weights, tmp_path):
    folder = formats.write("Hub, shards", tmp_path / "repo", weights)
    local_hub.add(TINY_REPO, folder)
    second = local_hub.repositories[TINY_REPO].commits.popitem()[1]["model-00002-of-00003.safetensors"]
    local_hub.add(TINY_REPO, folder)
    local_hub.faults = [Fault(second.etag, damage=50, times=2)]
    with pytest.raises(hub.DownloadError, match="'model-00002-of-00003.safetensors' was corrupted again"):
        create(cache)
    local_hub.requests.clear()
    assert_equal(create(cache).state_dict(), weights)
    assert len(local_hub.seen("GET", "/blobs/")) == 2


@pytest.mark.parametrize("method, path", [("HEAD", "/resolve/"), ("GET", "/blobs/")])
def test_too_many_requests(method, path, local_hub, cache, weights, waits):
    publish(local_hub, weights)
    times = (
        2 if method == "HEAD" else 1
    )  # the first HEAD is not repeated, for the cache's sake, before it is looked into
    local_hub.faults = [Fault(path, method, times, status=429, headers={"Retry-After": "7"})]
    assert_equal(create(cache).state_dict(), weights)
    assert waits == [8.0], "as long as the Hub asked for, and a second"


def test_server_error(local_hub, cache, weights, waits):
    publish(local_hub, weights)
    fault = Fault("/resolve/", "HEAD", 99, status=503)
    local_hub.faults = [dataclasses.replace(fault)]
    with pytest.raises(hub.DownloadError, match="could not be downloaded from http://127.*503"):
        create(cache)
    local_hub.faults = []
    create(cache)
    local_hub.faults = [dataclasses.replace(fault)]
    assert_equal(create(cache).state_dict(), weights)  # from the cache


def test_no_network_says_what_to_set(local_hub, cache, weights, waits):
    publish(local_hub, weights)
    local_hub.stop()
    with pytest.raises(hub.DownloadError) as error:
        create(cache)
    message = str(error.value)
    for part in (
        TINY_REPO,
        TINY_PTH,
        HUB.url,
        str(cache),
        "pretrained_cfg_overlay=dict(file=PATH)",
        "--checkpoint FILE",
        "HF_ENDPOINT",
    ):
        assert part in message
    assert "\n" not in message and len(message.replace(str(cache), "")) < 650
    assert len(waits) <= 5, "one file's attempts are long enough to wait for"
    local_hub.start()
    create(cache)
    local_hub.stop()
    assert_equal(create(cache).state_dict(), weights)


def test_no_network_and_the_second_choice_in_the_cache(local_hub, cache, weights, waits, tmp_path):
    local_hub.add(PTH_REPO, {TINY_PTH: formats.save_official(tmp_path / "w.pth", {"model": weights})})
    create(cache)
    local_hub.stop()
    assert_equal(create(cache).state_dict(), weights)


# ---- repositories that are wrong


def test_missing_shard(local_hub, cache, weights, tmp_path):
    folder = formats.write("Hub, shards", tmp_path / "repo", weights)
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not to be taken instead")
    local_hub.add(TINY_REPO, folder)
    message = "'model.safetensors.index.json' names a shard that is not there: 'model-00002-of-00003.safetensors'"
    with pytest.raises(hub.DownloadError, match=message):
        create(cache)


@pytest.mark.parametrize("shard", ["../config.json", "/etc/passwd", "a/../../b.safetensors"])
def test_index_that_points_out_of_its_folder(shard, local_hub, cache):
    index = json.dumps({"weight_map": {"model.head.bias": shard}}).encode()
    local_hub.add(TINY_REPO, {"model.safetensors.index.json": index})
    with pytest.raises(hub.DownloadError, match="is not a shard index.*lies outside of its folder"):
        create(cache)


def test_pickle_that_runs_code_is_refused(local_hub, cache, weights, tmp_path):
    marker = tmp_path / "marker"
    code = formats.Call(subprocess.Popen, [sys.executable, "-c", f"open({str(marker)!r}, 'w')"])
    path = formats.save_torch(tmp_path / "w.pth", {"model": weights, "config": code})
    local_hub.add(PTH_REPO, {TINY_PTH: path})
    with pytest.raises(CheckpointError, match="refused: unpickling it would call subprocess.Popen"):
        create(cache)
    assert not marker.exists()


def test_weights_of_another_model(local_hub, cache, weights):
    publish(local_hub, {**weights, "levels.0.extra": torch.ones(2)})
    with pytest.raises(CheckpointError, match="nothing was loaded. 1 differences:\n  unexpected: levels.0.extra"):
        create(cache)


# ---- processes, disks and settings

PRELUDE = """
import sys, os, time, timm, torch, internimage
from internimage.weights import hub
SMALL = dict(channels=8, depths=(1, 1, 2, 1), groups=(1, 1, 2, 4))
def create(**kwargs):
    return timm.create_model("internimage_tiny.ogvl_in1k", pretrained=True, **SMALL, **kwargs)
"""


def fresh(script: str, *arguments, **variables) -> None:
    """Run a script in a fresh process, which knows the Hub and its cache from its environment alone."""
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    env = environment() | {key: str(value) for key, value in variables.items()}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr


def start(script: str, *arguments) -> launched.Python:
    """A process whose client has the settings of this one."""
    return launched.Python(["-c", PRELUDE + textwrap.dedent(script), *arguments], environment())


def finish(process: launched.Python) -> str:
    result = process.communicate()
    assert result.returncode == 0, result.stderr
    return result.stdout


SAVE = "from safetensors.torch import save_file; save_file(create().state_dict(), sys.argv[1])"
SAVE_CACHED = (
    "from safetensors.torch import save_file; save_file(create(cache_dir=sys.argv[2]).state_dict(), sys.argv[1])"
)


def test_environment_of_a_fresh_process(local_hub, weights, tmp_path):
    publish(local_hub, weights, token="hf_right")
    home = tmp_path / "home"
    fresh(SAVE.format(""), tmp_path / "first", HF_HOME=home, HF_TOKEN="hf_right")
    assert_equal(load_file(tmp_path / "first"), weights)
    assert len(blobs(home / "hub")) == 1
    local_hub.requests.clear()
    fresh(SAVE.format(""), tmp_path / "second", HF_HOME=home, HF_HUB_OFFLINE="1")
    assert_equal(load_file(tmp_path / "second"), weights)
    assert local_hub.requests == []


def test_two_processes_at_once(local_hub, weights, cache, tmp_path):
    publish(local_hub, weights)
    both = threading.Barrier(2)
    # the first body is held back until both processes have asked for the file
    local_hub.faults = [Fault("/blobs/", cut=5000, hold=lambda: both.wait(120))]
    processes = [start(SAVE_CACHED, tmp_path / name, cache) for name in ("a", "b")]
    while len(local_hub.seen("HEAD", "/resolve/")) < 2:
        time.sleep(0.05)
    both.wait(120)
    for process, name in zip(processes, ("a", "b")):
        finish(process)
        assert_equal(load_file(tmp_path / name), weights)
    assert [file.name for file in cache.rglob("*.incomplete")] == []
    assert len(blobs(cache)) == 1


def test_process_that_is_killed_in_the_middle_leaves_nothing_that_is_taken_for_whole(local_hub, cache, many):
    publish(local_hub, many)
    killed = threading.Event()
    local_hub.faults = [Fault("/blobs/", cut=12_000_000, hold=lambda: killed.wait(120))]
    process = start("create(cache_dir=sys.argv[1])", cache)
    while not any(file.stat().st_size for file in cache.rglob("*.incomplete")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed.set()
    assert [file.suffix for file in blobs(cache)] == [".incomplete"]
    assert_equal(create_many(cache).state_dict(), many)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_full_disk(local_hub, cache, weights):
    """The kernel refuses what goes beyond a file's largest size as it does on a full disk, in the middle of a write."""
    publish(local_hub, weights)
    script = """
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    try:
        create(cache_dir=sys.argv[1])
    except hub.DownloadError as error:
        print(error)
    """
    out = finish(start(script, cache))
    assert f"the disk of the cache '{cache}' has no room" in out and "HF_HOME or cache_dir=PATH" in out
    assert blobs(cache) == []
    assert_equal(create(cache).state_dict(), weights)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_cache_that_cannot_be_written(local_hub, cache, weights, tmp_path):
    publish(local_hub, weights)
    create(cache)
    empty = tmp_path / "empty"
    empty.mkdir()
    script = """
    create(cache_dir=sys.argv[3])  # imports what it needs
    for folder in sys.argv[1:3]:
        os.system(f"chmod -R a-w,a+rX '{folder}'")
    if os.geteuid() == 0:
        os.seteuid(65534)  # nothing is forbidden to root
    create(cache_dir=sys.argv[1])
    print("loaded")
    try:
        create(cache_dir=sys.argv[2])
    except hub.DownloadError as error:
        print(error)
    """
    Path(os.environ["HF_HOME"]).chmod(0o755)  # where the client looks for a token
    for folder in (tmp_path, *tmp_path.parents):  # pytest's folders are closed to others
        mode = folder.stat().st_mode
        if Path(tempfile.gettempdir()) in folder.parents and mode & 0o055 != 0o055:
            folder.chmod(mode | 0o055)
    out = finish(start(script, cache, empty, tmp_path / "warm"))
    assert out.startswith("loaded\n")
    assert f"'{empty}/" in out and "Permission denied. HF_HOME or cache_dir=PATH names another place" in out
    subprocess.run(["chmod", "-R", "u+w", cache, empty], check=True)
