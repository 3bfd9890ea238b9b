"""A matrix of codes in a graph, in the words of the runtime that will read it.

`matmulnbits` are onnxruntime's own operators: MatMulNBits, which multiplies codes, and GatherBlockQuantized, which
decodes the rows that it looks up. `dequantize` is plain ONNX: DequantizeLinear in blocks before the product; for a
table the bytes of the rows are looked up, their codes taken apart, and those decoded. Codes of a table's row lie in
parts there, first part in the lowest bits of the bytes: to put them side by side is then a Concat.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from effc import edit
from effc.block_codes import BlockCodes, pack
from effc.layers import added_behind, bias_array, bias_value
from effc.model import RUNTIME_DOMAIN, Model

from ._coded_sites import Coded

INT8_ACTIVATIONS, FLOAT_ACTIVATIONS = 4, 1  # MatMulNBits' accuracy levels
UNSIGNED = {8: np.uint8, 4: ml_dtypes.uint4, 2: ml_dtypes.uint2}
SIGNED = {8: np.int8, 4: ml_dtypes.int4, 2: ml_dtypes.int2}
OPSETS = {8: 21, 4: 21, 2: 25}  # the first whose DequantizeLinear takes blocks of codes of that width


def put_own(model: Model, coded: Coded, codes: BlockCodes, level: int, shapes: dict[str, tuple | None]) -> None:
    """Let onnxruntime's operators read the codes in the place of what reads the matrix."""
    edit.import_domain(model, RUNTIME_DOMAIN)
    rows, columns = codes.codes.shape
    grid, name = codes.grid, coded.name
    blocks = edit.add_initializer(model, f"{name}_codes", codes.packed() if coded.products else codes.packed_rows())
    others = [edit.add_initializer(model, f"{name}_scales", grid.scales)]
    if not grid.symmetric:
        others.append(edit.add_initializer(model, f"{name}_zero_points", codes.packed_zeros()))
    options = {"bits": grid.bits, "block_size": grid.block}
    for node in coded.products:
        behind = added_behind(model, node, rows, len(shapes.get(node.outputs[0].name) or ()))
        adding = None if behind is None else behind[0]
        bias = _bias(model, node, behind, rows)
        inputs = [node.inputs[0], blocks, *others]
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        new = edit.make_node(
            model, "MatMulNBits", inputs, {"K": columns, "N": rows, "accuracy_level": level, **options},
            name=node.name or "", origin=[node, *([] if adding is None else [adding])], domain=RUNTIME_DOMAIN,
        )  # fmt: skip
        old = [node] if adding is None else [node, adding]
        edit.replace(model, old, [new], {old[-1].outputs[0]: new.outputs[0]})
    for node in coded.lookups:
        data, before = blocks, []
        if coded.products:  # the same bytes by rows
            shape = edit.add_initializer(model, f"{name}_rows", np.array([rows, -1]))
            view = edit.make_node(model, "Reshape", [blocks, shape], name=f"{node.name}_rows", origin=[node])
            data, before = view.outputs[0], [view]
        new = edit.make_node(
            model, "GatherBlockQuantized", [data, node.inputs[1], *others],
            {"gather_axis": 0, "quantize_axis": 1, **options}, name=node.name or "", domain=RUNTIME_DOMAIN,
        )  # fmt: skip
        edit.replace(model, [node], [*before, new], {node.outputs[0]: new.outputs[0]})


def _bias(model: Model, node: ir.Node, behind: tuple[ir.Node, int] | None, outputs: int) -> ir.Value | None:
    """The bias of a layer as one number an output.

    Args:
        behind: the Add that is its bias and the place of the constant there; None where the layer has its own.
    """
    if behind is not None:
        value = behind[0].inputs[behind[1]]
        array = model.constant(value)
    else:
        value, array = bias_value(node), bias_array(model, node, outputs)
    if array is None:
        return None
    if value.is_initializer() and np.array_equal(model.constant(value), array.reshape(-1)):
        return value
    return edit.add_initializer(model, f"{node.name}_bias", np.ascontiguousarray(array.reshape(-1)))


def put_plain(model: Model, coded: Coded, codes: BlockCodes) -> None:
    """Decode in plain ONNX before what reads the matrix: for dense layers, or for a table, not both."""
    if coded.lookups:
        for node in coded.lookups:
            _look_up(model, coded.name, node, codes)
        return
    grid, name = codes.grid, coded.name
    middle = 2 ** (grid.bits - 1)
    if grid.symmetric:  # the zero point is 0, and need not be stored
        numbers = (codes.codes.T.astype(np.int16) - middle).astype(SIGNED[grid.bits])
    else:
        numbers = codes.codes.T.astype(UNSIGNED[grid.bits])
    inputs = [_tensor(model, f"{name}_codes", numbers), edit.add_initializer(model, f"{name}_scales", grid.scales.T)]
    if not grid.symmetric:
        inputs.append(_tensor(model, f"{name}_zero_points", grid.zeros.T.astype(UNSIGNED[grid.bits])))
    decode = edit.make_node(
        model, "DequantizeLinear", inputs, {"axis": 0, "block_size": grid.block}, name=f"{name}_dequantize",
        origin=coded.products,
    )  # fmt: skip
    edit.insert_before(model, coded.products[0], [decode])
    weight = decode.outputs[0]
    weight.type, weight.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(codes.codes.T.shape)
    for node in coded.products:
        edit.set_input(model, node, 1, weight)
        if node.op_type == "Gemm":
            edit.set_attributes(model, node, transB=None)


def _tensor(model: Model, name: str, numbers: np.ndarray) -> ir.Value:
    return edit.add_initializer(model, name, ir.tensor(np.ascontiguousarray(numbers), name=name))


def _look_up(model: Model, name: str, node: ir.Node, codes: BlockCodes) -> None:
    grid, indices = codes.grid, node.inputs[1]
    each, columns = 8 // grid.bits, codes.codes.shape[1]
    parts = codes.codes.reshape(-1, each, columns // each).transpose(0, 2, 1).reshape(len(codes.codes), -1)
    tables = {"codes": pack(parts, grid.bits), "scales": grid.scales, "zero_points": grid.zeros}
    new = [
        edit.make_node(
            model, "Gather", [edit.add_initializer(model, f"{name}_{what}", table), indices], {"axis": 0},
            name=f"{node.name}_{what}", origin=[node],
        )
        for what, table in tables.items()
    ]  # fmt: skip
    found, *others = (each_node.outputs[0] for each_node in new)
    if each > 1:
        mask = edit.add_initializer(model, f"{name}_mask", np.uint8(2**grid.bits - 1))
        pieces = []
        for place in range(each):
            piece = found
            if place:
                by = edit.add_initializer(model, f"{name}_shift", np.uint8(grid.bits * place))
                new.append(_small(model, node, "BitShift", [piece, by], {"direction": "RIGHT"}))
                piece = new[-1].outputs[0]
            if place < each - 1:
                new.append(_small(model, node, "BitwiseAnd", [piece, mask], {}))
                piece = new[-1].outputs[0]
            pieces.append(piece)
        new.append(_small(model, node, "Concat", pieces, {"axis": -1}))
        found = new[-1].outputs[0]
    options = {"axis": -1, "block_size": grid.block}
    new.append(_small(model, node, "DequantizeLinear", [found, *others], options))
    edit.replace(model, [node], new, {node.outputs[0]: new[-1].outputs[0]})


def _small(model: Model, node: ir.Node, op: str, inputs: list[ir.Value], options: dict[str, object]) -> ir.Node:
    return edit.make_node(model, op, inputs, options, name=f"{node.name}_{op.lower()}", origin=[node])
