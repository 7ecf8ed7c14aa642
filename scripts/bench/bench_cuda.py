# SPDX-License-Identifier: MIT
"""DCNv3 and InternImage on a GPU against other implementations, as Markdown tables.

    python scripts/bench/bench_cuda.py ops --official PATH --dcnv4 PATH
    python scripts/bench/bench_cuda.py models --official PATH

The operator is timed by replaying CUDA graphs between events, which excludes launch overhead. Each graph calls a
function once for each of several sets of tensors, which together exceed the L2 cache. Models are timed between events,
call by call. All figures are medians. cuda_peers.py builds the other implementations.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cuda_peers
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a clone that is not installed

import internimage  # noqa: E402, F401  (registers operator and models)
from internimage.ops import dcnv3_reference as reference  # noqa: E402

STAGES = [(56, 4), (28, 8), (14, 16), (7, 32)]  # side and groups of InternImage-T at 224 px
GROUP_CHANNELS = 16
OP, OP_BACKWARD = torch.ops.internimage.dcnv3.default, torch.ops.internimage.dcnv3_backward.default

# Predicted before any measurement, for an H200-class GPU at batch 64; see docs/benchmarks/cuda.md.
EXPECTED = {  # ms at the first stage
    ("forward", "float16"): 0.061,
    ("forward", "bfloat16"): 0.061,
    ("softmax+forward", "float16"): 0.065,
    ("softmax+forward", "bfloat16"): 0.065,
    ("forward", "float32"): 0.105,
    ("backward", "float16"): 0.47,
    ("backward", "bfloat16"): 0.47,
}
AIMS = (
    "forward at least 5x (aim 8x) the official kernel, 1.0x (1.5x) DCNv4's; backward 3x (5x); 35 % (50 %) of the floor"
)


# ---- time


def replay_ms(calls: Sequence[Callable[[], object]], replays: int = 20) -> tuple[float, str]:
    """Median time of a call in ms, and how it was measured. The calls differ in their tensors only."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run, how = graph.replay, "graph"
    except RuntimeError:  # something in it cannot be captured
        torch.cuda.synchronize()
        run, how = lambda: [call() for call in calls], "eager"  # noqa: E731
    return events_ms(run, replays) / len(calls), how


def events_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time between events around `run`, in ms."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bandwidth of a copy of 1 GiB, reads plus writes, in bytes per second."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * 2**30 / (events_ms(lambda: target.copy_(source), 20) / 1e3)


# ---- the operator


def draw(batch: int, side: int, groups: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Input, offset (standard deviation 1), mask (logits) and grad_output."""
    generator = torch.Generator("cuda").manual_seed(seed)
    channels = (groups * GROUP_CHANNELS, groups * 18, groups * 9, groups * GROUP_CHANNELS)
    return [torch.randn(batch, side, side, c, generator=generator, device="cuda").to(dtype) for c in channels]


def geometry(groups: int, softmax: bool) -> tuple:
    return [3, 3], [1, 1], [1, 1], [1, 1], groups, 1.0, False, softmax


def works(sets: list[list[Tensor]], groups: int, official, dcnv4, dtype: torch.dtype) -> dict[tuple[str, str], list]:
    """(work, who) -> calls, one per set of tensors."""
    result = {}

    def add(work: str, who: str, call: Callable, arguments: list) -> None:
        result[work, who] = [lambda a=a: call(*a) for a in arguments]

    plain, fused = geometry(groups, False), geometry(groups, True)
    add("forward", "ours", lambda x, o, m, g: OP(x, o, m, *plain), sets)
    add("softmax+forward", "ours", lambda x, o, m, g: OP(x, o, m, *fused), sets)
    add("backward", "ours", lambda x, o, m, g: OP_BACKWARD(g, x, o, m, *plain, False, [True] * 3), sets)
    add("softmax+backward", "ours", lambda x, o, m, g: OP_BACKWARD(g, x, o, m, *fused, False, [True] * 3), sets)
    few = sets[:2]  # slow, and needs much memory
    add("backward, deterministic", "ours", lambda x, o, m, g: OP_BACKWARD(g, x, o, m, *plain, True, [True] * 3), few)
    add("forward", "reference", lambda x, o, m, g: reference.dcnv3(x, o, m, *plain), few)
    add(
        "backward", "reference", lambda x, o, m, g: reference.dcnv3_backward(g, x, o, m, *plain, False, [True] * 3), few
    )
    if official is not None and dtype != torch.bfloat16:

        def with_softmax(x, o, m, g):
            return official.forward(x, o, m.unflatten(-1, (groups, 9)).softmax(-1).flatten(-2), groups)

        add("forward", official.name, lambda x, o, m, g: official.forward(x, o, m, groups), sets)
        add("softmax+forward", official.name, with_softmax, sets)
        add("backward", official.name, lambda x, o, m, g: official.backward(g, x, o, m, groups), sets)
    if dcnv4 is not None:
        packed = [(x, dcnv4.pack(o, m, groups), g) for x, o, m, g in sets]
        add("forward", dcnv4.name, lambda x, p, g: dcnv4.forward(x, p, groups), packed)
        if dtype != torch.bfloat16:  # its backward does not support it
            add("backward", dcnv4.name, lambda x, p, g: dcnv4.backward(g, x, p, groups), packed)
    return result


def deviation(result: Tensor, right: Tensor) -> float:
    return ((result.float() - right.float()).abs().max() / right.float().abs().max()).item()


def bench_ops(arguments: argparse.Namespace) -> None:
    official, why_not_official = cuda_peers.build(cuda_peers.OfficialDCNv3, arguments.official)
    dcnv4, why_not_dcnv4 = cuda_peers.build(cuda_peers.DCNv4, arguments.dcnv4)
    for name, peer, reason in (("official", official, why_not_official), ("DCNv4", dcnv4, why_not_dcnv4)):
        print(f"{name}: not measured, {reason}\n" if peer is None else f"{name}, built from a patched copy:\n")
        for change in [] if peer is None else peer.changes:
            print(f"- {change}")
        print()
    bandwidth = copy_bandwidth()
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    print(f"{AIMS}. A copy of 1 GiB moves {bandwidth / 1e12:.2f} TB/s; L2 cache {l2 / 2**20:.0f} MiB.\n")
    end = time.monotonic() + arguments.budget
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        print(f"### {name}, batch {arguments.batch}\n")
        print("| stage | work | who | ms | ours is faster by | share of the floor | expected ms | |")
        print("|---|---|---|--:|--:|--:|--:|---|")
        for i, (side, groups) in enumerate(STAGES):
            if time.monotonic() > end:
                print(f"\nskipped from {side}x{side} on: out of time\n")
                return
            bytes_a_set = sum(t.numel() * t.element_size() for t in draw(1, side, groups, dtype, 0)) * arguments.batch
            count = min(24, max(4, 3 * l2 // bytes_a_set + 1))
            sets = [draw(arguments.batch, side, groups, dtype, seed) for seed in range(count)]
            calls = works(sets, groups, official, dcnv4, dtype)
            right = reference.dcnv3(*(t.float() for t in sets[0][:3]), *geometry(groups, False))
            off = {who: deviation(own[0](), right) for (work, who), own in calls.items() if work == "forward"}
            assert off["ours"] < 0.02, f"ours deviates by {off['ours']:.1e}"
            times = {key: replay_ms(own) for key, own in calls.items()}
            floor = sum(t.numel() * t.element_size() for t in (*sets[0][:3], sets[0][0])) / bandwidth * 1e3
            for (work, who), (ms, how) in times.items():
                ratio = f"{ms / times[work, 'ours'][0]:.2f}" if (work, "ours") in times and who != "ours" else ""
                share = f"{100 * floor / ms:.0f} %" if work.endswith("forward") and who == "ours" else ""
                expected = EXPECTED.get((work, name), "") if i == 0 and who == "ours" else ""
                note = "" if how == "graph" else how
                if off.get(who, 0) >= 0.02:  # DCNv4's launch settings may let a block span two images
                    note += f" its output deviates by {off[who]:.1e} of the largest value"
                print(
                    f"| {side}x{side} | {work} | {who} | {ms:.4f} | {ratio} | {share} | {expected} | {note} |",
                    flush=True,
                )
            del sets, calls
        print()


# ---- models

OURS = ("internimage_tiny", "internimage_base")
PEERS = {
    "internimage_tiny": ("convnext_tiny", "swin_tiny_patch4_window7_224"),
    "internimage_base": ("convnext_base", "swin_base_patch4_window7_224"),
}


class WithOfficialOperator:
    """Context in which our layers call the official operator, float16 only."""

    def __init__(self, official) -> None:
        self.official = official

    def __enter__(self) -> None:
        from internimage.layers import DCNv3

        official, self.before = self.official, DCNv3.forward

        def forward(layer, x: Tensor) -> Tensor:
            query = layer.query(x)
            mask = layer.mask(query).unflatten(-1, (layer.groups, 9)).softmax(-1).flatten(-2)
            offset = layer.offset(query).contiguous()
            return layer.output_proj(official.forward(layer.input_proj(x), offset, mask, layer.groups))

        DCNv3.forward = forward

    def __exit__(self, *_) -> None:
        from internimage.layers import DCNv3

        DCNv3.forward = self.before


def create(name: str, dtype: torch.dtype, channels_last: bool) -> nn.Module:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name).to("cuda", dtype)
    for own, parameter in model.named_parameters():  # so that points leave the pixel centers, as after training
        if own.endswith((".dcn.offset.weight", ".dcn.mask.weight")):
            nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def images_per_second(model: nn.Module, batch: int, dtype: torch.dtype, channels_last: bool, training: bool) -> float:
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=dtype)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device="cuda") % 1000
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model.train(training)

    def step():
        if not training:
            with torch.inference_mode():
                return model(images)
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    return batch / events_ms(step, 20) * 1e3


def bench_models(arguments: argparse.Namespace) -> None:
    end = time.monotonic() + arguments.budget
    official, reason = cuda_peers.build(cuda_peers.OfficialDCNv3, arguments.official)
    print("Images per second at 224 px, with the whole model in the dtype.")
    print(f"The same model on the official operator: {reason or 'in float16, the only 16-bit type it supports'}.")
    print("\n| model | dtype | work | batch | images/s | ours is faster by |\n|---|---|---|--:|--:|--:|")
    for ours in OURS:
        for training, compiled in ((False, False), (False, True), (True, False), (True, True)):
            if time.monotonic() > end:
                print("\nThe rest was skipped: out of time.")
                return
            batch = arguments.training_batch if training else arguments.batch
            work = ("training step" if training else "inference") + (", compiled" if compiled else "")
            contenders = [(ours, torch.bfloat16, False), *((peer, torch.bfloat16, False) for peer in PEERS[ours])]
            if official is not None and not training and not compiled:
                contenders += [(ours, torch.float16, False), (ours, torch.float16, True)]
            speeds = {}
            for name, dtype, on_official in contenders:
                channels_last = name.startswith("convnext")
                torch.compiler.reset()
                model = create(name, dtype, channels_last)
                function = torch.compile(model) if compiled else model
                try:
                    if on_official:
                        with WithOfficialOperator(official):
                            speed = images_per_second(function, batch, dtype, channels_last, training)
                    else:
                        speed = images_per_second(function, batch, dtype, channels_last, training)
                except torch.OutOfMemoryError:
                    speed = float("nan")
                speeds[name, dtype, on_official] = speed
                right = speeds[ours, dtype, False]
                ratio = f"{right / speed:.2f}" if name != ours or on_official else ""
                shown = f"{name} on the official operator" if on_official else name
                kind = str(dtype).removeprefix("torch.") + (", channels_last" if channels_last else "")
                print(f"| {shown} | {kind} | {work} | {batch} | {speed:.0f} | {ratio} |", flush=True)
                del model, function
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ops", "models"])
    parser.add_argument("--official", type=Path, help="checkout of OpenGVLab/InternImage")
    parser.add_argument("--dcnv4", type=Path, help="checkout of OpenGVLab/DCNv4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--training-batch", type=int, default=64)
    parser.add_argument("--budget", type=float, default=400, help="seconds after which no measurement is started")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "no GPU: torch.cuda.is_available() is False\n")
    (bench_ops if arguments.what == "ops" else bench_models)(arguments)


if __name__ == "__main__":
    main()
