"""Model -> torch.fx.GraphModule: leaf modules that hold the weights, and the rules of the table node by node."""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
from torch import Tensor, fx, nn

from effc.errors import BadInput
from effc.model import Model, constant_tensor

# Importing the files with rules puts these into the table.
from . import _torch_blocks as _blocks
from . import _torch_layers as _layers
from . import _torch_quantize as _quantize
from . import _torch_recurrent as _recurrent
from . import _torch_reductions as _reductions
from . import _torch_shapes as _shapes
from . import _torch_windows as _windows
from ._torch_ops import TABLE, Rule
from ._torch_ops import cast as to_type
from ._torch_weights import Integers, Source, place, source, to_torch

RULE_FILES = (_blocks, _layers, _quantize, _recurrent, _reductions, _shapes, _windows)
META = "effc"  # key in GraphModule.meta, which copies keep
TENSOR = "tensor"  # key in fx.Node.meta: the tensor of the model that it computes


@dataclass(frozen=True)
class Names:
    """What the view's parts are called in the model.

    Attributes:
        inputs, outputs: in the model's order, as `forward` takes and returns them.
        places: initializer -> paths of the module attributes that it stands at, all of one parameter or buffer.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    places: Mapping[str, tuple[str, ...]]


class Held(nn.Module):
    """A weight that is an operand of some function."""

    value: Tensor

    def forward(self) -> Tensor:
        return self.value


class Fixed(nn.Module):
    """A constant that is not trained. Integers, which may be shape values, stay in main memory."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        if value.is_floating_point():
            self.register_buffer("value", value, persistent=False)
        else:
            self.value = value

    def forward(self) -> Tensor:
        return self.value


def build(model: Model, expose: Sequence[str] = ()) -> fx.GraphModule:
    """The view, in eval(), with some inner tensors behind its outputs. Raises BadInput naming what has no rule."""
    for node in model.graph:
        if node.op_type != "Constant" and TABLE.find(node) is None:
            raise BadInput(f"{model.name} cannot be trained: {TABLE.missing(node)}")
    return Builder(model).run(expose)


class Builder:
    """One view in the making. Rules call it to reach operands and to put functions and modules into the graph."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph, self.root = fx.Graph(), nn.Module()
        self._values: dict[ir.Value, fx.Node] = {}
        self._fixed: dict[ir.Value, fx.Node] = {}
        self._sources: dict[ir.Value, Source | None] = {}
        self._parameters: dict[str, Tensor] = {}
        self._places: dict[str, list[str]] = {}
        self._leaves: set[str] = set()
        self._shapes = model.shapes()
        self._statistics, self._untrained = _statistics(model)
        self._integers: dict[str, ir.Value] = {}

    def run(self, expose: Sequence[str] = ()) -> fx.GraphModule:
        inputs = self._inputs()
        for node in self.model.graph:
            if node.op_type == "Constant" or self.source(node.outputs[0]) is not None or self._picks(node):
                continue  # made where it is read
            made = cast(Rule, TABLE.find(node))(self, node)
            if isinstance(made, fx.Node):
                several = len(node.outputs) > 1
                made = [self.call(operator.getitem, made, i) for i in range(len(node.outputs))] if several else [made]
            for value, result in zip(node.outputs, made, strict=True):
                self._values[value] = result
                result.meta.setdefault(TENSOR, value.name)
        shown = [*self.model.graph.outputs, *map(self.model.value, expose)]
        results = [self._result(v) for v in shown]
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        view = fx.GraphModule(self.root, self.graph, "View")
        outputs = tuple(v.name or "" for v in shown)
        view.meta[META] = Names(inputs, outputs, {name: tuple(paths) for name, paths in self._places.items()})
        return view.eval()

    def __call__(self, value: ir.Value | None) -> Any:
        """The operand that a node reads, None where it is left out."""
        if value is None:
            return None
        if value not in self._values:
            found = self.source(value)
            if found is None or value.name in self._statistics:
                return self.fixed(value)
            self._values[value] = self._held(value, found)
        return self._values[value]

    def call(self, compute: Callable, *inputs: object, **options: object) -> fx.Node:
        return self.graph.call_function(compute, inputs, options)

    def module(
        self,
        node: ir.Node,
        module: nn.Module,
        weights: Mapping[str, Source | None],
        *inputs: fx.Node,
        layout: Mapping[str, nn.Module] | None = None,
    ) -> fx.Node:
        """Call a module with these weights, each brought into the module's own layout by a last step."""
        first = next((s.name for s in weights.values() if s is not None), "")
        path = self._path(first.rpartition(".")[0], node.name)
        for attribute, found in weights.items():
            if found is not None:
                self._place(path, module, attribute, found, (layout or {}).get(attribute))
        self._add(path, module)
        return self.graph.call_module(path, inputs)

    def source(self, value: ir.Value | None) -> Source | None:
        """What is trained where a node reads this tensor, or None."""
        if value is None:
            return None
        if value not in self._sources:
            found = source(value)
            if found is not None and found.name in self._untrained:
                found = None
            if found is not None and isinstance(found.encoding, Integers):
                # Those that two nodes decode, each its way, could not be stored.
                found = found if self._integers.setdefault(found.name, value) is value else None
            self._sources[value] = found
        return self._sources[value]

    def fixed(self, value: ir.Value | None) -> Any:
        """An operand that is not trained, even where it is a weight: scales of codes, say."""
        if value is None or value in self._fixed:
            return None if value is None else self._fixed[value]
        tensor = constant_tensor(value)
        if tensor is None:
            if value not in self._values:
                raise BadInput(f"{self.model.name} cannot be trained: the constant {value.name!r} holds no numbers")
            return self._values[value]
        path = self._path("", f"{value.name}_fixed")
        self._add(path, Fixed(to_torch(tensor.numpy())))
        self._fixed[value] = self.graph.call_module(path)
        return self._fixed[value]

    def numbers(self, value: ir.Value | None) -> Any:
        """A constant of at most one axis as plain numbers, anything else as an operand."""
        tensor = constant_tensor(value)
        if tensor is None or len(tensor.shape) > 1:
            return self(value)
        found = tensor.numpy().tolist()
        return tuple(found) if isinstance(found, list) else found

    def shape(self, value: ir.Value) -> tuple | None:
        """The shape as far as it is known, None without a rank."""
        return self._shapes.get(value.name)

    def is_statistic(self, value: ir.Value) -> bool:
        return value.name in self._statistics

    def _inputs(self) -> tuple[str, ...]:
        """Placeholders under the inputs' names, or names like them where Python has another use for these."""
        infos = [v for v in self.model.graph.inputs if not v.is_initializer()]
        taken: set[str] = set()
        for value in infos:
            name = re.sub(r"\W", "_", value.name or "")
            name = name if name.isidentifier() else f"_{name}"
            while name in taken or keyword.iskeyword(name) or hasattr(builtins, name) or name == "self":
                name += "_"
            taken.add(name)
            self._values[value] = self.graph.placeholder(name)
        return tuple(value.name or "" for value in infos)

    def _picks(self, node: ir.Node) -> bool:
        """Whether a Cast makes indices of codebooks only."""
        uses = [u.node for u in node.outputs[0].uses()]
        reads = node.op_type == "Cast" and constant_tensor(node.inputs[0]) is not None
        gathers = bool(uses) and all(u.op_type == "Gather" and self.source(u.outputs[0]) is not None for u in uses)
        return reads and gathers and not node.outputs[0].is_graph_output()

    def _result(self, value: ir.Value) -> fx.Node:
        made = self(value)
        if value.dtype is not None and value.dtype.is_integer():  # codes are floats inside
            return self.call(to_type, made, to=int(value.dtype))
        return made

    def _held(self, value: ir.Value, found: Source) -> fx.Node:
        path, module = self._path("", value.name), Held()
        self._place(path, module, "value", found)
        self._add(path, module)
        return self.graph.call_module(path)

    def _place(
        self, path: str, module: nn.Module, attribute: str, found: Source, layout: nn.Module | None = None
    ) -> None:
        self._places.setdefault(found.name, []).append(f"{path}.{attribute}")
        if found.name in self._statistics:
            setattr(module, attribute, found.start)
            return
        parameter = self._parameters.setdefault(found.name, nn.Parameter(found.start))
        place(module, attribute, parameter, [step for step in (found.encoding, layout) if step is not None])

    def _add(self, path: str, module: nn.Module) -> None:
        prefix, _, name = path.rpartition(".")
        parent = self.root
        for part in prefix.split(".") if prefix else ():
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(name, module)
        self._leaves.add(path)

    def _path(self, wanted: str, otherwise: str) -> str:
        """Where a leaf module goes: at the prefix of its weight's name, as in the module it came from, or flat."""
        parts = wanted.split(".")
        above = {".".join(parts[:i]) for i in range(1, len(parts))}
        if all(re.fullmatch(r"\w+", p) and not _reserved(p) for p in parts) and not above & self._leaves:
            try:
                self.root.get_submodule(wanted)
            except AttributeError:
                return wanted
        name = re.sub(r"\W", "_", otherwise).strip("_") or "layer"
        while name in self.root._modules or _reserved(name) or not name.isidentifier():
            name = f"{name}_" if name[0].isalpha() else f"layer_{name}"
        return name


def _reserved(name: str) -> bool:
    """Whether Python or a module has another use for the name."""
    return keyword.iskeyword(name) or hasattr(fx.GraphModule, name) or name in vars(nn.Module())


def _statistics(model: Model) -> tuple[set[str | None], set[str | None]]:
    """Weights that are statistics of one batch norm and nothing else; those that are some, and something else."""
    statistics = [v.name for n in model.nodes("BatchNormalization") for v in n.inputs[3:5] if v.is_initializer()]
    alone = {name for name in statistics if len(list(model.graph.initializers[name].uses())) == 1}
    alone -= {v.name for v in model.graph.outputs}
    return alone, set(statistics) - alone
