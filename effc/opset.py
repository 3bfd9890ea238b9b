"""The operator set and file format that a model is written in, and lifting it to a later one."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from effc import edit
from effc.errors import PassFailed
from effc.model import STANDARD_DOMAINS, Model
from effc.shapes import strip


def lift_opset(model: Model, version: int) -> None:
    """Raise the standard operator set to at least `version`, through onnx's converter; names are kept.

    Large weights stay out of the conversion. Sub-graphs are converted with their graph.

    Raises:
        PassFailed: onnx has no conversion for some operator; the message names what it said.
    """
    if model.opset >= version or not model.opset:
        return
    copy = model.ir.clone()
    copy.ir_version = max(copy.ir_version or 0, ir_version_of(version), 4)
    weights = strip(copy)
    try:
        converted = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(copy), version))
    except (RuntimeError, onnx.version_converter.ConvertError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PassFailed(f"opset {model.opset} could not be lifted to {version}: {reason}") from error
    inputs = list(converted.graph.inputs)
    converted.graph.inputs.clear()
    converted.graph.inputs.extend(v for v in inputs if v.name not in weights)
    for value in inputs:
        if value.name in weights:
            value.const_value = weights[value.name]
            converted.graph.register_initializer(value)
    _restore_names(model.graph, converted.graph)
    converted.metadata_props.update(model.ir.metadata_props)
    converted.functions.update(copy.functions)
    converted.opset_imports.update({k: v for k, v in copy.opset_imports.items() if k not in STANDARD_DOMAINS})
    edit.substitute(model, converted)


def _restore_names(before: ir.Graph, after: ir.Graph) -> None:
    """Nodes that the converter left without a name, or renamed, are found again by the tensor they make."""
    makers = {v.name: node for node in before for v in node.outputs if v.name}
    for node in after:
        maker = next((makers[v.name] for v in node.outputs if v.name in makers), None)
        if maker is not None:
            node.name = maker.name
            node.metadata_props.update(maker.metadata_props)


_IR_VERSIONS = {9: 4, 10: 5, 11: 6, 12: 7, 15: 8, 19: 9, 21: 10, 23: 11, 24: 12, 25: 13}


def ir_version_of(opset: int) -> int:
    """The file format version that came with an operator set, the lowest that may hold it (onnx release table)."""
    return max((ir_version for first, ir_version in _IR_VERSIONS.items() if first <= opset), default=3)
