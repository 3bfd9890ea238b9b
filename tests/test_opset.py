"""Lifting the operator set: names, outputs and large weights are kept; a refusal changes nothing."""

import onnx
import pytest

from effc.capture import from_proto
from effc.errors import PassFailed
from effc.opset import ir_version_of, lift_opset
from tests import networks
from tests.networks import NETWORKS, distance, feeds, run
from tests.test_edit import check, state, unchanged


@pytest.mark.parametrize("target", [13, 17, 21])
def test_lifting_the_opset_keeps_names_and_outputs(target):
    proto = networks.old()
    model = from_proto(proto)
    names = [n.name for n in model.graph]
    weights = set(model.graph.initializers)
    lift_opset(model, target)
    assert model.opset == target
    assert [n.name for n in model.graph if n.name in names] == names
    assert weights <= set(model.graph.initializers)
    inputs = feeds(proto)
    assert distance(run(proto, inputs), run(check(model), inputs)) <= 1e-6


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"control"}))
def test_lifting_every_network(name):
    proto = NETWORKS[name]()
    model = from_proto(proto)
    lift_opset(model, 21)
    inputs = feeds(proto)
    assert distance(run(proto, inputs), run(check(model), inputs)) <= 1e-6


def test_lifting_keeps_functions_and_branches():
    proto = networks.control()
    model = from_proto(proto)
    lift_opset(model, 21)
    inputs = feeds(proto)
    assert distance(run(proto, inputs), run(check(model), inputs)) <= 1e-6


def test_lifting_never_lowers():
    model = from_proto(networks.plain())
    before = state(model)
    lift_opset(model, 13)
    assert unchanged(model, *before)


def test_lifting_keeps_large_weights_as_they_are():
    """The very tensors, not copies of them: a model of gigabytes must not be copied."""
    net = networks.Net("large", opset=11)
    x = net.input("x", ["N", 64])
    net.output(net.linear(x, 64, 64, name="fc"), ["N", 64])
    model = from_proto(net.model())
    tensor = model.value("fc.weight").const_value
    lift_opset(model, 17)
    assert model.value("fc.weight").const_value is tensor


def test_a_lift_that_onnx_refuses_changes_nothing(monkeypatch):
    model = from_proto(networks.old())
    before = state(model)

    def refuse(proto, version):
        raise RuntimeError("no adapter for Upsample\nmore words")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    with pytest.raises(PassFailed, match=r"^opset 9 could not be lifted to 13: no adapter for Upsample$"):
        lift_opset(model, 13)
    assert unchanged(model, *before)


@pytest.mark.parametrize(("opset", "version"), [(7, 3), (9, 4), (13, 7), (17, 8), (20, 9), (21, 10), (23, 11)])
def test_file_version_of_an_opset(opset, version):
    assert ir_version_of(opset) == version
