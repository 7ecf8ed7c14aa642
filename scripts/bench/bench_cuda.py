# SPDX-License-Identifier: MIT
"""DCNv3 and InternImage on a GPU against other implementations, as Markdown tables.

    python scripts/bench/bench_cuda.py ops --official PATH --dcnv4 PATH
    python scripts/bench/bench_cuda.py models --official PATH

The operator is timed by replaying CUDA graphs between events, which excludes launch overhead. Each graph calls a
function once for each of several sets of tensors, which together exceed the L2 cache, as do their outputs. Our results
are compared with the reference's before they are timed. Models are timed between events, call by call. All figures are
medians. cuda_peers.py builds the other implementations.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import cuda_peers
import torch
from timing import Budget, bytes_of, copy_bandwidth, events_ms, replay_ms
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a clone that is not installed

import internimage  # noqa: E402, F401  (registers operator and models)
from internimage.ops import dcnv3_reference as reference  # noqa: E402

STAGES = [(56, 4), (28, 8), (14, 16), (7, 32)]  # side and groups of InternImage-T at 224 px
GROUP_CHANNELS = 16
DETERMINISTIC = "backward, deterministic"
# Of the norm of our results' deviation from the reference in float32. Rounding to 8 and 11 bits is 1.7e-3 and 2.1e-4 of
# it; in float32 it may move a few points to the other side of a pixel, where the gradient of their offset is another.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
OP, OP_BACKWARD = torch.ops.internimage.dcnv3.default, torch.ops.internimage.dcnv3_backward.default

# Predicted before any measurement, for an H200-class GPU at batch 64; see docs/benchmarks/cuda.md.
EXPECTED = {  # ms at the first stage
    ("forward", "float16"): 0.060,
    ("forward", "bfloat16"): 0.060,
    ("softmax+forward", "float16"): 0.064,
    ("softmax+forward", "bfloat16"): 0.064,
    ("forward", "float32"): 0.075,
    ("backward", "float16"): 0.44,
    ("backward", "bfloat16"): 0.44,
}
AIMS = (
    "forward at least 5x (aim 8x) the official kernel, 1.0x (1.5x) DCNv4's; backward 3x (5x); 35 % (50 %) of the floor"
)

# ---- the operator


def draw(batch: int, side: int, groups: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Input, offset (standard deviation 1), mask (logits) and grad_output."""
    generator = torch.Generator("cuda").manual_seed(seed)
    channels = (groups * GROUP_CHANNELS, groups * 18, groups * 9, groups * GROUP_CHANNELS)
    return [torch.randn(batch, side, side, c, generator=generator, device="cuda").to(dtype) for c in channels]


def geometry(groups: int, softmax: bool) -> tuple:
    return [3, 3], [1, 1], [1, 1], [1, 1], groups, 1.0, False, softmax


def our_works(groups: int) -> dict[str, tuple[Callable, Callable]]:
    """What is measured -> our operator and the reference, as functions of input, offset, mask and grad_output."""

    def backward(operator: Callable, softmax: bool, deterministic: bool = False) -> Callable:
        return lambda x, o, m, g: operator(g, x, o, m, *geometry(groups, softmax), deterministic, [True] * 3)

    def forward(operator: Callable, softmax: bool) -> Callable:
        return lambda x, o, m, g: operator(x, o, m, *geometry(groups, softmax))

    def both(kind: Callable, operators: tuple[Callable, Callable], *arguments: bool) -> tuple[Callable, Callable]:
        return kind(operators[0], *arguments), kind(operators[1], *arguments)

    forwards, backwards = (OP, reference.dcnv3), (OP_BACKWARD, reference.dcnv3_backward)
    return {
        "forward": both(forward, forwards, False),
        "softmax+forward": both(forward, forwards, True),
        "backward": both(backward, backwards, False),
        "softmax+backward": both(backward, backwards, True),
        DETERMINISTIC: both(backward, backwards, False, True),
    }


def works(sets: list[list[Tensor]], groups: int, official, dcnv4, dtype: torch.dtype, only_ours: bool) -> dict:
    """(work, who) -> calls, one per set of tensors; ours come first."""
    result = {}

    def add(work: str, who: str, call: Callable, arguments: list) -> None:
        result[work, who] = [lambda a=a: call(*a) for a in arguments]

    few = sets[:2]  # for what is slow, or needs much memory
    ours = our_works(groups)
    for work, (operator, _) in ours.items():
        add(work, "ours", operator, few if work == DETERMINISTIC else sets)
    if only_ours:
        return result
    for work in ("forward", "backward"):
        add(work, "reference", ours[work][1], few)
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
    """Largest deviation, relative to the largest value."""
    return ((result.float() - right.float()).abs().max() / right.float().abs().max()).item()


def problem(work: str, groups: int, tensors: list[Tensor]) -> str:
    """How our results differ from the reference's in float32 on the CPU, in the first and the last image; or empty.

    A sum over many values, such as a gradient, has no bound on its largest relative error: its norm is compared.
    """
    operator, right = our_works(groups)[work]
    results = operator(*tensors)
    again = operator(*tensors) if work == DETERMINISTIC else results
    results, again = ([r] if isinstance(r, Tensor) else list(r) for r in (results, again))
    if not all(torch.equal(*pair) for pair in zip(results, again)):
        return "two calls differ"
    limit = LIMITS[tensors[0].dtype]
    for image in (0, tensors[0].shape[0] - 1):
        expected = right(*(t[image : image + 1].cpu().float() for t in tensors))
        for own, exact in zip(results, [expected] if isinstance(expected, Tensor) else expected):
            off = ((own[image : image + 1].cpu().float() - exact).norm() / exact.norm()).item()
            if not off <= limit:  # also if it is not a number, as with a GPU that computes nothing
                return f"deviates by {off:.1e} from the reference, allowed {limit:.0e}"
    return ""


def first_line(error: Exception) -> str:
    """What a table has room for."""
    return f"failed: {str(error).splitlines()[0][:150] if str(error) else type(error).__name__}"


class Rows:
    """The rows of one stage and type, each printed as soon as it is measured."""

    def __init__(self, dtype: str, stage: str, floor: float, as_json: bool) -> None:
        self.dtype, self.stage, self.floor, self.as_json = dtype, stage, floor, as_json
        self.times: dict[tuple[str, str], float] = {}
        self.all_right = True  # ours

    def wrong(self, work: str, who: str, why: str) -> None:
        """Results that are not right, and are not timed."""
        self.all_right &= who != "ours"
        self._print(work, None, why, f"| {self.stage} | {work} | {who} | | | | | {why} |")

    def right(self, work: str, who: str, ms: float, note: str) -> None:
        self.times[work, who] = ms
        ours = self.times.get((work, "ours"))
        ratio = f"{ms / ours:.2f}" if ours is not None and who != "ours" else ""
        share = f"{100 * self.floor / ms:.0f} %" if work.endswith("forward") and who == "ours" else ""
        is_first = self.stage == f"{STAGES[0][0]}x{STAGES[0][0]}"
        expected = EXPECTED.get((work, self.dtype), "") if is_first and who == "ours" else ""
        line = f"| {self.stage} | {work} | {who} | {ms:.4f} | {ratio} | {share} | {expected} | {note} |"
        self._print(work, ms, "", line)

    def _print(self, work: str, ms: float | None, why: str, line: str) -> None:
        facts = {"dtype": self.dtype, "stage": self.stage, "work": work, "ms": ms, "problem": why}
        print(json.dumps(facts) if self.as_json else line, flush=True)


def bench_stage(
    arguments: argparse.Namespace, where: tuple[int, int], dtype: torch.dtype, peers: tuple, copy: float, budget: Budget
) -> bool:
    """The rows of a stage and type; whether our results are right."""
    side, groups = where
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    bytes_a_set = sum(t.numel() * t.element_size() for t in draw(1, side, groups, dtype, 0)) * arguments.batch
    count = min(24, max(4, 3 * l2 // bytes_a_set + 1))
    sets = [draw(arguments.batch, side, groups, dtype, seed) for seed in range(count)]
    floor = bytes_of([*sets[0][:3], sets[0][0]]) / copy * 1e3
    rows = Rows(str(dtype).removeprefix("torch."), f"{side}x{side}", floor, arguments.json)
    right = None if arguments.ours else our_works(groups)["forward"][1](*(t.float() for t in sets[0]))
    for (work, who), calls in works(sets, groups, *peers, dtype, arguments.ours).items():
        if budget.is_over():
            break
        notes = []
        try:
            if who == "ours":
                if why := problem(work, groups, sets[0]):
                    rows.wrong(work, who, why)
                    continue
            elif work == "forward" and not (off := deviation(calls[0](), right)) < 0.02:
                # DCNv4's launch settings may let a block span two images
                notes.append(f"its output deviates by {off:.1e} of the largest value")
            ms, how = replay_ms(calls)
        except RuntimeError as error:  # also if the memory does not suffice
            rows.wrong(work, who, first_line(error))
        else:
            rows.right(work, who, ms, " ".join([*([] if how == "graph" else [how]), *notes]))
    return rows.all_right


def bench_ops(arguments: argparse.Namespace, budget: Budget) -> bool:
    """All tables; whether our results are right."""
    official, why_not_official = cuda_peers.build(cuda_peers.OfficialDCNv3, arguments.official, not arguments.built)
    dcnv4, why_not_dcnv4 = cuda_peers.build(cuda_peers.DCNv4, arguments.dcnv4, not arguments.built)
    copy = copy_bandwidth()
    say = (lambda *_, **__: None) if arguments.json else print
    for name, peer, reason in (("official", official, why_not_official), ("DCNv4", dcnv4, why_not_dcnv4)):
        say(f"{name}: not measured, {reason}\n" if peer is None else f"{name}, built from a patched copy:\n")
        for change in [] if peer is None else peer.changes:
            say(f"- {change}")
        say()
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    say(f"{AIMS}. A copy of 1 GiB moves {copy / 1e12:.2f} TB/s; L2 cache {l2 / 2**20:.0f} MiB.\n")
    all_right = True
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        say(f"### {str(dtype).removeprefix('torch.')}, batch {arguments.batch}\n")
        say("| stage | work | who | ms | ours is faster by | share of the floor | expected ms | |")
        say("|---|---|---|--:|--:|--:|--:|---|", flush=True)
        for where in STAGES:
            all_right &= bench_stage(arguments, where, dtype, (official, dcnv4), copy, budget)
            if budget.is_over():
                say(f"\nThe rest of {where[0]}x{where[0]} and what follows was skipped: out of time.\n")
                return all_right
        say()
    return all_right


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


def contenders(ours: str, official, training: bool, compiled: bool) -> list[tuple[str, torch.dtype, bool]]:
    """Models, types, and whether on the official operator; ours comes first."""
    names = [(ours, torch.bfloat16, False), *((peer, torch.bfloat16, False) for peer in PEERS[ours])]
    if official is not None and not training and not compiled:
        names += [(ours, torch.float16, False), (ours, torch.float16, True)]
    return names


def measure_model(contender: tuple, official, batch: int, training: bool, compiled: bool) -> float:
    """Images per second."""
    name, dtype, on_official = contender
    channels_last = name.startswith("convnext")
    torch.compiler.reset()
    model = create(name, dtype, channels_last)
    function = torch.compile(model) if compiled else model
    try:
        if on_official:
            with WithOfficialOperator(official):
                return images_per_second(function, batch, dtype, channels_last, training)
        return images_per_second(function, batch, dtype, channels_last, training)
    finally:
        del model, function
        torch.cuda.empty_cache()


def bench_models(arguments: argparse.Namespace, budget: Budget) -> bool:
    """The table; whether our models run."""
    official, reason = cuda_peers.build(cuda_peers.OfficialDCNv3, arguments.official, not arguments.built)
    print("Images per second at 224 px, with the whole model in the dtype.")
    print(f"The same model on the official operator: {reason or 'in float16, the only 16-bit type it supports'}.")
    print("\n| model | dtype | work | batch | images/s | ours is faster by |\n|---|---|---|--:|--:|--:|", flush=True)
    skipped, all_right = [], True
    for ours in OURS:
        for training, compiled in ((False, False), (False, True), (True, False), (True, True)):
            batch = arguments.training_batch if training else arguments.batch
            work = ("training step" if training else "inference") + (", compiled" if compiled else "")
            speeds = {}
            for contender in contenders(ours, official, training, compiled):
                name, dtype, on_official = contender
                shown = f"{name} on the official operator" if on_official else name
                if budget.is_over():  # each may take a minute, to compile
                    skipped.append(f"{shown} ({work})")
                    continue
                kind = str(dtype).removeprefix("torch.") + (", channels_last" if name.startswith("convnext") else "")
                try:
                    speeds[contender] = measure_model(contender, official, batch, training, compiled)
                    figures = f"{speeds[contender]:.0f} | "
                except RuntimeError as error:  # also if the memory does not suffice
                    figures = f"{first_line(error)} | "
                    all_right &= name != ours or on_official
                right = speeds.get((ours, dtype, False))
                if contender in speeds and right is not None and (name != ours or on_official):
                    figures += f"{right / speeds[contender]:.2f} "
                print(f"| {shown} | {kind} | {work} | {batch} | {figures}|", flush=True)
    if skipped:
        print(f"\nOut of time for {', '.join(skipped)}.")
    return all_right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ops", "models"])
    parser.add_argument("--official", type=Path, help="checkout of OpenGVLab/InternImage")
    parser.add_argument("--dcnv4", type=Path, help="checkout of OpenGVLab/DCNv4")
    parser.add_argument("--built", action="store_true", help="leave out peers that cuda_peers.py has not built before")
    parser.add_argument("--ours", action="store_true", help="our kernels alone, of the operator")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row, of the operator")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--training-batch", type=int, default=64)
    parser.add_argument("--budget", type=float, default=400, help="seconds after which no measurement is started")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "no GPU: torch.cuda.is_available() is False\n")
    bench = bench_ops if arguments.what == "ops" else bench_models
    sys.exit(not bench(arguments, Budget(arguments.budget)))


if __name__ == "__main__":
    main()
