# SPDX-License-Identifier: MIT
"""What test_nvrtc.py runs on the stand-in for CUDA: DCNv3 on tensors of torch's CUDA device, whose kernels are compiled
by NVRTC, and launched by the compiled module; the launches run the host's build of the same kernels (cuda_host)."""

import ctypes
import os
import re
import threading

import cuda_host
import oracle
import pytest
import torch
from conftest import assert_close
from test_dcnv3 import schema

import cuda_stand_in
from internimage import extension
from internimage.ops import dcnv3
from internimage.ops import dcnv3_reference as reference

OP = torch.ops.internimage.dcnv3.default
OP_BACKWARD = torch.ops.internimage.dcnv3_backward.default


class StandIn:
    """Its variables and events."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.stand_in_events.restype = ctypes.c_char_p

    def __setattr__(self, name, value):
        if name == "library":
            super().__setattr__(name, value)
        else:
            ctypes.c_int.in_dll(self.library, f"stand_in_{name}").value = value

    def __getattr__(self, name):
        return ctypes.c_int.in_dll(self.library, f"stand_in_{name}").value

    def events(self, kind: str) -> list[str]:
        return [e for e in self.library.stand_in_events().decode().splitlines() if e.startswith(kind)]


@pytest.fixture
def stand_in():
    found = StandIn()
    found.library.stand_in_forget()
    yield found
    found.loads_to_fail = found.launch_error = found.capturing = 0
    ctypes.c_void_p.in_dll(found.library, "stand_in_on_launch").value = None


@pytest.fixture
def host(stand_in):
    """The host's build; from here on it runs what is launched."""
    built = cuda_host.Host(os.environ["INTERNIMAGE_TEST_CUDA_HOST"])
    built.library.last_message.restype = ctypes.c_char_p
    built.library.last_arguments.restype = ctypes.POINTER(ctypes.c_char)
    launch = ctypes.cast(built.library.launch_by_name, ctypes.c_void_p).value
    ctypes.c_void_p.in_dll(stand_in.library, "stand_in_on_launch").value = launch
    return built


def last_arguments(host) -> bytes:
    size = ctypes.c_int64()
    begin = host.library.last_arguments(ctypes.byref(size))
    return begin[: size.value]


def draw(dtype=torch.float32, device="cuda", n=2, size=(5, 6), group_channels=16, **arguments):
    arguments = {"padding": (1, 1), "groups": 2, "softmax": True, **arguments}
    *tensors, grad = oracle.draw(3, n, size, group_channels, 1.5, **arguments)
    tensors[1] = oracle.off_the_grid(tensors[1], **arguments)
    on_cpu = [t.to(dtype) for t in (*tensors, grad)]
    return schema(arguments), on_cpu, [t.to(device) for t in on_cpu]


CASES = {
    "plain": {"softmax": False},
    "softmax": {},
    "no center": {"remove_center": True},
    "general": {"kernel_size": (2, 3), "group_channels": 3},
    "strides": {"stride": (2, 3), "dilation": (2, 1), "padding": (2, 1), "offset_scale": 0.7},
    "many chunks": {"group_channels": 192, "size": (2, 3)},
}


def field_bytes(arguments: bytes, compute: str, index: str) -> dict[str, bytes]:
    """The fields of the arguments, without the padding after each."""
    layout = cuda_stand_in.layout()["arguments"][f"{compute}, {index}"]
    assert len(arguments) == layout["size"]
    return {name: arguments[begin : begin + size] for name, begin, size in layout["fields"]}


@pytest.mark.parametrize("dtype", cuda_host.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype, host, stand_in):
    """What is launched has the name, the arguments, the grid and the numbers of the host's build."""
    geometry, on_cpu, tensors = draw(dtype, **CASES[case])
    host.forward(*on_cpu[:3], *geometry)
    arguments = last_arguments(host)
    output = OP(*tensors[:3], *geometry)
    assert host.library.last_message() == b""
    compute = "double" if dtype == torch.float64 else "float"
    assert field_bytes(last_arguments(host), compute, "uint32_t") == field_bytes(arguments, compute, "uint32_t")
    assert_close(output.cpu(), reference.dcnv3(*(t.double() for t in on_cpu[:3]), *geometry))
    (launch,) = stand_in.events("launch")
    threads = int.from_bytes(arguments[:4], "little")
    assert f"grid={-(-threads // 256)},1,1 block=256,1,1 shared=0" in launch


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=str
)  # torch's own kernels do not run: no rounding
@pytest.mark.parametrize("case", CASES)
def test_backward(case, dtype, deterministic, host, stand_in):
    geometry, on_cpu, tensors = draw(dtype, **CASES[case])
    *inputs, grad = on_cpu
    host.backward(grad, *inputs, *geometry, deterministic=deterministic)
    *inputs, grad = tensors
    grads = OP_BACKWARD(grad, *inputs, *geometry, deterministic, [True] * 3)
    assert host.library.last_message() == b""
    exact = [t.double() for t in on_cpu]
    expected = reference.dcnv3_backward(exact[3], *exact[:3], *geometry, False, [True] * 3)
    for name, result, right in zip(("input", "offset", "mask"), grads, expected):
        assert_close(result.cpu(), right, name=name)
    names = re.findall(r"(deterministic|backward)\w*_kernelI", "\n".join(stand_in.events("launch")))
    assert names == (["deterministic", "backward"] if deterministic else ["backward"])


def test_autograd_in_its_own_thread(host, stand_in):
    """A thread of autograd has no context of the driver before; gradients of some tensors alone."""
    geometry, on_cpu, tensors = draw()
    host.backward(on_cpu[3], *on_cpu[:3], *geometry)
    host.forward(*on_cpu[:3], *geometry)
    leaves = [t.requires_grad_() for t in tensors[:3]]
    dcnv3_output = OP(*leaves, *geometry)
    grads = torch.autograd.grad(dcnv3_output, leaves, tensors[3])
    assert all(grad.shape == leaf.shape for grad, leaf in zip(grads, leaves))
    assert len(stand_in.events("launch")) == 2


def test_the_current_stream(stand_in):
    geometry, _, tensors = draw()
    OP(*tensors[:3], *geometry)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        OP(*tensors[:3], *geometry)
    first, second = stand_in.events("launch")
    assert "stream=(nil)" in first and f"stream={stream.cuda_stream:#x}" in second


def test_nothing_waits(stand_in):
    geometry, _, tensors = draw(group_channels=5)  # kernels that no other test needs: they are compiled here
    before = stand_in.synchronized
    OP(*tensors[:3], *geometry)
    OP_BACKWARD(tensors[3], *tensors[:3], *geometry, False, [True] * 3)
    assert stand_in.synchronized == before and len(stand_in.events("launch")) == 2


def test_another_device_than_the_current(stand_in):
    geometry, _, tensors = draw(device="cuda:1")
    output = OP(*tensors[:3], *geometry)
    assert output.device.index == 1 and torch.cuda.current_device() == 0
    (launch,) = stand_in.events("launch")
    assert "device=1" in launch
    geometry, _, tensors = draw()
    OP(*tensors[:3], *geometry)
    assert "device=0" in stand_in.events("launch")[1]


def test_a_kernel_is_loaded_while_a_stream_is_captured(stand_in):
    geometry, _, tensors = draw(torch.float64, group_channels=2, kernel_size=(1, 2))
    stand_in.capturing = 1
    OP(*tensors[:3], *geometry)
    OP(*tensors[:3], *geometry)
    assert len(stand_in.events("launch")) == 2


def test_many_threads(stand_in):
    geometry, _, tensors = draw(torch.float16, group_channels=6)
    failures = []

    def call():
        try:
            for _ in range(50):
                OP(*tensors[:3], *geometry)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(stand_in.events("launch")) == 300


def test_an_empty_batch_launches_nothing(stand_in):
    geometry, _, tensors = draw()
    assert OP(*(t[:0] for t in tensors[:3]), *geometry).shape[0] == 0
    assert not stand_in.events("launch")


def test_compile(stand_in):
    """One node in the graph, whose shapes come from the fake."""
    _, _, tensors = draw()
    compiled = torch.compile(
        lambda *t: dcnv3(*t, padding=1, groups=2, softmax=True), backend="aot_eager", fullgraph=True
    )
    leaves = [t.requires_grad_() for t in tensors[:3]]
    torch.autograd.grad(compiled(*leaves), leaves, tensors[3])
    assert len(stand_in.events("launch")) == 2


@pytest.mark.parametrize(
    "error, said",
    [
        (701, r"forward_kernel<float, 8, 9, true, uint32_t> failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES \(in words\)"),
        (2, "CUDA out of memory: the driver has none left for forward_kernel"),
        (999, r"failed: CUDA error \(in words\)"),
    ],
)
def test_a_launch_that_fails(error, said, stand_in):
    geometry, _, tensors = draw()
    stand_in.launch_error = error
    with pytest.raises(RuntimeError, match=said):
        OP(*tensors[:3], *geometry)
    stand_in.launch_error = 0
    OP(*tensors[:3], *geometry)


def test_memory_is_gone_when_a_kernel_is_loaded(stand_in):
    geometry, _, tensors = draw(torch.float64, "cuda:1")  # where no other test has loaded that kernel
    stand_in.load_error, stand_in.loads_to_fail = 2, 1
    geometry_of_backward = (*geometry, False, [True] * 3)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        OP_BACKWARD(tensors[3], *tensors[:3], *geometry_of_backward)
    OP_BACKWARD(tensors[3], *tensors[:3], *geometry_of_backward)
    assert len(stand_in.events("launch")) == 1


def test_a_kept_image_that_the_driver_refuses_is_compiled_again(stand_in):
    """Damage that a checksum does not show; one more attempt, and then it works."""
    from internimage.nvrtc import cache, kernels

    geometry, _, tensors = draw(torch.bfloat16, "cuda:1", group_channels=7)
    name = "forward_kernel<__nv_bfloat16, 1, 0, false, uint32_t>"
    bytes_ = cuda_stand_in.layout()["kernels"][name]
    image, _ = kernels.cuda_kernel(name, bytes_, 0, "")
    assert image.numel() > 0  # it is in the cache now, but not loaded
    entries = cache.entries()
    stand_in.load_error, stand_in.loads_to_fail = 200, 1
    OP(*tensors[:3], *geometry)
    assert len(stand_in.events("load")) == 2 and len(stand_in.events("launch")) == 1
    assert cache.entries() == entries and not kernels.problems


def test_a_driver_that_is_too_old(stand_in, caplog):
    """Plain torch serves, and the warning comes once."""
    from internimage.nvrtc import kernels

    geometry, _, tensors = draw(torch.float16, "cuda:1", group_channels=7)
    stand_in.load_error, stand_in.loads_to_fail = 222, 100
    for _ in range(2):
        assert OP(*tensors[:3], *geometry).shape == tensors[0].shape
        grads = OP_BACKWARD(tensors[3], *tensors[:3], *geometry, False, [True, False, False])
        assert [tuple(grad.shape) for grad in grads] == [tuple(tensors[0].shape), (0,), (0,)]
    assert not stand_in.events("launch")
    (record,) = [r for r in caplog.records if "plain torch" in r.message]
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in record.message and "\n" not in record.message
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in extension.backend("dcnv3", "cuda").reason
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in extension.cuda_note()
    assert len(stand_in.events("load")) <= 4  # each kernel was tried at most twice
    kernels.problems.clear()
    kernels._failed.clear()
    kernels._said.clear()


def test_what_plain_torch_says_is_passed_on(stand_in):
    """It is called through the stable ABI, where an exception ends as a code; from 2.13 on torch tells what it was."""
    from internimage.nvrtc import kernels

    def no_memory(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with torch.library._scoped_library("internimage", "IMPL") as library:
        for name in ("dcnv3_reference", "dcnv3_backward_reference"):
            library.impl(name, no_memory, "CUDA")
        geometry, _, tensors = draw(torch.float16, "cuda:1", group_channels=9)
        stand_in.load_error, stand_in.loads_to_fail = 222, 100
        tells = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
        message = r"OutOfMemoryError: CUDA out of memory\. Tried to allocate 20\.00 GiB" if tells else "API call failed"
        with pytest.raises(RuntimeError, match=message):
            OP(*tensors[:3], *geometry)
        with pytest.raises(RuntimeError, match=message):
            OP_BACKWARD(tensors[3], *tensors[:3], *geometry, False, [True] * 3)
    kernels.problems.clear()
    kernels._failed.clear()
    kernels._said.clear()


def test_what_is_said_of_it():
    served = extension.backend("dcnv3", "cuda")
    assert served.name == "compiled kernel, by NVRTC when it is first needed" and not served.reason
    assert re.search(
        r"compiled by NVRTC \d+\.\d+ when they are first needed, and kept in '.+', which has [1-9]",
        extension.cuda_note(),
    )
