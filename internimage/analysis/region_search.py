# SPDX-License-Identifier: MIT
"""Search for a small set of cells that meets a bound, by evaluations of sets of cells in batches.

A set is a tensor (count,) of bools. Nothing is assumed of the errors: leaving out a cell may lower one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Errors = Callable[[Tensor], list[float]]
"""The errors of sets (N, count)."""

_RUNGS = 8  # sizes that are tried at once between two others
_RESERVE = 1  # evaluations that are kept for the last one


class Budget:
    """How many evaluations may be made.

    Args:
        limit: All.
        progress: Called with the number of those made.
    """

    def __init__(self, limit: int, progress: Callable[[int], None] | None = None) -> None:
        self.limit, self.used, self.progress = limit, 0, progress

    @property
    def left(self) -> int:
        """Evaluations that may still be made, without the one that is kept for the end."""
        return max(self.limit - _RESERVE - self.used, 0)

    def spend(self, count: int) -> None:
        """Note evaluations."""
        self.used += count
        if self.progress is not None:
            self.progress(self.used)


def _prefixes(order: Tensor, sizes: list[int]) -> Tensor:
    """The sets (N, count) of the first cells of an order, for each size."""
    sets = torch.zeros(len(sizes), len(order), dtype=torch.bool)
    for row, size in zip(sets, sizes):
        row[order[:size]] = True
    return sets


def _ladder(count: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... below count."""
    sizes = {1, *(2**i for i in range(1, 64) if 2**i < count), *(3 * 2**i for i in range(64) if 3 * 2**i < count)}
    return sorted(size for size in sizes if size < count)


def smallest_prefix(order: Tensor, errors: Errors, bound: float, budget: Budget) -> Tensor:
    """The first cells of an order, as few as were found to meet a bound; all of them do.

    Sizes on a ladder, then between the smallest that met the bound and the next one below, which did not.
    """
    low, high = 0, len(order)
    sizes = _ladder(high)
    while sizes:
        sizes = sizes[-budget.left :] if budget.left else []
        if not sizes:
            break
        met = [size for size, error in zip(sizes, errors(_prefixes(order, sizes))) if error <= bound]
        if met:
            low, high = max([low, *(size for size in sizes if size < met[0])]), met[0]
        else:
            low = sizes[-1]
        gap = high - low
        steps = min(_RUNGS, gap)
        sizes = sorted({low + gap * i // steps for i in range(1, steps)})
    return _prefixes(order, [high])[0]


def without_spare_cells(
    region: Tensor, order: Tensor, errors: Errors, bound: float, budget: Budget
) -> tuple[list[Tensor], bool]:
    """Leave out cells, one by one or several, until the set without any single one of them misses the bound.

    Args:
        region: A set that meets the bound.
        order: The cells, the most important first.
        errors: As above.
        bound: Of the errors.
        budget: Of evaluations.

    Returns:
        The sets that met the bound, each smaller than the one before, without the first; and whether it is proven that
        no single cell of the last one can be left out. If not, the budget ended.
    """
    found: list[Tensor] = []
    while True:
        cells = [cell for cell in order.flip(0).tolist() if region[cell]]  # the least important first
        proving = len(cells) <= budget.left
        candidates = _candidates(region, cells[: budget.left], errors, bound)
        if not candidates:
            return found, proving
        # these again, until none of them is left: fewer evaluations than of all cells
        while candidates:
            region, rest = _leave_out(region, candidates, errors, bound, budget)
            found.append(region)
            candidates = _candidates(region, rest[: budget.left], errors, bound)
        if not budget.left:
            return found, not region.any()


def _candidates(region: Tensor, cells: list[int], errors: Errors, bound: float) -> list[int]:
    """Those of the cells that can be left out, the one with the smallest error first."""
    if not cells:
        return []
    sets = region.repeat(len(cells), 1)
    sets[range(len(cells)), cells] = False
    each = errors(sets)
    return [cells[i] for i in sorted(range(len(cells)), key=each.__getitem__) if each[i] <= bound]


def _leave_out(
    region: Tensor, candidates: list[int], errors: Errors, bound: float, budget: Budget
) -> tuple[Tensor, list[int]]:
    """Leave out the first of the candidates, as many as the bound allows; returns the set and the other candidates."""
    sizes = [size for size in [*_ladder(len(candidates)), len(candidates)] if size > 1][: budget.left]
    sets = region.repeat(len(sizes) + 1, 1)
    for row, size in zip(sets, [1, *sizes]):
        row[candidates[:size]] = False
    each = errors(sets[1:]) if sizes else []
    best = max([1, *(size for size, error in zip(sizes, each) if error <= bound)])
    return sets[[1, *sizes].index(best)], candidates[best:]
