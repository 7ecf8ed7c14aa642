# SPDX-License-Identifier: MIT
"""An exported file in TensorRT, 10 or 11, on a GPU."""

import importlib.util

import pytest
import torch
from test_export import small_model

from internimage.engine.create import data_config
from internimage.export.export import Request, export_model

MIN, BEST, MAX = (1, 3, 64, 64), (2, 3, 96, 128), (4, 3, 128, 160)
SHAPES = [(1, 3, 64, 96), (3, 3, 97, 160)]  # none is traced, verified or one of the above


def engine_of(trt, path):
    """An engine for all sizes from MIN to MAX, and the runtime that it needs."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # types are those of the file: a choice in TensorRT 10, and the only way in 11, which ignores the flag
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # rounds to 10 bits, and is the default
    profile = builder.create_optimization_profile()
    profile.set_shape("image", MIN, BEST, MAX)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    runtime = trt.Runtime(logger)
    return runtime, runtime.deserialize_cuda_engine(plan)


@pytest.mark.gpu
def test_the_file_with_grid_sample(tmp_path):
    """At two sizes and batches, against the model in float64.

    float32 is off by 1e-6 of the logits' range on a CPU. TensorRT adds in another order and has its own GELU; nearest
    instead of bilinear samples would be off by a tenth.
    """
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("needs a GPU with TensorRT: pip install tensorrt")
    import tensorrt as trt

    model, path = small_model(), tmp_path / "m.onnx"
    export_model(model, data_config(model, 64), "random", path, Request("onnx", operator="grid-sample"))
    runtime, engine = engine_of(trt, path)  # the runtime must live as long as the engine
    context = engine.create_execution_context()
    for shape in SHAPES:
        image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            exact = small_model().double()(image.double())
        given = image.cuda()
        assert context.set_input_shape("image", shape)
        assert tuple(context.get_tensor_shape("logits")) == tuple(exact.shape)
        logits = torch.full(exact.shape, float("nan"), device="cuda")
        for name, tensor in (("image", given), ("logits", logits)):
            assert context.set_tensor_address(name, tensor.data_ptr())
        assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        assert float((logits.cpu() - exact).abs().max()) <= 1e-4 * float(exact.max() - exact.min())
    del context, engine, runtime
