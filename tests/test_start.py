# SPDX-License-Identifier: MIT
"""What is imported when: arguments are read without torch, and a program that imports the package has its models."""

import json
import os
import subprocess
import sys

import pytest
from runs import ROOT, environment

import internimage

HEAVY = ["torch", "timm", "PIL", "numpy", "huggingface_hub", "safetensors", "torchvision"]
# beside the answer of the command, which packages it loaded
WATCHED = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps([name for name in {heavy} if name in sys.modules]), file=sys.stderr))
from internimage_command import main
sys.exit(main(sys.argv[1:]))
"""


def python(*arguments, **more):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=environment() | more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["--help"], 0, "VERB"),
        (["--version"], 0, internimage.__version__),
        (["finetune", "--help"], 0, "warmup_epochs"),
        (["benchmark", "ops", "--help"], 0, "torchvision"),
        ([], 2, "required: VERB"),
        (["fly"], 2, "invalid choice: 'fly'"),
        (["evaluate", "--data", "x"], 2, "required: --model"),
        (["evaluate", "--model", "m", "--data", "x", "--batch-size", "0"], 2, "argument --batch-size"),
        (["predict", "a.png", "--model", "m", "--draw-layer", "x"], 2, "--draw-layer has no effect"),
        (["finetune", "data=x", "output=y", "epochs=-1"], 2, "'epochs' must be"),
        (["convert", "a", "b", "--model-kwargs", "x"], 2, "must be KEY=VALUE"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_the_command_reads_its_arguments_without_torch(arguments, status, said):
    result = python("-c", WATCHED.format(heavy=HEAVY), *arguments)
    assert result.returncode == status and said in result.stdout + result.stderr
    *_, loaded = result.stderr.splitlines()
    assert json.loads(loaded) == []


def test_as_a_module_too():
    result = python("-X", "importtime", "-m", "internimage", "--version")
    assert result.returncode == 0 and internimage.__version__ in result.stdout
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert not names & set(HEAVY) and "internimage" in names


@pytest.fixture
def no_torch(tmp_path):
    """An environment in which importing torch ends the program: what does that shows without its seconds."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


@pytest.mark.parametrize(
    "start",
    [
        "import internimage",
        "import internimage_command, internimage",  # a program may import that, too
        "import sys; sys.argv = ['-m', 'internimage']; import internimage",  # an odd program is no command
        "from internimage.cli import main",
        "import internimage.tasks.classification.config",
    ],
)
def test_a_program_loads_the_models_with_the_package(start, no_torch):
    assert python("-c", start, **no_torch).stderr == "torch was imported\n"


@pytest.mark.parametrize("command", [["-m", "internimage"], ["-m", "internimage_command"]])
def test_a_verb_loads_the_models_before_it_runs(command, no_torch):
    assert python(*command, "push", "folder", "me/mine", **no_torch).stderr == "torch was imported\n"


def test_what_is_not_loaded_yet_comes_when_it_is_asked_for():
    code = (
        "import internimage_command as command; command.starting = True\n"
        "import sys, internimage; assert 'torch' not in sys.modules\n"
        "assert callable(internimage.ops.dcnv3) and internimage.models.PUBLISHED\n"
        "import timm; assert timm.is_model('internimage_tiny')\n"
        "from internimage import models; print(len(internimage.list_models()))\n"
        "try: internimage.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    result = python("-c", code)
    assert result.stdout.splitlines() == [
        str(len(internimage.list_models())), "module 'internimage' has no attribute 'nothing'",
    ], result.stderr  # fmt: skip


def test_an_interrupt_while_packages_load_is_one_line(tmp_path):
    """torch's import is where Ctrl-C falls most often: a stand-in for torch is interrupted in it."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    arguments = ["-c", "import sys; from internimage_command import main; sys.exit(main())", "info"]
    result = python(*arguments, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert result.returncode == 130 and result.stderr == "interrupted\n"
    (tmp_path / "yaml.py").write_text("raise KeyboardInterrupt\n")  # while the parser is imported
    result = python(*arguments, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert result.returncode == 130 and result.stderr == "interrupted\n"


def test_another_module_that_is_run_is_no_command(tmp_path, no_torch):
    """Python looks for it as it does for ours, and it may import the package while that goes on."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import internimage\n")
    (tmp_path / "other" / "__main__.py").write_text("")
    for arguments in (["-m", "other"], ["-m", "other", "-m", "internimage"], ["-m", "internimage.benchmark.memory"]):
        assert python(*arguments, **no_torch).stderr == "torch was imported\n"
