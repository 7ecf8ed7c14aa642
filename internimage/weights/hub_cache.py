# SPDX-License-Identifier: MIT
"""Verification of files in huggingface_hub's cache against the Hub's checksums.

huggingface_hub compares sizes only, and trusts whatever is in the cache: even a file whose download was killed before
its checksum was compared, or one that was damaged later. The cache names a file's bytes by the ETag of the Hub's
answer, which is a checksum: SHA-256 for large files, git's SHA-1 for small ones. A match is recorded in a marker in the
repository's folder of the cache, where huggingface_hub uses only `blobs`, `refs` and `snapshots`.
"""

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import WeakFileLock

from ..errors import UserError, one_line
from ..files import write_text
from ..values import shown

_logger = logging.getLogger(__name__)

VARIABLE = "INTERNIMAGE_VERIFY"
MODES = ("always", "once", "never")
MARKERS = ".internimage"  # the folder of the markers

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHARED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")  # in huggingface_hub's store for all repositories of a cache
_CANNOT_SYNC = (errno.EBADF, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSYS, errno.ENOTSUP)
_CHUNK = 1 << 20

_not_checked: set[str] = set()  # repositories that were warned about


class VerifyError(UserError, ValueError):
    """INTERNIMAGE_VERIFY is none of its values."""


def verify_mode() -> str:
    """INTERNIMAGE_VERIFY: `always`, `once` or `never`; `once` if it is not set.

    Raises:
        VerifyError: It is something else.
    """
    value = os.environ.get(VARIABLE) or "once"
    if value not in MODES:
        raise VerifyError(f"{VARIABLE} must be always, once or never, got {shown(value)}")
    return value


@dataclass(frozen=True)
class CachedFile:
    """A file of a repository's snapshot in the cache.

    Attributes:
        path: `REPOSITORY/snapshots/COMMIT/FILENAME`.
        repository: The repository's folder of the cache.
        filename: Its name in the repository, with `/`.
        commit: Of the snapshot.
        blob: What the snapshot's symbolic link points to; None in a cache without links, which keeps no ETag.
    """

    path: Path
    repository: Path
    filename: str
    commit: str
    blob: Path | None

    @classmethod
    def of(cls, path: str | Path, filename: str) -> "CachedFile":
        """From the path that huggingface_hub returned for a file of a repository."""
        path = Path(path)
        snapshot = path
        for _ in filename.split("/"):
            snapshot = snapshot.parent
        repository = snapshot.parent.parent
        blob = None
        if path.is_symlink():
            target = Path(os.path.abspath(path.parent / os.readlink(path)))
            if target.parent == Path(os.path.abspath(repository / "blobs")):  # else the user's own arrangement
                blob = target
        return cls(path, repository, filename, snapshot.name, blob)

    # ---- markers

    @property
    def _key(self) -> str:
        if self.blob is not None:
            return self.blob.name
        return hashlib.sha256(f"{self.commit}/{self.filename}".encode()).hexdigest()

    @property
    def _marker(self) -> Path:
        return self.repository / MARKERS / f"{self._key}.json"

    def _noted(self) -> dict[str, Any]:
        """The marker; empty without one, or if it cannot be read."""
        try:
            content = json.loads(self._marker.read_bytes()) if self._marker.is_file() else None
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def _note(self, etag: str, seen: dict[str, int]) -> None:
        try:
            write_text(self._marker, json.dumps({"etag": etag, **seen}) + "\n")
        except OSError as error:  # a read-only cache: the next process hashes again
            _logger.debug("'%s' was not written: %s", self._marker, error)

    # ---- verification

    @property
    def etag(self) -> str | None:
        """The ETag that came with the file; None if the cache does not have it."""
        etag = self.blob.name if self.blob is not None else self._noted().get("etag")
        return etag if isinstance(etag, str) else None

    def is_trusted(self) -> bool:
        """Whether the file need not be hashed: a marker records a match and the file is unchanged since, or
        INTERNIMAGE_VERIFY is `never`."""
        mode = verify_mode()
        noted = self._noted() if mode == "once" else {}
        try:
            return mode == "never" or (bool(noted) and noted == {"etag": noted.get("etag"), **_seen(self.path.stat())})
        except OSError:
            return False

    def is_right(self, name: str, ask: bool) -> bool:
        """Whether the file matches its checksum; one that cannot be checked passes with a warning.

        Args:
            name: The repository, `owner/name`.
            ask: Ask the Hub for the checksum if the cache does not have it.
        """
        etag, why = self.etag, "the cache does not keep its checksum"
        if etag is None and ask:
            try:
                etag = self.announced(name)
            except Exception as error:  # also whatever the HTTP library of huggingface_hub raises
                why += f", and the Hub did not provide it ({one_line(error, 200)})"
        right = None
        if etag is not None:
            right, why = self.matches(etag), f"its ETag '{etag}' is no checksum"
        if right is None and name not in _not_checked:
            _not_checked.add(name)
            _logger.warning("%s: whether '%s' is damaged cannot be checked: %s", name, self.path, why)
        return right is not False

    def announced(self, name: str) -> str | None:
        """The ETag that the Hub has for the file now; raises what its client raises without an answer."""
        return get_hf_file_metadata(hf_hub_url(name, self.filename, revision=self.commit)).etag

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from hashing the same file meanwhile: they wait, and find the marker.

        The lock ends with its process. A read-only cache has none, and each process hashes for itself.
        """
        lock = self.repository.parent / ".locks" / self.repository.name / f"{self._key}.internimage.lock"
        with ExitStack() as stack:
            try:
                lock.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(WeakFileLock(lock))
            except OSError as error:
                _logger.debug("'%s' cannot be locked: %s", lock, error)
            yield

    def matches(self, etag: str) -> bool | None:
        """Hash the file, and record a match.

        Args:
            etag: From the Hub.

        Returns:
            Whether it matches; None if the ETag is not a checksum.
        """
        announced = etag.lower()
        if not (_SHA256.fullmatch(announced) or _SHA1.fullmatch(announced)):
            return None
        with self.path.open("rb") as file:
            before = os.fstat(file.fileno())
            sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % before.st_size, usedforsecurity=False)
            used = [sha256] if len(announced) == 64 else [sha256, sha1]
            while chunk := file.read(_CHUNK):
                for digest in used:
                    digest.update(chunk)
            if len(announced) == 64:
                right = sha256.hexdigest() == announced
            else:  # for a large file, some mirrors announce the SHA-1 of git-lfs's pointer to it
                pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                    sha256.hexdigest().encode(),
                    before.st_size,
                )
                pointed = hashlib.sha1(b"blob %d\0%s" % (len(pointer), pointer), usedforsecurity=False)
                right = announced in (sha1.hexdigest(), pointed.hexdigest())
            if right and _is_on_disk(file.fileno()) and _seen(before) == _seen(os.fstat(file.fileno())):
                self._note(etag, _seen(before))
        return right

    # ---- after a mismatch

    def remove(self) -> None:
        """Remove the damaged bytes, their marker and the links to them, as far as they belong to the cache."""
        self._marker.unlink(missing_ok=True)
        if self.blob is None:
            self.path.unlink(missing_ok=True)
            return
        for link in list((self.repository / "snapshots").rglob("*")):
            if link.is_symlink() and os.path.abspath(link.parent / os.readlink(link)) == str(self.blob):
                link.unlink(missing_ok=True)
        store = self.repository.parent / "blobs"
        if self.blob.is_symlink():
            target = Path(os.path.abspath(self.blob.parent / os.readlink(self.blob)))
            shared = target.parent.parent == Path(os.path.abspath(store))
            if shared and _SHARED.fullmatch(target.relative_to(target.parent.parent).as_posix()):
                target.unlink(missing_ok=True)
        self.blob.unlink(missing_ok=True)


def _seen(status: os.stat_result) -> dict[str, int]:
    """What changes when a file is written to or replaced."""
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,  # even if mtime was set back
        "inode": status.st_ino,
    }


def _is_on_disk(file: int) -> bool:
    """Flush a file to the disk, or else a marker could survive a loss of power that its file does not."""
    try:
        os.fsync(file)
    except OSError as error:
        return error.errno in _CANNOT_SYNC  # systems that flush only descriptors open for writing
    return True
