"""Train the example network on scikit-learn's digits and write digits.onnx beside this file (needs torch).

The exporter's default folds batch norm and renames weights. Here it is kept from that, so that the file still has the
BatchNormalization nodes that a pass folds and the parameter names that a reader knows.
"""

import math
from pathlib import Path

import data
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
EPOCHS = 30
OPSET = 18  # the exporter's own: asked for less it gives 18 all the same


class ConvNorm(nn.Sequential):
    """relu?(norm(conv3x3(x))): [n, c_in, h, w] -> [n, c_out, h / stride, w / stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, relu: bool = True):
        super().__init__()
        self.add_module("conv", nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False))
        self.add_module("norm", nn.BatchNorm2d(c_out))
        if relu:
            self.add_module("relu", nn.ReLU())


class Residual(nn.Module):
    """relu(x + f(x)) with two 3 x 3 convolutions in f; keeps the shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = ConvNorm(channels, channels)
        self.second = ConvNorm(channels, channels, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.second(self.first(x)))


class Digits(nn.Module):
    """Stages of 32, 64 and 128 channels, pooled: image [n, 1, 32, 32] in 0..1 -> logits [n, 10]."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNorm(1, 32)
        self.stage1 = Residual(32)
        self.down2 = ConvNorm(32, 64, stride=2)
        self.stage2 = Residual(64)
        self.down3 = ConvNorm(64, 128, stride=2)
        self.stage3 = ConvNorm(128, 128)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stage1(self.stem(image))
        x = self.stage2(self.down2(x))
        x = self.stage3(self.down3(x))
        return self.head(self.pool(x).flatten(1))


def load(batches) -> tuple[torch.Tensor, torch.Tensor]:
    """All of a source at once: image float [n, 1, 32, 32] in 0..1, label int64 [n]."""
    parts = list(batches)
    x, y = (np.concatenate([part[name] for part in parts]) for name in ("x", "y"))
    return torch.from_numpy(x)[:, None] / 255, torch.from_numpy(y)


def augment(x: torch.Tensor) -> torch.Tensor:
    """Turn by up to 0.2 rad, scale and shear by up to 10 %, shift by up to 2 pixels; each image its own."""
    n = len(x)
    angle = (torch.rand(n) - 0.5) * 0.4
    turn = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], 1).view(n, 2, 2)
    shift = (torch.rand(n, 2, 1) - 0.5) * 8 / data.SIDE
    theta = torch.cat([turn + (torch.rand(n, 2, 2) - 0.5) * 0.2, shift], 2)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int = EPOCHS, batch: int = 50) -> None:
    optimiser = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x)).split(batch):
            loss = F.cross_entropy(model(augment(x[rows])), y[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(x):.3f}", flush=True)


def export(model: nn.Module, path: Path) -> None:
    """Write `model` as ONNX with batch norm and parameter names kept, the batch axis `N`, and no metadata."""
    example = torch.zeros(2, 1, data.SIDE, data.SIDE)
    program = torch.onnx.export(
        model.eval(),
        (example,),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        opset_version=OPSET,
        dynamo=True,
        optimize=False,
    )
    assert program is not None, "with dynamo=True the exporter returns the program"
    exported = program.model
    optimizer.fold_constants(exported, onnx_shape_inference=True)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(exported)
    common.RemoveUnusedNodesPass()(exported)
    common.ClearMetadataAndDocStringPass()(exported)
    graph = exported.graph  # that pass leaves the metadata of values
    for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
        value.metadata_props.clear()
    ir.save(exported, path)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the number of threads changes the last bits of sums, and with them the file
    model = Digits()
    train(model, *load(data.train()))
    model.eval()
    x, y = load(data.test())
    with torch.no_grad():
        print(f"test accuracy: {(model(x).argmax(1) == y).float().mean():.2%} of {len(y)}")
    export(model, HERE / "digits.onnx")


if __name__ == "__main__":
    main()
