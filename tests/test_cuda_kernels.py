# SPDX-License-Identifier: MIT
"""What only the CUDA kernels on a GPU can get wrong: streams, graphs, devices, determinism, alignment, large tensors.

Their arithmetic is tested in test_dcnv3.py, which runs on whatever serves the operator, and without a GPU in
test_cuda_host.py.
"""

import copy

import oracle
import pytest
import torch
from conftest import assert_close
from test_dcnv3 import schema

import internimage  # noqa: F401  (registers the operator)
from internimage.extension import backend
from internimage.layers.dcnv3 import DCNv3
from internimage.ops import dcnv3
from internimage.ops import dcnv3_reference as reference

OP = torch.ops.internimage.dcnv3.default
OP_BACKWARD = torch.ops.internimage.dcnv3_backward.default
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled_kernels():
    served = backend("dcnv3", "cuda")
    if "compiled kernel" not in served.name:
        pytest.skip(f"needs the compiled CUDA kernels: {served.reason}")


def draw(n=2, size=(9, 10), groups=4, group_channels=16, dtype=torch.float32, device="cuda", **arguments):
    """Arguments, and input, offset, mask and grad_output on the device; locations off the kinks."""
    arguments = {"padding": (1, 1), "groups": groups, "softmax": True, **arguments}
    *tensors, grad_output = oracle.draw(40, n, size, group_channels, 2.0, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    return schema(arguments), [t.to(device, dtype) for t in (*tensors, grad_output)]


def check(geometry, tensors, results) -> None:
    """(output, gradients) against the reference in float64 on the CPU."""
    *inputs, grad = (t.double().cpu() for t in tensors)
    assert_close(results[0], reference.dcnv3(*inputs, *geometry), name="output")
    expected = reference.dcnv3_backward(grad, *inputs, *geometry, False, [True] * 3)
    for name, result, right in zip(("input", "offset", "mask"), results[1:], expected):
        assert_close(result, right, name=f"grad_{name}")


def both(geometry, tensors, deterministic=False) -> list[torch.Tensor]:
    *inputs, grad = tensors
    return [OP(*inputs, *geometry), *OP_BACKWARD(grad, *inputs, *geometry, deterministic, [True] * 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_channels", [1, 3, 8, 12, 16, 20, 24, 32, 48, 192, 512])
def test_group_channels(group_channels, dtype):
    geometry, tensors = draw(groups=2, group_channels=group_channels, dtype=dtype)
    check(geometry, tensors, both(geometry, tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side, groups", [(56, 4), (28, 8), (14, 16), (7, 32)])
def test_stages_of_the_tiny_model(side, groups, dtype):
    geometry, tensors = draw(3, (side, side), groups, dtype=dtype)
    check(geometry, tensors, both(geometry, tensors))


@pytest.mark.parametrize("n", [1, 5, 257, 300])
def test_any_batch(n):
    geometry, tensors = draw(n, (4, 5), 2, dtype=torch.float16)
    check(geometry, tensors, both(geometry, tensors))


@pytest.mark.parametrize("bytes_late", [8, 16])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned(dtype, which, bytes_late):
    """A tensor may begin anywhere in its storage; vector loads may not."""
    geometry, tensors = draw(dtype=dtype)
    t = tensors[which]
    late = bytes_late // t.element_size()
    tensors[which] = torch.cat([t.new_zeros(late), t.flatten()])[late:].view(t.shape)
    assert tensors[which].data_ptr() % 32 == bytes_late
    check(geometry, tensors, both(geometry, tensors))


@pytest.mark.parametrize("which", range(4))
def test_strided_tensors(which):
    geometry, tensors = draw(dtype=torch.float16)
    tensors[which] = tensors[which].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not tensors[which].is_contiguous()
    check(geometry, tensors, both(geometry, tensors))


def test_an_input_without_channels():
    geometry, (x, offset, mask, grad) = draw(groups=1)
    tensors = [x[..., :0], offset, mask, grad[..., :0]]
    output, *grads = both(geometry, tensors)
    assert output.shape == grads[0].shape == (2, 9, 10, 0)
    assert not grads[1].any() and not grads[2].any()


# ---- determinism


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_backward_gives_the_same_bits(dtype):
    geometry, tensors = draw(2, (20, 21), 4, dtype=dtype)
    before = torch.are_deterministic_algorithms_enabled()
    runs = []
    try:
        torch.use_deterministic_algorithms(True)
        for _ in range(5):
            leaves = [t.detach().clone().requires_grad_() for t in tensors[:3]]
            output = OP(*leaves, *geometry)
            runs.append([output.detach(), *torch.autograd.grad(output, leaves, tensors[3])])
    finally:
        torch.use_deterministic_algorithms(before)
    check(geometry, tensors, runs[0])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


# ---- streams, graphs, devices


def test_the_current_stream_is_used():
    """Work queued before on the same stream is waited for, without the host doing so."""
    geometry, tensors = draw(8, (28, 28), 8)
    late = [torch.zeros_like(t) for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(geometry, tensors)  # so that memory is there: asking the driver for it may wait
        stream.synchronize()
        torch.cuda._sleep(200_000_000)
        for target, source in zip(late, tensors):
            target.copy_(source)
        results = both(geometry, late)
        assert not stream.query()  # all of it was queued while the stream slept: nothing has waited
    stream.synchronize()
    check(geometry, tensors, results)


def test_two_streams():
    problems = [draw(4, (28, 28), 8), draw(4, (14, 14), 16, dtype=torch.float16)]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        results = []
        for stream, (geometry, tensors) in zip(streams, problems):
            with torch.cuda.stream(stream):
                results.append(both(geometry, tensors))
    torch.cuda.synchronize()
    for (geometry, tensors), result in zip(problems, results):
        check(geometry, tensors, result)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_graph(dtype, deterministic):
    geometry, tensors = draw(dtype=dtype)
    _, others = draw(dtype=dtype)
    others = [t.flip(0).contiguous() for t in others]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(geometry, tensors, deterministic)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both(geometry, tensors, deterministic)
    for t, other in zip(tensors, others):
        t.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    check(geometry, others, results)


def test_make_graphed_callables():
    torch.manual_seed(0)
    layer = DCNv3(64, groups=4).cuda()
    torch.nn.init.normal_(layer.offset.weight, 0, 0.1)
    plain = copy.deepcopy(layer)
    x = torch.randn(2, 14, 14, 64, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(layer, (torch.randn_like(x).requires_grad_(),))
    for _ in range(2):
        results = [m(x) for m in (graphed, plain)]
        assert_close(results[0], results[1])
        grads = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
        assert_close(grads[0], grads[1])


def test_compile_with_cuda_graphs():
    torch._dynamo.reset()
    geometry, tensors = draw()
    arguments = {"padding": 1, "groups": 4, "softmax": True}

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def step(input, offset, mask):
        return dcnv3(input * 1.0, offset, mask, **arguments) + 0.0

    for _ in range(4):  # the first runs are not recorded
        torch.compiler.cudagraph_mark_step_begin()
        leaves = [t.detach().clone().requires_grad_() for t in tensors[:3]]
        output = step(*leaves)
        results = [output.clone(), *torch.autograd.grad(output, leaves, tensors[3])]
    check(geometry, tensors, results)


def test_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a GPU more: there is one")
    geometry, tensors = draw(device="cuda:1")
    assert torch.cuda.current_device() == 0
    results = both(geometry, tensors)
    assert torch.cuda.current_device() == 0
    assert all(r.device.index == 1 for r in results)
    check(geometry, tensors, results)


# ---- what is refused


def test_refusals():
    geometry, (x, offset, mask, grad) = draw()
    with pytest.raises(RuntimeError, match="shape that input and kernel ask for"):
        OP(x, offset[..., :-1], mask, *geometry)
    with pytest.raises(RuntimeError, match="one dtype"):
        OP(x, offset.double(), mask, *geometry)
    with pytest.raises(RuntimeError, match="one device"):
        OP(x, offset.cpu(), mask, *geometry)
    with pytest.raises(RuntimeError, match="output's shape"):
        OP_BACKWARD(grad[:1], x, offset, mask, *geometry, False, [True] * 3)
    assert both(geometry, (x, offset, mask, grad))[0].isfinite().all()  # the device is not in an error state


# ---- large tensors


@pytest.mark.slow
def test_an_image_of_more_than_2_to_31_elements():
    """64-bit indices; compared where the last pixels are, against a crop."""
    free, _ = torch.cuda.mem_get_info()
    height, width, channels = 2**12, 2**13 + 8, 64
    needed = height * width * (channels * (5 * 2 + 4) + 2 * 27 * 2)
    if free < 1.2 * needed:
        pytest.skip(f"needs a GPU with {1.2 * needed / 2**30:.0f} GiB free")
    geometry = schema({"padding": (1, 1), "groups": 1, "softmax": True})
    x = torch.empty(1, height, width, channels, dtype=torch.float16, device="cuda").normal_()
    offset = torch.empty(1, height, width, 18, dtype=torch.float16, device="cuda").uniform_(0.1, 0.9)
    mask = torch.empty(1, height, width, 9, dtype=torch.float16, device="cuda").normal_()
    assert x.numel() > 2**31
    output = OP(x, offset, mask, *geometry)
    crop = (slice(None), slice(-16, None), slice(-16, None))
    exact = [t[crop].double() for t in (x, offset, mask)]
    assert_close(output[crop][:, 3:, 3:], reference.dcnv3(*exact, *geometry)[:, 3:, 3:])
    grads = OP_BACKWARD(output, x, offset, mask, *geometry, False, [True] * 3)
    expected = reference.dcnv3_backward(output[crop].double(), *exact, *geometry, False, [True] * 3)
    for name, grad, right in zip(("input", "offset", "mask"), grads, expected):
        assert_close(grad[crop][:, 4:, 4:], right[:, 4:, 4:], name=f"grad_{name}")


@pytest.mark.slow
def test_a_batch_of_more_than_2_to_31_elements():
    """32-bit indices still, as they count within an image."""
    n, side, groups = 2200, 128, 4
    free, _ = torch.cuda.mem_get_info()
    needed = n * side * side * groups * (16 * 2 * 2 + 27 * 2)
    if free < 1.2 * needed:
        pytest.skip(f"needs a GPU with {1.2 * needed / 2**30:.0f} GiB free")
    geometry = schema({"padding": (1, 1), "groups": groups, "softmax": True})
    x, offset, mask = (
        torch.empty(n, side, side, groups * c, dtype=torch.float16, device="cuda").uniform_(0.1, 0.9)
        for c in (16, 18, 9)
    )
    assert x.numel() > 2**31
    output = OP(x, offset, mask, *geometry)
    assert_close(output[-1:], reference.dcnv3(*(t[-1:].double() for t in (x, offset, mask)), *geometry))
