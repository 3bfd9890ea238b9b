"""Matrices that may be kept as codes: weights of dense layers, tables that rows are looked up in, or both at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np
import onnx_ir as ir

from effc.contract import Skipped
from effc.layers import bias_array, output_axis
from effc.model import STANDARD_DOMAINS, Model

from ._sites import Site, find

LEAST_TABLE = 1 << 16  # bytes of a table below which decoding its rows costs more than keeping it


@dataclass(frozen=True)
class Coded:
    """A matrix that some nodes read.

    Attributes:
        value: the weight [N, K] where `by_row`, else [K, N]; products sum over K, and a row of a table has K numbers.
        products: MatMul and Gemm.
        lookups: Gather of rows.
        turned: Transposes between the matrix and a product.
    """

    value: ir.Value
    products: tuple[ir.Node, ...]
    lookups: tuple[ir.Node, ...]
    turned: tuple[ir.Node, ...]
    by_row: bool

    @property
    def site(self) -> str:
        return self.readers[0].name or ""

    @property
    def readers(self) -> tuple[ir.Node, ...]:
        return (*self.products, *self.lookups)

    @property
    def name(self) -> str:
        return self.value.name or ""

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        rows, columns = self.value.const_value.shape.numpy()
        return (rows, columns) if self.by_row else (columns, rows)

    @property
    def matrix(self) -> np.ndarray:
        """[N, K]."""
        return self.stored(self.value.const_value.numpy())

    def stored(self, matrix: np.ndarray) -> np.ndarray:
        """[N, K] in the weight's own layout, or back."""
        return matrix if self.by_row else np.ascontiguousarray(matrix.T)


def matrices(
    model: Model, keep_float: Sequence[str], tables: bool, shapes: dict[str, tuple | None]
) -> Iterator[Coded | Skipped]:
    """Every matrix, each once, or why its nodes keep it in float."""
    done: set[ir.Value] = set()
    for node in model.nodes("MatMul", "Gemm", "Gather"):
        place = int(node.op_type != "Gather")
        value = node.inputs[place]
        maker = None if value is None else value.producer()
        turned = maker is not None and maker.op_type == "Transpose" and node.op_type == "MatMul"
        value = maker.inputs[0] if turned and maker.inputs[0].is_initializer() else value
        why = _no_matrix(node, value)
        if why is not None:
            if node.op_type != "Gather":  # what gathers anything else is no business of ours
                yield Skipped(node.name or "", why)
            continue
        if value in done:
            continue
        done.add(value)
        found = _read(model, value, keep_float, tables, shapes)
        if isinstance(found, Coded):
            yield found
        else:
            yield from (Skipped(name, reason) for name, reason in found.items())


def _no_matrix(node: ir.Node, value: ir.Value | None) -> str | None:
    if value is None or not value.is_initializer() or value.is_graph_input():
        maker = None if value is None else value.producer()
        if maker is not None and maker.op_type == "Constant":
            return "its weight is made by Constant: simplify makes it a weight of the graph"
        return "its right operand is no constant"
    if value.const_value is None or value.dtype != ir.DataType.FLOAT:
        return f"its weight is {str(value.dtype).lower()}; float32 is put into blocks"
    if len(value.const_value.shape) != 2:
        return f"its weight has {len(value.const_value.shape)} axes; matrices are put into blocks"
    return None


def _read(
    model: Model, value: ir.Value, keep_float: Sequence[str], tables: bool, shapes: dict[str, tuple | None]
) -> Coded | dict[str, str]:
    """The matrix with all that reads it; or, by node, why it stays as it is."""
    products, lookups, turned, by_row = [], [], [], set()
    named: list[ir.Node] = []
    refusals: dict[str, str] = {}
    for node, index in value.uses():
        if _turns(node, value):
            readers = [(reader, place, 0) for reader, place in node.outputs[0].uses()]
            turned.append(node)
            if not readers or node.outputs[0].is_graph_output():
                refusals[node.name or ""] = "it is an output of the graph"
        else:
            readers = [(node, index, None)]
        for reader, place, axis in readers:
            why = _cannot(model, reader, place, value, tables, shapes, axis)
            named.append(reader)
            if any(fnmatch(reader.name or "", pattern) for pattern in keep_float):
                why = "keep_float names it"
            if why is not None:
                refusals[reader.name or ""] = why
            elif reader.op_type == "Gather":
                lookups.append(reader)
                by_row.add(True)
            else:
                products.append(reader)
                by_row.add((output_axis(reader, 2) if axis is None else axis) == 0)
    if value.is_graph_output():
        refusals[named[0].name or ""] = "its weight is an output of the graph"
    if not refusals and len(by_row) > 1:
        refusals[named[0].name or ""] = "its weight is read by rows and by columns, and blocks lie along one of them"
    if refusals:
        other = next(iter(refusals))
        shared = f"its weight is shared with {other!r}, which keeps it in float"
        return {n.name or "": refusals.get(n.name or "", shared) for n in dict.fromkeys(named)}
    order = {node: place for place, node in enumerate(model.graph)}
    products, lookups = (sorted(dict.fromkeys(nodes), key=order.__getitem__) for nodes in (products, lookups))
    return Coded(value, tuple(products), tuple(lookups), tuple(turned), by_row.pop())


def _turns(node: ir.Node, value: ir.Value) -> bool:
    perm = node.attributes.get_ints("perm", [1, 0]) if node.op_type == "Transpose" else []
    return (
        list(perm) == [1, 0]
        and node.domain in STANDARD_DOMAINS
        and all(reader.op_type == "MatMul" and place == 1 for reader, place in node.outputs[0].uses())
    )


def _cannot(
    model: Model,
    node: ir.Node,
    place: int,
    value: ir.Value,
    tables: bool,
    shapes: dict[str, tuple | None],
    axis: int | None,
) -> str | None:
    """Why a node cannot read codes, or None."""
    if node.graph is not model.graph:
        return "a sub-graph reads its weight"
    if node.domain not in STANDARD_DOMAINS or (node.op_type, place) not in (("MatMul", 1), ("Gemm", 1), ("Gather", 0)):
        return f"{node.op_type} {node.name!r} reads its weight too"
    if node.op_type == "Gather":
        if not tables:
            return "embeddings=false keeps tables in float"
        if node.attributes.get_int("axis", 0) not in (0, -2):
            return "it looks up columns, not rows"
        if value.const_value.nbytes < LEAST_TABLE:
            return (
                f"its table takes {value.const_value.nbytes:,} bytes: decoding its rows would cost more than it saves"
            )
        return None
    if model.constant(node.inputs[0]) is not None:
        return "its input is a constant; simplify folds it"
    if len(shapes.get(node.inputs[0].name) or (0, 0)) < 2:
        return "its input has one axis; two or more are multiplied with codes"
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            return "its left operand is transposed"
        if node.attributes.get_float("alpha", 1.0) != 1:
            return "it scales its product by alpha; 1 is put into blocks"
        try:
            bias_array(model, node, value.const_value.shape.numpy()[output_axis(node, 2)])
        except ValueError as error:
            return str(error)
    return None


def bias_site(model: Model, node: ir.Node, shapes: dict[str, tuple | None]) -> Site | None:
    """The layer with the bias that can make up for means: its own, or one added behind a MatMul; None without."""
    site = find(model, node, shapes)
    return site if isinstance(site, Site) and site.biased else None
