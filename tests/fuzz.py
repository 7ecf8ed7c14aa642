# SPDX-License-Identifier: MIT
"""A fuzzer of everything that reads a stranger's file: what it does to files, and what must hold then.

A case is a number. With the reader's name it gives a file of the corpus and what is done to it, on any machine:

    python tests/fuzz.py READER NUMBER FOLDER

writes the files of a case to an empty FOLDER and reads them. Cases run in a child process, so that a crash, a hang or a
filled memory is a finding and not the end.
"""

import faulthandler
import json
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz_mutations import BLIND, Mutation

try:
    import resource
except ImportError:  # Windows, where there is no fork() either
    resource = None

CPU_SECONDS = 20  # of a case; the readers' own limits are far lower, but machines differ
SILENCE = 180  # seconds without a word from the child
NOT_READ = ("hostile", "refused")  # begin the names of seeds that need not be read
LONGEST = 2000  # characters of a message
MOST_MEMORY = 1 << 30  # bytes that a case may take; its files are far smaller
MEMORY = 3 << 30  # bytes of address space beyond what the process has already

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CODE = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|fork|forkpty|startfile|putenv|kill|killpg)|subprocess\..*|pty\..*"
    r"|socket\.(connect|bind|sendto|getaddrinfo|gethostby.*)|urllib\..*|webbrowser\..*|ftplib\..*|smtplib\..*|exec"
)
_CHANGE = re.compile(r"os\.(remove|rename|mkdir|rmdir|link|symlink|chmod|chown|truncate|utime)|shutil\..*|tempfile\..*")
_FOR_PICKLES = re.compile(r"torch(\..*)?|collections|_codecs|numpy(\..*)?|argparse|datetime|pathlib")


class CodeRan(BaseException):
    """A reader did what no reader may; no `except Exception` takes it for a damaged file."""


class TooLong(BaseException):
    """A reader took too long."""


@dataclass(frozen=True)
class Seed:
    """A case's files before anything is done to them.

    Attributes:
        name: For messages.
        files: By name; `/` makes folders.
        edits: Mutations that know a file's format, by the end of its name; the longest that fits counts.
        targets: The files that are damaged; all if empty.
        sealed: Whether checksums cover everything that is compared, where the reader is `sealed`.
    """

    name: str
    files: dict[str, bytes]
    edits: dict[str, tuple[Mutation, ...]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    sealed: bool = True


@dataclass(frozen=True)
class Reader:
    """What reads a kind of file.

    Attributes:
        name: For messages and `-k`.
        seeds: Makes the corpus, given an empty folder to work in.
        read: Reads the files in a folder, and returns what is in them, to be compared with `==`.
        errors: What it may raise.
        share: Of all cases.
        sealed: The damage that the files' checksums must reveal: what is read is then what was written, or nothing.
        writes: It may write.
    """

    name: str
    seeds: Callable[[Path], list[Seed]]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    share: float = 1.0
    sealed: tuple[Mutation, ...] = ()
    writes: bool = False


@dataclass
class Finding:
    """What is wrong with a reader."""

    reader: str
    number: int
    what: str
    where: str = ""
    steps: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.what}\n    in {self.where or '?'}\n    after {'; '.join(self.steps) or 'nothing'}\n"
            f"    python tests/fuzz.py '{self.reader}' {self.number} FOLDER"
        )


# ---- cases


Step = tuple[str, Mutation, int]  # file, what is done to it, the generator's seed


def plan(reader: Reader, seeds: list[Seed], number: int) -> tuple[Seed, list[Step]]:
    """The seed and the mutations of a case; the first cases are the hostile seeds as they are."""
    as_they_are = [seed for seed in seeds if seed.name.startswith(NOT_READ)]
    if number < len(as_they_are):
        return as_they_are[number], []
    random = Random(f"{reader.name} {number}")  # seeded by text: the same in every version of Python
    seed = random.choice(seeds)
    steps = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(seed.targets or tuple(seed.files))
        ending = max((end for end in seed.edits if name.endswith(end)), key=len, default=None)
        edits = seed.edits[ending] if ending is not None and random.random() < 0.6 else BLIND
        steps.append((name, random.choice(edits), random.getrandbits(64)))
    return seed, steps


def build(seed: Seed, steps: Iterable[Step]) -> dict[str, bytes]:
    files = dict(seed.files)
    for name, mutation, bits in steps:
        files[name] = mutation(files[name], Random(bits))
    return files


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# ---- what must hold


@contextmanager
def _watched(writes: bool) -> Iterator[None]:
    _watch.update(on=True, writes=writes, ran="")
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _watch["on"] = False
        if _watch["ran"]:  # also where the reader has caught it
            raise CodeRan(_watch["ran"])


_watch = {"on": False, "writes": False, "ran": ""}


def _audit(event: str, arguments: tuple) -> None:
    if not _watch["on"]:
        return
    wrong = _CODE.fullmatch(event) is not None
    if event == "exec":
        wrong = not _imports()
    elif event == "pickle.find_class":
        wrong = _FOR_PICKLES.fullmatch(str(arguments[0])) is None
    elif not _watch["writes"] and event == "open":
        wrong = isinstance(arguments[2], int) and bool(arguments[2] & _WRITING) and arguments[0] != os.devnull
    elif not _watch["writes"]:
        wrong = wrong or _CHANGE.fullmatch(event) is not None
    if wrong:
        _watch.update(on=False, ran=f"{event} {str(arguments)[:200]}")
        raise CodeRan(_watch["ran"])


def _imports() -> bool:
    """Whether this is an import, which runs code too: of files that are installed here."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _too_long(*_) -> None:
    raise TooLong(f"more than {CPU_SECONDS} s")


def judge(reader: Reader, folder: Path, files: dict[str, bytes], truth: object) -> tuple[str, str] | None:
    """Read files and say what is wrong with that and where, None if nothing.

    Args:
        reader: The reader.
        folder: An empty one; is emptied again.
        files: The files.
        truth: What must be read if anything is; None: anything.
    """
    write(folder, files)
    peak = _peak()
    try:
        with _watched(reader.writes):
            content = reader.read(folder)
    except CodeRan as error:
        return f"it did {error}", _place(error)
    except reader.errors as error:
        message = str(error)
        if not message.strip() or len(message) > LONGEST:
            return f"no reason, or a long one: {type(error).__name__}: {message[:200]!r}", _place(error)
        if _lacked_memory(error):
            return f"it asked for all of the memory before it said {type(error).__name__}", _place(error)
        return None
    except (Exception, TooLong) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", _place(error)
    finally:
        _empty(folder)
    if _peak() > peak + MOST_MEMORY:
        return f"it took {(_peak() - peak) / 1e9:.1f} GB", ""
    if truth is not None and content != truth:
        return "what was read is not what was written, and nobody said so", ""
    return None


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _lacked_memory(error: BaseException | None) -> bool:
    """Whether the limit of the memory was met on the way to an error."""
    while error is not None:
        if isinstance(error, MemoryError) or re.search("not enough memory|allocate memory|bad_alloc", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """The last frames of the package and of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames if f"internimage{os.sep}" in f.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else ""
    if isinstance(error, CodeRan) and error.__context__ is not None:
        return _place(error.__context__)
    return " < ".join(dict.fromkeys([last, *ours[-2:][::-1]]))


def _empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


# ---- many cases


def run(reader: Reader, numbers: range, folder: Path, most: int = 20) -> list[Finding]:
    """Run cases in child processes.

    Args:
        reader: The reader.
        numbers: Of the cases, one after another.
        folder: An empty one, for everything that is written.
        most: Findings after which it stops; of one place, the first counts.
    """
    made, work = folder / "seeds", folder / "case"
    made.mkdir(parents=True)
    work.mkdir()
    seeds = reader.seeds(made)
    left, findings = numbers, []
    while left and len(findings) < most:
        told, ended = _child(reader, seeds, left, work, most - len(findings))
        done = 0
        for line in told:
            if "failed" in line:
                raise RuntimeError(f"the fuzzer itself failed after case {done}:\n{line['failed']}")
            done = line["case"] - left[0] + 1
            if "what" in line:
                findings.append(Finding(reader.name, line["case"], line["what"], line["where"], line["steps"]))
        if ended:
            seed, steps = plan(reader, seeds, left[max(done - 1, 0)])
            findings.append(Finding(reader.name, left[max(done - 1, 0)], ended, "", _describe(seed, steps)))
            done = max(done, 1)
            _empty(work)
        if findings and findings[-1].what.startswith("it refuses a file that is not damaged"):
            break
        left = left[done:]
    unique = {(re.sub(r"[\d'\"].*", "", finding.what), finding.where): finding for finding in reversed(findings)}
    return sorted(unique.values(), key=lambda finding: finding.number)[:most]


def _child(reader: Reader, seeds: list[Seed], numbers: range, work: Path, most: int) -> tuple[list[dict], str]:
    """What a child process told of each case that it began, and how it ended, empty if as it should."""
    get, put = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(get)
        try:
            _cases(reader, seeds, numbers, work, most, put)
            os._exit(0)
        except BaseException:
            os.write(put, json.dumps({"failed": traceback.format_exc()}).encode() + b"\n")
            os._exit(1)
    os.close(put)
    text, silent = b"", False
    while select.select([get], [], [], SILENCE)[0]:
        chunk = os.read(get, 1 << 16)
        text += chunk
        if not chunk:
            break
    else:
        silent = True
        os.kill(pid, signal.SIGKILL)
    os.close(get)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = [json.loads(line) for line in text.split(b"\n")[:-1]]
    ended = f"no end within {SILENCE} s" if silent else f"the process died ({status})" if status else ""
    return told, ended


def _cases(reader: Reader, seeds: list[Seed], numbers: range, work: Path, most: int, put: int) -> None:
    import torch

    torch.set_num_threads(1)  # the threads of the parent are not here
    faulthandler.disable()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    signal.signal(signal.SIGPROF, _too_long)
    truths = {}
    for seed in seeds:  # also that modules which are loaded when they are needed are here
        if not seed.name.startswith(NOT_READ):
            write(work, seed.files)
            try:
                truths[seed.name] = reader.read(work)
            except Exception as error:
                what = f"it refuses a file that is not damaged: {type(error).__name__}: {error}"
                line = {"case": numbers[0], "what": what, "where": _place(error), "steps": [seed.name]}
                os.write(put, json.dumps(line).encode() + b"\n")
                return
            _empty(work)
    sys.addaudithook(_audit)
    _limit_memory()
    for number in numbers:
        os.write(put, json.dumps({"case": number}).encode() + b"\n")
        seed, steps = plan(reader, seeds, number)
        found = _try(reader, seed, steps, work, truths)
        if found is None:
            continue
        for step in list(steps):  # what is not needed for it
            fewer = [other for other in steps if other is not step]
            again = _try(reader, seed, fewer, work, truths)
            if fewer and again is not None and again[1] == found[1]:
                steps, found = fewer, again
        what, where = found
        line = {"case": number, "what": what, "where": where, "steps": _describe(seed, steps)}
        os.write(put, json.dumps(line).encode() + b"\n")
        most -= 1
        if not most:
            return


def _try(reader: Reader, seed: Seed, steps: list[Step], work: Path, truths: dict) -> tuple[str, str] | None:
    told = seed.sealed and all(mutation in reader.sealed for _, mutation, _ in steps)
    return judge(reader, work, build(seed, steps), truths.get(seed.name) if told else None)


def _describe(seed: Seed, steps: list[Step]) -> list[str]:
    return [seed.name, *(f"{mutation.__name__} of {name}" for name, mutation, _ in steps)]


def _limit_memory() -> None:
    if not sys.platform.startswith("linux"):
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main(name: str, number: str, folder: str) -> None:
    from fuzz_readers import READERS

    (reader,) = [reader for reader in READERS if reader.name == name]
    made = Path(folder) / "seeds"
    made.mkdir(parents=True)
    seed, steps = plan(reader, seeds := reader.seeds(made), int(number))
    case = Path(folder) / "case"
    write(case, build(seed, steps))
    print(f"{len(seeds)} seeds; {'; '.join(_describe(seed, steps))}; the files are in {case}")
    begun = time.process_time()
    try:
        print(repr(reader.read(case))[:2000])
    finally:
        print(f"{time.process_time() - begun:.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
