# SPDX-License-Identifier: MIT
"""The nodes of internimage_tiny, exported by the command: how many of each type, and their names."""

from collections import Counter

import onnx
import pytest
import timm

from internimage.cli import main
from internimage.engine.create import data_config
from internimage.models.timm_folder import save_model

DEPTHS = (4, 4, 18, 4)


@pytest.mark.slow  # 40 s
def test_a_layer_is_a_node(tmp_path):
    """One DeformConv for each of 30 layers. The one Gather is torch's, of the mean over the last map."""
    model = timm.create_model("internimage_tiny", num_classes=3)
    (tmp_path / "mine").mkdir()
    save_model(model, tmp_path / "mine", ["a", "b", "c"], data_config(model))
    path = tmp_path / "m.onnx"
    assert main(["export", "--model", str(tmp_path / "mine"), "--output", str(path), "--opset", "20"]) == 0
    file = onnx.load(str(path))
    nodes, counts = file.graph.node, Counter(node.op_type for node in file.graph.node)
    assert {node.domain for node in nodes} == {""}
    assert [(each.domain, each.version) for each in file.opset_import] == [("", 20)]
    assert [node.name for node in nodes if node.op_type == "DeformConv"] == [
        f"levels.{level}.blocks.{block}.dcn/DeformConv" for level in range(4) for block in range(DEPTHS[level])
    ]
    assert not counts.keys() & {"GridSample", "GatherND", "GatherElements", "ScatterND"}
    assert [node.name for node in nodes if node.op_type == "Gather"] == ["global_pool.pool/Gather"]
    # the two projections, offset and mask of each layer, and the two layers of each MLP; the head is a Gemm
    assert counts["MatMul"] == 30 * 6 and counts["Gemm"] == 1
