"""effc.inspection, and how it is told: numbers by hand for a small network with a prediction made up for it."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from effc import BadInput
from effc.capture import from_proto
from effc.cost import Cost, cost
from effc.energy import on_target
from effc.inspection import CHANGED, GONE, NEW, SAME, Inspection, compare, grouped, inspect, stated_batch
from effc.inspection_data import as_csv, as_data, comparison_csv, comparison_data
from effc.inspection_report import comparison_table, shorten, si, table, training_table
from effc.model import Model
from effc.predict import MEASURED, ROOFLINE, Estimate, Prediction
from effc.target import Roof, Target, find
from effc.training import training_cost
from tests import networks

# Each node's time in microseconds; conv1 takes bn1 and its ReLU in, the pool is known by its roofline alone.
TIMES = {"node_conv1": 30, "node_conv2": 40, "node_bn2": 4, "node_conv3": 20, "node_pool": 1, "node_fc": 2}
INTO_CONV1 = {"node_bn1": "node_conv1", "node_relu2": "node_conv1"}
FUSED = INTO_CONV1 | {"node_flat": ""}  # a view, of which nothing is left


def target(**changes) -> Target:
    roof = Roof({"float32": 1e9}, bandwidth=1e9, overhead=1e-6, run_overhead=2e-6)
    return replace(find("onnxruntime-avx2"), **({"roofs": {1: roof}, "name": "made up"} | changes))


def prediction(**changes: float) -> Prediction:
    times = {
        name: Estimate(changes.get(name, us) / 1e6, 0.1, ROOFLINE if name == "node_pool" else MEASURED)
        for name, us in TIMES.items()
        if changes.get(name, us) is not None
    }
    moved = {"reorder": Estimate(1e-6, 0.5, MEASURED)}
    total = sum(e.seconds for e in (*times.values(), *moved.values())) + 2e-6
    return Prediction(Estimate(total, 0.05, MEASURED), times, FUSED, moved, notes=("flat is a view",))


def inspected(model: Model | None = None, **changes) -> Inspection:
    return inspect(model or from_proto(networks.plain()), target(), prediction(**changes))


def printed(what, width: int = 120) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(what)
    return text.getvalue()


def test_layers_that_take_most_time_come_first():
    found = inspected()
    names = [layer.name for layer in found.layers]
    assert names[:6] == ["node_conv2", "node_conv1", "node_conv3", "node_bn2", "node_fc", "node_pool"]
    assert set(names[-2:]) == set(INTO_CONV1)  # these last, and before them what takes no time
    assert {layer.name for layer in found.layers} == {node.name for node in from_proto(networks.plain()).graph}
    assert [layer.seconds for layer in found.layers] == sorted((layer.seconds for layer in found.layers), reverse=True)


def test_shares_add_up_to_one():
    found = inspected()
    assert found.predicted.seconds == pytest.approx(100e-6, rel=1e-12, abs=0)
    by_name = {layer.name: layer.share for layer in found.layers}
    assert by_name["node_conv2"] == pytest.approx(0.4, rel=1e-12, abs=0)
    assert by_name["node_bn1"] is None and by_name["node_flat"] is None
    assert {layer.name for layer in found.layers if layer.fused_into is not None} == set(INTO_CONV1)
    assert [(row.name, pytest.approx(row.share, rel=1e-9, abs=0)) for row in found.added] == [
        ("run overhead", 0.02),
        ("reorder", 0.01),
    ]
    shares = [row.share or 0.0 for row in (*found.layers, *found.added)]
    assert sum(shares) == pytest.approx(1.0, rel=1e-12, abs=0)


def test_a_layer_by_hand():
    """conv1 with its batch norm and ReLU: 3 channels of 12 x 12 in, 8 out, 108 weights and 32 numbers of batch norm."""
    model = from_proto(networks.plain())
    found = inspected(model)
    conv = next(layer for layer in found.layers if layer.name == "node_conv1")
    assert (conv.op, conv.shape, conv.operands, conv.fuses) == (
        "Conv",
        (1, 8, 12, 12),
        "float32",
        ("BatchNormalization", "Relu"),
    )
    macs, weights, activations = 144 * 8 * 27, 4 * (8 * 27 + 4 * 8), 4 * 144 * (3 + 8)
    assert conv.cost == Cost(macs, 8 * 27, 4 * 8 * 27, 4 * 144 * 3, conv.cost.energy, 30e-6)
    assert conv.intensity == pytest.approx(macs / (weights + activations), rel=1e-12, abs=0)
    assert conv.roofline == pytest.approx(max(macs, weights + activations) / 1e9 + 1e-6, rel=1e-12, abs=0)
    assert conv.predicted == Estimate(30e-6, 0.1, MEASURED)
    assert conv.kernel == Cost(macs, 8 * 27 + 32, weights, activations, conv.kernel.energy, 30e-6)
    by_hand = (macs * 4.6 + weights * 160 + activations * 1.25) * 1e-12  # all of it fits the cache
    assert conv.kernel.energy == pytest.approx(by_hand, rel=1e-9, abs=0)
    norm = next(layer for layer in found.layers if layer.name == "node_bn1")
    assert norm.kernel == Cost()
    assert (norm.fused_into, norm.predicted, norm.roofline, norm.intensity) == ("node_conv1", None, None, None)
    assert norm.cost.parameters == 32


def test_totals_are_those_of_the_cost():
    model = from_proto(networks.plain())
    found = inspected(model)
    bare = cost(model).total
    assert replace(found.total, energy=0.0, seconds=0.0, activation_bytes=0) == replace(bare, activation_bytes=0)
    assert found.total == on_target(model, target(), prediction=prediction()).total
    assert found.total.seconds == found.predicted.seconds
    kernels = sum((layer.kernel for layer in found.layers), Cost())
    assert replace(kernels, energy=0.0, seconds=0.0) == replace(found.total, energy=0.0, seconds=0.0)
    assert kernels.energy == pytest.approx(found.total.energy, rel=1e-12, abs=0)
    moved = found.total.weight_bytes + found.total.activation_bytes
    assert found.intensity == pytest.approx(bare.macs / moved, rel=1e-12, abs=0)
    rooflines = [layer.roofline for layer in found.layers if layer.roofline is not None]
    assert len(rooflines) == len(TIMES)
    assert found.roofline == pytest.approx(sum(rooflines) + 2e-6, rel=1e-12, abs=0)


def test_notes_tell_where_figures_come_from():
    model = from_proto(networks.plain())
    some = target(source="a data sheet", remark="it stands in for another")
    found = inspect(model, some, prediction(), threads=3)
    assert found.notes == (
        "target made up: published figures, a data sheet",
        "it stands in for another",
        "the target knows 1 threads: the roofline of 3 is that of the next of these below",
        "flat is a view",
    )


def test_what_is_unknown_is_told_by_reason():
    model = from_proto(networks.control())
    found = inspect(model, target(), Prediction(Estimate(1e-5, 0.1, ROOFLINE), {}))
    assert grouped(found.unknown) == {
        "local.Swish is a local function, passed through untouched": ["node_swish"],
        "If holds a sub-graph, which is passed through untouched": ["node_choice"],
    }
    assert not any("not analysed" in note for note in found.notes)
    assert "unknown: node_swish: local.Swish is a local function" in printed(table(found))


@pytest.mark.parametrize(
    ("name", "batch", "dims", "words"),
    [
        ("depthwise", 2, {}, "the model's batch is fixed at 1; it cannot be inspected at --batch 2"),
        ("plain", None, {"T": 3}, "the model has no dimension 'T'; its dynamic dimensions are N"),
        ("depthwise", None, {"T": 3}, "the model has no dimension 'T'; all its dimensions are fixed"),
        ("sound", None, {}, "the dimension 'T' is dynamic: state it with --dim T=value"),
        ("plain", 2, {"N": 3}, "--dim N=3 and --batch 2 give the batch two sizes; give one of them"),
    ],
)
def test_sizes_that_cannot_be(name, batch, dims, words):
    with pytest.raises(BadInput) as found:
        stated_batch(from_proto(networks.NETWORKS[name]()), batch, dims)
    assert str(found.value) == words


def test_sizes_that_can():
    model = from_proto(networks.plain())
    assert [stated_batch(model, batch, {}) for batch in (None, 1, 7)] == [1, 1, 7]
    assert stated_batch(model, None, {"N": 5}) == stated_batch(model, 5, {"N": 5}) == 5
    assert stated_batch(from_proto(networks.depthwise()), None, {}) == 1
    assert stated_batch(from_proto(networks.sound()), 2, {"T": 6}) == 2


def thinner() -> Model:
    """plain with conv1 stored in fewer bytes of another name, and no last ReLU."""
    proto = networks.plain()
    nodes = {node.name: node for node in proto.graph.node}
    nodes["node_conv3"].output[0], removed = nodes["node_relu7"].output[0], nodes["node_relu7"]
    proto.graph.node.remove(removed)
    nodes["node_conv1"].name = "node_stem"
    return from_proto(proto)


def test_two_models_side_by_side():
    names = {node.op_type + node.name for node in from_proto(networks.plain()).graph}
    assert "Relunode_relu7" in names
    a = inspected()
    b = inspect(thinner(), target(), prediction(node_conv1=None, node_conv2=5))
    found = compare(a, b)
    totals = {total.name: total for total in found.totals}
    assert totals["nodes"].a - totals["nodes"].b == 1
    assert totals["predicted"].ratio == pytest.approx(0.35, rel=1e-12, abs=0)
    assert totals["MACs"].ratio == 1.0
    pairs = {pair.name: pair for pair in found.layers}
    assert [pair.name for pair in found.layers[:2]] == ["node_conv2", "node_conv1"]  # -35 and -30 us
    assert (pairs["node_conv2"].status, pairs["node_conv2"].seconds) == (
        CHANGED,
        pytest.approx(-35e-6, rel=1e-9, abs=0),
    )
    assert (pairs["node_conv1"].status, pairs["node_conv1"].macs) == (GONE, -144 * 8 * 27)
    assert (pairs["node_stem"].status, pairs["node_stem"].macs) == (NEW, 144 * 8 * 27)
    assert pairs["node_relu7"].status == GONE and pairs["node_bn2"].status == SAME
    assert compare(a, a).layers[0].status == SAME and {t.ratio for t in compare(a, a).totals} == {1.0}


def test_a_ratio_to_nothing_is_none():
    bare = inspect(from_proto(networks.plain()), target(), Prediction(Estimate(0.0, 0.0, ROOFLINE), {}))
    assert compare(bare, bare).totals[0].ratio is None
    assert {row.share for row in bare.layers} == {None} and bare.added == ()
    assert printed(table(bare)) and printed(comparison_table(compare(bare, bare)))


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (1_234_567, "", "1.23M"),
        (999_999, "", "1M"),
        (12, "B", "12B"),
        (45_600, "B", "45.6kB"),
        (0.25, "", "0.25"),
        (1.5e-7, "s", "150ns"),
        (1.2e-5, "s", "12us"),
        (0.0123, "s", "12.3ms"),
        (2.0, "s", "2s"),
        (3.6e-6, "J", "3.6uJ"),
        (1e-15, "J", "0.001pJ"),
        (-4e-6, "s", "-4us"),
        (3.12e14, "FLOP/s", "312TFLOP/s"),
        (0, "B", ""),
        (None, "", ""),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(number, unit, text):
    assert si(number, unit) == text


def test_long_names_lose_their_middle():
    assert shorten("short", 5) == "short"
    assert shorten("model.layer1.block2.conv3", 11) == "model…conv3"
    assert len(shorten("x" * 100, 17)) == 17


def test_the_table_tells_layers_totals_and_notes():
    text = printed(table(inspected()))
    lines = text.splitlines()
    assert lines[0].rstrip() == "model on made up (published), batch 1, 1 thread"
    layers = [line for line in lines if line.startswith("node_")]
    assert [line.split()[0] for line in layers[:3]] == ["node_conv2", "node_conv1", "node_conv3"]
    assert "Conv+2" in layers[1] and "1x8x12x12" in layers[1] and "30us" in layers[1] and "10%" in layers[1]
    assert "> 1us" in next(line for line in layers if "node_pool" in line)  # a lower bound
    assert not any("node_bn1" in line for line in lines)  # part of conv1's kernel
    assert "> by the roofline alone" in text and "Conv+2: two more nodes" in text
    assert "+ reorder" in text and "by runtime" in text and "+ run overhead" in text
    assert any(line.startswith("total") and "100us" in line and "100%" in line for line in lines)
    assert "note: flat is a view" in text
    assert max(map(len, lines)) <= 120


def test_the_longest_bar_is_that_of_the_layer_that_takes_most():
    lines = printed(table(inspected(), top=0)).splitlines()
    bars = {line.split()[0]: line.count("█") for line in lines if line.strip().startswith("node_")}
    assert bars["node_conv2"] == 6 and bars["node_conv1"] == 4 and bars["node_conv3"] == 3 and bars["node_bn1"] == 0


def test_the_rest_is_summed_up():
    text = printed(table(inspected(), top=2))
    assert "and 6 more, 30% of the time; nodes inside of kernels or free: 5; --top 0 shows all" in text
    assert "node_conv3" not in text
    assert "and nodes inside of kernels or free: 5" in printed(table(inspected(), top=8))
    assert "--top 0" not in printed(table(inspected(), top=0))


def test_all_nodes_stand_under_their_kernels():
    lines = printed(table(inspected(), top=0)).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("node_conv1"))
    assert [line.split()[0] for line in lines[first + 1 : first + 3]] == ["node_bn1", "node_relu2"]
    assert all(line.startswith("  node_") for line in lines[first + 1 : first + 3])
    names = [line.split()[0] for line in lines if line.strip().startswith("node_")]
    assert sorted(names) == sorted(layer.name for layer in inspected().layers)
    assert set(names[-3:]) == {"node_relu5", "node_relu7", "node_flat"}  # nothing is left of these


def test_operators_are_named_where_there_is_room():
    layer = inspected().layers[0]
    fused = {
        (): "Conv",
        ("Relu",): "Conv+Relu",
        ("Constant", "Relu"): "Conv+Relu",
        ("Constant",): "Conv",
        ("BatchNormalization",): "Conv+1",
        ("Add", "Relu"): "Conv+Add+Relu",
        ("BatchNormalization", "Add", "Constant"): "Conv+2",
    }
    for fuses, text in fused.items():
        shown = printed(table(replace(inspected(), layers=(replace(layer, fuses=fuses),))))
        assert next(line for line in shown.splitlines() if line.startswith(layer.name)).split()[1] == text
        assert ("two more nodes" in shown) == bool(re.search(r"\d", text))


def test_what_the_runtime_adds_is_one_row_a_kind():
    moved = {f"n{i} (ReorderInput)": Estimate(i * 1e-6, 0.1 * i, MEASURED) for i in (1, 3)}
    made_up = replace(prediction(), moved=moved | {"c (Cast)": Estimate(1e-6, 0.3, ROOFLINE)})
    text = printed(table(inspect(from_proto(networks.plain()), target(), made_up)))
    rows = {line.partition("by runtime")[0].strip(): line.split() for line in text.splitlines() if "by runtime" in line}
    assert set(rows) == {"+ 2 ReorderInput", "+ Cast"}
    assert rows["+ 2 ReorderInput"][5:7] == ["4us", "25%"]  # (1 x 0.1 + 3 x 0.3) / 4
    assert rows["+ Cast"][4:7] == [">", "1us", "30%"]


def test_notes_of_one_reason_are_one():
    notes = tuple(
        f"{n} {kind} by the roofline alone: why" for n, kind in zip((1, 9, 2, 3, 4, 5), "abcdef", strict=True)
    )
    some = replace(inspected(), notes=("other", *notes, "7 g by the roofline alone: because"))
    text = printed(table(some))
    assert "note: by the roofline alone, as why: 9 b, 5 f, 4 e, 3 d and 2 more" in text
    assert "note: by the roofline alone, as because: 7 g" in text and "note: other" in text
    bare = Prediction(Estimate(1e-5, 0.5, ROOFLINE), {"node_fc": Estimate(1e-5, 0.5, ROOFLINE)}, notes=notes)
    text = printed(table(inspect(from_proto(networks.plain()), target(), bare)))
    assert "note: all by the roofline alone: why; effc calibrate-target measures those of this machine" in text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_the_console(width):
    model = from_proto(networks.plain())
    found = inspected(model)
    name, much = "a.very.long.path.of.modules." * 6 + "conv", Cost(*[123_456_789] * 4, 1.0)
    long = replace(found.layers[0], name=name, kernel=much)
    lines = printed(table(replace(found, layers=(long, *found.layers[1:])), 0, width), width).splitlines()
    rows = [line for line in lines if line.strip().startswith(("layer", "a.very", "node_", "total", "+ "))]
    assert len(rows) == 1 + len(found.layers) + len(found.added) + 1
    assert all(len(line.rstrip()) <= width for line in lines)
    # names lose their middle, numbers nothing
    assert not any(re.search(r"…( |$)", line) for line in rows if not line.startswith("+ run"))
    assert any(line.startswith("a.very") and "%" in line and "123M" in line for line in lines)


def test_two_models_in_tables():
    other = replace(inspect(thinner(), target(), prediction(node_conv1=None, node_conv2=5)), model="thin [1]")
    text = printed(comparison_table(compare(inspected(), other)))
    lines = text.splitlines()
    assert "thin [1]" in lines[0]
    assert any(line.split() == ["predicted", "100us", "35us", "0.350"] for line in lines)
    row = next(line for line in lines if line.startswith("node_conv2"))
    assert "changed" in row and "40us -> 5us" in row and row.rstrip().endswith("-35us")
    assert any(line.split() == ["±", "5%", "5%"] for line in lines)
    assert "layers are the same; what the runtime adds takes 3us -> 3us" in text and max(map(len, lines)) <= 120
    assert re.search(r"and \d more that differ, by ", printed(comparison_table(compare(inspected(), other), top=1)))
    assert text.count("note: flat is a view") == 1  # true of both
    own = printed(comparison_table(compare(inspected(), replace(other, notes=("but",)))))
    assert "model note: flat is a view" in own and "thin [1] note: but" in own


def test_json_holds_everything_in_plain_units():
    found = inspected()
    data = json.loads(json.dumps(as_data(found), allow_nan=False))
    assert set(data) == {
        "model", "target", "origin", "batch", "threads", "totals", "layers", "added", "unknown", "notes",
    }  # fmt: skip
    assert (data["target"], data["origin"], data["batch"]) == ("made up", "published", 1)
    assert data["totals"]["predicted_seconds"] == found.predicted.seconds
    assert data["totals"]["macs"] == sum(layer["macs"] for layer in data["layers"])
    assert data["totals"]["energy_joules"] == pytest.approx(
        sum(layer["energy_joules"] for layer in data["layers"]), rel=1e-12, abs=0
    )
    conv = next(layer for layer in data["layers"] if layer["name"] == "node_conv1")
    assert conv["shape"] == [1, 8, 12, 12] and conv["basis"] == "measured" and conv["relative_error"] == 0.1
    assert conv["predicted_seconds"] == 30e-6 and conv["fuses"] == ["BatchNormalization", "Relu"]
    assert (conv["parameters"], conv["kernel_parameters"]) == (8 * 27, 8 * 27 + 32)
    norm = next(layer for layer in data["layers"] if layer["name"] == "node_bn1")
    assert (norm["parameters"], norm["kernel_parameters"]) == (32, 0)
    assert norm["fused_into"] == "node_conv1" and norm["predicted_seconds"] is None
    assert [row["name"] for row in data["added"]] == ["run overhead", "reorder"]
    assert len(as_data(found, top=3)["layers"]) == 3


def test_csv_holds_a_line_a_layer():
    found = inspected()
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert len(rows) == len(found.layers) + len(found.added)
    assert rows[0]["name"] == "node_conv2" and float(rows[0]["predicted_seconds"]) == found.layers[0].seconds
    assert rows[0]["shape"] == "1x16x6x6" and int(rows[0]["macs"]) == 36 * 16 * 72
    assert rows[1]["fuses"] == "BatchNormalization+Relu"
    assert rows[-1]["name"] == "reorder" and rows[-1]["op"] == "by runtime" and rows[-1]["macs"] == ""


def test_two_models_as_data():
    found = compare(inspected(), inspect(thinner(), target(), prediction(node_conv1=None, node_conv2=5)))
    data = json.loads(json.dumps(comparison_data(found), allow_nan=False))
    assert data["ratios"]["predicted"] == pytest.approx(0.35, rel=1e-12, abs=0)
    first = data["layers"][0]
    assert first["name"] == "node_conv2" and first["status"] == "changed"
    assert (first["a"]["predicted_seconds"], first["b"]["predicted_seconds"]) == (40e-6, 5e-6)
    gone = next(row for row in data["layers"] if row["name"] == "node_conv1")
    assert gone["b"] is None
    rows = list(csv.DictReader(io.StringIO(comparison_csv(found))))
    assert rows[0]["status"] == "changed" and float(rows[0]["b_predicted_seconds"]) == 5e-6
    assert next(row for row in rows if row["name"] == "node_conv1")["b_macs"] == ""


def test_training_is_told_in_one_line():
    text = printed(training_table(training_cost(2.03e20, peak=312e12, utilisation=0.21, devices=256, price=2.33)))
    assert "2.03e+20" in text and "0.14" in text and "at 21% of 312TFLOP/s, 256 devices" in text
    small = printed(training_table(training_cost(1e15, peak=1e14, utilisation=0.5)))
    assert "no price given" in small and "0.0056" in small and "0.00023" in small  # 20 seconds
