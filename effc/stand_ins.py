"""Standard operators in the place of the runtime's own, for those who know the standard ones alone."""

from __future__ import annotations

import onnx

from effc.model import RUNTIME_DOMAIN, UNDERSTOOD


def with_stand_ins(proto: onnx.ModelProto) -> None:
    """Put the standard operator of the same shapes in the place of those on codes in blocks, which onnx does not know.

    MatMulNBits becomes a MatMul with [K, N], GatherBlockQuantized a Gather of as many numbers as its codes are.
    """
    graph = proto.graph
    packed = {
        i.name: (i.type.tensor_type.elem_type, [d.dim_value for d in i.type.tensor_type.shape.dim]) for i in graph.input
    }
    packed |= {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in graph.initializer}
    for node in graph.node:
        if node.domain != RUNTIME_DOMAIN or node.op_type not in UNDERSTOOD:
            continue
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "MatMulNBits":
            shape, op, place = [options["K"], options["N"]], "MatMul", 1
        else:
            dtype, shape = packed.get(node.input[0], (0, []))
            if dtype == onnx.TensorProto.UINT8:  # bytes that hold several codes
                shape = [*shape[:-1], *(size * 8 // options.get("bits", 4) for size in shape[-1:])]
            op, place = "Gather", 0
        if not all(shape) or not shape:
            continue
        dense = f"{node.output[0]}/decoded"
        graph.input.append(onnx.helper.make_tensor_value_info(dense, onnx.TensorProto.FLOAT, shape))
        operands = list(node.input[:2])
        operands[place] = dense
        node.op_type, node.domain = op, ""
        del node.input[:], node.attribute[:]
        node.input.extend(operands)
        if op == "Gather":
            node.attribute.append(onnx.helper.make_attribute("axis", options.get("gather_axis", 0)))
