"""Writes integer codes into a graph: quantize/dequantize pairs on activations, codes for weights and biases."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.layers import bias_array, mean_inputs, output_axis
from effc.model import Model
from effc.placement import Placement
from effc.quantize import Affine, quantize_weight

from ._integer_fit import Fit
from ._stem import widen

UNASKED = ("Conv", "ConvTranspose", "Gemm")  # whose float weights onnxruntime quantises unasked


class Lowering:
    """One rewrite of a model to integers.

    Args:
        bits: the width that weights keep to.
        balanced: round weights so that a channel's mean output stays, as far as mean inputs are known.
        corrected: take what is left of that shift off the bias.
        inputs_in: multiple of input channels that the integer kernels like; images are padded to it.
        float_bias: biases stay floats.
    """

    def __init__(
        self,
        model: Model,
        bits: int = 8,
        balanced: bool = False,
        corrected: bool = False,
        inputs_in: int = 1,
        float_bias: bool = False,
        fit: Fit | None = None,
    ) -> None:
        self.model = model
        self.bits, self.balanced, self.corrected = bits, balanced, corrected
        self.inputs_in, self.float_bias, self.fit = inputs_in, float_bias, fit
        self._source: dict[ir.Value, ir.Value] = {}  # decoded graph input -> graph input
        self._codes: dict[ir.Value, ir.Value] = {}
        self._decoded: dict[ir.Value, ir.Value] = {}
        self._parameters: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def static(
        self, placement: Placement, ranges: Mapping[ir.Value, Affine], means: Mapping[ir.Node, np.ndarray | None]
    ) -> None:
        """Lower a placement; `means` are the mean inputs of the weighted nodes, as `effc.layers.mean_inputs` takes."""
        readers = {v: list(v.uses()) for v in placement.coded}
        inputs = {n: n.inputs[0] for n in placement.integer}
        for value, source in placement.coded.items():
            if value is source:
                self._pair(value, ranges[value], self._origin(value, placement))
            else:
                self._pass_on(value, source, ranges[source])
        for value, uses in readers.items():
            for node, index in uses:
                if node in placement.passing:
                    continue
                if node in placement.integer:
                    edit.set_input(self.model, node, index, self._decoded[value])
                elif placement.made_in_codes(value):
                    edit.set_input(self.model, node, index, self._for_float(value, node, index))
            if value.is_graph_output() and placement.made_in_codes(value):
                edit.hand_over_output(self.model, value, self._decoded[value])
        if self.fit is not None:
            self.fit.start(self.model)
        for node in [n for n in self.model.graph if n in inputs]:
            if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                self._weighted(node, ranges[placement.coded[inputs[node]]], means.get(node))
            elif node.op_type == "ReduceMean":
                self._global_pool(node)

    @staticmethod
    def _origin(value: ir.Value, placement: Placement) -> list[ir.Node]:
        maker = value.producer()
        if maker is not None and placement.made_in_codes(value):
            return [maker]
        return [n for n in value.consumers() if n in placement.integer]

    def _pair(self, value: ir.Value, q: Affine, origin: list[ir.Node]) -> None:
        """Q and DQ behind a tensor."""
        scale = edit.add_initializer(self.model, f"{value.name}_scale", np.asarray(q.scale))
        zero = edit.add_initializer(self.model, f"{value.name}_zero_point", np.asarray(q.zero))
        self._parameters[value] = scale, zero
        quantize = edit.make_node(
            self.model, "QuantizeLinear", [value, scale, zero], name=f"{value.name}_quantize", origin=origin
        )
        quantize.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(q.zero.dtype))
        quantize.outputs[0].shape = value.shape
        self._insert_behind(value, quantize)
        self._codes[value] = quantize.outputs[0]
        self._decode(value, origin)

    def _pass_on(self, value: ir.Value, source: ir.Value, q: Affine) -> None:
        """Let an operator run on its input's codes; its own output becomes codes, decoded behind it."""
        node = value.producer()
        edit.set_input(self.model, node, 0, self._codes[node.inputs[0]])
        value.type = ir.TensorType(ir.DataType.from_numpy(q.zero.dtype))
        if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
            edit.set_input(self.model, node, 2, self._parameters[source][1])
        self._codes[value] = value
        self._parameters[value] = self._parameters[source]
        self._decode(value, [node])

    def _decode(self, value: ir.Value, origin: list[ir.Node]) -> None:
        codes = self._codes[value]
        dequantize = edit.make_node(
            self.model,
            "DequantizeLinear",
            [codes, *self._parameters[value]],
            name=f"{value.name}_dequantize",
            origin=origin,
        )
        dequantize.outputs[0].type, dequantize.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        self._insert_behind(codes, dequantize)
        self._decoded[value] = dequantize.outputs[0]
        if value.is_graph_input():
            self._source[dequantize.outputs[0]] = value

    def _for_float(self, value: ir.Value, node: ir.Node, index: int) -> ir.Value:
        """What a node that stays in float reads of a coded tensor.

        onnxruntime quantises the float weights of a layer that it finds between DequantizeLinear with one scale and
        QuantizeLinear, and with one scale a tensor, which ruins depthwise layers. The same scale once a channel keeps
        its hands off, and costs nothing.
        """
        weight = node.inputs[1].shape if index == 0 and node.op_type in UNASKED and len(node.inputs) > 1 else None
        if weight is None or not all(isinstance(d, int) for d in weight) or node.graph is not self.model.graph:
            return self._decoded[value]
        axis = 1
        if node.op_type == "Conv":
            channels = weight[1] * node.attributes.get_int("group", 1)
        else:
            channels = weight[1] if node.attributes.get_int("transB", 0) else weight[0]
            axis = 0 if node.attributes.get_int("transA", 0) else 1
        scale, zero = (v.const_value.numpy() for v in self._parameters[value])
        dequantize = edit.make_node(
            self.model,
            "DequantizeLinear",
            [
                self._codes[value],
                edit.add_initializer(self.model, f"{value.name}_scales", np.repeat(scale, channels)),
                edit.add_initializer(self.model, f"{value.name}_zero_points", np.repeat(zero, channels)),
            ],
            {"axis": axis},
            name=f"{value.name}_dequantize_channels",
            origin=[value.producer()],
        )
        dequantize.outputs[0].type, dequantize.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        edit.insert_before(self.model, node, [dequantize])
        return dequantize.outputs[0]

    def _insert_behind(self, value: ir.Value, node: ir.Node) -> None:
        maker = value.producer()
        if maker is None:
            edit.insert_before(self.model, self.model.graph[0], [node])
        else:
            edit.insert_after(self.model, maker, [node])

    def _weighted(self, node: ir.Node, x: Affine, mean: np.ndarray | None) -> None:
        """Codes for weight and bias; the bias at scale x_scale * w_scale in 32 bits, as integer kernels add it.

        Or the bias stays floats, where the target adds it to decoded sums.
        """
        weight = self.model.constant(node.inputs[1])
        axis = output_axis(node, weight.ndim)
        bias = bias_array(self.model, node, weight.shape[axis])
        if node.op_type == "Gemm":
            weight = weight * np.float32(node.attributes.get_float("alpha", 1.0))
        wide = None if self.float_bias else bias  # that has to fit 32 bits
        settings = {"bits": self.bits, "bias": wide, "input_scale": float(x.scale)}
        if self.fit is not None and self.fit.takes(node, weight):
            q, bias = self.fit.codes(node, weight, axis, bias, settings)
        else:
            met = None if mean is None else mean_inputs(node, mean, weight)
            q = quantize_weight(weight, axis, **settings, mean=met if self.balanced else None)
            if self.corrected and met is not None and node.op_type != "MatMul":
                others = tuple(i for i in range(weight.ndim) if i != axis)
                shift = ((q.decoded() - weight.astype(np.float64)) * met).sum(axis=others)
                bias = (0.0 if bias is None else bias) - shift
        codes = q.codes
        if node.op_type == "Conv" and (image := self._source.get(node.inputs[0])) is not None:
            codes = widen(self.model, node, codes, image, self._codes[image], self._parameters[image], self.inputs_in)
        if node.op_type == "Gemm":
            if axis == 0:  # integer kernels read the right operand as it stands
                codes, axis = np.ascontiguousarray(codes.T), 1
            edit.set_attributes(self.model, node, transB=None, alpha=None, beta=None)
        edit.set_input(self.model, node, 1, self._constant(node.inputs[1].name, codes, q.scales, axis, node))
        if bias is None:
            return
        given = node.inputs[2] if len(node.inputs) > 2 else None
        hint = given.name if given is not None else f"{node.name}_bias"
        if self.float_bias:
            edit.set_input(self.model, node, 2, edit.add_initializer(self.model, hint, np.float32(bias)))
            return
        scales = (np.float32(x.scale) * q.scales).astype(np.float32)
        integers = np.rint(bias / scales.astype(np.float64)).clip(-(2**31 - 1), 2**31 - 1).astype(np.int32)
        edit.set_input(self.model, node, 2, self._constant(hint, integers, scales, 0, node))

    def _constant(self, hint: str, codes: np.ndarray, scales: np.ndarray, axis: int, node: ir.Node) -> ir.Value:
        """DequantizeLinear over constant codes."""
        dequantize = edit.make_node(
            self.model,
            "DequantizeLinear",
            [
                edit.add_initializer(self.model, f"{hint}_quantized", codes),
                edit.add_initializer(self.model, f"{hint}_scale", scales),
                edit.add_initializer(self.model, f"{hint}_zero_point", np.zeros(scales.shape, codes.dtype)),
            ],
            {"axis": axis},
            name=f"{hint}_dequantize",
            origin=[node],
        )
        dequantize.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        dequantize.outputs[0].shape = ir.Shape(codes.shape)
        edit.insert_before(self.model, node, [dequantize])
        return dequantize.outputs[0]

    def _global_pool(self, node: ir.Node) -> None:
        """A mean over all positions has an integer kernel under the name GlobalAveragePool only."""
        nodes = [edit.make_node(self.model, "GlobalAveragePool", [node.inputs[0]], name=node.name, origin=[node])]
        if not node.attributes.get_int("keepdims", 1):
            axes = edit.add_initializer(self.model, f"{node.name}_axes", np.array([2, 3]))
            means = [nodes[0].outputs[0], axes]
            nodes.append(edit.make_node(self.model, "Squeeze", means, name=f"{node.name}_squeeze", origin=[node]))
        edit.replace(self.model, [node], nodes, {node.outputs[0]: nodes[-1].outputs[0]})

    def dynamic(self, node: ir.Node) -> None:
        """MatMul or Gemm -> DynamicQuantizeLinear, MatMulInteger, and the product of both scales."""
        model = self.model
        weight = model.constant(node.inputs[1])
        axis = output_axis(node, weight.ndim)
        bias = bias_array(model, node, weight.shape[axis])
        if node.op_type == "Gemm":
            weight = weight * np.float32(node.attributes.get_float("alpha", 1.0))
        q = quantize_weight(weight.T if axis == 0 else weight, 1, bits=self.bits)
        hint = node.inputs[1].name
        codes = edit.add_initializer(model, f"{hint}_quantized", np.ascontiguousarray(q.codes))
        scales = edit.add_initializer(model, f"{hint}_scale", q.scales)
        zeros = edit.add_initializer(model, f"{hint}_zero_point", np.zeros(q.scales.shape, np.int8))
        name = node.name
        quantize = edit.make_node(model, "DynamicQuantizeLinear", [node.inputs[0]], name=f"{name}_quantize", outputs=3)
        x, x_scale, x_zero = quantize.outputs
        product = edit.make_node(model, "MatMulInteger", [x, codes, x_zero, zeros], name=f"{name}_integer")
        cast = edit.make_node(model, "Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_cast")
        both = edit.make_node(model, "Mul", [x_scale, scales], name=f"{name}_scales")
        scaled = edit.make_node(model, "Mul", [cast.outputs[0], both.outputs[0]], name=f"{name}_scaled")
        nodes = [quantize, product, cast, both, scaled]
        if bias is not None:
            added = edit.add_initializer(model, f"{name}_bias", np.ascontiguousarray(bias, np.float32))
            nodes.append(edit.make_node(model, "Add", [scaled.outputs[0], added], name=f"{name}_biased"))
        edit.replace(model, [node], nodes, {node.outputs[0]: nodes[-1].outputs[0]})
