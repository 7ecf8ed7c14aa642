# SPDX-License-Identifier: MIT
"""Times on a GPU, and how long a benchmark may take."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OUTPUTS = 0.25  # share of the free memory that the outputs of a graph's calls may take


class Budget:
    """Seconds after which no measurement is started."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def is_over(self) -> bool:
        return time.monotonic() > self.end


def events_ms(run: Callable[[], object], repeats: int = 20) -> float:
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


def replay_ms(calls: Sequence[Callable[[], object]], replays: int = 20) -> tuple[float, str]:
    """Median time of a call in ms, and how it was measured. The calls differ in their tensors only.

    The outputs of all calls exist at the same time. Otherwise the graph's pool would give each call the memory that
    the output of the call before it has just left, which is still in the L2 cache, and part of the writes would never
    reach the memory that their time is compared with.
    """
    first = calls[0]()
    calls = calls[: how_many(len(calls), bytes_of(first), torch.cuda.mem_get_info()[0])]
    del first
    calls[-1]()
    torch.cuda.synchronize()
    graph, outputs = torch.cuda.CUDAGraph(), []
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                outputs.append(call())
        run, how = graph.replay, "graph"
    except RuntimeError:  # something in it cannot be captured
        torch.cuda.synchronize()
        outputs.clear()
        run, how = lambda: [call() for call in calls], "eager"  # noqa: E731
    ms = events_ms(run, replays) / len(calls)
    del run, outputs, graph
    torch.cuda.empty_cache()  # the graph's pool
    return ms, how


def how_many(calls: int, output_bytes: int, free_bytes: int) -> int:
    """How many calls' outputs may exist at the same time: two at least, unless there is one call."""
    return min(calls, max(2, int(OUTPUTS * free_bytes) // max(1, output_bytes)))


def bytes_of(output: object) -> int:
    """The size of a tensor, or of several."""
    tensors = [output] if isinstance(output, Tensor) else output if isinstance(output, (list, tuple)) else []
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def copy_bandwidth() -> float:
    """Bandwidth of a copy of 1 GiB, reads plus writes, in bytes per second."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * 2**30 / (events_ms(lambda: target.copy_(source)) / 1e3)
