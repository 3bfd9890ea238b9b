"""From torch to a Model: torch.export, then torch's exporter to ONNX without its optimiser, then `effc.exported`.

So batch norms and the names of parameters survive. What cannot be exported is refused in one line, and what was
exported has been run beside the module.
"""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from effc import registry
from effc.capture import first_line, sound
from effc.errors import BadInput, EffcError
from effc.model import Model
from effc.program_file import read_program
from effc.verify import rounding

TOLERANCE = 1e-3  # max|a - b| / max|a| above which the export is wrong; rounding alone stays far below in float32
_BATCH = 2  # torch takes an axis of one element for fixed, so a dynamic batch is exported with this many
_INSTALL = "torch is needed for this model and is not installed: pip install 'effc[torch]'"


@dataclass(frozen=True)
class Call:
    """What a module is called with."""

    args: tuple
    kwargs: Mapping[str, Any]

    def on(self, function: Any) -> Any:
        return function(*self.args, **self.kwargs)

    def tensors(self, torch: Any) -> list[Any]:
        leaves = torch.utils._pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def map(self, torch: Any, function: Any) -> Call:
        return Call(*torch.utils._pytree.tree_map(function, (self.args, dict(self.kwargs))))


def capture_torch(
    source: Any, example_inputs: Any, dynamic_batch: bool, input_names: Sequence[str] | None, name: str | None
) -> Model:
    """See `effc.capture`: a module, an exported program, or the path of a .pt2 file. Raises BadInput."""
    try:
        import torch
        import torch.onnx
    except ImportError as error:
        raise BadInput(_INSTALL) from error
    if isinstance(source, str | os.PathLike):
        name, source = name or Path(source).stem, read_program(torch, Path(source))
    if isinstance(source, torch.export.ExportedProgram):
        if example_inputs is not None:
            raise BadInput("an exported program has inputs of its own: leave out example_inputs")
        return _from_program(torch, source, input_names, name or "program")
    if isinstance(source, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise BadInput("TorchScript cannot be exported: give the module that it was made from")
    if not isinstance(source, torch.nn.Module):
        raise BadInput(f"a {type(source).__name__} of torch is no model: give an nn.Module or an ExportedProgram")
    call = _call(torch, example_inputs)
    return _from_module(torch, source, call, dynamic_batch, input_names, name or type(source).__name__)


def _from_module(
    torch: Any, module: Any, call: Call, dynamic: bool, input_names: Sequence[str] | None, name: str
) -> Model:
    with _evaluating(torch, module):
        expected = _run(torch, module, call, name)
        if not dynamic:
            return _captured(torch, _export(torch, module, call, None, name), call, expected, input_names, name)
        try:
            return _with_any_batch(torch, module, call, input_names, name)
        except BadInput as error:
            why = str(error)
        model = _captured(torch, _export(torch, module, call, None, name), call, expected, input_names, name)
        tensor = next((t for t in call.tensors(torch) if t.ndim), None)
        size = "" if tensor is None else f" at {tensor.shape[0]}"
        model.notes = (*model.notes, f"the batch is fixed{size}: {why}")
        return model


def _with_any_batch(torch: Any, module: Any, call: Call, input_names: Sequence[str] | None, name: str) -> Model:
    """Export with a dynamic first axis, and see that it holds. Raises BadInput where the module does not allow it."""
    batch = next((t.shape[0] for t in call.tensors(torch) if t.ndim), None)
    if not batch:
        raise BadInput("no input has a first axis")

    def batched(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch

    sizes = torch.export.ShapesCollection()

    def widened(leaf: Any) -> Any:
        if batched(leaf):
            leaf = torch.cat([leaf] * _BATCH) if batch == 1 else leaf
            sizes[leaf] = {0: torch.export.Dim.AUTO}
        return leaf

    wide = call.map(torch, widened)
    program = _export(torch, module, wide, sizes, name)
    if not _takes_any(program):
        raise BadInput("the module takes one size, or goes another way for others")
    model = _captured(torch, program, wide, _run(torch, module, wide, name), input_names, name)
    one = call.map(torch, lambda leaf: leaf[:1] if batched(leaf) else leaf)
    try:
        _check(torch, model, one, _run(torch, module, one, name))
    except BadInput as error:
        raise BadInput(f"at one sample, what was exported is not right: {error}") from error
    return model


def _takes_any(program: Any) -> bool:
    """Whether each symbol may be of any size: torch narrows its range where the module asks for its size."""
    ranges = program.range_constraints.values()
    return bool(ranges) and all(r.lower <= _BATCH and r.upper > 2**31 for r in ranges)


def _from_program(torch: Any, program: Any, input_names: Sequence[str] | None, name: str) -> Model:
    args, kwargs = program.example_inputs or (None, None)
    call = None if args is None else Call(tuple(args), kwargs or {})
    expected = None
    if call is not None:
        expected = _run(torch, program.module(), call, name)
    model = _captured(torch, program, call, expected, input_names, name)
    if model.batch is not None:
        note = f"the batch is fixed at {model.batch}, as the program was exported: torch.export takes dynamic_shapes"
        model.notes = (*model.notes, note)
    return model


def _captured(
    torch: Any, program: Any, call: Call | None, expected: Any, input_names: Sequence[str] | None, name: str
) -> Model:
    """The Model of a program, run on the inputs that it was exported with."""
    from effc.exported import canonical

    _check_program(torch, program, name)
    graph = _to_onnx(torch, program, name)
    if input_names is not None and (
        len(input_names) != len(graph.graph.inputs) or len(set(input_names)) < len(input_names)
    ):
        there = ", ".join(v.name for v in graph.graph.inputs)
        raise BadInput(f"{len(graph.graph.inputs)} different input_names are needed, for {there}")
    model = sound(canonical(graph, input_names), name)
    if call is not None:
        _check(torch, model, call, expected)
    return model


def _call(torch: Any, given: Any) -> Call:
    """Example inputs as arguments. Raises BadInput."""
    if given is None:
        raise BadInput(
            "a module is captured with example inputs: give example_inputs, a tensor, a tuple of arguments or a dict of"
            " keyword arguments"
        )
    if isinstance(given, torch.Tensor):
        call = Call((given,), {})
    elif isinstance(given, Mapping):
        call = Call((), dict(given))
    elif isinstance(given, tuple | list):
        call = Call(tuple(given), {})
    else:
        raise BadInput(f"example inputs are a {type(given).__name__}; a tensor, a tuple or a dict is needed")
    for leaf in torch.utils._pytree.tree_leaves((call.args, call.kwargs)):
        if not isinstance(leaf, torch.Tensor | int | float | str | None):
            hint = ": torch.from_numpy makes one" if isinstance(leaf, np.ndarray) else ""
            raise BadInput(f"example inputs hold a {type(leaf).__name__}; tensors are needed{hint}")
        if isinstance(leaf, torch.Tensor) and leaf.is_complex():
            raise BadInput("an example input is complex, which ONNX has no type for: give real and imaginary parts")
    if not call.tensors(torch):
        raise BadInput("example inputs hold no tensor")
    return call


def _run(torch: Any, module: Any, call: Call, name: str) -> list[np.ndarray]:
    """Outputs of a module, on copies of its buffers. Raises BadInput."""
    buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
    try:
        with torch.no_grad(), _quiet():
            found = torch.func.functional_call(module, buffers, call.args, dict(call.kwargs))
    except Exception as error:  # a forward method may raise anything
        raise BadInput(f"{name} does not run on the example inputs: {first_line(error)}") from error
    leaves = torch.utils._pytree.tree_leaves(found)
    return [_array(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _array(tensor: Any) -> np.ndarray:
    plain = tensor.detach().cpu()
    return plain.numpy() if str(plain.dtype) != "torch.bfloat16" else ir.tensor(plain).numpy()


def _export(torch: Any, module: Any, call: Call, sizes: Any, name: str) -> Any:
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module, call.args, dict(call.kwargs) or None, dynamic_shapes=sizes, strict=False)
    except Exception as error:  # torch traces the user's forward method, which may raise anything
        said = str(error)
        if "data-dependent" in said or "data dependent" in said:
            raise BadInput(
                f"{name} goes another way by the numbers in a tensor (data-dependent control flow), which a graph does"
                " not hold: write it with torch.where or torch.cond"
            ) from error
        raise BadInput(f"torch.export cannot export {name}: {first_line(error)}") from error


def _check_program(torch: Any, program: Any, name: str) -> None:
    """What the exporter would write, and wrongly. Raises BadInput."""
    signature = program.graph_signature
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    for number, output in enumerate(signature.user_outputs):
        value = values.get(output) if isinstance(output, str) else output
        if not isinstance(value, torch.Tensor):
            raise BadInput(f"output {number} of {name} is {value!r} and no tensor: leave it out")
        if value.is_complex():
            raise BadInput(f"output {number} of {name} is complex, which ONNX has no type for: give torch.view_as_real")


def _to_onnx(torch: Any, program: Any, name: str) -> ir.Model:
    try:
        with _quiet():
            exported = torch.onnx.export(program, (), dynamo=True, optimize=False, verbose=False)
    except Exception as error:  # what failed is the cause, of any type, somewhere inside of the exporter's own errors
        while error.__cause__ is not None:
            error = error.__cause__
        if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error)):
            raise BadInput(f"{name} uses {found[1]}, which torch's exporter cannot express in ONNX") from error
        raise BadInput(f"torch's exporter to ONNX fails on {name}: {first_line(error)}") from error
    signature = exported.exported_program.graph_signature  # after decomposition: only there is writing told
    if written := sorted({*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()}):
        raise BadInput(
            f"{name} writes to {', '.join(written[:3])}, which a graph cannot: call .eval() before torch.export, or"
            " make it an input and an output"
        )
    return exported.model


def _check(torch: Any, model: Model, call: Call, expected: Sequence[np.ndarray]) -> None:
    """Run the model beside what it was made of. Raises BadInput."""
    feeds = dict(zip((t.name for t in model.inputs), map(_array, call.tensors(torch)), strict=True))
    try:
        found = registry.backend("onnxruntime").session(model).run(feeds)
    except EffcError as error:
        raise BadInput(f"onnxruntime does not run what torch exported of {model.name}: {error}") from error
    limit = TOLERANCE + rounding(model)
    for name, wanted in zip((t.name for t in model.outputs), expected, strict=True):
        got = np.asarray(found[name])
        if got.shape != wanted.shape or not _close(got, wanted, limit):
            raise BadInput(
                f"torch and onnxruntime differ in output {name!r} of {model.name}: is anything in it drawn at random,"
                " as by dropout in training?"
            )


def _close(a: np.ndarray, b: np.ndarray, limit: float) -> bool:
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return False
    a, b = (np.nan_to_num(x, posinf=0, neginf=0) for x in (a, b))
    return not a.size or np.abs(a - b).max() <= limit * max(np.abs(b).max(), 1e-12)


@contextmanager
def _evaluating(torch: Any, module: Any) -> Iterator[None]:
    """In eval mode meanwhile, each part in its own mode again afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporters print and log at length what ends in one line here."""
    level, out = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(out):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
