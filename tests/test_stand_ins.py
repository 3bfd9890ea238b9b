"""effc.stand_ins: shapes behind the runtime's own operators."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effc.capture import from_proto
from effc.cost import cost
from effc.shapes import proven


def table(bits: int, dtype: int) -> onnx.TensorProto:
    """30 rows of 64 codes: bytes that hold several, or numbers of a narrow type."""
    if dtype == TensorProto.UINT8:
        return numpy_helper.from_array(np.zeros((30, 64 * bits // 8), np.uint8), "codes")
    return helper.make_tensor("codes", dtype, [30, 64], bytes(30 * 64 * bits // 8), raw=True)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (8, TensorProto.UINT8),
        (4, TensorProto.UINT8),
        (2, TensorProto.UINT8),
        (4, TensorProto.UINT4),
        (4, TensorProto.INT4),
    ],
)
def test_shapes_and_costs_behind_codes_in_blocks(bits, dtype):
    nodes = [
        helper.make_node(
            "GatherBlockQuantized", ["codes", "ids", "s"], ["rows"], "look", domain="com.microsoft", block_size=32,
            gather_axis=0, quantize_axis=1, **({"bits": bits} if dtype == TensorProto.UINT8 else {}),
        ),
        helper.make_node(
            "MatMulNBits", ["rows", "b", "bs", "", "", "bias"], ["y"], "up", domain="com.microsoft", K=64, N=24,
            bits=bits, block_size=32,
        ),
        helper.make_node("Softmax", ["y"], ["z"], "soft"),
    ]  # fmt: skip
    weights = [
        table(bits, dtype),
        *(
            numpy_helper.from_array(array, name)
            for name, array in {
                "s": np.ones((30, 2), np.float32),
                "b": np.zeros((24, 2, 4 * bits), np.uint8),
                "bs": np.ones((24, 2), np.float32),
                "bias": np.ones(24, np.float32),
            }.items()
        ),
    ]
    ends = (
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 5])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(helper.make_graph(nodes, "g", *ends, weights), opset_imports=opsets, ir_version=10)
    model = from_proto(proto)
    assert [model.shapes(3)[name] for name in ("rows", "y", "z")] == [(3, 5, 64), (3, 5, 24), (3, 5, 24)]
    assert proven(model)["y"].shape == ("N", 5, 24)
    found = cost(model, 3)
    assert not found.unknown and not model.not_analysed()
    assert found.nodes["up"].macs == 15 * 64 * 24 and found.nodes["up"].parameters == 64 * 24 + 24
    assert found.nodes["look"].parameters == 30 * 64
    assert found.nodes["look"].weight_bytes == 30 * 64 * bits // 8 + 30 * 2 * 4
    # The graph itself is as it was.
    assert [node.op_type for node in model.graph] == ["GatherBlockQuantized", "MatMulNBits", "Softmax"]
