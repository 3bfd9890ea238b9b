"""TensorRT: writes graphs by its rules of explicit quantisation, and runs them on onnxruntime, which stands in for it.

No engine is built here: what onnxruntime computes of the graph, operator by operator and in floats between Q and DQ, is
what the graph means, and so its accuracy; of latency nothing is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from effc import edit
from effc.capture import load
from effc.contract import Progress
from effc.errors import BadInput, EffcError, PassFailed
from effc.graphsurgeon import surgery
from effc.kernels import Kernel
from effc.model import Model
from effc.opset import lift_opset
from effc.runtime import Deployment, Finding, Timings
from effc.traffic import element_types

from ._tensorrt_form import HALF_OPSET, legalise
from ._tensorrt_half import to_half
from ._tensorrt_rules import NEWEST_OPSET, OLDEST_OPSET, check
from .onnxruntime import OnnxRuntime, OnnxRuntimeSession, load_session, session_options


class TensorRT:
    """The backend of that name; see `effc.runtime.Backend`.

    Attributes:
        half: emit float16 between Q and DQ and in layers that are not quantised.
    """

    name = "tensorrt"
    caveat = (
        "no TensorRT engine was built: accuracy is that of the same graph run by onnxruntime, and nothing about latency"
        " was measured"
    )
    half: ClassVar[bool] = False

    def version(self) -> str:
        return f"not installed; onnxruntime {ort.__version__} stands in"

    def session(
        self, model: Model | Path, *, threads: int = 1, optimize: bool = True, expose: Sequence[str] = ()
    ) -> OnnxRuntimeSession:
        """The graph as it would be emitted, run by onnxruntime operator by operator.

        With `expose`, and without `optimize`, the model is run as it is: lowering is not what it means. It may be a
        part of a model, so it is not held to the rules.

        Raises:
            BadInput: `expose` names a tensor that the main graph does not have; the opset is too new.
            EffcError: onnxruntime does not take the model.
        """
        if not isinstance(model, Model):
            model = load(model)
        if optimize and not expose:
            model = self._lowered(model)
        # Its optimiser would fuse what TensorRT does not, and quantise float weights between DQ and Q unasked.
        return load_session(model, session_options(threads, optimize=False), expose)

    def _lowered(self, model: Model) -> Model:
        """A copy in the emitted form; remembered until the next edit."""

        def lower() -> Model:
            copy = model.clone()
            self._lower(copy)
            return copy

        return model.cached(("lowered", self.name), lower)

    def emit(self, model: Model) -> None:
        """Lower a model in place: opset, biases as floats, one scale for an activation, float16 where asked for.

        Raises:
            BadInput: it breaks a rule that no lowering can mend; the message names the first place.
        """
        self._lower(model)
        errors = [finding for finding in self.check(model) if finding.error]
        if errors:
            more = f" (and {len(errors) - 1} more: effc check-tensorrt lists all)" if len(errors) > 1 else ""
            raise BadInput(f"{model.name} is nothing for TensorRT: {errors[0]}{more}")

    def _lower(self, model: Model) -> None:
        if model.opset > NEWEST_OPSET:
            raise BadInput(
                f"{model.name} is of opset {model.opset}; TensorRT takes {OLDEST_OPSET} to {NEWEST_OPSET}:"
                " export it at one of these"
            )
        try:
            lift_opset(model, HALF_OPSET if self.half else OLDEST_OPSET)
            floats = [name for name, dtype in element_types(model).items() if dtype == ir.DataType.FLOAT]
            with surgery(model) as graph:
                legalise(graph)
                if self.half:
                    to_half(graph, frozenset(floats))
            edit.remove_unused(model)
        except PassFailed as error:
            raise BadInput(f"{model.name} cannot be written for TensorRT: {error}") from error
        OnnxRuntime().emit(model)

    def check(self, model: Model) -> tuple[Finding, ...]:
        """See `effc.runtime.Checker`; the rules stand in docs/tensorrt.md."""
        return check(model)

    def deployment(self, model: Model, feeds: Mapping[str, np.ndarray] | None = None, threads: int = 1) -> Deployment:
        """Nothing: what TensorRT makes of a model is seen in an engine only."""
        return Deployment({}, {})

    def kernels(
        self, model: Model, batch: int = 1, dims: Mapping[str, int] | None = None, threads: int = 1
    ) -> tuple[tuple[Kernel, ...], dict[str, str]]:
        """Raises EffcError: its kernels are not known without an engine."""
        raise EffcError("TensorRT is not at hand to say which kernels it makes of a model")

    def calibrate(self, threads: int, seconds: float, progress: Progress) -> Timings:
        """Raises EffcError: there is nothing to time."""
        raise EffcError("TensorRT is not at hand to be measured")


class TensorRTHalf(TensorRT):
    """The same in float16."""

    name = "tensorrt-fp16"
    half = True
