"""effc.backends._torch_recurrent: against onnxruntime, trained and written back, and refusals."""

import numpy as np
import onnx
import pytest
from onnx import helper

from effc.capture import from_proto
from effc.errors import BadInput
from effc.registry import backend, trainer
from tests.networks import Net, distance, feeds, run

torch = pytest.importorskip("torch")

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, INPUTS, HIDDEN = 7, 5, 6
CLOSE = 2e-6  # relative to the largest number, float32


def network(
    kind: str, *, both: bool = False, bias: bool = True, states: bool = False, lengths: int | None = None, **attributes
) -> onnx.ModelProto:
    """One layer over [7, 2, 5], its outputs those of the network."""
    net = Net(f"{kind}{both}{bias}")
    directions, rows = 1 + both, GATES[kind] * HIDDEN
    inputs = [net.input("x", [STEPS, 2, INPUTS])]
    inputs += [
        net.weight("w", net.random(directions, rows, INPUTS, scale=0.4)),
        net.weight("r", net.random(directions, rows, HIDDEN, scale=0.4)),
        net.weight("b", net.random(directions, 2 * rows, scale=0.4)) if bias else "",
        "" if lengths is None else net.weight("lengths", np.full(2, lengths, np.int32)),
    ]
    if states:
        names = ["h", "c"] if kind == "LSTM" else ["h"]
        inputs += [net.weight(name, net.random(directions, 2, HIDDEN)) for name in names]
    options = {"linear_before_reset": 1} if kind == "GRU" else {}
    count = 3 if kind == "LSTM" else 2
    made = [f"y{i}" for i in range(count)]
    direction = "bidirectional" if both else "forward"
    settings = {"hidden_size": HIDDEN, "direction": direction} | options | attributes
    settings = {key: value for key, value in settings.items() if value is not None}
    net.nodes.append(helper.make_node(kind, inputs, made, name="layer", **settings))
    for name in made:
        net.output(name)
    return net.model()


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"states": True}, {"lengths": STEPS}])
def test_layers_agree_with_onnxruntime(kind, both, options):
    proto = network(kind, both=both, **options)
    view = trainer().view(from_proto(proto))
    given = feeds(proto, 2)
    assert distance(run(proto, given), trainer().session(view).run(given)) <= CLOSE


@pytest.mark.parametrize("kind", GATES)
def test_they_are_trained_and_written_back(kind):
    proto = network(kind, both=True)
    model = from_proto(proto)
    view, given = trainer().view(model), feeds(proto, 2)
    optimizer = torch.optim.SGD(view.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (view(torch.from_numpy(given["x"]))[0] - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert {name for name, _ in trainer().weights(view).items()} == {"w", "r", "b"}
    assert losses[-1] < losses[0] and all(p.grad is not None and p.grad.abs().sum() > 0 for p in view.parameters())
    trainer().write_back(view, model)
    found = backend("onnxruntime").session(model, optimize=False).run(given)
    assert distance(found, trainer().session(view).run(given)) <= CLOSE
    assert distance(found, run(proto, given)) > 100 * CLOSE


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("GRU", {"linear_before_reset": 0}, "has linear_before_reset=0"),
        ("GRU", {"linear_before_reset": None}, "has linear_before_reset='its default'"),
        ("LSTM", {"direction": "reverse"}, "has direction='reverse'"),
        ("LSTM", {"clip": 1.0}, "has clip=1.0"),
        ("RNN", {"activations": ["Relu"]}, r"has activations=\('Relu',\)"),
    ],
)
def test_other_kinds_are_refused_by_name(kind, options, text):
    with pytest.raises(BadInput, match=f"cannot be trained: {kind} .* {text}, which has no trainable form"):
        trainer().view(from_proto(network(kind, **options)))


def test_sequences_of_several_lengths_are_refused():
    proto = network("GRU", lengths=STEPS - 2)
    view = trainer().view(from_proto(proto))
    with pytest.raises(BadInput, match="GRU over sequences of several lengths has no trainable form"):
        trainer().session(view).run(feeds(proto, 2))
