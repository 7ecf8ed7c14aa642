# SPDX-License-Identifier: MIT
"""The bookkeeping of benchmarks, their refusal to time what computes something else, and that they run; no times."""

import csv
import importlib
import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import launched
import pytest
import timm
import torch

from internimage.benchmark import CORES, memory, models, ops, timing
from internimage.benchmark.official import FUNCTION, MODEL, official_arguments
from internimage.cli import main
from internimage.extension import has_kernel
from internimage.ops.onednn import CAN_PACK

FUNCTION_FILE = """
    import DCNv3
    import pkg_resources
    from internimage.ops import dcnv3
    version = float(pkg_resources.get_distribution("DCNv3").version)

    def dcnv3_core_pytorch(input, offset, mask, kh, kw, sh, sw, ph, pw, dh, dw, group, group_channels, scale, center):
        return FACTOR * dcnv3(input, offset, mask, (kh, kw), (sh, sw), (ph, pw), (dh, dw), group, scale, center)
"""
MODEL_FILE = """
    import timm
    from ops_dcnv3 import modules
    from timm.models.layers import DropPath

    def InternImage(core_op, channels, drop_path_rate, **arguments):
        assert (core_op, drop_path_rate) == ("DCNv3_pytorch", 0.0)
        model = timm.create_model({16: "internimage_atto", 64: "internimage_tiny", 80: "internimage_small"}[channels])
        model.register_forward_hook(lambda module, inputs, logits: logits * FACTOR)
        return model
"""


@pytest.fixture
def checkout(tmp_path):
    """What stands in for a checkout of the official code: the same files with the same imports, computing by ours."""

    def make(factor=1.0):
        folder = tmp_path / f"checkout-{factor}"
        for file, text in ((FUNCTION, FUNCTION_FILE), (MODEL, MODEL_FILE)):
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text(textwrap.dedent(text).replace("FACTOR", str(factor)))
        (folder / "classification" / "ops_dcnv3" / "modules").mkdir()
        (folder / "classification" / "ops_dcnv3" / "modules" / "__init__.py").touch()
        return folder

    return make


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- running


def test_ops(checkout, tmp_path, capsys):
    path = tmp_path / "new" / "ops.csv"
    command = ["benchmark", "ops", "--quick", "--official", str(checkout()), "--csv", str(path)]
    assert main(command) == 0
    rows = read(path)
    assert list(rows[0]) == ops.COLUMNS
    assert {row["who"] for row in rows} == {
        *("ours", "reference", "torchvision", "official"),
        *("reference / ours", "torchvision / ours", "official / ours"),
    }
    assert {(row["clock"], row["threads"]) for row in rows} == {("cpu", "1"), *([("wall", "2")] if CORES > 1 else [])}
    assert {row["what"] for row in rows if row["who"] == "official / ours"} == {
        *ops.WORKS, "forward, ours in bf16", "softmax+forward, ours in bf16"
    }  # fmt: skip
    for row in rows:
        assert all(float(row[column]) > 0 for column in (*(f"{s}x{s}" for s, _, _ in ops.STAGES), "weighted"))
        assert row["machine"] and row["date"] and row["torch"] == torch.__version__ and row["malloc"]
    printed = capsys.readouterr().out
    assert "| softmax+forward" in printed and "official / ours" in printed
    # a second run is appended
    assert main(["benchmark", "ops", "--quick", "--csv", str(path), "--peers", "--threads", "1"]) == 0
    assert len(read(path)) == len(rows) + 2 * 5


def test_models(checkout, tmp_path):
    path = tmp_path / "models.csv"
    command = ["benchmark", "models", "--quick", "--official", str(checkout()), "--threads", "1", "--no-memory"]
    assert main([*command, "--peers", "official", "resnet10t", "--csv", str(path)]) == 0
    rows = [row for row in read(path) if row["of"] == "min"]
    assert [(row["what"], row["who"], row["dtype"], row["unit"]) for row in rows] == [
        ("inference", "internimage_tiny", "fp32", "images/s"),
        ("inference", "internimage_tiny", "bf16", "images/s"),
        ("inference", "official InternImage-T", "fp32", "images/s"),
        ("inference", "resnet10t", "fp32", "images/s"),
        ("inference", "resnet10t", "bf16", "images/s"),
        ("inference", "internimage_tiny / official InternImage-T", "fp32", "x"),
        ("inference", "internimage_tiny / official InternImage-T", "bf16 / fp32", "x"),
        ("inference", "internimage_tiny / resnet10t", "fp32", "x"),
        ("inference", "internimage_tiny / resnet10t", "bf16", "x"),
        ("training step", "internimage_tiny", "fp32", "images/s"),
        ("training step", "official InternImage-T", "fp32", "images/s"),
        ("training step", "resnet10t", "fp32", "images/s"),
        ("training step", "internimage_tiny / official InternImage-T", "fp32", "x"),
        ("training step", "internimage_tiny / resnet10t", "fp32", "x"),
    ]
    assert all(float(row["value"]) > 0 for row in rows)


def test_without_bfloat16(tmp_path):
    path = tmp_path / "models.csv"
    command = ["benchmark", "models", "--quick", "--threads", "1", "--no-memory", "--no-bf16", "--csv", str(path)]
    assert main([*command, "--peers", "resnet10t", "--training-batch", "0"]) == 0
    assert [(row["who"], row["dtype"]) for row in read(path) if row["of"] == "min"] == [
        ("internimage_tiny", "fp32"),
        ("resnet10t", "fp32"),
        ("internimage_tiny / resnet10t", "fp32"),
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_the_weights_are_packed_or_not(packed):
    model = models.Contender("internimage_atto", packed=packed).build()
    assert {block.pack_weights for block in model.get_blocks()} == {packed}


def test_models_of_other_sizes_one_after_the_other(checkout, tmp_path, monkeypatch):
    path = tmp_path / "models.csv"
    monkeypatch.setattr(memory, "peak", lambda contender, *_: 8.0 if contender.checkout else 4.0)
    command = ["benchmark", "models", "--quick", "--official", str(checkout()), "--threads", "1", "--csv", str(path)]
    command += ["--training-batch", "0", "--peers", "official", "--models", "internimage_atto", "internimage_small"]
    assert main(command) == 0
    expected = []
    for own, official in (
        ("internimage_atto", "official InternImage-atto"),
        ("internimage_small", "official InternImage-S"),
    ):
        expected += [
            ("inference", own, "fp32"),
            ("inference", own, "bf16"),
            ("inference", official, "fp32"),
            ("inference", f"{own} / {official}", "fp32"),
            ("inference", f"{own} / {official}", "bf16 / fp32"),
            ("peak memory, inference", own, "fp32"),
            ("peak memory, inference", f"{own} (weights not packed)", "fp32"),
            ("peak memory, inference", official, "fp32"),
            ("peak memory, inference", f"{own} / {official}", "fp32"),
            ("peak memory, inference", f"{own} (weights not packed) / {official}", "fp32"),
        ]
    assert [(row["what"], row["who"], row["dtype"]) for row in read(path) if row["of"] != "median"] == expected


def test_without_packed_weights(tmp_path, monkeypatch):
    path = tmp_path / "models.csv"
    monkeypatch.setattr(memory, "peak", lambda contender, batch, training: 1.0)
    command = ["benchmark", "models", "--quick", "--models", "internimage_atto", "--no-packed-weights"]
    assert main([*command, "--peers", "resnet10t", "--threads", "1", "--csv", str(path)]) == 0
    names = {"internimage_atto (weights not packed)", "resnet10t", "internimage_atto (weights not packed) / resnet10t"}
    for what in ("inference", "training step", "peak memory, inference", "peak memory, training step"):
        assert {row["who"] for row in read(path) if row["what"] == what} == names


# from the files in classification/configs of the official repository
CONFIGURATIONS = {
    "tiny": dict(channels=64, depths=[4, 4, 18, 4], groups=[4, 8, 16, 32]),
    "small": dict(channels=80, depths=[4, 4, 21, 4], groups=[5, 10, 20, 40], layer_scale=1e-5, post_norm=True),
    "base": dict(channels=112, depths=[4, 4, 21, 4], groups=[7, 14, 28, 56], layer_scale=1e-5, post_norm=True),
    "large": dict(
        channels=160, depths=[5, 5, 22, 5], groups=[10, 20, 40, 80], layer_scale=1e-5, post_norm=True, offset_scale=2.0
    ),
    "xlarge": dict(
        channels=192, depths=[5, 5, 24, 5], groups=[12, 24, 48, 96], layer_scale=1e-5, post_norm=True, offset_scale=2.0
    ),
    "huge": dict(
        channels=320, depths=[6, 6, 32, 6], groups=[10, 20, 40, 80], dw_kernel_size=5, res_post_norm=True,
        level2_post_norm=True, level2_post_norm_block_ids=[5, 11, 17, 23, 29], center_feature_scale=True,
        use_clip_projector=True,
    ),
    "giant": dict(
        channels=512, depths=[2, 2, 48, 4], groups=[16, 32, 64, 128], dw_kernel_size=5, post_norm=True,
        level2_post_norm=True, level2_post_norm_block_ids=[5, 11, 17, 23, 29, 35, 41, 47], center_feature_scale=True,
        use_clip_projector=True, res_post_norm=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", CONFIGURATIONS)
def test_the_arguments_of_the_official_model(size):
    model = timm.create_model(f"internimage_{size}", device="meta")
    defaults = dict(mlp_ratio=4.0, layer_scale=None, offset_scale=1.0, post_norm=False)
    assert official_arguments(model) == defaults | CONFIGURATIONS[size]


def test_the_logits_that_are_compared_depend_on_the_blocks():
    """Layer scales as initialized, 1e-5, would hide what a block computes."""
    contender = models.Contender("internimage_small", img_size=64)
    model, images = contender.build(), contender.images(1)
    before = models.inference(model, images)()
    with torch.no_grad():
        for block in model.get_blocks():
            block.dcn.offset.weight.neg_()
    after = models.inference(model, images)()
    assert (after - before).abs().max() > 10 * models.TOLERANCE["official"] * before.abs().max()


@pytest.mark.skipif(not (CAN_PACK and has_kernel("fingerprint", "cpu")), reason="nothing is packed on this machine")
def test_memory_has_the_packed_weights(monkeypatch):
    """With a small image, whose activations are few, the copies of the blocks' weights are most of it. The processes
    are forked with everything imported; those of the next test are its own."""
    forked = SimpleNamespace(run=lambda command, env, **_: launched.python(*command[1:], variables=env))
    monkeypatch.setattr(memory, "subprocess", forked)
    contender = models.Contender("internimage_tiny", img_size=32)
    packed, unpacked = (memory.peak(replace(contender, packed=value), 1, training=False) for value in (True, False))
    weights = sum(
        4 * module.weight.numel() / 1e6
        for block in timm.create_model("internimage_tiny", device="meta").get_blocks()
        for module in block.modules()
        if isinstance(module, torch.nn.Linear)
    )
    assert packed - unpacked > 0.8 * weights


def test_memory_grows_with_the_images():
    contender = models.Contender("internimage_atto", img_size=64)
    small, large = (memory.peak(contender, batch, training=True) for batch in (1, 32))
    # the activations of 31 more images of 64 px, 4 stages: at the least the stem's two maps of 16 channels in float32
    assert large - small > 31 * (16 * 16 * 16 + 32 * 32 * 8) * 4 / 1e6


# ---- refusals


def fails(capsys, *arguments):
    assert main(["benchmark", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("what", ["ops", "models"])
def test_a_peer_that_computes_something_else_is_not_timed(what, checkout, tmp_path, capsys):
    path = tmp_path / "out.csv"
    error = fails(capsys, what, "--quick", "--official", checkout(1.01), "--csv", path)
    assert "deviate" in error and "official" in error
    assert not path.exists()


@pytest.mark.parametrize("what", ["ops", "models"])
def test_no_checkout(what, tmp_path, capsys):
    error = fails(capsys, what, "--quick", "--official", tmp_path)
    assert "not a checkout of OpenGVLab/InternImage" in error and "classification" in error


def test_a_peer_that_there_is_not(capsys):
    assert "timm has no model 'resnot50'" in fails(capsys, "models", "--quick", "--peers", "official", "resnot50")


def test_models_that_this_package_does_not_have(capsys):
    for name in ("resnet50", "internimage_tiny.ogvl_in1k"):
        error = fails(capsys, "models", "--quick", "--peers", "--models", "internimage_tiny", name)
        assert f"this package has no model '{name}'; --models takes " in error and "internimage_small" in error
        assert len(error.splitlines()) == 1
    error = fails(capsys, "models", "--models", "internimage_tiny", "--peers", "internimage_tiny")
    assert "'internimage_tiny' is among both --models and --peers" in error


def test_a_model_of_ours_that_does_not_run_at_a_size_is_told_in_one_line():
    contender = models.Contender("internimage_huge", img_size=47)
    error = "'internimage_huge' does not run at 47 pixels: sides must be multiples of 32"
    with pytest.raises(timing.BenchmarkError, match=error), models.errors_of(contender):
        raise ValueError("sides must be multiples of 32")
    with pytest.raises(RuntimeError), models.errors_of(contender):  # a bug
        raise RuntimeError


def test_a_checkout_that_cannot_be_imported(checkout, capsys):
    folder = checkout()
    shutil.rmtree(folder / "classification" / "ops_dcnv3" / "modules")
    assert "ops_dcnv3" in fails(capsys, "models", "--quick", "--official", folder)


@pytest.mark.parametrize("what", ["ops", "models"])
def test_the_official_code_without_a_checkout(what, capsys, monkeypatch):
    """Asked for it is an error; left to us it is left out, and told."""
    assert "'official' needs your checkout" in fails(capsys, what, "--quick", "--peers", "official")
    seen = []
    module = importlib.import_module("internimage.cli.benchmark")
    monkeypatch.setattr(module, f"benchmark_{what}", lambda checkout, peers, *_: seen.append((checkout, list(peers))))
    assert main(["benchmark", what, "--quick"]) == 0
    expected = [peer for peer in {"ops": ops, "models": models}[what].PEERS if peer != "official"]
    assert seen == [(None, expected)] and len(expected) == 2
    assert "skipping the official code; --official PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code", ["1 / 0", "def dcnv3_core_pytorch(", "raise ValueError('first line\\nsecond line')", ""]
)
def test_a_checkout_whose_code_fails_is_told_in_one_line(code, tmp_path, capsys):
    (tmp_path / FUNCTION).parent.mkdir(parents=True)
    (tmp_path / FUNCTION).write_text(code)
    error = fails(capsys, "ops", "--quick", "--official", tmp_path)
    assert "dcnv3_core_pytorch could not be loaded from" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "peer, reason", [("resnet18.foo", "Invalid pretrained tag"), ("levit_128", "does not run at 64 pixels")]
)
def test_a_peer_that_does_not_run_is_told_in_one_line(peer, reason, tmp_path, capsys):
    path = tmp_path / "out.csv"
    error = fails(capsys, "models", "--quick", "--no-memory", "--peers", peer, "--csv", path)
    assert f"'{peer}'" in error and reason in error and "Traceback" not in error
    assert len(error.splitlines()) == 1 and not path.exists()


def test_peers_of_one_size_and_without_drop_path_can_be_built():
    images = models.Contender("vit_tiny_patch16_224", img_size=64)
    assert images.build()(images.images(1)).shape == (1, 1000)
    assert models.Contender("vgg11", img_size=64).build().training is False


def test_the_stand_ins_are_gone_afterwards(checkout):
    before = sys.modules.get("pkg_resources"), list(sys.path)
    ops.official_core(checkout())
    assert (sys.modules.get("pkg_resources"), sys.path) == before
    assert not [name for name in sys.modules if name in ("DCNv3", "ops_dcnv3")]


def test_a_file_with_other_columns_is_left_alone(tmp_path, capsys):
    path = tmp_path / "old.csv"
    path.write_text("what,of,weighted\nforward,min,3\n")
    assert "other columns" in fails(capsys, "ops", "--quick", "--csv", path)
    assert "other columns" in fails(capsys, "models", "--quick", "--csv", path)
    assert path.read_text() == "what,of,weighted\nforward,min,3\n"
    assert "is a folder" in fails(capsys, "ops", "--quick", "--csv", tmp_path)


def test_a_file_that_cannot_be_written_is_told_before_anything_is_timed(tmp_path, capsys, monkeypatch):
    def timed(*_, **__):
        raise AssertionError("something was timed")

    monkeypatch.setattr(ops, "interleave", timed)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\x00")
    for name, what in (("file/x.csv", "cannot be written"), ("picture.csv", "is not a CSV file")):
        error = fails(capsys, "ops", "--quick", "--peers", "--csv", tmp_path / name)
        assert what in error and len(error.splitlines()) == 1
    new = tmp_path / "new" / "x.csv"
    with pytest.raises(AssertionError, match="something was timed"):
        main(["benchmark", "ops", "--quick", "--peers", "--csv", str(new)])
    assert not new.parent.exists()


def test_a_disk_that_is_full_in_the_end(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.csv"
    timing.append_csv(path, [{"a": 1}])
    monkeypatch.setattr(timing, "appending", full)
    with pytest.raises(timing.BenchmarkError, match=r"x.csv' cannot be written \(No space left on device\)"):
        timing.append_csv(path, [{"a": 2}])
    assert path.read_text() == "a\n1\n"


def test_what_stands_above_a_table():
    times = timing.Times(timing.Clock("wall", 2), rounds=1, others=0.5)
    line = timing.describe(timing.facts(times.clock, times))
    assert line.startswith("wall time with 2 threads, 1 round, other processes used 0.50 cores (NOT quiet); ")
    times = timing.Times(timing.Clock("cpu", 1), rounds=7)
    assert timing.describe(timing.facts(times.clock, times)).startswith("CPU time of 1 thread, 7 rounds; ")


@pytest.mark.parametrize("what", ["ops", "models"])
def test_threads(what, capsys):
    for number in ("0", "-1", str(CORES + 1)):
        error = fails(capsys, what, "--threads", "1", number)
        allowed = f"must be a whole number from 1 to {CORES}, the number of cores of this machine, got '{number}'"
        assert f"argument --threads: {allowed}" in error and len(error.splitlines()) == 1
    assert "--threads has 1 twice" in fails(capsys, what, "--quick", "--threads", "1", "1")
    clocks = [timing.Clock("wall", 4), timing.Clock("cpu", 1), timing.Clock("wall", 2)]
    assert timing.clocks([4, 1, 2]) == clocks


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--batch", "-1"], ["--peers", "mmcv"]])
def test_arguments_out_of_range(arguments, capsys):
    assert f"argument {arguments[0]}: must be " in fails(capsys, "ops", *arguments)


# ---- arithmetic


class Ticks(timing.Clock):
    """A clock that counts its readings."""

    now = [0.0]

    def __call__(self):
        self.now[0] += 1.0
        return self.now[0]


def test_rounds_are_interleaved():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleave(functions, 2, Ticks("cpu", 1), settle=False)
    assert "".join(order) == "abc" * 3  # one round warms up
    assert times.seconds == {name: [1.0, 1.0] for name in "abc"}
    order.clear()
    timing.interleave(functions, 2, Ticks("cpu", 1), settle=True)
    assert "".join(order) == "abc" + "aabbcc" * 2


@pytest.mark.parametrize("loads, kept, others", [([0.0, 1.0, 0.05, 0.0], 3, 0.05 / 3), ([1.0, 0.5, 0.9] * 3, 3, 0.5)])
def test_loud_rounds_of_wall_times_do_not_count(loads, kept, others, monkeypatch):
    coming = iter(loads)

    class Load:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.cores = next(coming)

    monkeypatch.setattr(timing, "_Others", Load)
    times = timing.interleave({"a": lambda: None}, 3, Ticks("wall", 1), settle=False)
    assert len(times.seconds["a"]) == kept
    assert times.others == pytest.approx(others)
    assert not list(coming)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    seen = []
    with pytest.raises(ZeroDivisionError):
        functions = {"a": lambda: seen.append(torch.get_num_threads()), "b": lambda: 1 / 0}
        timing.interleave(functions, 1, timing.Clock("wall", 3), settle=False)
    assert seen == [3] and torch.get_num_threads() == before


def test_ratios_of_the_operator():
    times = timing.Times(timing.Clock("cpu", 1))
    for factor, (side, _, _) in enumerate(ops.STAGES, 1):
        times.seconds[side, "ours", "forward"] = [0.001 * factor, 0.004, 0.003]
        times.seconds[side, "official", "forward"] = [0.030, 0.010, 0.090]
    rows = {(row["who"], row["of"]): row for row in ops.rows(times, {})}
    ours, ratio = rows["ours", "min"], rows["official / ours", "min"]
    assert [ours[f"{side}x{side}"] for side, _, _ in ops.STAGES] == [1, 2, 3, 3]
    assert ours["weighted"] == pytest.approx(4 * 1 + 4 * 2 + 18 * 3 + 4 * 3)
    assert ratio["56x56"] == 10 and ratio["weighted"] == pytest.approx(300 / 78, rel=1e-2)
    assert rows["official / ours", "median"]["56x56"] == 10


def test_ratios_of_models_take_the_faster_memory_format():
    tiny, upstream = "internimage_tiny", "official InternImage-T"
    ours, official = models.Contender(tiny), models.Contender(tiny, checkout=Path("checkout"))
    half = models.Contender(tiny, "bf16")
    first, last = (models.Contender("convnext_tiny", channels_last=c) for c in (False, True))
    times = timing.Times(timing.Clock("cpu", 1), {ours: [2.0], half: [0.5], official: [5.0], first: [4.0], last: [1.0]})
    about = timing.facts()
    rows = [row for row in models.rows(times, tiny, "inference", 8, about) if row["of"] == "min"]
    values = {(row["who"], row["dtype"]): (row["value"], row["memory_format"]) for row in rows}
    assert values == {
        (tiny, "fp32"): (4.0, "default"),
        (tiny, "bf16"): (16.0, "default"),
        (upstream, "fp32"): (1.6, "default"),
        ("convnext_tiny", "fp32"): (8.0, "channels_last"),
        (f"{tiny} / {upstream}", "fp32"): (2.5, "default"),
        (f"{tiny} / {upstream}", "bf16 / fp32"): (10.0, "default"),
        (f"{tiny} / convnext_tiny", "fp32"): (0.5, "channels_last"),
    }


def test_markdown():
    assert timing.markdown(["who", "ms"], [["a", 1.5], ["longer", 10]], names=1) == (
        "| who    |  ms |\n| ------ | --: |\n| a      | 1.5 |\n| longer |  10 |"
    )
