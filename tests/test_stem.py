"""effc.passes._stem: strides moved into channels against onnxruntime's own convolution, and in a lowered network."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import effc
from effc.capture import from_proto
from effc.passes._stem import folded, widened
from tests.networks import Net, distance, feeds, run

EXACT = 1e-5  # the same products in another order, of float32


def convolution(w: np.ndarray, stride: int, pads: list[int], size: tuple[int, int], block: int = 0) -> onnx.ModelProto:
    nodes, x = [], "x"
    if block:
        nodes.append(helper.make_node("SpaceToDepth", ["x"], ["s"], blocksize=block))
        x = "s"
    nodes.append(helper.make_node("Conv", [x, "w"], ["y"], strides=[stride, stride], pads=pads))
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 3, *size]), ("y", None))
    ]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], [numpy_helper.from_array(w, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def ran(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 3), (7, 7), (11, 5)])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [3, 2, 2, 3], [5, 1, 0, 4]])
def test_pixels_of_a_stride_become_channels(stride, kernel, pads):
    rng, size = np.random.default_rng(0), (6 * stride, 7 * stride)
    w = rng.normal(size=(6, 3, *kernel)).astype(np.float32)
    x = rng.normal(size=(1, 3, *size)).astype(np.float32)
    moved, around = folded(w, stride, pads, size)
    wanted = ran(convolution(w, stride, pads, size), x)
    found = ran(convolution(np.ascontiguousarray(moved), 1, around, size, stride), x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EXACT * np.abs(wanted).max())
    assert min(around) >= 0 and np.count_nonzero(moved) == w.size


def stem(size: int, kernel: int, **attributes) -> onnx.ModelProto:
    net = Net(f"stem {kernel}")
    x = net.input("input", ["N", 3, size, size])
    x = net.relu(net.conv(x, 3, 16, kernel, name="stem", bias=True, **attributes))
    net.head(net.relu(net.conv(x, 16, 16, 3, name="next", pads=[1] * 4, bias=True)), 16)
    return net.model()


@pytest.mark.parametrize(
    ("proto", "shape", "widening"),
    [
        (stem(16, 7, strides=[2, 2], pads=[3] * 4), (16, 12, 4, 4), "SpaceToDepth"),
        (stem(16, 3, strides=[2, 2], auto_pad="SAME_UPPER"), (16, 12, 2, 2), "SpaceToDepth"),
        (stem(15, 3, strides=[2, 2], pads=[1] * 4), (16, 4, 3, 3), "Pad"),
        (stem(16, 3, strides=[2, 2], dilations=[2, 2]), (16, 4, 3, 3), "Pad"),
        (stem(16, 3, pads=[1] * 4), (16, 4, 3, 3), "Pad"),
    ],
)
def test_a_lowered_stem_reads_more_channels(proto, shape, widening):
    """Codes of inputs and weights round by half a step each: 2 % of the largest output for two layers."""
    inputs = [{n: a[:1] for n, a in feeds(proto, batch=1, seed=s).items()} for s in range(8)]
    lowered = effc.optimize(
        proto, "int8", calibrate={"source": lambda: iter(inputs)}, measure=False, force=True
    ).model  # fmt: skip
    first = next(n for n in lowered.graph if n.op_type == "Conv")
    assert tuple(first.inputs[1].shape) == shape
    assert [n.op_type for n in lowered.graph].count(widening) == 1
    given = from_proto(proto)
    conv = next(iter(given.nodes("Conv")))
    assert widened(conv, tuple(given.constant(conv.inputs[1]).shape), 4) == shape
    assert distance(run(proto, inputs[0]), run(lowered.proto(), inputs[0])) < 0.02
