# SPDX-License-Identifier: MIT
"""No file of the Hub's cache is taken for whole before its checksum was compared, by this process or by another one."""

import errno
import hashlib
import json
import logging
import os
import subprocess
import threading
import time
from pathlib import Path

import formats
import golden
import pytest
import timm
import torch
from hub_server import Fault
from huggingface_hub import HfApi, constants, scan_cache_dir
from safetensors.torch import save

from internimage.convert.convert import convert
from internimage.errors import UserError
from internimage.weights import hub
from internimage.weights import hub_cache as verify
from internimage.weights.hub_cache import CachedFile
from internimage.weights.released import PUBLISHED

REPO, NAME, SIZE = "me/mine", "model.safetensors", 3_000_000
SMALL = dict(channels=8, depths=(1, 1, 2, 1), groups=(1, 1, 2, 4))
TINY, TINY_REPO = "internimage_tiny.ogvl_in1k", "OpenGVLab/internimage_t_1k_224"


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(verify, "_not_checked", set())


@pytest.fixture
def content() -> bytes:
    return torch.randint(256, (SIZE,), dtype=torch.uint8).numpy().tobytes()


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that were hashed."""
    names, matches = [], CachedFile.matches

    def count(self, etag):
        names.append(self.filename)
        return matches(self, etag)

    monkeypatch.setattr(CachedFile, "matches", count)
    return names


def load(cache: Path, name: str = NAME, repo: str = REPO) -> bytes:
    return hub.download(repo, (name,), str(cache)).read_bytes()


def blob(cache: Path) -> Path:
    """The large file of a cache with one."""
    (found,) = {path.resolve() for path in cache.rglob("*") if path.is_file() and path.stat().st_size > SIZE // 2}
    return found


def flip(path: Path, at: int = 1_000_000) -> None:
    time.sleep(0.02)  # file systems tell times that are further apart than some milliseconds
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def flip_with_the_old_time(path: Path) -> None:
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def zero_a_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))


def cut(path: Path) -> None:
    os.truncate(path, SIZE - 100)


def exchange(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(SIZE))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


DAMAGES = [flip, flip_with_the_old_time, zero_a_page, cut, exchange]


# ---- damage


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_the_cache_is_downloaded_again(damage, local_hub, cache, content):
    local_hub.add(REPO, {NAME: content})
    assert load(cache) == content
    damage(blob(cache))
    assert load(cache) == content
    assert len(local_hub.seen("GET", "/blobs/")) == 2
    assert load(cache) == content
    assert len(local_hub.seen("GET", "/blobs/")) == 2, "once"


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no network"])
def test_damage_without_a_network_is_one_line_and_stays(how, local_hub, cache, content, monkeypatch):
    commit = local_hub.add(REPO, {NAME: content})
    load(cache)
    path = blob(cache)
    flip(path)
    damaged = path.read_bytes()
    if how == "no network":
        local_hub.stop()
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for _ in range(2):
        with pytest.raises(hub.DownloadError) as error:
            load(cache)
        message = str(error.value)
        assert f"snapshots/{commit}/{NAME}' in the cache is damaged" in message
        assert "Try again with a network, or use a file of your own (--checkpoint FILE" in message
        assert "\n" not in message and not isinstance(error.value, (hub.Unreachable, hub.NothingThere))
    assert path.read_bytes() == damaged
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    local_hub.start()
    assert load(cache) == content


def test_process_that_died_before_it_compared_the_checksum(local_hub, cache, content, monkeypatch):
    local_hub.add(REPO, {NAME: content})
    local_hub.faults = [Fault("/blobs/", damage=5000)]
    with monkeypatch.context() as patch:
        patch.setattr(CachedFile, "matches", lambda *_: (_ for _ in ()).throw(SystemExit("killed")))
        with pytest.raises(SystemExit, match="killed"):
            load(cache)
    assert blob(cache).read_bytes() != content
    assert load(cache) == content


def test_download_that_is_damaged_twice_leaves_nothing(local_hub, cache, content):
    local_hub.add(REPO, {NAME: content})
    local_hub.faults = [Fault("/blobs/", damage=5000, times=2)]
    with pytest.raises(hub.DownloadError, match=f"'{NAME}' was corrupted again and has been deleted; try again.*proxy"):
        load(cache)
    assert [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 1000] == []
    assert not any(path.is_symlink() for path in cache.rglob("*"))
    assert load(cache) == content


def test_links_of_other_commits_to_the_same_bytes(local_hub, cache, content):
    local_hub.add(REPO, {NAME: content, "b.safetensors": content}, ref="old")
    local_hub.add(REPO, {NAME: content})
    paths = [hub.download(f"{REPO}@{ref}", (name,), str(cache)) for ref in ("old", "main") for name in (NAME,)]
    flip(blob_of := paths[0].resolve())
    assert load(cache) == content and blob_of.exists()
    assert not scan_cache_dir(cache).warnings
    assert hub.download(f"{REPO}@old", (NAME,), str(cache)).read_bytes() == content
    assert len(local_hub.seen("GET", "/blobs/")) == 2


def test_damage_in_an_older_commit(local_hub, cache, content):
    commit = local_hub.add(REPO, {NAME: content}, ref="old")
    local_hub.add(REPO, {NAME: content[::-1]})
    for revision in (commit, "old"):
        path = hub.download(f"{REPO}@{revision}", (NAME,), str(cache))
        flip(path.resolve())
        again = hub.download(f"{REPO}@{revision}", (NAME,), str(cache))
        assert again == path and again.read_bytes() == content


def test_only_what_is_the_caches_own_is_deleted(local_hub, cache, content, tmp_path):
    local_hub.add(REPO, {NAME: content})
    load(cache)
    path, mine = blob(cache), tmp_path / "mine"
    flip(path)
    path.rename(mine)
    path.symlink_to(mine)
    damaged = mine.read_bytes()
    assert load(cache) == content
    assert mine.read_bytes() == damaged and not path.is_symlink()


def test_store_that_repositories_share(local_hub, cache, content):
    """Of huggingface_hub with Xet: the blob is a link into a store of the whole cache, which it would link again."""
    local_hub.add(REPO, {NAME: content})
    load(cache)
    path = blob(cache)
    shared = cache / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    path.rename(shared)
    path.symlink_to(os.path.relpath(shared, path.parent))
    assert load(cache) == content and len(local_hub.seen("GET", "/blobs/")) == 1
    flip(shared)
    assert load(cache) == content
    assert not shared.exists()


def test_small_files_have_gits_checksum(local_hub, cache):
    config = json.dumps({"architecture": "internimage_tiny"}).encode()
    local_hub.add(REPO, {"config.json": config})
    assert load(cache, "config.json") == config
    (path,) = cache.rglob("blobs/*")
    flip(path, 20)
    assert load(cache, "config.json") == config


# ---- other ETags


def pointer_sha1(content: bytes) -> str:
    text = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(content).hexdigest()}\nsize {SIZE}\n"
    )
    return hashlib.sha1(b"blob %d\0%s" % (len(text), text.encode())).hexdigest()


ETAGS = {
    "upper-case SHA-256": lambda content: hashlib.sha256(content).hexdigest().upper(),
    "git's SHA-1": lambda content: hashlib.sha1(b"blob %d\0" % SIZE + content).hexdigest(),
    "upper-case git's SHA-1": lambda content: hashlib.sha1(b"blob %d\0" % SIZE + content).hexdigest().upper(),
    "git's SHA-1 of the pointer": pointer_sha1,
}


@pytest.mark.parametrize("kind", ETAGS)
def test_etags_that_can_be_checked(kind, local_hub, cache, content, caplog):
    local_hub.add(REPO, {NAME: content}, etags={NAME: ETAGS[kind](content)})
    local_hub.faults = [Fault("/blobs/", damage=5000)]
    assert load(cache) == content
    flip(blob(cache))
    assert load(cache) == content
    assert len(local_hub.seen("GET", "/blobs/")) == 3 and "cannot be checked" not in caplog.text


@pytest.mark.parametrize("etag", ["5f3c-1a2b", hashlib.md5(b"").hexdigest() + "-12", "z" * 64])
def test_opaque_etag_is_warned_of_once(etag, local_hub, cache, content, caplog):
    local_hub.add(REPO, {NAME: content, "b.safetensors": content[1:]}, etags={NAME: etag, "b.safetensors": etag + "b"})
    for name, expected in ((NAME, content), ("b.safetensors", content[1:]), (NAME, content)):
        assert load(cache, name) == expected
    (record,) = [record for record in caplog.records if record.name == "internimage.weights.hub_cache"]
    assert record.levelno == logging.WARNING
    assert f"is damaged cannot be checked: its ETag '{etag}' is no checksum" in record.getMessage()


# ---- when there is a hash


def test_file_is_hashed_once(local_hub, cache, content, hashed):
    local_hub.add(REPO, {NAME: content})
    for _ in range(3):
        assert load(cache) == content
    assert hashed == [NAME]
    (marker,) = cache.rglob(f"{verify.MARKERS}/*")
    noted, status = json.loads(marker.read_text()), blob(cache).stat()
    assert (noted["size"], noted["mtime_ns"], noted["inode"]) == (SIZE, status.st_mtime_ns, status.st_ino)
    for damaged in (b"", b"{", b"[]", b'{"size": 3000000}', b"[" * 100_000, b"\xff"):
        marker.write_bytes(damaged)
        assert load(cache) == content
    assert len(hashed) == 7


@pytest.mark.parametrize("mode, count, got", [("always", 3, "right"), ("never", 0, "damaged"), ("", 2, "right")])
def test_setting(mode, count, got, local_hub, cache, content, hashed, monkeypatch):
    monkeypatch.setenv("INTERNIMAGE_VERIFY", mode)
    local_hub.add(REPO, {NAME: content})
    local_hub.faults = [Fault("/blobs/", damage=5000)]
    first, second = load(cache), load(cache)
    assert first == second and (first == content) == (got == "right")
    assert len(hashed) >= count and (count or not hashed)


@pytest.mark.parametrize("value", ["yes", "ALWAYS", "once,never", "0"])
def test_setting_that_is_none(value, local_hub, cache, content, monkeypatch):
    local_hub.add(REPO, {NAME: content})
    monkeypatch.setenv("INTERNIMAGE_VERIFY", value)
    with pytest.raises(UserError, match=f"^INTERNIMAGE_VERIFY must be always, once or never, got '{value}'$"):
        load(cache)
    assert not local_hub.requests


def test_cache_without_room_for_markers_is_hashed_each_time(local_hub, cache, content, hashed):
    local_hub.add(REPO, {NAME: content})
    load(cache)
    subprocess.run(["rm", "-r", *map(str, cache.rglob(verify.MARKERS)), str(cache / ".locks")], check=True)
    (next(cache.glob("models--*")) / verify.MARKERS).write_bytes(b"")  # as a folder without permission, also for root
    (cache / ".locks").write_bytes(b"")
    hashed.clear()
    for _ in range(2):
        assert load(cache) == content
    assert hashed == [NAME] * 2


def test_bytes_that_change_under_the_hash_are_not_noted(local_hub, cache, content, monkeypatch):
    sync = os.fsync

    def change(descriptor):
        sync(descriptor)
        if os.fstat(descriptor).st_size == SIZE:
            flip(blob(cache))

    local_hub.add(REPO, {NAME: content})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", change)
        assert load(cache) != content
    assert not list(cache.rglob(f"{verify.MARKERS}/*"))
    assert load(cache) == content


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADF])
def test_bytes_that_did_not_reach_the_disk_are_not_noted(code, local_hub, cache, content, monkeypatch):
    sync = os.fsync

    def fail(descriptor):
        if os.fstat(descriptor).st_size == SIZE:
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    local_hub.add(REPO, {NAME: content})
    monkeypatch.setattr(os, "fsync", fail)
    assert load(cache) == content
    # EBADF is how Windows says that it has none for files that are read
    assert len(list(cache.rglob(f"{verify.MARKERS}/*"))) == (code == errno.EBADF)


# ---- several at once


@pytest.mark.parametrize("damaged", [False, True])
def test_second_process_meanwhile_waits_for_the_checksum(damaged, local_hub, cache, content, hashed, monkeypatch):
    local_hub.add(REPO, {NAME: content})
    local_hub.faults = [Fault("/blobs/", damage=5000)] if damaged else []
    begun, go_on, matches = threading.Event(), threading.Event(), CachedFile.matches

    def hold(self, etag):
        begun.set()
        assert go_on.wait(60)
        return matches(self, etag)

    monkeypatch.setattr(CachedFile, "matches", hold)
    results = []
    threads = [threading.Thread(target=lambda: results.append(load(cache))) for _ in range(3)]
    threads[0].start()
    assert begun.wait(60)
    assert blob(cache).exists()
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.3)
    assert results == []
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert results == [content] * 3
    assert len(hashed) == 1 + damaged and len(local_hub.seen("GET", "/blobs/")) == 1 + damaged


def test_push_between_two_shards(local_hub, cache, tmp_path):
    """All shards are of the commit that the index is of."""
    old = {key: torch.full((2,), float(i)) for i, key in enumerate("abc")}
    for name, tensors in (("old", old), ("new", formats.shifted(old))):
        folder = tmp_path / name
        folder.mkdir()
        shards = {key: f"model-0000{i + 1}-of-00003.safetensors" for i, key in enumerate(tensors)}
        for key, shard in shards.items():
            (folder / shard).write_bytes(save({key: tensors[key]}))
        (folder / f"{NAME}.index.json").write_text(json.dumps({"weight_map": shards}))
    commit = local_hub.add(REPO, tmp_path / "old")
    first = local_hub.repositories[REPO].commits[commit]["model-00001-of-00003.safetensors"]
    local_hub.faults = [Fault(first.etag, hold=lambda: local_hub.add(REPO, tmp_path / "new"))]
    index = hub.download(REPO, cache_dir=str(cache))
    assert index.parent.name == commit
    for shard in sorted((tmp_path / "old").glob("*.safetensors")):
        assert (index.parent / shard.name).read_bytes() == shard.read_bytes()


def test_shards_in_a_folder_of_the_repository(local_hub, cache):
    files = {
        "fp16/model-1.safetensors": b"1",
        f"fp16/{NAME}.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}',
    }
    local_hub.add(REPO, files)
    index = hub.download(REPO, (f"fp16/{NAME}.index.json",), str(cache))
    assert (index.parent / "model-1.safetensors").read_bytes() == b"1"


# ---- what else reads the cache


def test_huggingface_hub_takes_a_cache_with_markers(local_hub, cache, content):
    commit = local_hub.add(REPO, {NAME: content, "config.json": b"{}"})
    for name in (NAME, "config.json"):
        load(cache, name)
    assert len(list(cache.rglob(f"{verify.MARKERS}/*"))) == 2
    info = scan_cache_dir(cache)
    (repo,) = info.repos
    assert not info.warnings and repo.nb_files == 2 and repo.size_on_disk == SIZE + 2
    check = HfApi().verify_repo_checksums(REPO, cache_dir=cache)
    assert (check.checked_count, check.mismatches, check.missing_paths, check.extra_paths) == (2, [], [], [])
    info.delete_revisions(commit).execute()
    assert not list(cache.glob("models--*"))


@pytest.mark.parametrize("offline", [False, True])
def test_cache_without_links(offline, local_hub, cache, content, monkeypatch, caplog):
    """As on Windows: it keeps no ETag, so the Hub is asked, and the marker keeps it."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    local_hub.add(REPO, {NAME: content})
    local_hub.faults = [Fault("/blobs/", damage=5000)]
    assert load(cache) == content
    assert not any(path.is_symlink() for path in cache.rglob("*"))
    flip(blob(cache))
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(hub.DownloadError, match="in the cache is damaged, and cannot be downloaded again now"):
            load(cache)
        subprocess.run(["rm", "-r", *map(str, cache.rglob(verify.MARKERS))], check=True)
        load(cache)
        assert "cannot be checked: the cache does not keep its checksum, and the Hub did not provide it" in caplog.text
    else:
        assert load(cache) == content
        assert "cannot be checked" not in caplog.text


# ---- every way to the cache passes here


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    shapes = timm.create_model("internimage_tiny", device="meta", **SMALL).state_dict()
    return golden.fill_state_dict({key: value.shape for key, value in shapes.items()})


def spoil(cache: Path, name: str) -> None:
    """Flip a bit of a file in the middle of its bytes, where it stays what it is."""
    (path,) = cache.glob(f"models--*/snapshots/*/{name}")
    flip(path.resolve(), path.stat().st_size - 50)


CONFIG = json.dumps(
    {
        "architecture": "internimage_tiny",
        "num_classes": 1000,
        "model_args": SMALL,
        "pretrained_cfg": {"crop_pct": 0.875, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
    }
).encode()


def test_create_model(local_hub, cache, weights):
    local_hub.add(TINY_REPO, {NAME: save(formats.hub_names(weights))})
    for _ in range(2):
        model = timm.create_model(TINY, pretrained=True, cache_dir=str(cache), **SMALL)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        spoil(cache, NAME)


def test_official_pickle(local_hub, cache, weights, tmp_path):
    file = PUBLISHED[TINY].pth
    local_hub.add("OpenGVLab/InternImage", {file: formats.save_official(tmp_path / "w.pth", {"model": weights})})
    for _ in range(2):
        model = timm.create_model(TINY, pretrained=True, cache_dir=str(cache), **SMALL)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        spoil(cache, file)


def test_convert(local_hub, cache, weights, tmp_path):
    local_hub.add(REPO, {NAME: save(weights), "config.json": CONFIG})
    for i in range(2):
        convert(REPO, tmp_path / f"to{i}", cache_dir=str(cache))
        model = timm.create_model(f"local-dir:{tmp_path / f'to{i}'}", pretrained=True)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        assert model.pretrained_cfg["std"] == [0.5] * 3
        for name in (NAME, "config.json"):
            spoil(cache, name)


def test_hf_hub_name(local_hub, cache, weights):
    """timm reads its config.json by itself, before the weights are asked for."""
    local_hub.add(REPO, {NAME: save(weights), "config.json": CONFIG})

    def create():
        return timm.create_model(f"hf-hub:{REPO}", pretrained=True, cache_dir=str(cache))

    create()
    spoil(cache, NAME)
    assert torch.equal(create().state_dict()["head.bias"], weights["head.bias"])
    (path,) = cache.glob("models--*/snapshots/*/config.json")
    path.resolve().write_bytes(CONFIG.replace(b"0.875", b"0.975"))
    with pytest.raises(
        hub.DownloadError, match="config.json' was damaged when it was read.*downloaded again; try again"
    ):
        create()
    assert create().pretrained_cfg["crop_pct"] == 0.875
