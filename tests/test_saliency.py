# SPDX-License-Identifier: MIT
"""The saliency region: its bound and its minimality by brute force, known answers, fills, budgets."""

import itertools
import math

import pytest
import timm
import torch
import views
from torch import nn

from internimage.analysis import Logit, NodeError, NotFiniteView, Pooled, Position, saliency, saliency_region
from internimage.analysis.fills import fill_image
from internimage.analysis.region_search import Budget, smallest_prefix, without_spare_cells

# two ways to sum in float64; errors are between 0 and 1, and sums have some thousand terms
ROUNDING = 1e-10


def value(model, image, node) -> torch.Tensor:
    """A node (D,) by the model's own methods."""
    with torch.no_grad():
        if isinstance(node, Logit):
            return model(image[None])[0, node.label, None]
        if isinstance(node, Pooled):
            return model.forward_head(model.forward_features(image[None]), pre_logits=True)[0]
        vector = model.forward_intermediates(image[None], intermediates_only=True)[node.layer - 1][0, :, node.y, node.x]
        return vector if node.channel is None else vector[node.channel, None]


def error(model, node, image, masked) -> float:
    """As the definition has it: 1 - cos, or relative."""
    whole, other = value(model, image, node), value(model, masked, node)
    if len(whole) > 1:
        return float(1 - nn.functional.cosine_similarity(whole, other, dim=0))
    return float((other - whole).abs() / whole.abs())


def masked_by(image, fill, cells, cell) -> torch.Tensor:
    """The image where cells are true, else the fill, pixel by pixel."""
    result = fill.clone()
    for y, x in itertools.product(range(image.shape[1]), range(image.shape[2])):
        if cells[y // cell, x // cell]:
            result[:, y, x] = image[:, y, x]
    return result


@pytest.fixture(scope="module")
def atto():
    return views.model("internimage_atto")


NODES = [Position(3, 1, 0), Position(3, 1, 0, 2), Pooled(), Logit(1)]


@pytest.mark.parametrize("node", NODES, ids=["position", "channel", "pooled", "logit"])
@pytest.mark.parametrize("bound", [0.02, 0.1])
def test_the_error_is_below_the_bound_and_no_cell_can_be_left_out(atto, node, bound):
    image = views.image(32, 28)  # whose last cells are narrower
    found = saliency_region(atto, image, node, bound=bound, cell=8)
    assert found.cells.shape == (4, 4) and found.cells.dtype == found.mask.dtype == torch.bool
    median = image.flatten(1).sort().values[:, (32 * 28 - 1) // 2].view(3, 1, 1).expand_as(image)
    assert torch.equal(found.masked, masked_by(image, median, found.cells, 8))
    assert torch.equal(found.mask, masked_by(torch.ones(1, 32, 28), torch.zeros(1, 32, 28), found.cells, 8)[0].bool())
    assert found.size == found.mask.double().mean()

    assert 0 <= found.error <= found.bound == bound
    assert abs(found.error - error(atto, node, image, found.masked)) < ROUNDING
    assert abs(found.masked_error - error(atto, node, image, median)) < ROUNDING and found.masked_error > bound
    assert found.minimal and found.cells.any()
    for row, column in found.cells.nonzero().tolist():
        fewer = found.cells.clone()
        fewer[row, column] = False
        assert error(atto, node, image, masked_by(image, median, fewer, 8)) > bound
    assert 3 < found.evaluations <= 1000
    assert "no single cell can be left out" in found.text and f"bound {bound:g}" in found.text


def test_the_same_arguments_give_the_same_region(atto):
    image = views.image(64, 64)
    seen = []
    first = saliency_region(atto, image, Pooled(), progress=seen.append)
    again = saliency_region(atto, image, Pooled())
    assert torch.equal(first.cells, again.cells) and first.error == again.error
    assert first.evaluations == again.evaluations == seen[-1] and seen == sorted(seen)
    other = saliency_region(atto, image, Pooled(), bound=0.01)
    assert other.cells.sum() > first.cells.sum()


def test_evaluations_in_small_batches_are_the_same(atto, monkeypatch):
    image = views.image(32, 32)
    whole = saliency_region(atto, image, Pooled(), cell=8)
    monkeypatch.setattr(saliency, "_BATCH_PIXELS", 3 * 32 * 32)
    parts = saliency_region(atto, image, Pooled(), cell=8)
    assert torch.equal(parts.cells, whole.cells) and parts.evaluations == whole.evaluations


@pytest.mark.parametrize("budget", [3, 4, 10, 30, 60, 100])
def test_a_budget_that_ends_leaves_a_region_that_meets_the_bound(atto, budget):
    image, node = views.image(64, 64), Pooled()
    found = saliency_region(atto, image, node, bound=0.02, cell=8, budget=budget)
    assert found.evaluations <= budget and found.error <= 0.02 and not found.minimal
    assert abs(found.error - error(atto, node, image, found.masked)) < ROUNDING
    assert "the budget ended before it was minimal" in found.text
    if budget < 5:
        assert found.cells.all() and found.error == 0 and torch.equal(found.masked, image)


def test_other_models():
    for name, size in (("small resnet", 32), ("convnext_atto", 32)):
        model, image = views.model(name), views.image(size, size)
        found = saliency_region(model, image, Logit(1), bound=0.1, cell=8, fill="blur")
        assert found.error <= 0.1 and abs(found.error - error(model, Logit(1), image, found.masked)) < ROUNDING


# ---- known answers


class Sum(nn.Module):
    """Logits that are weighted sums over the pixels."""

    def __init__(self, *weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.stack(weights).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nchw,khw->nk", x, self.weights)


def of_cells(values, cell: int = 2) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(cell, 0).repeat_interleave(cell, 1) / cell**2


def test_the_region_of_a_sum_is_known():
    """The first logit has 0.91 of its value in one cell, the second one equal parts of a quarter in four."""
    toy = Sum(of_cells([[0.02, 0.91, 0.03], [0.01, 0.02, 0.01]]), of_cells([[1, 0, 1], [0, 1, 1]]))
    image = torch.ones(1, 4, 6, dtype=torch.float64)
    found = saliency_region(toy, image, Logit(0), bound=0.1, cell=2, fill="zero")
    assert found.cells.tolist() == [[False, True, False], [False, False, False]]
    assert found.error == pytest.approx(0.09) and found.masked_error == pytest.approx(1) and found.minimal
    assert found.size == pytest.approx(1 / 6)
    found = saliency_region(toy, image, Logit(1), bound=0.1, cell=2, fill="zero")
    assert found.cells.tolist() == [[True, False, True], [False, True, True]] and found.error == 0
    # the wholly masked image keeps half of the value, and each of the cells has an eighth
    found = saliency_region(toy, image, Logit(1), bound=0.3, cell=2, fill=torch.tensor([0.5]))
    assert found.masked_error == pytest.approx(0.5) and found.cells.sum() == 2 and found.error == pytest.approx(0.25)
    assert found.fill == "color" and found.minimal
    assert found.share_inside((0, 0, 6, 4)) == 1
    left = torch.zeros(4, 6)
    left[:, :3] = 1
    assert found.share_inside(left) == float((found.mask & left.bool()).sum()) / 8


def test_the_soft_mask_finds_the_cells_that_matter():
    """Five of 64 cells, which have all of the value: they are the first of the ranking, for most bounds and fills."""
    weights = torch.zeros(8, 8)
    cells = [3, 17, 30, 44, 59]
    weights.view(-1)[cells] = torch.tensor([1.0, 1.2, 0.9, 1.1, 0.8])
    toy, image = Sum(of_cells(weights.tolist())), torch.ones(1, 16, 16, dtype=torch.float64)
    for fill in (torch.zeros_like(image), 0.5 * image):
        node, budget = Logit(0).open(toy), Budget(1000)
        masking = saliency._Masking(node, image[None], fill[None], 2, budget)
        assert sorted(masking.ranking(0.1)[:5].tolist()) == cells
    found = saliency_region(toy, image, Logit(0), bound=0.1, cell=2, fill="zero")
    assert found.cells.flatten().nonzero().flatten().tolist() == cells
    # 40 steps, the whole and the empty region, 24 sizes at most on two ladders, 5 cells and the region itself
    assert found.evaluations <= 40 + 2 + 24 + 5 + 1


def test_an_empty_region_is_said_in_words():
    toy, image = Sum(of_cells([[1, 2], [3, 4]])), torch.ones(1, 4, 4, dtype=torch.float64)
    found = saliency_region(toy, image, Logit(0), bound=0.1, cell=2, fill=0.95 * image)
    assert not found.cells.any() and not found.mask.any() and found.size == 0 and found.minimal
    assert found.error == found.masked_error == pytest.approx(0.05)
    assert found.text.startswith("the wholly masked image (image) has an error of 0.05, which meets the bound of 0.1")
    assert math.isnan(found.share_inside((0, 0, 4, 4)))
    assert saliency_region(toy, image, Logit(0), budget=3, cell=2, fill=image).evaluations == 3


def test_a_soft_mask_that_meets_the_bound_is_not_the_answer():
    """A node that saturates at half the value: half a mask everywhere meets the bound, and so do half of the cells."""

    class Saturated(Sum):
        def forward(self, x):
            return super().forward(x).clamp(max=0.5)

    toy = Saturated(of_cells([[0.25, 0.25], [0.25, 0.25]])).double()
    found = saliency_region(toy, torch.ones(1, 4, 4).double(), Logit(0), bound=0.1, cell=2, fill="zero")
    assert found.cells.sum() == 2 and found.error == 0 and found.minimal
    assert set(found.masked.flatten().tolist()) == {0.0, 1.0}


# ---- the search, on errors that are given


def brute_force(errors, region, bound) -> bool:
    for cell in region.nonzero().flatten().tolist():
        fewer = region.clone()
        fewer[cell] = False
        if errors(fewer[None])[0] <= bound:
            return False
    return True


@pytest.mark.parametrize("seed", range(8))
def test_the_search_on_any_errors(seed):
    """Errors of each set drawn at random, with no order between a set and its subsets, but 0 for the whole."""
    generator = torch.Generator().manual_seed(seed)
    count, bound = 8, 0.5
    table = torch.rand(2**count, generator=generator).tolist()
    table[-1] = 0.0
    calls = []

    def errors(sets):
        calls.append(len(sets))
        return [table[int(sum(2**i for i, there in enumerate(row.tolist()) if there))] for row in sets]

    order = torch.randperm(count, generator=generator)
    budget = Budget(10**6)
    region = smallest_prefix(order, errors, bound, budget)
    assert errors(region[None])[0] <= bound
    smaller, minimal = without_spare_cells(region, order, errors, bound, budget)
    sizes = [int(each.sum()) for each in (region, *smaller)]
    assert sizes == sorted(set(sizes), reverse=True)
    for each in smaller:
        assert errors(each[None])[0] <= bound
    assert minimal and brute_force(errors, [region, *smaller][-1], bound)


@pytest.mark.parametrize("limit", [*range(1, 40), 50, 60, 70, 80, 1000])
def test_the_search_keeps_its_budget(limit):
    weights = torch.linspace(1, 2, 24)
    budget = Budget(limit)

    def errors(sets):
        budget.spend(len(sets))
        return (1 - (sets * weights).sum(1) / weights.sum()).clamp_min(0).tolist()

    order = torch.arange(24)  # the worst one
    region = smallest_prefix(order, errors, 0.3, budget)
    smaller, minimal = without_spare_cells(region, order, errors, 0.3, budget)
    assert budget.used <= max(limit - 1, 0)  # the last one is kept
    last = [region, *smaller][-1]
    assert 1 - weights[last].sum() / weights.sum() <= 0.3 + 1e-6  # in float32
    if minimal:
        budget.limit = 10**6
        assert brute_force(errors, last, 0.3)
    else:
        assert limit < 1000


def test_the_smallest_prefix():
    for needed in range(1, 41):
        calls = []

        def errors(sets, needed=needed, calls=calls):
            calls.append(len(sets))
            return [0.0 if int(row.sum()) >= needed else 1.0 for row in sets]

        order = torch.randperm(40, generator=torch.Generator().manual_seed(needed))
        region = smallest_prefix(order, errors, 0.5, Budget(10**6))
        assert sorted(region.nonzero().flatten().tolist()) == sorted(order[:needed].tolist())
        assert sum(calls) <= 30


# ---- fills


def test_fills():
    image = views.image(32, 48)[None]
    median = fill_image(image, "median")
    assert torch.equal(median[0, :, 3, 7], image[0].flatten(1).median(1).values) and median.std((2, 3)).max() == 0
    assert not fill_image(image, "zero").any()
    color = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(fill_image(image, color)[0, :, 5, 5], color.double())
    for given in (image + 1, (image + 1)[0]):
        assert torch.equal(fill_image(image, given), image + 1)
    blurred = fill_image(image, "blur")
    ones = torch.ones(1, 3, 8, 64, dtype=torch.float64)
    assert (fill_image(ones, "blur") - 1).abs().max() < 1e-6  # weights that add up to 1 in float32
    assert blurred.shape == image.shape and blurred.dtype == image.dtype
    # a point becomes a Gaussian of a standard deviation of 32 / 8 pixels, cut at 10.5 pixels: 0.93 times its variance
    point = torch.zeros(1, 1, 32, 33, dtype=torch.float64)
    point[0, 0, 16, 16] = 1
    spread = fill_image(point, "blur")[0, 0]
    places = torch.arange(33) - 16.0
    assert (spread.sum(0) * places**2).sum() == pytest.approx(0.93 * 16, rel=0.01)


def test_fills_decide_the_result(atto):
    image = views.image(32, 32)
    found = {fill: saliency_region(atto, image, Pooled(), cell=8, fill=fill) for fill in ("median", "blur", "zero")}
    assert [region.fill for region in found.values()] == list(found)
    assert len({region.masked_error for region in found.values()}) == 3


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bound=0), "bound must be between 0 and 1, got 0"),
        (dict(bound=1), "bound must be between 0 and 1, got 1"),
        (dict(bound=float("nan")), "bound must be between 0 and 1, got nan"),
        (dict(bound="0.1"), "bound must be between 0 and 1, got '0.1'"),
        (dict(cell=0), "cell must be a whole number from 1, got 0"),
        (dict(cell=2.5), "cell must be a whole number from 1, got 2.5"),
        (dict(budget=2), "budget must be a whole number from 3, got 2"),
        (dict(budget=True), "budget must be a whole number from 3, got True"),
        (dict(fill="gray"), "fill must be 'median', 'blur', 'zero' or an image as a tensor, got 'gray'"),
        (dict(fill=None), "fill must be 'median', 'blur', 'zero' or an image as a tensor, got None"),
        (dict(fill=torch.zeros(3, 8, 8)), r"fill must be a color \(3,\) or an image \(3, 32, 32\), got \(3, 8, 8\)"),
        (dict(fill=torch.full((3,), float("nan"))), "fill must be finite floating-point numbers, preprocessed as the"),
        (dict(fill=torch.zeros(3, dtype=torch.uint8)), "fill must be finite floating-point numbers"),
    ],
)
def test_arguments_that_are_out_of_range(atto, arguments, message):
    def fail(*_):
        raise AssertionError("computed")

    handle = atto.register_forward_pre_hook(fail)
    try:
        with pytest.raises(NodeError, match=message) as caught:
            saliency_region(atto, views.image(), Logit(0), **arguments)
    finally:
        handle.remove()
    assert "\n" not in str(caught.value)


def test_a_node_that_is_zero_and_a_model_with_randomness():
    image = torch.ones(1, 4, 4, dtype=torch.float64)
    with pytest.raises(NotFiniteView, match="the node 'logit of class 0' is zero, so that an error relative to it has"):
        saliency_region(Sum(torch.zeros(4, 4)), image, Logit(0))

    class Random(Sum):
        def forward(self, x):
            return super().forward(x) * (1 + torch.rand(len(x), 1))

    with pytest.raises(NotFiniteView, match="'logit of class 0' differs between two passes of the same image"):
        saliency_region(Random(torch.ones(4, 4)), image, Logit(0), bound=1e-6, cell=2, fill="zero", budget=100)


def test_a_cell_larger_than_the_image_and_a_float32_model():
    model = timm.create_model("internimage_atto", num_classes=3).eval()
    found = saliency_region(model, views.image(32, 32), Pooled(), cell=64)
    assert found.cells.tolist() == [[True]] and found.error == 0 and found.minimal
    assert found.masked.dtype == torch.float32
    small = saliency_region(model, views.image(64, 64), Pooled(), bound=1e-3, cell=8)
    assert small.error <= 1e-3
