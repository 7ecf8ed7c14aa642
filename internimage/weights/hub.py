# SPDX-License-Identifier: MIT
"""Files from and to the Hugging Face Hub. All settings of huggingface_hub (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE,
tokens) apply.

Reading a downloaded file is up to `weights/load.py`.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from timm.models._hub import download_cached_file

from ..errors import UserError, is_disk_full, is_write_protected, one_line
from ..progress import on_terminal
from .file_names import INDEX_SUFFIX, WEIGHT_FILES
from .hub_cache import CachedFile, verify_mode
from .shard_index import weight_map

_logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")

# advice where there is no network, for users of the command line and of Python
OWN_FILE = "a file of your own (--checkpoint FILE; in Python, pretrained_cfg_overlay=dict(file=PATH))"


class DownloadError(UserError, RuntimeError):
    """A repository or a file could not be downloaded; the message says what was tried and what to set."""


class NothingThere(DownloadError):
    """The Hub answered that it has no such repository or file, or none for this user."""


class Unreachable(DownloadError):
    """The Hub did not answer, and the cache does not hold the file."""


class BadName(UserError, ValueError):
    """An invalid name of a repository or a branch."""


class UploadError(UserError, RuntimeError):
    """A folder could not be uploaded; the message says why."""


def split_revision(repo_id: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> (`owner/name`, `revision`); None without one."""
    name, _, revision = repo_id.partition("@")
    return name, revision or None


_BRANCH = re.compile(r"(?![-/.])(?!.*(//|\.\.|@\{|/\.|\.lock(/|$)))[^\x00-\x20\x7f~^:?*\[\\]+(?<![/.])")


def check_repository(repo_id: str, revision: str | None = None) -> None:
    """Check that `owner/name` is a valid repository of the Hub, and `revision` a branch, tag or commit, offline.

    Raises:
        BadName: It is not; the message says what names look like.
    """
    try:
        validate_repo_id(repo_id)
        wrong = repo_id.count("/") != 1
    except HFValidationError:
        wrong = True
    if wrong:
        raise BadName(
            f"'{repo_id}' is no name for a repository: it must be OWNER/NAME, of letters, digits, '-', '_' and '.', "
            f"at most 96"
        )
    if revision is not None and (revision == "@" or not _BRANCH.fullmatch(revision)):
        raise BadName(f"'{revision}' is no name for a branch: as in git, without spaces, '..' and any of ~^:?*[\\")


# ---- download


def download(
    repo_id: str,
    filenames: tuple[str, ...] = WEIGHT_FILES,
    cache_dir: str | None = None,
    cached_only: bool = False,
) -> Path:
    """Download the first of `filenames` that a repository has.

    A file appears in the cache complete or not at all. Whether it was downloaded now or before, it is compared with the
    checksum that the Hub announced (INTERNIMAGE_VERIFY); if it is damaged, it is deleted and downloaded again once.

    Args:
        repo_id: `owner/name` or `owner/name@revision`.
        filenames: In order of preference. With a shard index, its shards are downloaded too.
        cache_dir: Instead of huggingface_hub's own cache.
        cached_only: Look in the cache only.

    Returns:
        The local file; the shards of a shard index are beside it.

    Raises:
        NothingThere, Unreachable, DownloadError: None of them is available.
        VerifyError: INTERNIMAGE_VERIFY is none of its values.
    """
    verify_mode()  # an invalid value is reported before anything is downloaded
    name, revision = split_revision(repo_id)
    at = f"revision {revision or 'main'}"
    unreachable: Exception | None = None
    for filename in filenames:
        # once the Hub has not answered, look in the cache only: it may hold the next file
        local = cached_only or unreachable is not None
        try:
            path = _fetch(name, filename, revision, cache_dir, local)
            if filename.endswith(INDEX_SUFFIX):
                _fetch_shards(name, path, filename, cache_dir, local)
        except LocalEntryNotFoundError as error:  # before its parent class, EntryNotFoundError
            unreachable = unreachable or error
        except GatedRepoError as error:
            raise NothingThere(
                f"{name} is open to those only who accepted its terms at {constants.ENDPOINT}/{name}, and set HF_TOKEN"
            ) from error
        except RepositoryNotFoundError as error:
            raise NothingThere(
                f"{name} was not found at {constants.ENDPOINT}, or needs a token (HF_TOKEN). Revision: "
                f"{revision or 'main'}."
            ) from error
        except RevisionNotFoundError as error:
            raise DownloadError(f"{name} has no revision '{revision}'") from error
        except EntryNotFoundError as error:
            _logger.debug("%s: %s", name, error)
        except DownloadError:
            raise
        except Exception as error:  # also whatever the HTTP library of huggingface_hub raises
            raise DownloadError(f"{name}: downloading '{filename}' failed: {_reason(error, cache_dir)}") from error
        else:
            _logger.info("%s: using %s", name, filename)
            return path
    if unreachable:
        cause = one_line(unreachable.__cause__ or unreachable, 200)
        offline = " HF_HUB_OFFLINE=1 forbids downloads." if constants.HF_HUB_OFFLINE else ""
        what = "weights" if filenames == WEIGHT_FILES else ", ".join(filenames)
        raise Unreachable(
            f"{name}: {what} could not be downloaded from {constants.ENDPOINT}, nor found in the cache "
            f"'{cache_dir or constants.HF_HUB_CACHE}'. Use {OWN_FILE}, or a mirror (HF_ENDPOINT).{offline} ({cause})"
        ) from unreachable
    raise NothingThere(f"{name} ({at}) has none of {', '.join(filenames)}")


def _fetch(name: str, filename: str, revision: str | None, cache_dir: str | None, local_files_only: bool) -> Path:
    """A file of the Hub, from the cache or downloaded into it, compared with its checksum."""
    file = _cached_file(name, filename, revision, cache_dir, local_files_only)
    if file.is_trusted() or (verify_mode() == "always" and file.is_right(name, ask=not local_files_only)):
        return file.path
    with file.alone():  # one of many processes hashes, and the others find its marker
        if file.is_trusted() or file.is_right(name, ask=not local_files_only):
            return file.path
        try:
            if local_files_only:
                raise LocalEntryNotFoundError("only the cache was asked")
            file.announced(name)  # before anything is deleted
        except Exception as error:  # also whatever the HTTP library of huggingface_hub raises
            raise DownloadError(
                f"{name}: '{file.path}' in the cache is damaged, and cannot be downloaded again now "
                f"({one_line(error, 200)}). Try again with a network, or use {OWN_FILE}"
            ) from error
        _logger.warning("%s: '%s' was damaged; it is deleted and downloaded again", name, file.path)
        _remove(name, file)
        file = _cached_file(name, filename, file.commit, cache_dir, local_files_only)
        if file.is_right(name, ask=True):
            return file.path
        _remove(name, file)
    raise DownloadError(
        f"{name}: '{filename}' was corrupted again and has been deleted; try again. If this persists, a mirror or "
        f"proxy changes files, or a disk or the memory is faulty (the expected checksum is {file.etag})"
    )


def _cached_file(
    name: str, filename: str, revision: str | None, cache_dir: str | None, local_files_only: bool
) -> CachedFile:
    path = hf_hub_download(name, filename, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    return CachedFile.of(path, filename)


def check_cached(repo_id: str, filename: str, cache_dir: str | None = None) -> None:
    """Check a file that another library has just read from the cache against its checksum.

    Args:
        repo_id: `owner/name` or `owner/name@revision`.
        filename: Its name there. A file that is not in the cache passes.
        cache_dir: Instead of huggingface_hub's own cache.

    Raises:
        DownloadError: It is damaged. If the Hub answers, it has been downloaded again.
    """
    name, revision = split_revision(repo_id)
    try:
        file = _cached_file(name, filename, revision, cache_dir, local_files_only=True)
    except LocalEntryNotFoundError:
        return
    if not file.is_trusted() and not file.is_right(name, ask=False):
        download(f"{name}@{file.commit}", (filename,), cache_dir)  # or an error that says why not
        raise DownloadError(
            f"{name}: '{file.path}' was damaged when it was read, and has been downloaded again; try again"
        )


def commit_of(path: Path, filename: str) -> str:
    """The commit of a file that `download` returned, so that more files can be taken from the same one."""
    return CachedFile.of(path, filename).commit


def _fetch_shards(name: str, index: Path, filename: str, cache_dir: str | None, local_files_only: bool) -> None:
    # of the index's commit, or else a push between two requests would mix the weights of both
    commit = commit_of(index, filename)
    try:
        shards = sorted(set(weight_map(index).values()))
    except ValueError as error:
        raise DownloadError(f"{name}: {error}") from error
    for shard in shards:
        try:
            file = (PurePosixPath(filename).parent / shard).as_posix()
            _fetch(name, file, commit, cache_dir, local_files_only)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise DownloadError(f"{name}: '{index.name}' names a shard that is not there: '{shard}'") from error


def _remove(name: str, file: CachedFile) -> None:
    try:
        file.remove()
    except OSError as error:
        raise DownloadError(
            f"{name}: '{file.path}' in the cache is damaged, and cannot be deleted: {error.strerror}. HF_HOME or "
            f"cache_dir=PATH names another place"
        ) from error


def _reason(error: Exception, cache_dir: str | None) -> str:
    """Why a download failed, and what to set."""
    cache = cache_dir or constants.HF_HUB_CACHE
    if isinstance(error, OSError) and is_disk_full(error):
        return (
            f"the disk of the cache '{cache}' has no room for it ({error.strerror}); no part of it was kept. "
            f"HF_HOME or cache_dir=PATH names another place"
        )
    if isinstance(error, OSError) and is_write_protected(error):
        return f"'{error.filename or cache}': {error.strerror}. HF_HOME or cache_dir=PATH names another place"
    if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code == 401:
        return f"the token was refused (HF_TOKEN): {one_line(error)}"
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return f"it has another size than announced and has been deleted; try again. ({one_line(error)})"
    return one_line(error)


def download_url(url: str, cache_dir: str | None = None) -> Path:
    """Download any URL, into timm's cache or `cache_dir`.

    Raises:
        DownloadError: It failed.
    """
    try:
        return Path(download_cached_file(url, progress=on_terminal(), cache_dir=cache_dir))
    except (OSError, RuntimeError, ValueError) as error:
        raise DownloadError(f"{url} could not be downloaded: {one_line(error)}") from error


# ---- upload


def push(
    folder: Path,
    repo_id: str,
    files: Iterable[str],
    revision: str | None = None,
    private: bool = False,
    message: str = "",
) -> str:
    """Upload files of a folder in one commit; creates the repository if there is none.

    The commit also removes weights of an earlier upload that are not among the files.

    Args:
        folder: The folder.
        repo_id: `owner/name`.
        files: Their names in it.
        revision: Branch; None for the main one.
        private: Whether a new repository is private.
        message: Commit message.

    Returns:
        The commit's URL.

    Raises:
        BadName: `repo_id` or `revision` is invalid; nothing was sent.
        UploadError: The Hub refused, or did not answer. No file of the folder is visible there then.
    """
    check_repository(repo_id, revision)
    api = HfApi(library_name="internimage")
    files = list(files)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # weights in another layout, which readers might prefer to the new ones
        old = [f for f in api.list_repo_files(repo_id, revision=revision) if _WEIGHTS.fullmatch(f) and f not in files]
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=file, path_or_fileobj=folder / file) for file in files]
            + [CommitOperationDelete(path_in_repo=file) for file in old],
            commit_message=message or f"Upload {folder.resolve().name}",
            revision=revision,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        hint = " HF_TOKEN, or `hf auth login`, must name a token that may write there." if status in (401, 403) else ""
        raise UploadError(f"{constants.ENDPOINT} refused the upload to {repo_id}: {one_line(error)}{hint}") from error
    except Exception as error:  # also whatever the HTTP library of huggingface_hub raises
        raise UploadError(f"{repo_id}: the upload failed: {type(error).__name__}: {one_line(error)}") from error
    return str(commit.commit_url)
