# SPDX-License-Identifier: MIT
"""Error-bounded saliency: a small region of an image that gives a node nearly the value of the whole image.

"Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019, section 2.1, defines it: the smallest region whose
image, with the rest masked, gives the same response within an error. The search for a small one is our own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .areas import Area, as_mask, ratio
from .fills import fill_image, name_of_fill
from .inspection import NotFiniteView, check_finite, inspected
from .maps import NodeError, whole_number
from .nodes import Node, OpenNode
from .region_search import Budget, smallest_prefix, without_spare_cells

__all__ = ["SaliencyRegion", "saliency_region"]

_STEPS = 40  # of the descent
_RATE = 0.3  # of Adam, on logits
_MARGIN = 0.8  # of the bound, which the soft mask aims at: cells become whole or nothing afterwards
_BATCH_PIXELS = 16 * 224 * 224  # of the images that are evaluated together


@dataclass(frozen=True, eq=False)
class SaliencyRegion:
    """What `saliency_region` returns. Pixels are those of the preprocessed image.

    Attributes:
        cells: (rows, columns), bool. The cells of the region.
        mask: (H, W), bool. Its pixels.
        size: Its share of the image's pixels.
        error: Of the node where all but the region is masked: that of this binary region, never above the bound.
        bound: As given.
        masked_error: Of the node where the whole image is masked.
        minimal: Whether it is proven that no single cell can be left out; if not, the budget ended first.
        evaluations: Images that went through the network.
        cell: Side of a cell in pixels.
        fill: What stands in the masked part; "color" or "image" if it was given as a tensor.
        masked: (C, H, W). The preprocessed image with its masked part, as the network saw it.
        node: What the node is, in words.
    """

    cells: Tensor
    mask: Tensor
    size: float
    error: float
    bound: float
    masked_error: float
    minimal: bool
    evaluations: int
    cell: int
    fill: str
    masked: Tensor
    node: str

    @property
    def text(self) -> str:
        """The outcome in words."""
        if not self.cells.any():
            return (
                f"the wholly masked image ({self.fill}) has an error of {self.masked_error:.3g}, which meets the bound "
                f"of {self.bound:g} by itself: the region is empty and says nothing of the image"
            )
        size = f"{int(self.cells.sum())} of {self.cells.numel()} cells, {100 * self.size:.1f} % of the image"
        proof = "no single cell can be left out" if self.minimal else "the budget ended before it was minimal"
        return f"{size}: error {self.error:.3g} (bound {self.bound:g}; wholly masked {self.masked_error:.3g}); {proof}"

    def share_inside(self, area: Area) -> float:
        """The share of the region that is inside an area.

        Args:
            area: A mask (H, W), or a box (left, top, right, bottom) of the pixels' edges.

        Returns:
            0 to 1; NaN for an empty region.

        Raises:
            NodeError: The area has another size, or no pixels of the image.
        """
        mask = as_mask(area, *self.mask.shape)
        return ratio(float((self.mask & mask).sum()), float(self.mask.sum()))


def saliency_region(
    model: nn.Module,
    image: Tensor,
    node: Node,
    bound: float = 0.1,
    cell: int = 16,
    fill: str | Tensor = "median",
    budget: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> SaliencyRegion:
    """A small region of cells with which alone the node keeps its value, within an error.

    The error is `1 - cos` between the node's vectors with the region and with the whole image; for a logit or a
    channel, the difference relative to the value with the whole image.

    First a soft mask is fitted, which ranks the cells; then the first cells of the ranking are taken, as few as meet
    the bound; then single cells are left out until none can be. There may be a smaller region yet. What stands in the
    masked part decides the result: a fill that is new to the model, such as zeros, makes edges of its own.

    Args:
        model: Any model; left as it is.
        image: (C, H, W) or (1, C, H, W), preprocessed.
        node: `Position`, `Logit` or `Pooled`.
        bound: Of the error, between 0 and 1.
        cell: Side of the square cells in pixels; those at the right and lower borders may be smaller.
        fill: "median", the image's median color; "blur", the image strongly blurred; "zero", the mean color of the
            preprocessing; or a preprocessed image (C, H, W) or color (C,).
        budget: Images that may go through the network, at least 3. If it ends first, the region still meets the bound.
        progress: Called after each evaluation with the number of images so far.

    Returns:
        The region, and its error, which is computed anew for it alone. The same arguments give the same result.

    Raises:
        NodeError: The model has no such node, or an argument is out of range.
        NotFiniteView: There is NaN or infinity in the weights, the image or the node's value, or that is zero.
    """
    _check(bound, cell, budget)
    opened = node.open(model)
    with inspected(model, image) as batch:
        masking = _Masking(opened, batch, fill_image(batch, fill), cell, Budget(budget, progress))
        masked_error, *_ = masking.errors(torch.zeros(1, masking.count, dtype=torch.bool))
        accepted, minimal = _search(masking, masked_error, bound)
        region = accepted.pop()
        while (error := masking.alone(region)) > bound:  # by the rounding of sums in another order
            if not accepted:
                raise NotFiniteView(f"the node '{opened.text()}' differs between two passes of the same image")
            region, minimal = accepted.pop(), False
        mask = masking.pixels(region)
        return SaliencyRegion(
            cells=region.view(masking.grid),
            mask=mask,
            size=float(mask.double().mean()),
            error=error,
            bound=float(bound),
            masked_error=masked_error,
            minimal=minimal,
            evaluations=masking.budget.used,
            cell=cell,
            fill=name_of_fill(fill),
            masked=masking.images(region[None])[0].cpu(),
            node=opened.text(),
        )


def _check(bound: float, cell: int, budget: int) -> None:
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 < bound < 1:
        raise NodeError(f"bound must be between 0 and 1, got {bound!r}")
    whole_number("cell", cell, 1)
    whole_number("budget", budget, 3)


def _search(masking: "_Masking", masked_error: float, bound: float) -> tuple[list[Tensor], bool]:
    """Regions that meet the bound, each smaller than the one before; and whether the last is proven minimal."""
    empty = torch.zeros(masking.count, dtype=torch.bool)
    accepted = [~empty]
    if masked_error <= bound:
        return [*accepted, empty], True
    order = masking.ranking(bound)
    accepted.append(smallest_prefix(order, masking.errors, bound, masking.budget))
    smaller, minimal = without_spare_cells(accepted[-1], order, masking.errors, bound, masking.budget)
    return [*accepted, *smaller], minimal


class _Masking:
    """Evaluates a node on an image whose cells are masked.

    Args:
        node: Open in a model that is inspected.
        image: (1, C, H, W).
        fill: (1, C, H, W), what stands in masked cells.
        cell: Side of a cell.
        budget: Of evaluations; counts them.

    Attributes:
        grid: Rows and columns of cells.
        count: Number of cells. Masks are bools (..., count), row by row.
    """

    def __init__(self, node: OpenNode, image: Tensor, fill: Tensor, cell: int, budget: Budget) -> None:
        self.node, self.image, self.fill, self.cell, self.budget = node, image, fill, cell, budget
        height, width = image.shape[2:]
        self.grid = -(-height // cell), -(-width // cell)
        self.count = self.grid[0] * self.grid[1]
        self.batch = max(1, _BATCH_PIXELS // (height * width))
        with torch.no_grad():
            budget.spend(1)
            self.reference = self._double(node.values(image))
        check_finite(self.reference, f"the node '{node.text()}'", image.dtype)
        if not self.reference.norm() > 0:
            raise NotFiniteView(f"the node '{node.text()}' is zero, so that an error relative to it has no meaning")

    @staticmethod
    def _double(values: Tensor) -> Tensor:
        return values.float() if values.device.type == "mps" else values.double()  # which has no float64

    def _error(self, values: Tensor) -> Tensor:
        """The error (N,) of values (N, D)."""
        values = self._double(values)
        if not self.node.is_vector:
            return ((values - self.reference).abs() / self.reference.abs())[:, 0]
        # 1 - cos, without the difference of nearly equal numbers
        length = values.norm(dim=1, keepdim=True)
        unit = values / length.clamp_min(torch.finfo(values.dtype).tiny)
        error = 0.5 * (unit - self.reference / self.reference.norm()).square().sum(1)
        return torch.where(length[:, 0] > 0, error, torch.ones_like(error))

    def _spread(self, cells: Tensor) -> Tensor:
        """Values of cells (N, count) -> of pixels (N, 1, H, W)."""
        height, width = self.image.shape[2:]
        grid = cells.view(-1, 1, *self.grid)
        return grid.repeat_interleave(self.cell, 2).repeat_interleave(self.cell, 3)[:, :, :height, :width]

    def pixels(self, region: Tensor) -> Tensor:
        """The pixels (H, W) of a region (count,)."""
        return self._spread(region[None])[0, 0]

    def images(self, regions: Tensor) -> Tensor:
        """The image with all but a region masked, for each of (N, count): (N, C, H, W)."""
        return torch.where(self._spread(regions).to(self.image.device), self.image, self.fill)

    @torch.no_grad()
    def errors(self, regions: Tensor) -> list[float]:
        """The error of each region of (N, count), evaluated in batches. One that is not finite is infinite."""
        found: list[float] = []
        for part in regions.split(self.batch):
            found += self._error(self.node.values(self.images(part))).tolist()
            self.budget.spend(len(part))
        return [error if math.isfinite(error) else math.inf for error in found]

    def alone(self, region: Tensor) -> float:
        """The error of a region, evaluated by itself."""
        (error,) = self.errors(region[None])
        return error

    def ranking(self, bound: float) -> Tensor:
        """The cells, the most important first, by a soft mask that meets the bound.

        Minimizes `mean(m) + weight * max(error - 0.8 bound, 0) / bound` over one logit for each cell by Adam, beginning
        at half a mask: at the full one, where the error has its minimum, its gradient is zero. The weight grows while
        the error is too large, and shrinks while it is not.
        """
        logits = torch.zeros(self.count, device=self.image.device, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=_RATE)
        weight = 1.0
        mean = torch.zeros(self.count)
        steps = min(_STEPS, self.budget.left // 4)
        for step in range(steps):
            soft = logits.sigmoid()
            spread = self._spread(soft[None]).to(self.image.dtype)
            error = self._error(self.node.values(torch.lerp(self.fill, self.image, spread)))[0]
            self.budget.spend(1)
            excess = (error - _MARGIN * bound).clamp_min(0) / bound
            optimizer.zero_grad()
            (soft.mean() + weight * excess).backward()
            if logits.grad is None or not torch.isfinite(logits.grad).all():
                break  # of a soft mask in a half type: the ranking so far stands
            optimizer.step()
            weight *= 1.2 if float(excess.detach()) > 0 else 1 / 1.2
            if step >= steps // 2:
                mean += logits.detach().sigmoid().cpu()
        return mean.argsort(descending=True, stable=True)
