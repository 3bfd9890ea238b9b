"""effc.passes.unfuse: what the runtime fuses before and after, and the numbers."""

from dataclasses import replace

import onnx
import pytest

from effc.capture import from_proto
from effc.contract import Context, Proposal, Skipped
from effc.passes.unfuse import Unfuse
from effc.registry import backend
from effc.target import find
from effc.verify import verify
from tests.networks import NETWORKS, distance, feeds, run

RUNTIME, TARGET = backend("onnxruntime"), find("onnxruntime-avx2")
SAME = 1e-6  # of the largest output


def context(model, target=TARGET) -> Context:
    return Context(model, target, RUNTIME, dims={"T": 6})


@pytest.mark.parametrize(("name", "sites"), [("masked", 2), ("transformer", 1), ("residual", 0), ("mlp", 0)])
def test_sums_before_norms_are_no_longer_fused(name, sites):
    proto = NETWORKS[name]()
    model = from_proto(proto)
    found = list(Unfuse().propose(model, context(model)))
    chosen = [f for f in found if isinstance(f, Proposal)]
    assert len(chosen) == sites == RUNTIME.deployment(model).fused.get("SkipLayerNormalization", 0)
    assert all(f.reason == "no slower kernel is made of it" for f in found if isinstance(f, Skipped))
    after = model.clone()
    Unfuse().rewrite(after, chosen, context(after))
    verify(after, model)
    onnx.checker.check_model(after.proto(), full_check=True)
    assert sum(1 for _ in after.nodes("Sum")) == sites
    assert "SkipLayerNormalization" not in RUNTIME.deployment(after).fused
    inputs = feeds(proto, batch=3)
    assert distance(run(proto, inputs), run(after.proto(), inputs)) <= SAME
    fast = RUNTIME.session(after).run(inputs)
    assert distance(run(proto, inputs), fast) <= 1e-5  # with the runtime's own fusions


def test_another_runtime_is_left_alone():
    model = from_proto(NETWORKS["masked"]())
    other = replace(TARGET, name="other", runtime="tensorrt")
    found = list(Unfuse().propose(model, context(model, other)))
    assert {f.reason for f in found} == {"target 'other' is not onnxruntime on a CPU"}
