"""What holds for every registered pass, on every small network. A new pass is in here as soon as it is registered."""

import itertools
import re

import onnx
import pytest
import yaml

import effc
import effc.capture
from effc import registry
from effc.capture import from_proto
from effc.contract import Pass
from effc.history import KEPT, UNDONE
from effc.recipe import build, describe, dump_recipe, format_calls, load_recipe, options, parse
from tests import conformance
from tests.conformance import BOUNDS, OPTIONS, Cell, make, pass_names, put_through, recipe, refusals
from tests.networks import NETWORKS, distance, feeds, run

PASSES = pass_names()
PAIRED = ("plain", "depthwise", "transformer", "control", "two_outputs")  # for pairs: one of each kind
ROUNDING = {"half": 4e-3}  # float16 has steps of 1e-3; elsewhere a pass's own tolerance holds
HELD: dict[tuple[str, str], tuple[onnx.ModelProto, effc.Result]] = {}


def result(name: str, network: str) -> tuple[onnx.ModelProto, effc.Result]:
    """Of one pass, run once for all tests."""
    if (name, network) not in HELD:
        HELD[name, network] = put_through(recipe(name), network)
    return HELD[name, network]


def bound(*names: str, network: str) -> float:
    """How far the outputs may be from the original's."""
    total = 0.0
    for name in names:
        step = make(name)
        total += max(step.tolerance, ROUNDING.get(network, 0.0)) if step.exact else BOUNDS[name]
    return total


def test_every_pass_states_what_is_expected_of_it():
    assert set(PASSES) <= set(OPTIONS), "tests/conformance.py lists the options of each pass"
    lossy = {name for name in PASSES if not registry.pass_class(name).exact}
    assert lossy <= set(BOUNDS), "tests/conformance.py bounds what each lossy pass may do to outputs"
    for name in PASSES:
        cls = registry.pass_class(name)
        assert cls.__doc__ and len(cls.__doc__.strip().splitlines()[0]) > 10
        assert cls.tolerance > 0 if cls.exact else cls.tolerance == 0


@pytest.mark.parametrize("name", PASSES)
def test_every_option_is_documented_and_tried(name):
    known = {option.name: option for option in options(registry.pass_class(name))}
    assert all(option.description for option in known.values())
    tried = {key for text in OPTIONS[name] for key in describe(build(parse(text))[0]).options}
    assert tried == set(known)  # also: each value differs from the default, else describe() would leave it out


@pytest.mark.parametrize("text", [*PASSES, *(text for name in PASSES for text in OPTIONS[name])])
def test_options_go_through_text_and_yaml(tmp_path, text):
    (step,) = build(parse(text))
    said = format_calls([describe(step)])
    assert build(parse(said)) == (step,)
    assert format_calls([describe(build(parse(said))[0])]) == said
    (tmp_path / "r.yaml").write_text(dump_recipe([step]), encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml") == (step,)
    nested = f"repeat{{steps=3, passes=[{said}]}}"
    assert build(parse(nested))[0].passes == (step,)
    assert yaml.safe_load(dump_recipe(build(parse(nested))))["passes"][0]["repeat"]["steps"] == 3


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_frozen_value(name):
    step = make(name)
    assert step == make(name) and hash(step) == hash(make(name))
    assert isinstance(step, Pass)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", PASSES)
def test_the_result_is_valid_and_right(name, network):
    proto, found = result(name, network)
    after = found.model.proto()
    onnx.checker.check_model(after, full_check=True)
    assert [(i.name, i.type) for i in after.graph.output] == [(i.name, i.type) for i in proto.graph.output]
    weights = {t.name for t in proto.graph.initializer}
    assert [i.name for i in after.graph.input] == [i.name for i in proto.graph.input if i.name not in weights]
    batches = (1,) if found.model.batch else (1, 2, 5)
    for batch, seed in itertools.product(batches, (0, 1)):
        inputs = feeds(proto, batch=batch, seed=seed)
        assert distance(run(proto, inputs), run(after, inputs)) <= bound(name, network=network)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", PASSES)
def test_the_written_file_gives_the_same_outputs(tmp_path, name, network):
    proto, found = result(name, network)
    path = effc.save(found.model, tmp_path / "m.onnx")
    inputs = feeds(proto)
    here = run(found.model.proto(), inputs)
    assert distance(here, run(onnx.load(path), inputs)) == 0
    assert distance(here, run(effc.load(path).proto(), inputs)) == 0


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", PASSES)
def test_the_ledger_is_complete(name, network):
    proto, found = result(name, network)
    (record,) = found.history.passes
    before = from_proto(proto)
    assert [(e.node, e.op) for e in record.ledger] == [(node.name, node.op_type) for node in before.graph]
    after = {node.name for node in found.model.graph}
    for entry in record.ledger:
        assert entry.status in ("changed", "skipped")
        assert bool(entry.reason) == (entry.status == "skipped")
        assert "\n" not in entry.reason
        if record.status == KEPT:
            assert set(entry.to) <= after
    assert record.status in (KEPT, "unchanged", UNDONE)
    assert bool(record.reason) == (record.status != KEPT)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_changes_something_and_refuses_something_with_a_reason(name):
    records = {network: result(name, network)[1].history.passes[0] for network in NETWORKS}
    assert any(record.status == KEPT for record in records.values())
    reasons = {reason for record in records.values() for reason in refusals(record)}
    assert reasons, f"{name} leaves nothing alone with a reason of its own on any network"
    for reason in reasons:
        assert len(reason) > 15 and not re.search(r"Error|Traceback|<.* at 0x", reason), reason


@pytest.mark.parametrize("network", PAIRED)
@pytest.mark.parametrize("name", PASSES)
def test_for_tensorrt_the_result_keeps_its_rules(name, network):
    """And is as right, run by onnxruntime in its stead."""
    proto, found = put_through(recipe(name), network, target_name="tensorrt", measure=True)
    assert [str(f) for f in registry.checker("tensorrt").check(found.model) if f.error] == []
    assert found.history.latency is None and found.history.unproven[0].startswith("no TensorRT engine was built")
    inputs = feeds(proto)
    assert distance(run(proto, inputs), run(found.model.proto(), inputs)) <= bound(name, network=network)


REFUSALS = [
    ("simplify", "control", "node_choice", "If holds a sub-graph, which is passed through untouched"),
    ("fold-batchnorm", "two_outputs", "node_left_bn", "the weight of 'node_conv_left' is shared with another node"),
    ("fold-batchnorm", "branches", "node_dense_bn", "it stands behind Concat 'node_concat'"),
    ("equalize", "plain", "node_conv1", "BatchNormalization 'node_bn1' is no scaling of what it reads"),
    ("smooth", "plain", "node_fc", "scales cannot pass Flatten 'node_flat'"),
    ("bound-masks", "transformer", "node_softmax47", "nothing masks its input"),
    ("unfuse", "residual", "node_b1_add", "no slower kernel is made of it"),
    ("low-rank", "half", "node_conv1", "its weight is float16; float32 is factorised"),
    ("low-rank", "two_outputs", "node_conv_left", "its weight is shared with 'node_conv_right'"),
    ("prune-weights", "transformer", "node_matmul45", "its right operand is no constant"),
    ("prune-channels", "transformer", "node_q", "simplify makes them numbers"),
    ("prune-blocks", "residual", "node_b2_add", "both of its operands come from layers of their own"),
    ("prune-groups", "depthwise", "node_dw", "it is depthwise"),
    ("weight-only", "transformer", "node_matmul45", "its right operand is no constant"),
    ("recover", "control", "node_conv1", "trainable forms of local.Swish (node_swish) are unknown"),
    ("recover", "depthwise", "node_conv", "the model's batch is fixed at 1: training needs a free batch"),
    ("group-lasso", "half", "node_conv1", "its weight is float16"),
    ("int8", "half", "node_conv1", "its weight is float16; float32 is lowered"),
    ("int8", "transformer", "node_matmul45", "its right operand is no constant"),
    ("int8", "two_outputs", "node_conv_left", "a batch norm follows it: run fold-batchnorm first"),
]


@pytest.mark.parametrize(("name", "network", "node", "words"), [row for row in REFUSALS if row[0] in PASSES])
def test_refusals_in_words(name, network, node, words):
    record = result(name, network)[1].history.passes[0]
    entry = next((e for e in record.ledger if e.node == node), None)
    assert entry is not None, [e.node for e in record.ledger]
    assert words in entry.reason


def test_a_refusal_of_each_pass_is_quoted():
    assert {name for name, *_ in REFUSALS} >= set(PASSES)


def test_without_calibration_int8_says_what_it_needs():
    record = put_through("int8", "plain", calibrate=None)[1].history.passes[0]
    assert set(refusals(record)) == {"a convolution needs calibration data: give --calibrate SPEC"}
    assert [e.node for e in record.ledger if e.status == "changed"] == ["node_fc"]


@pytest.mark.parametrize("network", PAIRED)
@pytest.mark.parametrize(("first", "second"), list(itertools.product(PASSES, PASSES)))
def test_every_ordered_pair_gives_a_right_model(first, second, network):
    proto, found = put_through(f"{recipe(first)}, {recipe(second)}", network)
    statuses = [record.status for record in found.history.passes]
    assert len(statuses) == 2 and set(statuses) <= {KEPT, "unchanged", UNDONE}
    assert all(record.reason for record in found.history.passes if record.status != KEPT)
    if first == second and statuses[0] == KEPT and make(first).exact:
        assert statuses[1] != UNDONE
    inputs = feeds(proto)
    after = found.model.proto()
    onnx.checker.check_model(after, full_check=True)
    assert distance(run(proto, inputs), run(after, inputs)) <= bound(first, second, network=network)
    assert set(found.history.node_map) == {e.node for e in found.history.passes[0].ledger}
    heirs = {new for to in found.history.node_map.values() for new in to}
    assert heirs == {node.name for node in found.model.graph}


@pytest.mark.parametrize("name", [name for name in PASSES if registry.pass_class(name).exact])
def test_once_more_finds_nothing_left_to_do(name):
    """An exact pass reaches its goal at once; a second run over its result changes no node."""
    for network in NETWORKS:
        _, first = result(name, network)
        again = effc.optimize(first.model, recipe(name), dims=conformance.DIMS, measure=False)
        assert not again.history.changed, network


def test_the_table_of_what_works_says_what_was_found():
    lines = conformance.table(["fold-batchnorm", "int8", "fold-batchnorm, int8"]).splitlines()
    assert lines[:2] == [
        "| network | `fold-batchnorm` | `int8` | `fold-batchnorm, int8` |",
        "| --- | --- | --- | --- |",
    ]
    rows = {line.split(":")[0].strip("| "): line for line in lines[2:] if line.startswith("|")}
    assert set(rows) == set(NETWORKS)
    assert all(line.count("|") == 5 for line in rows.values())
    assert "| changed 4 of 11 |" in rows["plain"]
    assert "| nothing to do |" in rows["transformer"]
    number = re.search(r"\| refused \[(\d+)\] \|", rows["two_outputs"])
    assert number is not None
    assert any(line.startswith(f"{number[1]}. the weight of 'node_conv_") for line in lines)
    assert str(Cell(UNDONE, 2, 4, ["it drifts"])) == "undone: it drifts"
