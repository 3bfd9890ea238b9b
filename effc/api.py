"""`effc.optimize`: a recipe, run under the user's limits, with its whole record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

import effc
from effc import choose, edit, registry, target
from effc.capture import capture
from effc.contract import Context, Pass, Progress, no_progress
from effc.cost import cost
from effc.data import Data, DataSpec, open_data
from effc.errors import BadInput, EffcError, RequirementNotMet
from effc.guard import Guard, quantised
from effc.history import KEPT, UNDONE, Accuracy, History, Snapshot
from effc.manager import PassManager
from effc.measure import Latency, random_feeds
from effc.model import Model, collection_paused
from effc.recipe import build, describe, format_calls, parse
from effc.runtime import Backend, caveat
from effc.shapes import stored_size
from effc.verify import plain_outputs

Spec = str | Path | Mapping[str, Any] | DataSpec | Data
DEFAULT_PASSES = "simplify,fold-batchnorm,int8"
DEFAULT_MAX_DROP = 1.0  # points, with labelled evaluation data
GOALS = tuple(choose.GOALS)


@dataclass(frozen=True)
class Result:
    """The optimised model (the original's graph when nothing was kept) and the record of what was done."""

    model: Model
    history: History

    @cached_property
    def module(self) -> Any:
        """The optimised model as a trainable `torch.fx.GraphModule` (docs/torch_view.md); needs PyTorch.

        After training, `registry.trainer().write_back(result.module, result.model)` brings its weights into the model.

        Raises:
            BadInput: PyTorch is not installed, or an operator has no trainable form.
        """
        return registry.trainer().view(self.model)


def optimize(
    model: Any,
    passes: str | Sequence[Pass] = DEFAULT_PASSES,
    *,
    example_inputs: Any = None,
    calibrate: Spec | None = None,
    evaluate: Spec | None = None,
    train: Spec | None = None,
    teachers: Sequence[Any] = (),
    max_drop: float | None = None,
    min_speedup: float | None = None,
    max_size: float | None = None,
    goal: str = "latency",
    target_name: str | None = None,
    foreign_target: bool = False,
    batch: int | None = None,
    dims: Mapping[str, int] | None = None,
    threads: int = 1,
    measure: bool = True,
    force: bool = False,
    seed: int = 0,
    replay: History | None = None,
    progress: Progress = no_progress,
) -> Result:
    """Run passes over a model; keep what is right, accurate enough and pays.

    Args:
        model: what `effc.capture` takes: a Model, an .onnx or .pt2 file, an ONNX message, a module or program of
            torch. It is never changed.
        passes: pass objects, or a recipe such as "simplify,int8{calibrator=mse}".
        example_inputs: for a torch module, as in `effc.capture`.
        calibrate: data to look at activations with.
        evaluate: data to judge accuracy on.
        train: data for passes that train, such as `recover`.
        teachers: what these learn from, each as `model`; by default the original.
        max_drop: points of the metric that may be lost; with labelled evaluation data 1 unless given.
        min_speedup: required speed of the result over the original, as measured.
        max_size: required size of the result, as a share of the original's.
        goal: what the guard judges rewrites by, unless a pass's own budget says else: "latency", "size", "energy" or
            "macs".
        target_name: what to optimise for, by name or as a file; None means onnxruntime on this processor. Where this
            machine is no such device, nothing is timed, and the prediction decides.
        foreign_target: accept a file that was measured on another machine.
        batch, dims, threads: what to measure at; `dims` gives symbolic dimensions but the batch their sizes. A batch
            of None is the model's own where it is fixed, else 1.
        measure: False times nothing; the record calls the result unproven.
        force: keep what does not pay, and drop the default limit on accuracy; the record still says so.
        replay: the record of an earlier run whose decisions are taken over instead of judged again.

    Raises:
        BadInput: model, data or options cannot be used.
        RequirementNotMet: min_speedup or max_size was not reached; its `result` holds the best that was.
        PassFailed: a pass broke its contract.
    """
    started = time.perf_counter()
    if goal not in GOALS:
        raise BadInput(f"unknown goal {goal!r}; there are {', '.join(GOALS)}")
    if min_speedup is not None and not measure:
        raise BadInput("a minimum speed-up has to be measured: leave out --no-measure or --min-speedup")
    if max_drop is not None and evaluate is None:
        raise BadInput("a largest drop needs evaluation data: give --evaluate SPEC (Python: evaluate=...)")
    original = capture(model, example_inputs)
    steps = build(parse(passes)) if isinstance(passes, str) else tuple(passes)
    aim = target.find(target_name, foreign=foreign_target)
    if min_speedup is not None and not aim.local:
        raise BadInput(f"target {aim.name!r} is another machine's: no speed can be measured; leave out --min-speedup")
    backend = registry.backend(aim.runtime)
    batch = original.batch or 1 if batch is None else batch
    calibration, evaluation, training = (
        None if s is None else open_data(s).for_model(original) for s in (calibrate, evaluate, train)
    )
    feeds = real_feeds(original, batch, dims or {}, calibration or evaluation, seed)
    _runs(original, backend, feeds)
    backend.emit(original.clone())  # what this runtime does not take is refused before work is done on it
    if max_drop is None and evaluation is not None and evaluation.labelled and not force:
        max_drop = DEFAULT_MAX_DROP
    context = Context(
        original=original,
        target=aim,
        backend=backend,
        calibration=calibration,
        training=training,
        teachers=tuple(capture(teacher) for teacher in teachers),
        goal=goal,
        batch=batch,
        dims=dims or {},
        threads=threads,
        seed=seed,
        progress=progress,
    )
    guard = Guard(
        original=original,
        backend=backend,
        feeds=feeds,
        goal=goal,
        context=context,
        evaluation=evaluation,
        max_drop=max_drop,
        force=force,
        measure=measure,
        threads=threads,
        batch=batch,
        dims=dims or {},
        seed=seed,
        progress=progress,
    )
    given = {"calibrate": calibration, "evaluate": evaluation, "train": training}
    data = {name: each.digest for name, each in given.items() if each is not None}
    for role, what in (("calibrate", "calibration"), ("train", "training")):
        if replay is not None and replay.data.get(role) != data.get(role):
            raise BadInput(f"the report to replay was made with other {what} data; give the same --{role} SPEC")
    with collection_paused():
        before = Snapshot(cost(original, batch, dims).total, stored_size(original), len(original.graph))
    history = History(
        model=original.name,
        recipe=format_calls([describe(step) for step in steps]),
        target=aim.name,
        goal=goal,
        batch=batch,
        threads=threads,
        seed=seed,
        versions=_versions(backend),
        data=data,
        original=before,
        final=before,
        notes=[*original.notes, *_target_notes(aim), *_data_notes(given)],
        origin=aim.origin,
    )
    manager = PassManager(context, guard, None if replay is None else replay.stages)
    outcome = manager.run(original, steps)
    history.stages, history.node_map = outcome.stages, outcome.node_map
    with collection_paused():
        result = _finish(history, guard, original, outcome.model, context, judge=replay is None)
    history.seconds = time.perf_counter() - started
    _require(history, result, min_speedup, max_size)
    return result


def real_feeds(
    model: Model, batch: int, dims: Mapping[str, int], data: Data | None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Inputs at the stated batch: the first samples of the data, repeated where they are too few; else made up."""
    if model.batch is not None and model.batch != batch:
        raise BadInput(f"the model's batch is fixed at {model.batch}; --batch {batch} cannot be measured")
    if data is None:
        return random_feeds(model, batch, dims, seed)
    samples = next(iter(data.first(batch).batches(batch))).feeds
    return {name: np.resize(array, (batch, *array.shape[1:])) for name, array in samples.items()}


def _runs(model: Model, backend: Backend, feeds: Mapping[str, np.ndarray]) -> None:
    try:
        plain_outputs(model, feeds, backend)
    except BadInput:
        raise
    except EffcError as error:
        raise BadInput(f"{backend.name} cannot run {model.name} as it is: {error}") from error


def _versions(backend: Backend) -> dict[str, str]:
    return {
        "effc": effc.__version__,
        "onnx": onnx.__version__,
        "onnx_ir": ir.__version__,
        backend.name: backend.version(),
        "numpy": np.__version__,
    }


def _target_notes(aim: target.Target) -> list[str]:
    told = f"target {aim.name}: {f'{aim.origin} figures' if aim.roofs else 'no figures'}"
    return [told + (f", {aim.source}" if aim.source else ""), *([aim.remark] if aim.remark else [])]


def _data_notes(given: Mapping[str, Data | None]) -> list[str]:
    evaluation, notes = given["evaluate"], []
    for role, what in (("calibrate", "calibration"), ("train", "training")):
        data = given[role]
        shared = 0 if data is None or evaluation is None else data.overlap(evaluation)
        if shared:
            said = f"{what} and evaluation share {shared} samples: the accuracy reported is too good"
            notes.append(f"{said}; use start and limit")
    return notes


def _finish(
    history: History, guard: Guard, original: Model, reached: Model, context: Context, *, judge: bool
) -> Result:
    """Judge the whole against the original (but for a replay), lower it for the runtime, and complete the record."""
    changed = reached.revision != original.revision
    if guard.evaluation is not None:
        history.original.accuracy = guard.accuracy(original)
    if changed and guard.clock:
        history.latency = _only_latency(history, original) or guard.latency(original.file or original, reached)
        if judge and history.latency.slower and guard.goal == "latency" and not guard.force:
            # Each stage may lose up to the noise; together they must not, unless one is there for something else.
            reason = f"the whole is slower than the original: {history.latency.describe()}"
            judged_by = {goal for stage in history.stages if stage.status == KEPT for goal in stage.goals}
            if judged_by <= {"latency", choose.ACCURACY}:
                _undo(history, reason)
                reached, changed, history.latency = original, False, None
                history.node_map = {node.name: (node.name,) for node in original.graph}
            else:
                history.unproven.append(f"kept for the budgets of its passes, though {reason}")
    final = reached.clone()
    context.backend.emit(final)
    judged = final.clone() if caveat(context.backend) else reached
    if changed:
        _sign(final, history)
    accuracy: Accuracy | None = guard.accuracy(judged) if guard.evaluation is not None else None
    if accuracy is not None and guard.chosen_on_part:
        on_all = accuracy
        accuracy, history.original.accuracy = guard.reported(judged), guard.reported(original)
        history.notes.append(
            f"accuracy is reported on the {accuracy.samples} evaluation samples that did not serve for choosing; on all"
            f" {on_all.samples} {on_all.metric} is {on_all.points:.2f} ({-on_all.drop:+.2f})"
        )
    total = cost(reached, context.batch, context.dims).total
    if not context.large or guard.goal == "energy" or any(stage.predicted for stage in history.stages):
        history.original.cost, total = (context.costs(m).total for m in (original, reached))
        history.predicted = guard.predicted(original, reached)
        history.notes += _not_predicted(reached, context)
    history.final = Snapshot(total, stored_size(final), len(final.graph), accuracy)
    if guard.clock or quantised(reached):
        deployment = context.backend.deployment(reached, guard.feeds, context.threads)
        history.fused, history.fell_back = dict(deployment.fused), dict(deployment.fell_back)
        history.deployed_difference = deployment.difference
        history.notes += deployment.notes
    if caveat(context.backend):
        history.unproven.append(caveat(context.backend))
    elif not guard.clock:
        why = f": target {context.target.name!r} is another machine's" if guard.measure else ""
        history.unproven.append(f"latency was not measured{why}")
    if guard.evaluation is None and any(s.status == KEPT and not r.exact for s in history.stages for r in s.passes):
        history.unproven.append("nothing is known about accuracy: no evaluation data were given")
    history.unproven += [text for stage in history.stages for text in stage.unproven if text not in history.unproven]
    return Result(final, history)


def _not_predicted(model: Model, context: Context) -> list[str]:
    if context.foresee(model) is not None or (context.large and context.goal != "latency"):
        return []
    try:
        context.predict(model)
    except EffcError as error:
        return [f"latency is not predicted: {error}"]
    return []


def _undo(history: History, reason: str) -> None:
    for stage in history.stages:
        if stage.status == KEPT:
            stage.status, stage.cause, stage.reason = UNDONE, "goal", reason
            for record in stage.passes:
                record.status, record.reason = UNDONE, reason


def _only_latency(history: History, original: Model) -> Latency | None:
    """The latency of the only stage that was kept is that of the whole."""
    kept = [stage for stage in history.stages if stage.status == KEPT]
    return kept[0].latency if len(kept) == 1 and original.file is None else None


def _sign(model: Model, history: History) -> None:
    """Write into the file's metadata how it came about."""
    signature = {"effc.version": effc.__version__, "effc.recipe": history.recipe, "effc.target": history.target}
    signature |= {f"effc.data.{role}": digest for role, digest in history.data.items()}
    edit.set_metadata(model, signature)


def _require(history: History, result: Result, min_speedup: float | None, max_size: float | None) -> None:
    if min_speedup is not None:
        speedup = 1 / history.latency.ratio if history.latency else 1.0
        if speedup < min_speedup:
            history.unmet.append(f"the result is {speedup:.2f}x as fast as the original, {min_speedup:g}x was required")
    if max_size is not None:
        share = history.final.size / history.original.size
        if share > max_size:
            history.unmet.append(f"the result has {share:.2f} of the original's size, {max_size:g} was required")
    if history.unmet:
        raise RequirementNotMet("; ".join(history.unmet), result)
