# SPDX-License-Identifier: MIT
"""The GPU checks (scripts/checks/gpu) and their pack, without a GPU: limits, reports, contents, environment."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "scripts" / "checks"
if not CHECKS.exists():
    pytest.skip("needs the sources, not an installed package", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("needs Linux", allow_module_level=True)
sys.path.insert(0, str(CHECKS))

import gpu_check  # noqa: E402
import gpu_pack  # noqa: E402
from gpu import build, environment, profile, sanitize, tests, variants  # noqa: E402
from gpu import report as reports  # noqa: E402
from gpu.settings import Settings  # noqa: E402

LIMIT = [sys.executable, str(reports.LIMIT)]
# Starts a process in a session of its own whose parent ends, and one that ignores SIGTERM; writes their numbers.
STARTS_OTHERS = """
import os, signal, subprocess, sys, time
sleep = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
sleep += "open(sys.argv[1], 'a').write(f'{os.getpid()}\\\\n'); time.sleep(600)"
subprocess.run(["setsid", "-f", sys.executable, "-c", sleep, sys.argv[1]])
subprocess.Popen([sys.executable, "-c", sleep, sys.argv[1]], start_new_session=True)
while len(open(sys.argv[1]).readlines()) < 2: time.sleep(0.01)
print("started", flush=True)
time.sleep(float(sys.argv[2]))
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def started(file: Path) -> list[int]:
    """Those that STARTS_OTHERS has started: two."""
    pids = [int(line) for line in file.read_text().split()]
    assert len(pids) == 2
    return pids


@pytest.fixture
def others(tmp_path):
    """A file for their numbers; what a failed test leaves is ended."""
    file = tmp_path / "others"
    file.write_text("")
    yield file
    for pid in map(int, file.read_text().split()):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def report(tmp_path):
    return reports.Report(tmp_path / "out" / "gpu.md", tmp_path / "out" / "gpu-check.log")


def settings(tmp_path, **changes) -> Settings:
    return Settings.read({"OUT": str(tmp_path / "out"), **changes})


# ---- limits


def test_a_command_that_ends_leaves_no_processes(others):
    result = subprocess.run([*LIMIT, "60", sys.executable, "-c", STARTS_OTHERS, str(others), "0"])
    assert result.returncode == 0 and not any(map(is_running, started(others)))


def test_a_command_that_does_not_end_leaves_no_processes(others):
    """Its time is over when the others have been started: at the third try, if the machine is very busy."""
    for seconds in ("3", "20", "100"):
        others.write_text("")
        command = [*LIMIT, seconds, sys.executable, "-c", STARTS_OTHERS, str(others), "600"]
        result = subprocess.run(command, capture_output=True, text=True)
        if "started" in result.stdout:
            break
    assert result.returncode == 124 and not any(map(is_running, started(others)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_is_told_to_end(number, others):
    command = [*LIMIT, "600", sys.executable, "-c", STARTS_OTHERS, str(others), "600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    assert process.wait() == 128 + number and not any(map(is_running, started(others)))


def test_what_started_it_is_killed(others):
    """As by the kernel when memory is short: nothing can react to that but the limit itself."""
    code = f"import subprocess, sys; subprocess.run({LIMIT!r} + ['200'] + sys.argv[1:])"
    command = [sys.executable, "-c", code, sys.executable, "-c", STARTS_OTHERS, str(others), "600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.kill()
    end = time.monotonic() + 100
    while any(map(is_running, started(others))) and time.monotonic() < end:  # nobody waits for them
        time.sleep(0.05)
    assert not any(map(is_running, started(others)))


def test_limits_within_a_limit(others):
    """A stage runs its commands by the same program."""
    inner = [*LIMIT, "600", sys.executable, "-c", STARTS_OTHERS, str(others), "600"]
    process = subprocess.Popen([*LIMIT, "600", *inner], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.terminate()
    assert process.wait() == 143 and not any(map(is_running, started(others)))


@pytest.mark.parametrize(
    "command, status",
    [
        ([sys.executable, "-c", "raise SystemExit(7)"], 7),
        ([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 137),
        (["/no/such/program"], 127),
    ],
)
def test_the_status_of_a_command(command, status):
    result = subprocess.run([*LIMIT, "60", *command], capture_output=True, text=True)
    assert result.returncode == status
    assert result.stderr == ("'/no/such/program' cannot be run: No such file or directory\n" if status == 127 else "")


# ---- the report


def test_output_is_kept_as_it_comes(report):
    """What was written is there while the command still runs."""
    code = "import sys; print('first', flush=True); sys.stdin.readline(); print('second')"
    seen = []
    running = report.start(
        ["sh", "-c", f'mkfifo "$0.pipe"; exec {sys.executable} -c "$1" <"$0.pipe"', str(report.log), code],
        60,
        seen.append,
    )
    pipe = Path(f"{report.log}.pipe")
    while not pipe.exists():
        time.sleep(0.01)
    with pipe.open("w") as file:
        while not seen:
            time.sleep(0.01)
        assert report.log.read_text().endswith("\nfirst\n")
        file.write("\n")
    assert running.wait() == 0 and running.output == "first\nsecond" and seen == ["first", "second"]


def test_the_end_of_the_output_is_in_the_report(report):
    running = report.run([sys.executable, "-c", "for i in range(5): print(i)\nraise SystemExit(3)"], 60, tail=2)
    assert report.path.read_text() == "```\n3\n4\n```\n" and reports.verdict(running) == "Status 3."
    assert "0\n1\n2\n3\n4\n" in report.log.read_text()


def test_out_of_time_is_said(report):
    running = report.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"], 5)
    assert reports.verdict(running) == "Out of time: ended after 5 s."


# ---- the stages

TORCH = """
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    @staticmethod
    def get_device_properties(i):
        class gpu: name, multi_processor_count, total_memory = "A GPU", 132, 80 << 30
        return gpu
class version: cuda = "13.0"
__version__ = "2.99"
"""
STAGES = """
import dataclasses, subprocess, sys, time
sys.path.insert(0, {checks!r})
import gpu_check
def raises(report, settings, clock): raise RuntimeError("no luck")
def hangs(report, settings, clock):
    report.write("found this much")
    report.run([sys.executable, "-c", {others!r}, {file!r}, "600"], 500)
def dies(report, settings, clock):
    import os, signal; os.kill(os.getpid(), signal.SIGKILL)
def succeeds(report, settings, clock):
    report.write("found that")
    return 0
gpu_check.STAGES = dict(raises=raises, hangs=hangs, dies=dies, succeeds=succeeds)
gpu_check.__file__, gpu_check.IN_RESERVE = __file__, 1
read = gpu_check.Settings.read
gpu_check.Settings.read = staticmethod(lambda variables: dataclasses.replace(read(variables), limit={limit}))
sys.exit(gpu_check.main())
"""


def run_stages(tmp_path, stage: str, others: Path, limit: int = 60) -> subprocess.CompletedProcess:
    (tmp_path / "modules" / "torch").mkdir(parents=True, exist_ok=True)
    (tmp_path / "modules" / "torch" / "__init__.py").write_text(TORCH)
    script = tmp_path / "stages.py"
    script.write_text(STAGES.format(checks=str(CHECKS), others=STARTS_OTHERS, file=str(others), limit=limit))
    variables = {**os.environ, "PYTHONPATH": str(tmp_path / "modules"), "OUT": str(tmp_path / "out"), "REPORT": ""}
    return subprocess.run([sys.executable, str(script), stage], capture_output=True, text=True, env=variables)


def test_a_stage_that_hangs_is_ended(tmp_path, others):
    for limit in (8, 60, 300):
        others.write_text("")
        result = run_stages(tmp_path, "hangs", others, limit)
        if "started" in (tmp_path / "out" / "gpu-check.log").read_text():
            break
    assert result.returncode == 1 and not any(map(is_running, started(others)))
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "found this much" in text and text.endswith(f"Out of time: the stage was ended after {limit} s.\n")


def test_all_goes_on_after_a_stage_that_fails(tmp_path, others, monkeypatch):
    others.write_text("")
    result = run_stages(tmp_path, "all", others, 8)
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert result.returncode == 1
    assert [*re.findall(r"^## (\w+), \d{4}-\d\d-\d\d \d\d:\d\d UTC$", text, re.M)] == [
        "raises",
        "hangs",
        "dies",
        "succeeds",
    ]
    assert "The stage failed: RuntimeError: no luck" in text and re.search(r"^raises: failed, \d+ s\.$", text, re.M)
    assert "The stage broke off, status 137." in text
    assert "- A GPU (132 multiprocessors, 80 GiB)\n" in text and "torch 2.99, CUDA 13.0\n" in text
    assert "found that" in text and re.search(r"succeeds: done, \d+ s\.\n$", text)


def shell(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, **variables}
    command = ["bash", str(CHECKS / "gpu_check.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("stage", ["test", "all"])
def test_without_a_gpu(stage, tmp_path):
    result = shell(stage, OUT=str(tmp_path / "out"), REPORT="")
    assert (result.returncode, result.stderr) == (2, "no GPU: torch.cuda.is_available() is False\n")
    assert result.stdout == "" and not list((tmp_path / "out").iterdir())


def test_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no such module')\n")
    result = shell("test", OUT=str(tmp_path / "out"), REPORT="", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "has no torch (no such module); PYTHON selects the interpreter" in result.stderr


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"LIMIT": "x"}, "LIMIT must be seconds, from 30 to 3600, got 'x'"),
        ({"LIMIT": "5"}, "LIMIT must be seconds, from 30 to 3600, got '5'"),
        ({"CPU_TESTS": "yes"}, "CPU_TESTS must be 0 or 1, got 'yes'"),
        ({"OFFICIAL": "/no/such"}, "OFFICIAL must be a checkout, and there is no folder '/no/such'"),
    ],
)
def test_a_variable_that_cannot_be(variables, words, tmp_path):
    result = shell("test", OUT=str(tmp_path / "out"), **variables)
    assert (result.returncode, result.stderr) == (2, f"{words}\n")


def test_the_help_names_every_stage_and_variable():
    result = shell()
    assert result.returncode == 2
    first, rest = result.stderr.split("\n\n", 2)[1:]
    assert first.split()[1] == "|".join([*gpu_check.STAGES, "all"])
    assert re.findall(r"^([a-z-]+)  ", rest, re.M) == [*gpu_check.STAGES, "all"]
    assert re.findall(r"^([A-Z_0-9]+) ", rest, re.M) == [
        "PYTHON",
        "OUT",
        "REPORT",
        "LIMIT",
        "OFFICIAL",
        "DCNV4",
        "CPU_TESTS",
        "RACECHECK",
    ]


def test_paths_are_relative_to_the_caller(tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": "./python", "OUT": "here/out", "REPORT": "r.md"}
    variables |= {"OFFICIAL": "peer", "DCNV4": ""}
    command = ["bash", str(CHECKS / "gpu_check.sh"), "test"]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert result.stderr == f"OFFICIAL must be a checkout, and there is no folder '{tmp_path}/peer'\n"
    (tmp_path / "peer").mkdir()
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert result.returncode == 2 and (tmp_path / "here" / "out").is_dir()


def test_where_results_go(tmp_path):
    assert settings(tmp_path).report == tmp_path / "out" / "gpu.md"
    assert settings(tmp_path, REPORT=str(tmp_path / "x.md")).report == tmp_path / "x.md"
    assert Settings.read({}).report == ROOT / "docs" / "benchmarks" / "gpu.md"
    assert not Settings.read({}).cpu_tests and not Settings.read({}).racecheck


# ---- compute-sanitizer

SANITIZER = """#!/bin/sh
echo "$@" >> "{folder}/calls"
case "$2" in
memcheck) echo "========= ERROR SUMMARY: {memcheck} errors"; [ {memcheck} = 0 ] || exit 99;;
initcheck) echo "=========     at at::native::fill_kernel"; echo "========= ERROR SUMMARY: 1 error"; exit 99;;
racecheck)
    echo "========= RACECHECK SUMMARY: 0 hazards displayed"
    echo "variants=$INTERNIMAGE_CUDA_VARIANTS" >> "{folder}/calls";;
esac
"""


def sanitized(
    tmp_path, report, monkeypatch, memcheck: int = 0, seconds: float = 500, **variables
) -> tuple[int, str, str]:
    """The stage's status, its report, and how the tool was called."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(folder=tmp_path, memcheck=memcheck))
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize.machine, "tool", lambda name: str(tool))
    monkeypatch.setattr(sanitize.machine, "backend", lambda: "compiled kernel")
    monkeypatch.setattr(variants, "unknown", lambda: "")
    status = sanitize.run(report, settings(tmp_path, **variables), reports.Clock(seconds))
    return status, report.path.read_text(), (tmp_path / "calls").read_text()


def test_the_sanitizer_looks_at_memory(tmp_path, report, monkeypatch):
    status, text, calls = sanitized(tmp_path, report, monkeypatch)
    assert status == 0 and [line.split()[1] for line in calls.splitlines()] == ["memcheck", "initcheck"]
    assert "ERROR SUMMARY: 0 errors" in text and "None of it is in our kernels." in text


def test_the_sanitizer_finds_something(tmp_path, report, monkeypatch):
    status, text, _ = sanitized(tmp_path, report, monkeypatch, memcheck=3)
    assert status == 1 and "ERROR SUMMARY: 3 errors Status 99." in text


def test_races_are_looked_for_if_asked(tmp_path, report, monkeypatch):
    status, _, calls = sanitized(tmp_path, report, monkeypatch, RACECHECK="1")
    assert status == 0 and "racecheck" in calls and "variants=tiles,window,fixed" in calls


def test_initcheck_needs_time(tmp_path, report, monkeypatch):
    status, text, calls = sanitized(tmp_path, report, monkeypatch, seconds=40)
    assert status == 0 and "initcheck" not in calls and "Not run: out of time." in text


# ---- counters and variants


def test_counters_of_a_profile():
    stall = "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
    never = "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
    names = ["ID", "Kernel Name", "gpu__time_duration.sum", "lts__t_sectors_op_red.sum", stall, never]
    rows = [
        names,
        ["", "", "us", "sector", "inst", "inst"],
        ["0", "void internimage::cuda::backward_kernel<__half, 4>(int, int)", "470.1", "57,802,752", "2.51", "0"],
        ["1", "fill", "20.5", "0", "0.2", "0"],
    ]
    page = ["==PROF== Connected", *(",".join(f'"{value}"' for value in row) for row in rows)]
    kernels = list(profile.read(page))
    assert [kernel["gpu__time_duration.sum"] for kernel in kernels] == ["470.1 us", "20.5 us"]
    text = profile.table(kernels)
    assert "1. `backward_kernel<__half, 4>`\n2. `fill`" in text
    assert "| us | 470.1 us | 20.5 us |" in text and "| L2 sectors of reds | 57,802,752 sector | 0 sector |" in text
    assert "| DRAM read |  |  |" in text and "| long scoreboard | 2.51 | 0.2 |" in text and "barrier" not in text
    assert list(profile.read(["==ERROR== no permission"])) == []


NCU = """#!{python}
import sys
arguments = sys.argv[1:]
dtype = arguments[arguments.index("--dtype") + 1]
with open(arguments[arguments.index("--log-file") + 1], "w") as file:
    if {denied}:
        print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", file=file)
        sys.exit(1)
    print('"Kernel Name","gpu__time_duration.sum"\\n"","us"\\n"' + dtype + '_kernel","7.5"', file=file)
"""


@pytest.mark.parametrize("denied", [False, True])
def test_a_profile(denied, tmp_path, report, monkeypatch):
    tool = tmp_path / "ncu"
    tool.write_text(NCU.format(python=sys.executable, denied=denied))
    tool.chmod(0o755)
    monkeypatch.setattr(profile.machine, "tool", lambda name: str(tool))
    run = report.run
    monkeypatch.setattr(
        report, "run", lambda c, *rest, **more: run(c if c[0] == str(tool) else ["true"], *rest, **more)
    )
    assert profile.run(report, settings(tmp_path), reports.Clock(300)) == 0
    text = report.path.read_text()
    if denied:
        assert text.endswith("not available: ==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")
        return
    for dtype in profile.DTYPES:
        assert f"1. `{dtype}_kernel`" in text and f"All counters are in `profile-{dtype}.csv`." in text
    assert text.count("| us | 7.5 us |") == 3


def test_without_a_profiler(tmp_path, report, monkeypatch):
    monkeypatch.setattr(profile.machine, "tool", lambda name: None)
    assert profile.run(report, settings(tmp_path), reports.Clock(300)) == 0
    assert report.path.read_text() == "not available: there is no ncu (Nsight Compute).\n"


def test_variants_side_by_side():
    def row(ms):
        return {("float16", "56x56", "forward"): {"ms": ms}}

    text = variants.table({"default": row(0.5), "tiles": row(0.25), "window": row(None), "fixed": {}})
    assert text.splitlines()[1:] == [
        "| dtype | stage | work | default | tiles | window | fixed |",
        "|---|---|---|--:|--:|--:|--:|",
        "| float16 | 56x56 | forward | 0.5000 | **0.2500** |  |  |",
    ]


ROWS = """
import json, os, sys
variants = os.environ.get("INTERNIMAGE_CUDA_VARIANTS", "")
ms = {"": 0.5, "tiles": 0.25, "window": None, "fixed": 0.75, "tiles,window,fixed": 0.4}[variants]
why = "" if ms else "deviates by 1 from the reference"
print(json.dumps(dict(dtype="float16", stage="56x56", work="forward", ms=ms, problem=why)))
sys.exit(ms is None)
"""


def test_variants_run_in_processes_of_their_own(tmp_path, report, monkeypatch):
    monkeypatch.setattr(variants, "unknown", lambda: "")
    monkeypatch.delenv(variants.VARIABLE, raising=False)
    start, commands = report.start, []

    def start_rows(command, seconds, **variables):
        commands.append(command)
        return start([sys.executable, "-c", ROWS], seconds, **variables)

    monkeypatch.setattr(report, "start", start_rows)
    assert variants.run(report, settings(tmp_path), reports.Clock(600)) == 1
    text = report.path.read_text()
    assert len(commands) == 6 and all("--ours" in command and "--json" in command for command in commands)
    assert "\ntiles:\n\n1 rows, all results right.\n" in text
    assert "- float16, 56x56, forward: deviates by 1 from the reference\n" in text
    assert "| dtype | stage | work | default | tiles | window | fixed | all | default again |\n" in text
    assert "| float16 | 56x56 | forward | 0.5000 | **0.2500** |  | 0.7500 | 0.4000 | 0.5000 |\n" in text


def test_a_build_without_variants(tmp_path, monkeypatch):
    (tmp_path / "internimage").mkdir()
    monkeypatch.setattr(variants, "ROOT", tmp_path)
    (tmp_path / "internimage" / "_C.abi3.so").write_bytes(b"\0INTERNIMAGE_NVRTC\0")
    assert variants.unknown() == "This build does not know INTERNIMAGE_CUDA_VARIANTS: it has no variants."
    (tmp_path / "internimage" / "_C_cuda.abi3.so").write_bytes(b"\0INTERNIMAGE_CUDA_VARIANTS\0")
    assert variants.unknown() == ""


# ---- wheels


def write_wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    there = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{there}/METADATA", metadata + "".join(f"Requires-Dist: {r}\n" for r in requires))
        wheel.writestr(f"{there}/WHEEL", f"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{there}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path) -> Path:
    """Wheels of all that a pack needs, and of what it must not have; `timm` needs torch and something more."""
    folder = tmp_path / "index"
    for text in [*gpu_pack.NEEDS, gpu_pack.PIP]:
        name, _, version = text.partition(">=")
        requires = ["torch", "torchvision", "helper>=1; python_version>='3'", "extra-one; extra == 'x'"]
        write_wheel(folder, name.replace("-", "_"), version or "1", *(requires if name == "timm" else []))
    write_wheel(folder, "helper", "1.5", "numpy>=1.26")
    for name in gpu_pack.THERE:
        write_wheel(folder, name, "99.0")
    return folder


def test_wheels_are_those_that_a_machine_with_torch_may_lack(index, tmp_path):
    names = gpu_pack.download(tmp_path / "wheels", "3.12", index)
    assert {name.split("-")[0] for name in names} == {
        *(re.split("[>=]", text)[0].replace("-", "_") for text in [*gpu_pack.NEEDS, gpu_pack.PIP]),
        "helper",
    }


def test_a_wheel_that_there_is_not(index, tmp_path):
    next(index.glob("helper-*")).unlink()
    with pytest.raises(gpu_pack.PackError, match="pip cannot download the wheels: ERROR: .*helper"):
        gpu_pack.download(tmp_path / "wheels", "3.12", index)


def test_what_is_needed_is_what_the_package_says():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    said = {re.split("[>=]", text)[0]: text for text in said}
    for text in gpu_pack.NEEDS:
        name = re.split("[>=]", text)[0]
        assert said.get(name, text) == text
    packed = {re.split("[>=]", text)[0] for text in gpu_pack.NEEDS} | set(gpu_pack.THERE)
    assert {re.split("[>=]", text)[0] for text in project["dependencies"]} <= packed


@pytest.mark.parametrize(
    "installed, chosen",
    [
        ({}, ["helper", "timm", "tool"]),
        ({"timm": "1.0.31"}, ["tool"]),  # what it requires is not looked at
        ({"timm": "1.0.26"}, ["helper", "timm", "tool"]),
        ({"timm": "1.0.26", "helper": "1.0"}, ["timm", "tool"]),
        ({"timm": "2.0", "tool": "3"}, []),
    ],
)
def test_only_what_is_lacking_is_installed(installed, chosen, tmp_path):
    pytest.importorskip("pip")
    wheels = tmp_path / "wheels"
    write_wheel(wheels, "timm", "1.0.31", "torch>=2", "helper>=1", "extra; extra == 'x'")
    write_wheel(wheels, "helper", "1.5", "timm")
    write_wheel(wheels, "tool", "3")
    found = environment.lacking(wheels, ["timm>=1.0.31", "tool"], {"torch": "2.11.0+cu130", **installed}.get)
    assert [path.name.split("-")[0] for path in found] == chosen


def test_what_a_pack_cannot_help_with(tmp_path):
    pytest.importorskip("pip")
    write_wheel(tmp_path / "wheels", "timm", "1.0.31", "torch>=2")
    with pytest.raises(
        environment.EnvironmentProblem, match="torch is installed in version 1.9, and the pack has no wheel"
    ):
        environment.lacking(tmp_path / "wheels", ["timm"], {"torch": "1.9"}.get)
    with pytest.raises(environment.EnvironmentProblem, match="torch is not installed, and the pack has no wheel"):
        environment.lacking(tmp_path / "wheels", ["timm"], {}.get)


def test_an_environment_of_a_pack(tmp_path, monkeypatch):
    """On top of an interpreter that is in an environment itself; no network, no index."""
    pip = pytest.importorskip("pip")
    pack = tmp_path / "pack"
    write_wheel(pack / "wheels", "timm", "99.0", "torch")
    with zipfile.ZipFile(pack / "wheels" / "pip-99.0-py3-none-any.whl", "w") as wheel:
        for path in Path(pip.__file__).parent.rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                wheel.write(path, f"pip/{path.relative_to(Path(pip.__file__).parent)}")
    (pack / "requirements.txt").write_text("timm>=99\npytest\n")
    version = "{}.{}".format(*sys.version_info)
    (pack / "manifest.json").write_text(json.dumps({"python": version, "made": "today"}))
    script = [sys.executable, str(CHECKS / "gpu" / "environment.py"), str(pack)]
    variables = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_REQUIRE_VIRTUALENV": "1"}
    result = subprocess.run(script, capture_output=True, text=True, env=variables)
    assert result.returncode == 0, result.stderr
    code = "import timm, torch, pytest; print(timm.version, torch.__file__, pytest.__file__)"
    said = subprocess.run([result.stdout.strip(), "-c", code], capture_output=True, text=True)
    import torch

    assert said.stdout.split() == ["99.0", torch.__file__, pytest.__file__], said.stderr
    made = (pack / "venv" / "made.json").stat().st_mtime_ns
    assert subprocess.run(script, capture_output=True, text=True).stdout == result.stdout
    assert (pack / "venv" / "made.json").stat().st_mtime_ns == made  # not made anew
    (pack / "manifest.json").write_text(json.dumps({"python": "3.1", "made": "today"}))
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 1 and "the wheels of this pack are for Python 3.1, and" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# ---- the pack


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A small checkout of this project, with built modules."""
    root = tmp_path / "checkout"
    for name, text in {
        "internimage/__init__.py": "", "csrc/a.cpp": "", "csrc/b.cu": "", "setup.py": "", "gone.py": "",
        ".gitignore": "*.so\n_build.json\n", "scripts/checks/gpu/run.sh": "run\n",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    (root / "gone.py").unlink()
    (root / "new.py").write_text("")
    for name in (gpu_pack.MODULE, gpu_pack.CUDA_MODULE):
        (root / "internimage" / name).write_bytes(name.encode())
    facts = {"torch": "2.14", "cuda": {"architectures": ["sm_80", "sm_90", "compute_90"], "reason": ""}}
    (root / "internimage" / gpu_pack.FACTS).write_text(json.dumps(facts))
    monkeypatch.setattr(gpu_pack, "ROOT", root)
    return root


def pack_arguments(tmp_path, index, **changes) -> argparse.Namespace:
    defaults = dict(
        out=tmp_path / "pack", python="3.12", architectures="8.0;9.0", official=None, dcnv4=None, peers_python=None,
        wheels=index, limit=60,
    )  # fmt: skip
    return argparse.Namespace(**{**defaults, **changes})


def test_a_pack(tmp_path, checkout, index, capsys):
    peer = tmp_path / "official"
    for name in (
        "classification/ops_dcnv3/src/vision.cpp",
        "classification/ops_dcnv3/build/x.o",
        "detection/big",
        "LICENSE",
    ):
        (peer / name).parent.mkdir(parents=True, exist_ok=True)
        (peer / name).write_text("x")
    gpu_pack.make(pack_arguments(tmp_path, index, official=peer))
    pack = tmp_path / "pack"
    files = {path.relative_to(pack).as_posix() for path in pack.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("wheels/")} == {
        "README.md", "manifest.json", "requirements.txt", "run.sh",
        "source/.gitignore", "source/csrc/a.cpp", "source/csrc/b.cu", "source/new.py", "source/setup.py",
        "source/scripts/checks/gpu/run.sh", "source/internimage/__init__.py", "source/internimage/_build.json",
        "source/internimage/_C.abi3.so", "source/internimage/_C_cuda.abi3.so",
        "peers/official/LICENSE", "peers/official/classification/ops_dcnv3/src/vision.cpp",
    }  # fmt: skip
    manifest = json.loads((pack / "manifest.json").read_text())
    assert manifest["python"] == "3.12" and manifest["commit"].endswith("-dirty") and len(manifest["wheels"]) > 10
    assert "_C_cuda.abi3.so for sm_80, sm_90, compute_90" in manifest["modules"]
    text = (pack / "README.md").read_text()
    assert (
        "\n    bash run.sh all\n" in text and "- `peers/official`: the sources, which nvcc must compile there\n" in text
    )
    gpu_pack.make(pack_arguments(tmp_path, index))  # again, without the peer
    assert not (pack / "peers").exists()
    assert re.search(r"/pack: \d+\.\d MB\. _C\.abi3\.so, and _C_cuda", capsys.readouterr().out)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda root, a: (root / "internimage" / gpu_pack.MODULE).unlink(), r"internimage/_C\.abi3\.so is not there"),
        (
            lambda root, a: os.utime(root / "csrc" / "a.cpp", (time.time() + 100,) * 2),
            r"internimage/_C\.abi3\.so is older than csrc/a\.cpp",
        ),
        (lambda root, a: setattr(a, "limit", 0.001), r"the pack has .* MB, more than 0: the largest are .*\.whl"),
        (lambda root, a: setattr(a, "dcnv4", root), r"has no folder DCNv4_op"),
        (lambda root, a: setattr(a, "out", root), r"is there and is not a pack: --out names another folder"),
        (lambda root, a: shutil.rmtree(root / ".git"), r"is not a git checkout"),
    ],
)
def test_no_pack(change, words, tmp_path, checkout, index):
    arguments = pack_arguments(tmp_path, index)
    change(checkout, arguments)
    with pytest.raises(gpu_pack.PackError, match=words):
        gpu_pack.make(arguments)
    assert (checkout / "setup.py").is_file()


def test_a_module_for_other_gpus_is_not_packed(tmp_path, checkout, index, monkeypatch):
    monkeypatch.setattr(
        gpu_pack, "build_cuda_module", lambda root, library, wanted: {"reason": f"no nvcc for {wanted}"}
    )
    gpu_pack.make(pack_arguments(tmp_path, index, architectures="10.0"))
    package = tmp_path / "pack" / "source" / "internimage"
    assert not (package / gpu_pack.CUDA_MODULE).exists()
    assert json.loads((package / "_build.json").read_text())["cuda"] == {"reason": "no nvcc for ['10.0']"}
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert manifest["modules"] == "_C.abi3.so alone: no nvcc for ['10.0']"


# ---- the tests that use the GPU

OUTPUT = """
print("tests/test_a.py::test_x[a b-cuda] PASSED  [ 10%]")
print("tests/test_a.py::test_y[cuda] FAILED  [ 20%]", flush=True)
print("tests/test_b.py::test_z SKIPPED (needs x)  [ 30%]", flush=True)
"""


@pytest.mark.parametrize(
    "end, words, passed",
    [
        ("raise SystemExit(1)", "1 passed, 1 failed, 1 skipped\n- tests/test_a.py::test_y[cuda]\n\nStatus 1.\n", False),
        (
            "import time; time.sleep(600)",
            "1 passed, 1 failed, 1 skipped\n- tests/test_a.py::test_y[cuda]\n\nOut of time: ended after 6 s.\n",
            False,
        ),
    ],
)
def test_results_are_counted_also_if_the_time_is_over(end, words, passed, report):
    running = report.start([sys.executable, "-c", OUTPUT + end], 6)
    running.wait()
    assert tests.judge(report, running) == passed and report.path.read_text() == words


def test_all_passed_and_none_selected(report):
    for code in ("print('tests/test_a.py::test_x PASSED [100%]')", f"raise SystemExit({tests.NO_TESTS})"):
        running = report.start([sys.executable, "-c", code], 60)
        running.wait()
        assert tests.judge(report, running)
    assert report.path.read_text() == "1 passed\n\nAll passed.\nNo tests.\n\n"


def test_both_ways_to_a_kernel_are_tested(tmp_path, report, monkeypatch):
    """Each in a process with INTERNIMAGE_NVRTC set, and only if a call is served by a compiled kernel."""
    served = {
        "0": "plain torch; no module",
        "1": "compiled kernel, by NVRTC when it is first needed",
        None: "plain torch",
    }
    monkeypatch.setattr(tests.machine, "backend", lambda **variables: served[variables.get("INTERNIMAGE_NVRTC")])
    code = (
        "import os, sys; print('tests/a.py::' + os.environ.get('INTERNIMAGE_NVRTC', '-') + sys.argv[2][:3] + ' PASSED')"
    )
    monkeypatch.setattr(tests, "PYTEST", [sys.executable, "-c", code])
    assert tests.run(report, settings(tmp_path), reports.Clock(300)) == 0
    text = report.path.read_text()
    assert "With the kernels that nvcc has compiled:\n\nNot run: plain torch; no module.\n" in text
    assert (
        "With the kernels that NVRTC compiles:\n\n```\ntests/a.py::1gpu PASSED\n```\n1 passed\n\nAll passed.\n" in text
    )
    served["1"] = "plain torch; no NVRTC"
    assert tests.run(report, settings(tmp_path), reports.Clock(300)) == 1
    assert report.path.read_text().endswith("No CUDA kernels are in use: nothing was tested.\n")


# ---- building


def test_what_is_there_is_not_built(tmp_path, report, monkeypatch):
    monkeypatch.setattr(build.machine, "nvccs_module", lambda: Path("_C_cuda.abi3.so"))
    monkeypatch.setattr(build.machine, "backend", lambda **_: "compiled kernel")
    monkeypatch.setattr(build.machine, "lacks_code_for_this_gpu", lambda: "")
    assert build.run(report, settings(tmp_path), reports.Clock(300)) == 0
    assert report.path.read_text() == "`_C_cuda.abi3.so` is there and serves this GPU: not built.\n"


def test_without_nvcc_nothing_is_built(tmp_path, report, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build.machine, "nvccs_module", lambda: Path("_C_cuda.abi3.so"))
    monkeypatch.setattr(build.machine, "backend", lambda **_: "compiled kernel")
    monkeypatch.setattr(build.machine, "lacks_code_for_this_gpu", lambda: "loaded, but not for it")
    monkeypatch.setattr(build.machine, "tool", lambda name: None)
    assert build.run(report, settings(tmp_path), reports.Clock(300)) == 0
    assert report.path.read_text() == (
        "`_C_cuda.abi3.so` is there, but does not serve this GPU: loaded, but not for it\n\n"
        "Not built: there is no nvcc. NVRTC compiles the kernels when they are first needed.\n"
    )
