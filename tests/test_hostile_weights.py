# SPDX-License-Identifier: MIT
"""Weight files made to hurt: each is opened or refused in one line, with memory and time that its size accounts for."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import hostile
import pytest
from hostile import call, mapping, number, pickled, storage, tensor, text, with_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured as Linux does it")

OPENS = "opened"
SECONDS = 60  # of processor time, so that a busy machine does not count; what is stopped takes seconds at most
TUPLES = b")" + b"\x85" * 150_000
DOUBLED = b")q\x00" + b"h\x00\x86q\x00" * 64  # a tuple of itself twice, again and again
EXPANDED = pickled(mapping({"a": tensor(storage("0", 2), (20_000_000, 1024), (0, 0))}))


def key_of(key: bytes) -> bytes:
    """A dict with such a key."""
    return b"}" + key + b"Ns"


def zero_keys() -> bytes:
    """Numbers with one hash, which makes a dict compare each with each."""
    return b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 60_000)) + b"u"


BESIDE = {  # the weights can be read, whatever is beside them
    "bytearray of 8 GB": call("builtins.bytearray", number(8 * 2**30)),
    "tensor of 80 GB": call("torch.DoubleTensor", number(10 * 2**30)),
    "text that an encoding doubles": call("_codecs.encode", text("x" * 16), text("utf-8"))
    + b"q\x00"
    + b"".join(call("_codecs.encode", b"h\x00", text("hex")) + b"q\x00" for _ in range(40)),
    "key of tuples in tuples": key_of(TUPLES),
    "set of tuples in tuples": call("builtins.set", b"]" + TUPLES + b"a"),
    "key of tuples of tuples twice": key_of(DOUBLED),
    "set of tuples of tuples twice": call("builtins.set", b"]" + DOUBLED + b"a"),
    "lists in lists": b"]" * 100_000 + b"a" * 99_999,
    "dicts in dicts": b"}" + b"K\x00}" * 50_000 + b"s" * 50_000,
    "configurations in configurations": call("yacs.config.CfgNode") * 2 + b"b",
    "numbers of one hash": zero_keys(),
    "numbers of one hash, counted": call("collections.Counter", zero_keys()),
    "key that is a list": key_of(b"]"),
    "memo of four billion": b"Nr\xf0\xff\xff\xff",
}
END = b'],"data_offsets":[0,0]}}'
OTHERS = {
    "stride 0": (lambda path: hostile.torch_archive(path, EXPANDED), "would take 81.9 GB, and it stores 0.0 GB"),
    "stride 0, before torch 1.6": (
        lambda path: hostile.before_torch_16(path, EXPANDED.replace(b"\x8a\x01\x02tQ", b"\x8a\x01\x02NtQ")),
        "would take 81.9 GB",
    ),
    "a thousand views of one storage": (
        lambda path: hostile.torch_archive(
            path,
            pickled(mapping({f"a{i}": tensor(storage("0", 2**20), (2**20,), (1,)) for i in range(1000)})),
            {"0": bytes(2**22)},
        ),
        "would take 4.2 GB",
    ),
    "zeros, compressed": (
        lambda path: hostile.torch_archive(
            path, pickled(mapping({"a": tensor(storage("0", 1000 * 2**20), (1000 * 2**20,), (1,))})), {},
            hostile.deflated("w/data/0", 4000, bytes(2**20)),
        ),
        "would become 4.2 GB",
    ),
    "more than the compressed record claims": (
        lambda path: hostile.torch_archive(
            path, with_weights(b"N"), {}, hostile.deflated("w/data/0", 4000, bytes(2**20), size=8)
        ),
        "holds more than it claims",
    ),
    "pickle, compressed": (
        lambda path: hostile.archive(path, [hostile.deflated("w/data.pkl", 100, b"N" * 2**20)]), "larger than 64 MiB",
    ),
    "instructions without end": (lambda path: hostile.torch_archive(path, pickled(b"]" * 2_000_000)), "instructions"),
    "marks without end": (lambda path: hostile.torch_archive(path, pickled(b"(" * 2_000_000)), "instructions"),
    "directory without end": (
        lambda path: hostile.archive(path, [hostile.Record(f"w/{i}", b"") for i in range(150_000)]),
        "directory.*larger",
    ),
    "text of four billion": (lambda path: hostile.torch_archive(path, b"\x80\x02X\xff\xff\xff\xff."), "too early"),
    "storage of 2**62": (
        lambda path: hostile.before_torch_16(
            path, pickled(mapping({"a": tensor(storage("0", 2**60, before_16=True), (2,), (1,))})),
            {"0": (2**60, hostile.TWO)},
        ),
        "too early",
    ),
    "tensors of tensors": (
        lambda path: hostile.torch_archive(
            path,
            pickled(
                hostile.named("torch._tensor._rebuild_from_type_v2") + b"q\x01"
                + hostile.named("torch.Tensor") + b"q\x02" + b")"
                + b"q\x03h\x01h\x02h\x03\x87" * 100_000 + b"R"
            ),
        ),
        "class that torch.save does not write|not one that torch.save writes|no function",
    ),
    "safetensors, header of 90 MB": (
        lambda path: hostile.safetensors(path, b'{"a":{"dtype":"U8","shape":[' + b"0," * 45_000_000 + b"0" + END),
        "header of 900000.. bytes is longer than 16 MiB",
    ),
    "safetensors, a hundred thousand dimensions": (
        lambda path: hostile.safetensors(path, b'{"a":{"dtype":"U8","shape":[' + b"0," * 100_000 + b"0" + END),
        "shape that no tensor can have",
    ),
}  # fmt: skip
CASES = {
    **{
        f"{what}, beside": (lambda path, b=b: hostile.torch_archive(path, with_weights(b)), OPENS)
        for what, b in BESIDE.items()
    },
    **{
        f"{what}, beside, before torch 1.6": (
            lambda path, b=b: hostile.before_torch_16(path, with_weights(b, before_16=True)), OPENS
        )
        for what, b in list(BESIDE.items())[:4]
    },
    **OTHERS,
}  # fmt: skip

# every file is read in a child of a process that has imported the package
READER = """
import json, os, resource, sys
from pathlib import Path
from internimage.weights.readers import open_weights

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def read(path):
    try:
        for entry in open_weights(path).values():
            if not entry.problem:
                entry.read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:2000]
    return "opened"

for path in sorted(Path(sys.argv[1]).iterdir()):
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        before = peak()
        mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]),) * 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        outcome = read(path)
        os.write(sender, json.dumps(dict(outcome=outcome, memory=peak() - before)).encode())
        os._exit(0)
    os.close(sender)
    with open(receiver) as file:
        outcome = file.read()
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    print(json.dumps([path.name, dict(json.loads(outcome or "{}"), status=status, seconds=seconds)]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for what, (write, _) in CASES.items():
        write(folder / what)
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-c", textwrap.dedent(READER), str(folder), str(SECONDS)]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("what", CASES)
def test_neither_memory_nor_time_is_taken(what, outcomes):
    outcome = outcomes[what]
    died = os.WTERMSIG(outcome["status"]) if os.WIFSIGNALED(outcome["status"]) else 0
    assert not died, f"ended by {signal.Signals(died).name}"
    said, expected = outcome["outcome"], CASES[what][1]
    assert outcome["memory"] < 2**30, said
    if expected == OPENS:
        assert said == OPENS
    else:
        assert said.startswith("CheckpointError: ") and "\n" not in said
        assert re.search(expected, said), said
