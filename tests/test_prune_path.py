"""effc.passes._prune_path and _widths: what steps save adds up to what the smaller model costs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from effc.capture import from_proto
from effc.channels import channels
from effc.contract import Context
from effc.cost import Cost, cost
from effc.passes._prune_path import Choice, path, ranked, steps_of
from effc.passes._widths import Coupled, Widths, less, prunable
from effc.registry import backend
from effc.removal import remove_units
from effc.target import find
from tests.networks import NETWORKS, Net
from tests.test_channels import heads

NAMES = ("plain", "residual", "depthwise", "branches", "mlp")


def chain() -> onnx.ModelProto:
    """Three layers in a row, the middle one dear on both sides."""
    net = Net("chain")
    x = net.relu(net.conv(net.input("x", ["N", 3, 8, 8]), 3, 16, 1, name="a"))
    x = net.relu(net.conv(x, 16, 16, 3, name="b", pads=[1] * 4))
    net.head(x, 16)
    return net.model()


def recurrent() -> onnx.ModelProto:
    """A dense layer of eight units in front of an LSTM of four."""
    net = Net("recurrent")
    x = net.relu(net.node("MatMul", net.input("x", [5, 1, 3]), net.weight("w", net.random(3, 8))))
    weights = [net.weight(n, net.random(1, 16, size, scale=0.4)) for n, size in (("input", 8), ("state", 4))]
    net.node("LSTM", x, *weights, name="lstm", outputs=2, hidden_size=4)
    last = net.node("Squeeze", "lstm_1", net.weight("axes", np.array([0])))
    net.output(net.node("MatMul", last, net.weight("v", net.random(4, 3))), [1, 3])
    return net.model()


def widths_of(proto: onnx.ModelProto) -> tuple[Widths, list[Coupled]]:
    model = from_proto(proto)
    context = Context(model, find("onnxruntime-avx2"), backend("onnxruntime"))
    groups = [item for item in prunable(model) if isinstance(item, Coupled)]
    return Widths(model, groups, model.shapes(1), context, timed=False), groups


@pytest.mark.parametrize("name", NAMES)
def test_savings_of_a_path_are_those_of_the_smaller_model(name):
    proto = NETWORKS[name]()
    widths, groups = widths_of(proto)
    choices = {
        g.name: Choice(steps_of(g.count, 1, 0.6), np.linspace(0, 1, len(steps_of(g.count, 1, 0.6)))) for g in groups
    }
    steps = path(widths, choices, "macs", lambda saved: False)
    left = {step.site: step.left for step in steps}
    model = from_proto(proto)
    gone = {unit for g in groups for unit in g.group.units[left.get(g.name, g.count) :]}
    before = cost(model, 1).total
    remove_units(model, gone)
    after, saved = cost(model, 1).total, sum((step.saved for step in steps), Cost())
    assert before.macs - saved.macs == pytest.approx(after.macs, rel=0.02)  # counts of single layers are rounded
    assert before.weight_bytes - saved.weight_bytes == pytest.approx(after.weight_bytes, rel=0.1)  # biases count alike


def test_the_last_step_goes_no_further_than_is_enough():
    """Units that are free go in one step, all but one, where nothing else is asked."""
    widths, groups = widths_of(chain())
    choices = {g.name: Choice(steps_of(g.count, 1, 0.95), np.zeros(len(steps_of(g.count, 1, 0.95)))) for g in groups}
    total = cost(from_proto(chain()), 1).total.macs
    steps = path(widths, choices, "macs", lambda saved: saved.macs >= 0.3 * total)
    saved = sum(step.saved.macs for step in steps)
    unit = total / 16
    assert 0.3 * total <= saved <= 0.3 * total + unit


def test_costs_of_attention_and_of_recurrent_layers_follow_their_units():
    """Scores go by heads; of a recurrent layer only the matrix that reads units shrinks."""
    widths, groups = widths_of(recurrent())
    (group,) = groups
    steps, hidden = 5, 4
    saved = widths.saving(group.name, 2).macs
    assert saved == steps * 6 * (3 + 4 * hidden)  # six of eight units: made by one layer, read by four gates
    widths, groups = widths_of(heads())
    (attention,) = (g for g in groups if g.count == 3)
    left = from_proto(heads())
    before = cost(left, 1).total.macs
    remove_units(left, set(attention.group.units[:1]))
    assert widths.saving(attention.name, 2).macs == before - cost(left, 1).total.macs


def test_a_path_ends_where_enough_is_saved():
    widths, groups = widths_of(chain())
    choices = {
        g.name: Choice(steps_of(g.count, 1, 0.9), np.arange(len(steps_of(g.count, 1, 0.9))) ** 2.0) for g in groups
    }
    total = sum(widths.cost(name).macs for name in ("node_a", "node_b", "node_fc"))
    steps = path(widths, choices, "macs", lambda saved: saved.macs >= total / 2)
    saved = sum(step.saved.macs for step in steps)
    assert saved >= total / 2 > saved - steps[-1].saved.macs


def test_the_cheap_unit_goes_first():
    widths, groups = widths_of(chain())
    first, second = (g.name for g in groups)
    choices = {first: Choice([16, 8], [0.0, 1e-3]), second: Choice([16, 8], [0.0, 1.0])}
    steps = path(widths, choices, "macs", lambda saved: False)
    assert [step.site for step in steps] == [first, second]
    assert steps[1].saved.macs < widths_of(chain())[0].saving(second, 8).macs  # half of its inputs are gone already


def test_alike_takes_the_same_share_of_all():
    widths, groups = widths_of(chain())
    choices = {g.name: Choice([16, 12, 8, 4], [0.0, 1.0, 2.0, 3.0]) for g in groups}
    steps = ranked(widths, choices, lambda saved: False, alike=True)
    assert [step.left for step in steps] == [12, 12, 8, 8, 4, 4]


def test_ranked_goes_by_damage_alone():
    widths, groups = widths_of(chain())
    first, second = (g.name for g in groups)
    choices = {first: Choice([16, 8, 4], [0.0, 8.0, 20.0]), second: Choice([16, 8, 4], [0.0, 4.0, 10.0])}
    steps = ranked(widths, choices, lambda saved: False, alike=False)
    assert [step.site for step in steps] == [second, first, second, first]


def test_sizes_are_multiples_down_to_what_has_to_stay():
    assert steps_of(20, 8, 0.9) == [20, 16, 8]
    assert steps_of(16, 8, 0.9) == [16, 8]
    assert steps_of(6, 8, 0.9) == [6]
    assert steps_of(10, 1, 0.5) == [10, 9, 8, 7, 6, 5]


def test_reasons_of_what_cannot_be_pruned():
    model = from_proto(NETWORKS["plain"]())
    told = dict(item for item in prunable(model) if isinstance(item, tuple))
    assert told == {"node_fc": "'fc' is an output of the model"}
    assert {len(g.units) for g in channels(model).groups if g.pinned is None} == {8, 16}


def test_less_is_what_is_left():
    assert less(Cost(10, 8, 32, 4, 2.0, 1.0), Cost(4, 3, 12, 1, 0.5, 0.25)) == Cost(6, 5, 20, 3, 1.5, 0.75)
