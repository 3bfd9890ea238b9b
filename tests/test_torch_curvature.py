"""Curvature of the error in weights: against exact Hessians, a recursion by hand, Jacobians; and what has no rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from effc.backends.torch import Torch
from effc.capture import from_proto
from effc.errors import BadInput
from tests.networks import NETWORKS, Net, agree, feeds, scores_of

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")
TORCH = Torch()
RNG = np.random.default_rng(0)
X = RNG.standard_normal((16, 6)).astype(np.float32)
IMAGES = RNG.standard_normal((5, 2, 9, 9)).astype(np.float32)


def found(proto: onnx.ModelProto, *batches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return TORCH.curvature(TORCH.view(from_proto(proto)), batches)


def hessian_diagonal(proto: onnx.ModelProto, x: np.ndarray, name: str, loss) -> np.ndarray:
    """Of loss(outputs), the mean over samples, by autograd twice; loss takes and gives tensors."""
    view = TORCH.view(from_proto(proto)).double()
    weight = TORCH.weights(view)[name]
    value = loss(view(torch.from_numpy(x).double())) / len(x)
    (first,) = torch.autograd.grad(value, weight, create_graph=True)
    flat = [
        torch.autograd.grad(g, weight, retain_graph=True)[0].reshape(-1)[i] for i, g in enumerate(first.reshape(-1))
    ]
    return torch.stack(flat).reshape(weight.shape).numpy()


def cross_entropy(y):
    return torch.nn.functional.cross_entropy(y, y.detach().softmax(1), reduction="sum")


def relative_error(y):
    return (y - y.detach()).square().sum() / (y.detach().square().sum() / len(y))


def one_output() -> onnx.ModelProto:
    """6 -> 8 -> 1: no class scores, and behind each weight there is one path only."""
    return scores_of(6, 8, 1)


# where the diagonal recursion is exact: to rounding of float32


@pytest.mark.parametrize("softmax", [False, True])
def test_of_a_softmax_layer_it_is_the_diagonal_of_the_hessian(softmax):
    h = found(scores_of(6, 8, 4, softmax=softmax), {"x": X[:10]}, {"x": X[10:]})
    for name in ("fc1.weight", "fc1.bias"):
        agree(h[name], hessian_diagonal(scores_of(6, 8, 4), X, name, cross_entropy), 1e-5)


@pytest.mark.parametrize("name", ["fc0.weight", "fc0.bias", "fc1.weight"])
def test_of_a_network_of_single_paths_with_squared_error_it_is_the_diagonal_of_the_hessian(name):
    agree(found(one_output(), {"x": X})[name], hessian_diagonal(one_output(), X, name, relative_error), 1e-5)


def test_of_a_linear_layer_it_is_what_finite_differences_say():
    """Damage measured by hand, of a step of 0.1: exact for a quadratic error, to 1e-3 of the largest."""
    proto = scores_of(6, 1)
    model, session = from_proto(proto), TORCH.session
    h = found(proto, {"x": X})["fc0.weight"]
    view = TORCH.view(model)
    weight, before = TORCH.weights(view)["fc0.weight"], session(view).run({"x": X})
    (name,) = before
    measured = np.zeros(h.shape)
    for place in np.ndindex(h.shape):
        with torch.no_grad():
            weight[place] += 0.1
        off = session(view).run({"x": X})[name] - before[name]
        with torch.no_grad():
            weight[place] -= 0.1
        measured[place] = np.sum(off**2) / np.sum(before[name] ** 2)
    agree(0.5 * h * 0.1**2, measured, 1e-3)


# the recursion, by hand


def test_of_a_convolutional_network_it_is_the_recursion_by_hand():
    """Conv, ReLU, max-pool, Conv with stride, ReLU, dense: LeCun et al. in NumPy, to 1e-4."""
    net = Net("by hand")
    x = net.conv(net.input("x", ["N", 2, 9, 9]), 2, 3, 2, name="c1", bias=True)
    x = net.node("MaxPool", net.relu(x), kernel_shape=[2, 2], strides=[2, 2])
    x = net.relu(net.conv(x, 3, 4, 2, name="c2", strides=[2, 2]))
    net.output(net.linear(net.node("Flatten", x), 16, 5, name="fc"), ["N", 5])
    h = found(net.model(), {"x": IMAGES})
    w = net.weights
    a1 = np.einsum("nchwij,dcij->ndhw", sliding_window_view(IMAGES, (2, 2), (2, 3)), w["c1.weight"])
    a1 += w["c1.bias"][:, None, None]
    x1 = np.maximum(a1, 0)
    blocks = x1.reshape(5, 3, 4, 2, 4, 2).transpose(0, 1, 2, 4, 3, 5).reshape(5, 3, 4, 4, 4)
    x2 = blocks.max(-1)
    patches = sliding_window_view(x2, (2, 2), (2, 3))[:, :, ::2, ::2]
    a2 = np.einsum("nchwij,dcij->ndhw", patches, w["c2.weight"])
    x3 = np.maximum(a2, 0)
    scores = x3.reshape(5, -1) @ w["fc.weight"].T + w["fc.bias"]
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    h3 = p * (1 - p)
    agree(h["fc.weight"], h3.T @ x3.reshape(5, -1) ** 2 / 5, 1e-4)
    h2 = (h3 @ w["fc.weight"] ** 2).reshape(x3.shape) * (a2 > 0)
    agree(h["c2.weight"], np.einsum("ndhw,nchwij->dcij", h2, patches**2) / 5, 1e-4)
    back = np.einsum("ndhw,dcij->nchiwj", h2, w["c2.weight"] ** 2).reshape(x2.shape)
    winner = np.arange(4) == blocks.argmax(-1)[..., None]
    h1 = (winner * back[..., None]).reshape(5, 3, 4, 4, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(x1.shape) * (a1 > 0)
    agree(
        h["c1.weight"], np.einsum("ndhw,nchwij->dcij", h1, sliding_window_view(IMAGES, (2, 2), (2, 3)) ** 2) / 5, 1e-4
    )
    agree(h["c1.bias"], h1.sum((0, 2, 3)) / 5, 1e-4)


# single rules, against Jacobians: y = f(w * x), outputs that are no class scores


def with_op(
    op: str, *, shape=(4, 2, 3, 3), opset: int = 20, more=(), **attributes
) -> tuple[onnx.ModelProto, np.ndarray]:
    net = Net(op, opset=opset)
    w = net.weight("w", net.random(*shape))
    ones = net.node("Mul", net.input("x", [1] * len(shape)), w)
    extra = [net.weight(f"more{i}", np.asarray(array, np.float32)) for i, array in enumerate(more)]
    net.output(net.node(op, ones, *extra, **attributes), [None] * len(shape))
    return net.model(), np.ones([1] * len(shape), np.float32)


CASES = {
    "sigmoid": with_op("Sigmoid"), "tanh": with_op("Tanh"), "gelu": with_op("Gelu"), "elu": with_op("Elu", alpha=0.5),
    "leaky": with_op("LeakyRelu", alpha=0.3), "neg": with_op("Neg"), "abs": with_op("Abs"), "exp": with_op("Exp"),
    "hardswish": with_op("HardSwish"), "softplus": with_op("Softplus"), "erf": with_op("Erf"),
    "mean": with_op("ReduceMean", keepdims=1), "global": with_op("GlobalAveragePool"),
    "average": with_op("AveragePool", kernel_shape=[2, 2], pads=[1, 1, 0, 0]),
    "softmax": with_op("Softmax", axis=2), "log-softmax": with_op("LogSoftmax", axis=-1),
    "instance norm": with_op("InstanceNormalization", more=([2, 3], [0, 1])),
    "batch norm": with_op("BatchNormalization", more=([2, 3], [0, 1], [0.5, 0], [2, 0.25])),
    "layer norm": with_op("LayerNormalization", more=(RNG.normal(size=3), [0, 1, 2])),
    "relu": with_op("Relu"), "clip": with_op("Clip", more=(-0.5, 0.5)),
    "max-pool": with_op("MaxPool", kernel_shape=[2, 2]),
    "div": with_op("Div", more=([[[4.0]]],)), "sub": with_op("Sub", more=([[[4.0]]],)),
    "pow": with_op("Pow", more=(3.0,)),
    "transpose": with_op("Transpose", perm=[2, 0, 3, 1]), "swish": with_op("Mul", more=([0.5, 2, 3],)),
    "prelu": with_op("PRelu", more=([[[0.2]], [[0.4]]],)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_function_squares_its_jacobian(case):
    """h_j = sum_i (dy_i/dx_j)^2 2/|y|^2, x = w: to 1e-4."""
    proto, x = CASES[case]
    view = TORCH.view(from_proto(proto))
    weight, given = TORCH.weights(view)["w"], torch.from_numpy(x)
    rows = []
    y = view(given)
    for number in y.reshape(-1):
        rows.append(torch.autograd.grad(number, weight, retain_graph=True)[0])
    expected = torch.stack(rows).square().sum(0) * 2 / y.detach().square().sum()
    agree(found(proto, {"x": x})["w"], expected.numpy(), 1e-4)


@pytest.mark.parametrize(
    "network", ["plain", "residual", "depthwise", "branches", "transformer", "sound", "transposed"]
)
def test_whole_networks_have_curvature_that_is_finite_and_not_negative(network):
    proto = NETWORKS[network]()
    h = found(proto, feeds(proto, batch=1))
    assert h and all(np.isfinite(a).all() and (a >= 0).all() for a in h.values())
    assert sum(a.any() for a in h.values()) >= len(h) - 2  # a shift of all keys, say, changes nothing


def test_the_view_keeps_its_mode():
    view = TORCH.view(from_proto(scores_of(6, 4))).train()
    TORCH.curvature(view, [{"x": X}])
    assert view.training


# what has no rule


def test_what_has_no_rule_is_refused():
    net = Net("unknown")
    x = net.linear(net.input("x", ["N", 6]), 6, 4, name="fc")
    net.output(net.node("ReduceL2", x, axes=[1], name="l2"), ["N", 1])
    with pytest.raises(BadInput, match=r"curvature behind LinalgVectorNorm is not known.*_torch_curvature\.py"):
        found(net.model(), {"x": X})


def test_a_product_of_a_tensor_with_itself_is_refused():
    net = Net("twice")
    x = net.node("Mul", net.input("x", [6, 6]), net.weight("w", net.random(6, 6)))
    net.output(net.node("MatMul", x, x), [6, 6])
    with pytest.raises(BadInput, match="a product of a tensor with itself"):
        found(net.model(), {"x": X[:6]})


def test_no_samples_and_missing_inputs_are_refused():
    with pytest.raises(BadInput, match="there are no samples"):
        found(scores_of(6, 4))
    with pytest.raises(BadInput, match="input 'x' is missing; there are z"):
        found(scores_of(6, 4), {"z": X})
