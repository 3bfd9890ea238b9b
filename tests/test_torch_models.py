"""The trainable view of whole models against onnxruntime: those that the onnx package carries, and real ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.backend.test
import pytest

import effc
from effc import registry
from effc.backends.torch import Torch
from effc.capture import load
from tests.networks import distance, feeds, run

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
TORCH = Torch()
LIGHT = sorted((Path(onnx.backend.test.__file__).parent / "data" / "light").glob("*.onnx"))
SHARED = [
    "resnet20-cifar10", "resnet56-cifar10", "mobilenet_v1_025-imagenet", "vgg-small-cifar10", "ultraface-rfb-320",
]  # fmt: skip
CALIBRATION = {
    "resnet20-cifar10": "cifar10-train.yaml",
    "vgg-small-cifar10": "cifar10-train.yaml",
    "mobilenet_v1_025-imagenet": "imagenet-500.yaml",
}


def shared(name: str) -> Path:
    return Path(os.environ["EFFC_DATA"], "models", f"{name}.onnx")


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_a_light_model_agrees_with_onnxruntime(path):
    """Their weights are constants, so many outputs are alike: to 1e-5."""
    proto = onnx.load(path)
    inputs = feeds(proto, batch=1)
    view = TORCH.view(load(path))
    assert distance(run(proto, inputs), TORCH.session(view).run(inputs)) <= 1e-5


@pytest.mark.models
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SHARED)
def test_a_real_model_agrees_with_onnxruntime(name, batch):
    """To 1e-5 of the largest output, at a batch that the graph allows."""
    proto = onnx.load(shared(name))
    inputs = feeds(proto, batch=batch)
    model = load(shared(name))
    view = TORCH.view(model)
    assert distance(run(proto, inputs), TORCH.session(view).run(inputs)) <= 1e-5
    revision = model.revision
    TORCH.write_back(view, model)
    assert model.revision == revision


class Forced(torch.fx.Interpreter):
    """Runs a view layer by layer: each quantised tensor is compared with a reference, which the next layers read."""

    def __init__(self, view: torch.fx.GraphModule, codes: dict[str, np.ndarray]) -> None:
        super().__init__(view)
        self.codes = codes
        self.steps: dict[str, int] = {}
        self.shares: dict[str, float] = {}

    def run_node(self, n: torch.fx.Node):
        made = super().run_node(n)
        name = n.meta.get("tensor")
        if name not in self.codes:
            return made
        reference = torch.from_numpy(self.codes[name].astype(np.float32))
        difference = (made - reference).abs()
        self.steps[name], self.shares[name] = int(difference.max()), float((difference > 0).float().mean())
        return reference


@pytest.mark.models
@pytest.mark.parametrize("name", CALIBRATION)
def test_int8_codes_are_onnxruntimes_layer_by_layer(name):
    """On the same input a layer's code differs by one at most, where the sum lies at a tie: in 0.1 % of all at most."""
    folder = Path(os.environ["EFFC_DATA"])
    spec = f"{folder / 'data' / CALIBRATION[name]}{{limit=16}}"
    proto = onnx.load(shared(name))
    model = effc.optimize(proto, "fold-batchnorm, int8", calibrate=spec, measure=False, force=True).model
    inputs = feeds(proto, batch=2)
    names = [n.outputs[0].name for n in model.nodes("QuantizeLinear")]
    reference = registry.backend("onnxruntime").session(model, optimize=False, expose=names).run(inputs)
    forced = Forced(TORCH.view(model), {n: reference[n] for n in names})
    with torch.no_grad():
        result = forced.run(*(torch.from_numpy(a) for a in inputs.values()))
    assert forced.steps.keys() == set(names) and max(forced.steps.values()) <= 1
    assert max(forced.shares.values()) <= 1e-3
    output = reference[model.outputs[0].name]
    assert np.abs(result.numpy() - output).max() <= 1e-5 * np.abs(output).max()
