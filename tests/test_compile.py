# SPDX-License-Identifier: MIT
"""`torch.compile`: one graph for every size of model, and no more compilations than a plain convolutional network."""

from collections.abc import Callable, Sequence

import golden
import pytest
import timm
import torch
from conftest import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import internimage  # noqa: F401  (registers the models)

Size = tuple[int, int, int, int]

# what distinguishes the sizes, in as few blocks as show it; each is compiled in one of the modes, to save time
SHORT = {
    "internimage_tiny": (False, dict(depths=(1, 1, 1, 1))),
    "internimage_large": (True, dict(depths=(1, 1, 1, 1))),
    "internimage_huge": (False, dict(depths=(1, 1, 2, 1), stage3_post_norm_blocks=(1,))),
    "internimage_giant": (True, dict(depths=(1, 1, 2, 1), stage3_post_norm_blocks=(1,))),
}
ARCHITECTURES = [
    f"internimage_{size}" for size in ("atto", "tiny", "small", "base", "large", "xlarge", "huge", "giant")
]
# landscape, portrait, square, odd sides, other batches; then those that torch compiles anew: from 16 images on it
# chooses another convolution; 1 image, and a map of one pixel (a side of 32), are constants to it
INPUTS: list[Size] = [
    (2, 3, 64, 96), (2, 3, 96, 64), (3, 3, 128, 128), (15, 3, 64, 64), (2, 3, 65, 97),
    (16, 3, 64, 96), (1, 3, 64, 96), (2, 3, 32, 96), (2, 3, 96, 32), (2, 3, 32, 32),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):  # otherwise the ninth is an error
        yield
    torch._dynamo.reset()


def compilations(
    model: nn.Module, inputs: Sequence[Size], dynamic: bool | None, backend: str = "eager", device: str = "cpu"
) -> list[int]:
    """How many graphs were compiled up to each input. A break in a graph is an error."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, dynamic=dynamic, fullgraph=True)
    found = []
    with torch.set_grad_enabled(model.training):
        for size in inputs:
            output = compiled(torch.randn(size, device=device))
            if output.requires_grad and device != "meta":
                output.sum().backward()
            found.append(counter.frame_count)
    return found


# ---- all sizes


def check_one_graph(name: str, training: bool, **more) -> None:
    """On the meta device, where a model takes no memory: what is compiled there is what is compiled elsewhere."""
    model = timm.create_model(name, device="meta", drop_path_rate=0.1, **more).train(training)
    assert compilations(model, [(2, 3, 64, 96), (3, 3, 96, 64), (2, 3, 128, 128)], True, device="meta") == [1, 1, 1]


@pytest.mark.parametrize("name", SHORT)
def test_a_size_is_one_graph(name):
    training, arguments = SHORT[name]
    check_one_graph(name, training, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_size_of_all_its_blocks_is_one_graph(name, training):
    check_one_graph(name, training)


# ---- how many compilations


def both(training: bool, dynamic: bool | None, backend: str) -> tuple[list[int], list[int]]:
    """The compilations of InternImage, and those of timm's smallest ConvNeXt."""
    ours, theirs = (
        timm.create_model(name, num_classes=4, depths=(1, 1, 1, 1)).train(training)
        for name in ("internimage_atto", "convnext_atto")
    )
    return compilations(ours, INPUTS, dynamic, backend), compilations(theirs, INPUTS, dynamic, backend)


def test_no_more_compilations_than_convnext():
    ours, theirs = both(False, True, "eager")
    assert all(a <= b for a, b in zip(ours, theirs)), f"{ours}, and ConvNeXt: {theirs}"


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "default"])
@pytest.mark.parametrize(
    "training, backend", [(False, "eager"), (True, "eager"), (True, "aot_eager")], ids=["eval", "train", "backward"]
)
def test_no_more_compilations_than_convnext_in_any_mode(training, backend, dynamic):
    ours, theirs = both(training, dynamic, backend)
    assert all(a <= b for a, b in zip(ours, theirs)), f"{ours}, and ConvNeXt: {theirs}"


# ---- CUDA graphs


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_reduce_overhead(training):
    """Logits and gradients, from a recorded CUDA graph."""
    model = timm.create_model("internimage_atto", num_classes=10).train(training)
    model.load_state_dict(golden.fill_state_dict({key: value.shape for key, value in model.state_dict().items()}))
    model = model.cuda()
    x = golden.images(1, (2, 3, 64, 96)).cuda()

    def step(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        with torch.set_grad_enabled(training):
            logits = call(x)
            if not training:
                return [logits.clone()]
            logits.square().mean().backward()
        return [logits.detach().clone(), *(parameter.grad.clone() for parameter in model.parameters())]

    expected = step(model)
    counters.clear()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # the first runs are not recorded
        torch.compiler.cudagraph_mark_step_begin()
        results = step(compiled)
    assert counters["inductor"]["cudagraph_skips"] == 0
    for actual, wanted in zip(results, expected):
        assert_close(actual, wanted, 1e-3)
