# SPDX-License-Identifier: MIT
"""The CUDA kernels that NVRTC compiles when they are first needed: without a GPU, on a stand-in for CUDA."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cuda_host
import cuda_stand_in
import pytest
import torch

from internimage import extension, locks
from internimage.nvrtc import RUN_TIME_KERNELS, cache, compiler, kernels, parts

ROOT = Path(__file__).resolve().parent.parent
FIXED = ["range", "sum", "slow", "round"]
KEY = {"kernel": "forward_kernel<float, 8, 9, true, uint32_t>", "target": "sm_90", "sources": "1"}


# its argument is ROOT; neither torch nor the models are imported if the command line's module is there
WITHOUT_MODELS = "import sys; sys.path.insert(0, sys.argv[1]); import internimage_command as c; c.starting = True\n"


def found() -> parts.Parts:
    try:
        return parts.find()
    except parts.Missing as missing:
        pytest.skip(f"needs NVRTC: {missing}")


@pytest.fixture
def nvrtc() -> compiler.Nvrtc:
    return compiler.load(found().library)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The cache's folder, new."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_complained", set())
    return tmp_path / "cache" / "cuda"


# ---- compiling


@pytest.mark.skipif(cuda_stand_in.CPP_COMPILER is None, reason="needs a C++ compiler (g++, or CXX)")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_120", "compute_90"])
@pytest.mark.parametrize(
    "family", ["forward", "backward", "backward3x3", "deterministic", "tiles", "window", *(f"fixed_{f}" for f in FIXED)]
)
def test_a_kernel(family, architecture, nvrtc):
    """All of them for seven architectures: test_cuda_compile.py."""
    kernel, argument_bytes = next(
        item for item in cuda_stand_in.layout()["kernels"].items() if item[0].startswith(f"{family}_kernel")
    )
    kind, number = architecture.split("_")
    image, name = nvrtc.compile(found(), kernel, argument_bytes, compiler.Target(kind, int(number)))
    assert f"{family}_kernel" in name and name.startswith("_ZN11internimage4cuda")
    assert image.startswith(b"\x7fELF") if kind == "sm" else b".target sm_90" in image and image.endswith(b"\0")


@pytest.mark.skipif(cuda_stand_in.CPP_COMPILER is None, reason="needs a C++ compiler (g++, or CXX)")
def test_host_and_gpu_lay_out_the_arguments_alike(nvrtc):
    source = '#include "cuda/gather/arguments.h"\n'
    for i, (types, facts) in enumerate(cuda_stand_in.layout()["arguments"].items()):
        source += f"using A{i} = internimage::cuda::Arguments<{types}>;\n"
        source += f"static_assert(sizeof(A{i}) == {facts['size']});\n"
        for name, offset, size in facts["fields"]:
            source += f"static_assert(__INTADDR__(&((A{i}*)0)->{name}) == {offset});\n"
            source += f"static_assert(sizeof(((A{i}*)0)->{name}) == {size});\n"
    nvrtc.build(found(), source, [], compiler.Target("sm", 90))


def test_another_layout_is_refused(nvrtc):
    with pytest.raises(compiler.CompileError, match="the host lays out the arguments differently"):
        nvrtc.compile(found(), KEY["kernel"], 8, compiler.Target("sm", 90))


def test_an_error_is_one_line_without_paths(nvrtc):
    with pytest.raises(compiler.CompileError) as failure:
        nvrtc.build(
            found(), '#include "cuda/gather/arguments.h"\nint x = no_such_name;\n', [], compiler.Target("sm", 90)
        )
    assert re.fullmatch(r'internimage\.cu\(2\): error: identifier "no_such_name" is undefined', str(failure.value))


@pytest.mark.parametrize(
    "capability, target",
    [
        ((7, 5), "sm_75"),
        ((8, 7), "sm_86"),  # machine code of an earlier minor version
        ((9, 0), "sm_90"),
        ((12, 1), "sm_120"),
        ((11, 0), "compute_90"),  # a major version that NVRTC does not know
        ((13, 0), "compute_120"),
        ((7, 0), None),
        ((6, 1), None),
    ],
)
def test_what_is_compiled_for_a_gpu(capability, target):
    nvrtc = object.__new__(compiler.Nvrtc)
    nvrtc.supported = [75, 80, 86, 90, 120]
    chosen = nvrtc.target(capability)
    assert (chosen and str(chosen)) == target


# ---- what it takes


def test_what_is_missing(monkeypatch, tmp_path):
    packages = tmp_path / "nvidia"
    folders = [packages / "cu13", packages / "cuda_nvrtc", packages / "cuda_runtime"]
    monkeypatch.setattr(parts, "_package_folders", lambda major: folders)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    for version, package in (("12.8", "nvidia-cuda-nvrtc-cu12"), ("13.0", "nvidia-cuda-nvrtc")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(
            parts.Missing, match=rf"NVRTC {version[:2]} is not in torch's packages \({package} has it\)"
        ):
            parts.find()
    (packages / "cu13" / "lib").mkdir(parents=True)
    (packages / "cu13" / "lib" / "libnvrtc.so.13").write_bytes(b"")
    with pytest.raises(parts.Missing, match=r"cuda_fp16.h and cuda_bf16.h are not .* \(nvidia-cuda-runtime has them\)"):
        parts.find()
    (packages / "cuda_runtime" / "include").mkdir(parents=True)
    for name in ("cuda_fp16.h", "cuda_bf16.h"):
        (packages / "cuda_runtime" / "include" / name).write_text("")
    there = parts.find()
    assert (there.library.name, there.include.parent.name) == ("libnvrtc.so.13", "cuda_runtime")
    with pytest.raises(parts.Missing, match="'libnvrtc.so.13' cannot be used: .*file too short"):
        compiler.Nvrtc(there.library)
    monkeypatch.setattr(parts, "_PACKAGE", tmp_path / "internimage")
    with pytest.raises(parts.Missing, match="without the sources"):
        parts.find()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(parts.Missing, match="this torch has no CUDA"):
        parts.find()


def test_the_key_changes_with_what_an_image_depends_on(nvrtc, monkeypatch, tmp_path):
    here = found()
    target = compiler.Target("sm", 90)
    keys = [kernels.cache_key(here, "k<float>", 8, target)]
    keys.append(kernels.cache_key(here, "k<double>", 8, target))
    keys.append(kernels.cache_key(here, "k<float>", 16, target))
    keys.append(kernels.cache_key(here, "k<float>", 8, compiler.Target("compute", 90)))
    sources = tmp_path / "csrc"
    for path in parts.source_files(here.sources):
        copy = sources / path.relative_to(here.sources)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    same = parts.Parts(here.library, here.include, sources)
    assert kernels.cache_key(same, "k<float>", 8, target) == keys[0]  # wherever the sources are
    (sources / "cuda" / "types.h").write_text("// another\n")
    parts.fingerprint.cache_clear()
    keys.append(kernels.cache_key(same, "k<float>", 8, target))
    monkeypatch.setattr(nvrtc, "version", "99.0")  # torch was upgraded
    keys.append(kernels.cache_key(here, "k<float>", 8, target))
    assert len({json.dumps(key) for key in keys}) == len(keys)


# ---- the cache


def test_an_entry(folder):
    assert cache.read(KEY) is None and cache.entries() == 0
    cache.write(KEY, b"\0image\n\n", "name")
    assert cache.read(KEY) == (b"\0image\n\n", "name") and cache.entries() == 1
    assert cache.read({**KEY, "sources": "2"}) is None
    cache.write(KEY, b"another", "name")
    assert cache.read(KEY) == (b"another", "name") and cache.entries() == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "other key", "no JSON", "folder", "pipe"])
def test_an_entry_that_is_not_what_it_should_be(damage, folder):
    """It is not used, and replaced where that is possible."""
    cache.write(KEY, b"image", "name")
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-2])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(b'{"made by": "somebody else"}\nimage')
    elif damage == "other key":
        path.write_bytes(content.replace(b"sm_90", b"sm_80"))
    elif damage == "no JSON":
        path.write_bytes(b"[" * 100000 + b"\n")
    else:
        path.unlink()
        path.mkdir() if damage == "folder" else os.mkfifo(path)
    assert cache.read(KEY) is None
    cache.write(KEY, b"image", "name")  # never fails
    if damage != "folder":
        assert cache.read(KEY) == (b"image", "name")


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "_complained", set())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    for _ in range(3):
        cache.write(KEY, b"image", "name")
        assert cache.read(KEY) is None
    (record,) = caplog.records
    assert re.match(
        r"compiled CUDA kernels cannot be kept in '.+' \(.+\): .* INTERNIMAGE_CACHE names another folder",
        record.message,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the size of files")
def test_a_full_disk(folder):
    """As by a limit of the size of files: no entry, no rest of one, one warning."""
    code = (
        f"{WITHOUT_MODELS}import resource, signal\n"
        "from internimage.nvrtc import cache\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"key = {KEY!r}\n"
        "cache.write(key, b'x' * 100000, 'name'); cache.write(key, b'x' * 100000, 'name')\n"
        "print(cache.read(key))"
    )
    command = [sys.executable, "-c", code, str(ROOT)]
    result = subprocess.run(command, cwd=folder.parent.parent, capture_output=True, text=True)
    assert result.stdout == "None\n", result.stderr
    assert result.stderr.count("cannot be kept") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_writer_that_is_killed(folder):
    code = (
        f"{WITHOUT_MODELS}import os, signal\n"
        "from internimage.nvrtc import cache\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"cache.write({KEY!r}, b'image', 'name')\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=folder.parent.parent)
    assert result.returncode == -signal.SIGKILL
    assert cache.read(KEY) is None and cache.entries() == 0 and len(list(folder.iterdir())) == 1
    cache.write(KEY, b"image", "name")
    assert cache.read(KEY) == (b"image", "name") and len(list(folder.iterdir())) == 1


TURN = """
from internimage import locks
from internimage.nvrtc import cache
sleep = locks.time.sleep
def waits(seconds):
    global waits_already
    if not waits_already:
        print("waits", flush=True)
    waits_already = True
    sleep(seconds)
locks.time.sleep, waits_already = waits, False
cache._LONGEST = float(sys.argv[2])
with cache.turn(KEY):
    print("mine", flush=True)
    if sys.argv[3:] == ["stay"]:
        sys.stdin.read()
"""


def take_turn(seconds: float, *stay: str) -> subprocess.Popen:
    command = [sys.executable, "-c", f"{WITHOUT_MODELS}KEY = {KEY!r}\n{TURN}", str(ROOT), str(seconds), *stay]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(folder):
    """A process whose turn it is, until its standard input ends."""
    with take_turn(600, "stay") as process:
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


@pytest.mark.parametrize("killed", [False, True])
def test_one_process_compiles_at_a_time(killed, holder, folder):
    """The next one waits for its end, or its death."""
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    with take_turn(600) as second:
        assert second.stdout.readline() == "waits\n"
        if killed:
            holder.kill()
        holder.stdin.close()
        assert second.stdout.read() == "mine\n"
    assert second.returncode == 0
    assert sys.platform == "win32" or list(folder.iterdir()) == []


def test_a_process_that_compiles_forever_is_not_waited_for(holder):
    with take_turn(0.1) as second:
        assert second.stdout.read() == "waits\nmine\n"
    assert second.returncode == 0


@pytest.mark.parametrize("problem", ["a file", "no home", "a folder in its place", "no locks"])
def test_without_locks_nobody_waits(problem, folder, monkeypatch):
    if problem == "a file":
        (folder.parent).write_text("")
    elif problem == "no home":
        monkeypatch.setattr(cache, "folder", lambda: None)
    elif problem == "a folder in its place":
        cache._path(KEY).with_suffix(".lock").mkdir(parents=True)
    else:
        monkeypatch.setattr(locks, "_try_lock", lambda file: None)
    with cache.turn(KEY):
        pass
    with pytest.raises(ZeroDivisionError), cache.turn(KEY):
        raise ZeroDivisionError


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    if sys.platform != "win32":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache.folder() == tmp_path / "internimage" / "cuda"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, as its specification says
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache.folder() == tmp_path / ".cache" / "internimage" / "cuda"
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "other"))
    assert cache.folder() == tmp_path / "other" / "cuda"


def test_without_a_home(monkeypatch, caplog):
    monkeypatch.setattr(cache, "folder", lambda: None)
    monkeypatch.setattr(cache, "_complained", set())
    cache.write(KEY, b"image", "name")
    assert cache.read(KEY) is None and cache.entries() == 0
    assert "the user has no home folder" in caplog.text


# ---- on the stand-in


def skip_without_stand_in() -> parts.Parts:
    if sys.platform != "linux" or cuda_stand_in.C_COMPILER is None or cuda_host.COMPILER is None:
        pytest.skip("needs Linux, a C and a C++ compiler")
    here = found()
    if not (here.include / "cuda_runtime_api.h").is_file():
        pytest.skip("needs cuda_runtime_api.h")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("internimage::serve_cuda", "CompositeExplicitAutograd"):
        pytest.skip("needs the compiled module for the CPU, which has the launcher")
    return here


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    here = skip_without_stand_in()
    return cuda_stand_in.build(tmp_path_factory.mktemp("stand_in") / "stand_in.so", here.include)


@pytest.fixture
def variables(stand_in, tmp_path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("INTERNIMAGE_", "CUDA_"))}
    return {
        **inherited,
        "LD_PRELOAD": str(stand_in),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # new memory is zero: torch's own kernels, which fill it, do not run
        cache.VARIABLE: str(tmp_path / "cache"),
        kernels.VARIABLE: "1",  # also where nvcc's module is installed
    }


# the operators alone: the models take seconds more to import
CALL = """
import internimage_command
internimage_command.starting = True
import ctypes, torch, internimage.ops
from internimage import extension
def call(device="cuda"):
    x, offset, mask = (torch.ones(1, 4, 4, c).to(device) for c in (16, 18, 9))
    return torch.ops.internimage.dcnv3(x, offset, mask, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1.0, False, True)
def events():
    library = ctypes.CDLL("libcuda.so.1")
    library.stand_in_events.restype = ctypes.c_char_p
    return library.stand_in_events().decode()
"""


def run(code: str, variables: dict[str, str], tmp_path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CALL + code]
    return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def launched_kernels(tmp_path_factory) -> Path:
    """A cache for kernels that are compiled once for all launches."""
    return tmp_path_factory.mktemp("launched")


@pytest.mark.parametrize(
    "checks, variants", [("on_stand_in.py", ""), ("variants_on_stand_in.py", "tiles,window,fixed")], ids=str
)
def test_launches(checks, variants, variables, launched_kernels, tmp_path_factory):
    """Files of cuda_stand_in, each in a process of its own."""
    variables["INTERNIMAGE_CUDA_VARIANTS"] = variants
    variables[cuda_host.LIBRARY] = str(cuda_host.shared(tmp_path_factory, "-DLAYOUTS"))
    variables[cache.VARIABLE] = str(launched_kernels)
    code = f"{WITHOUT_MODELS}import pytest; sys.exit(pytest.main(sys.argv[2:]))"
    command = [
        sys.executable,
        "-c",
        code,
        str(ROOT),
        "-q",
        "-p",
        "no:cacheprovider",
        str(cuda_stand_in.FOLDER / checks),
    ]
    result = subprocess.run(command, cwd=ROOT / "tests", env=variables, capture_output=True, text=True)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout + result.stderr


def test_the_first_call_compiles_and_the_next_process_does_not(variables, tmp_path):
    first, second = (run("call(); print(events())", variables, tmp_path) for _ in range(2))
    for result in (first, second):
        assert result.returncode == 0 and "launch " in result.stdout, result.stderr
    line = r"internimage: NVRTC \d+\.\d+ compiles the CUDA kernels that Stand-in 0 needs, .* keeps them in '.*'\n"
    assert re.fullmatch(line, first.stderr) and second.stderr == ""


# compiles only when another process waits for that, or compiles as well
SLOWLY = """
from pathlib import Path
from internimage import locks
from internimage.nvrtc import compiler
compile, sleep = compiler.Nvrtc.compile, locks.time.sleep
def slowly(*arguments):
    Path(f"{os.getpid()}.compiles").touch()
    while not list(Path().glob("*.waits")) and len(list(Path().glob("*.compiles"))) < 2:
        sleep(0.01)
    return compile(*arguments)
def waits(seconds):
    Path(f"{os.getpid()}.waits").touch()
    sleep(seconds)
compiler.Nvrtc.compile, locks.time.sleep = slowly, waits
call(); print(events())
"""


def test_two_processes_at_once(variables, tmp_path):
    """One compiles; the other waits, takes the result, and says nothing."""
    command = [sys.executable, "-c", f"import os\n{CALL}{SLOWLY}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, cwd=tmp_path, env=variables, **pipes) for _ in range(2)]
    said = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), said
    assert all("launch " in out for out, _ in said)
    assert len(list(tmp_path.glob("*.compiles"))) == 1
    assert sorted("compiles the CUDA kernels" in errors for _, errors in said) == [False, True]
    assert "" in [errors for _, errors in said]
    (entry,) = (tmp_path / "cache" / "cuda").iterdir()
    assert entry.suffix == ".kernel"


@pytest.mark.parametrize("can_be_kept", [True, False])
def test_threads_and_devices_of_a_process_compile_once(can_be_kept, variables, tmp_path):
    """Also where nothing can be kept on disk."""
    code = (
        "import threading\n"
        "from internimage.nvrtc import compiler\n"
        "compile, compiled = compiler.Nvrtc.compile, []\n"
        "def counted(*arguments):\n"
        "    compiled.append(1)\n"
        "    return compile(*arguments)\n"
        "compiler.Nvrtc.compile = counted\n"
        "threads = [threading.Thread(target=call, args=(f'cuda:{i % 2}',)) for i in range(6)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "print(events()); print('compiled', len(compiled))\n"
    )
    if not can_be_kept:
        (tmp_path / "cache").write_text("")
    result = run(code, variables, tmp_path)
    assert "compiled 1\n" in result.stdout and result.stdout.count("launch ") == 6, result.stdout + result.stderr
    assert {"load device=0", "load device=1"} <= {line[:13] for line in result.stdout.splitlines()}


@pytest.mark.parametrize(
    "capability, loaded, reason",
    [
        ("13.0", "load device=0 ptx", ""),
        ("6.1", "", r"NVRTC .* compiles for compute capability 7\.5 and newer; Stand-in 0 has 6\.1"),
    ],
)
def test_other_gpus(capability, loaded, reason, variables, tmp_path):
    code = "call(); print(events()); print(extension.backend('dcnv3', 'cuda')); print(extension.cuda_note())"
    result = run(code, {**variables, "STAND_IN_CAPABILITY": capability}, tmp_path)
    assert result.returncode == 0, result.stderr
    if loaded:
        assert loaded in result.stdout and "launch " in result.stdout
    else:
        assert "launch " not in result.stdout
        assert re.search(f"internimage: {reason}: plain torch serves DCNv3 on cuda:0", result.stderr)
        assert re.search(f"Backend.*plain torch.*{reason}", result.stdout)


def test_without_nvrtc(variables, tmp_path):
    """INTERNIMAGE_NVRTC=0, without nvcc's module: plain torch, and info says why."""
    code = (
        "import sys\n"
        "sys.orig_argv, sys.argv = ['python', '-m', 'internimage'], ['-m']\n"  # the operators come later
        "from internimage import extension\n"
        "extension._MODULES['cuda'] = 'no_such_module'\n"
        "import internimage.ops\n"
        "print(extension.backend('dcnv3', 'cuda').name, '|', extension.cuda_note())\n"
    )
    variables[kernels.VARIABLE] = "0"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("plain torch | none: ")
    assert result.stdout.endswith("they cannot be compiled at run time: INTERNIMAGE_NVRTC is 0\n")


def test_a_value_that_does_not_exist(variables, tmp_path):
    """A warning at import, an error of one line when a kernel is needed, and a line in info."""
    code = (
        "print(extension.cuda_note())\ntry: call()\nexcept RuntimeError as error: print(str(error).splitlines()[0])\n"
    )
    variables = {**variables, kernels.VARIABLE: "yes"}
    result = run("extension._run_time.serve()\n" + code, variables, tmp_path)  # though nvcc's module is installed
    said = "INTERNIMAGE_NVRTC must be 0 or 1, got 'yes'"
    assert f"RuntimeWarning: internimage: {said}" in result.stderr
    note, error = result.stdout.splitlines()
    assert note == f"none: {said}" and error.endswith(f"internimage: {said}")


def test_variants_that_do_not_exist(variables, tmp_path):
    """Nothing at import; an error of one line in each call, until the variable is right."""
    code = (
        "import os\n"
        "for name in ('tiles, windows', 'tiles'):\n"
        "    os.environ['INTERNIMAGE_CUDA_VARIANTS'] = name\n"
        "    try: call(); print(events().count('launch'))\n"
        "    except RuntimeError as error: print(str(error).splitlines()[0])\n"
    )
    result = run(code, {**variables, "INTERNIMAGE_CUDA_VARIANTS": "windows"}, tmp_path)
    error, launches = result.stdout.splitlines()
    assert error.endswith(
        "internimage: INTERNIMAGE_CUDA_VARIANTS must be names out of tiles, window and fixed, separated by commas, "
        "got 'tiles, windows'"
    )
    assert launches == "1" and result.stderr.count("\n") == 1  # of NVRTC, at the second call


def test_variants_make_these_kernels_serve(monkeypatch):
    """Also where nvcc's module is installed, which has no variants."""
    for name, value, preferred in (("", "", False), (kernels.VARIANTS, "tiles", True), (kernels.VARIABLE, "1", True)):
        for variable in (kernels.VARIANTS, kernels.VARIABLE):
            monkeypatch.setenv(variable, value if variable == name else "")
        assert RUN_TIME_KERNELS.is_preferred() == preferred


def test_variants_where_nothing_is_compiled_at_run_time(variables, tmp_path):
    """Nvcc's module says that it has none, rather than to serve with its default kernels."""
    if not any(Path(extension.__file__).parent.glob("_C_cuda.*so")):
        pytest.skip("needs the module that nvcc compiles")
    code = "try: call()\nexcept RuntimeError as error: print(str(error).splitlines()[0])"
    result = run(code, {**variables, kernels.VARIABLE: "0", kernels.VARIANTS: "tiles"}, tmp_path)
    assert "INTERNIMAGE_CUDA_VARIANTS needs kernels that are compiled at run time" in result.stdout, result.stderr


def test_fork(variables, tmp_path):
    """A loader's worker that uses the GPU, where the parent has not."""
    code = (
        "import os\n"
        "child = os.fork()\n"
        "call()\n"
        "print('launch ' in events(), flush=True)\n"
        "os._exit(0) if child == 0 else os.waitpid(child, 0)\n"
    )
    result = run(code, variables, tmp_path)
    assert result.stdout.split() == ["True", "True"], result.stderr


def test_a_kept_kernel_that_is_damaged(variables, tmp_path):
    run("call()", variables, tmp_path)
    (entry,) = (tmp_path / "cache" / "cuda").iterdir()
    entry.write_bytes(entry.read_bytes()[:-100])
    result = run("call(); print(events())", variables, tmp_path)
    assert "launch " in result.stdout and "compiles the CUDA kernels" in result.stderr


# ---- what is said


def test_what_is_said_without_a_compiled_module(monkeypatch):
    monkeypatch.setattr(extension, "has_kernel", lambda op, device: False)
    monkeypatch.setattr(RUN_TIME_KERNELS, "serves", False)
    monkeypatch.setattr(RUN_TIME_KERNELS, "why_not", lambda: "NVRTC 13 is not in torch's packages")
    said = extension.backend("dcnv3", "cuda").reason
    assert said.endswith("; and they cannot be compiled at run time: NVRTC 13 is not in torch's packages")


def test_messages_come_once(capsys, caplog, monkeypatch):
    monkeypatch.setattr(kernels, "_said", set())
    for _ in range(2):
        kernels._say("compiles")
        with caplog.at_level(logging.WARNING):
            kernels._say("does not", warn=True)
    assert capsys.readouterr().err.count("internimage: compiles\n") == 1 and len(caplog.records) == 1
