"""Training that brings accuracy back after lossy passes: from the original as teacher, with labels or without.

The student is the model as the passes left it, seen as a trainable network (`backends/torch.py`); its weights, with
whatever structure they have, are trained and written back into the same graph. See `finetune` for the loop and
`distillation` for what is minimised.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx
from pydantic import Field

from effc import registry
from effc.api import Spec
from effc.augment import Augment
from effc.capture import capture
from effc.contract import Context, Pass, Progress, Proposal, Skipped, no_progress
from effc.data import Data, open_data
from effc.distillation import Loss, ensemble
from effc.errors import BadInput
from effc.evaluate import Score, are_probabilities, class_labels, evaluate
from effc.finetune import Finetune, Fitted, Wanted, device, torch_threads
from effc.model import Model, constant_tensor
from effc.piecewise import By, rewritten, train_parts
from effc.proximal import Shrinkage
from effc.reestimate import reestimate
from effc.runtime import Session
from effc.schedule import Optimizer, Precision, Schedule
from effc.target import find as find_target
from effc.zeros import hold_zeros

HELD_OUT = 2048  # samples, at most, that judge epochs


@dataclass(frozen=True)
class Recover(Pass):
    """Fine-tuning towards the original's outputs, and labels where the training data have them."""

    name: ClassVar[str] = "recover"
    recovers: ClassVar[bool] = True

    epochs: Annotated[int, Field(ge=0, description="passes over the training data")] = 10
    by: Annotated[
        By, Field(description="train the whole; or, for little data, rewritten blocks or layers one after the other")
    ] = "whole"
    optimizer: Annotated[
        Optimizer | None, Field(description="SGD with momentum, or Adam; None: sgd for the whole, adam for parts")
    ] = None
    learning_rate: Annotated[
        float | None, Field(gt=0, description="at its highest, then along a cosine to 0; None: 0.01, with adam 0.001")
    ] = None
    batch: Annotated[int, Field(ge=2, description="samples a step")] = 128
    labels: Annotated[
        float, Field(ge=0, le=1, description="weight of the labels; the teacher has the rest; 1: no teacher")
    ] = 0.1
    temperature: Annotated[
        float, Field(gt=0, description="that the teacher's and the model's scores are divided by")
    ] = 4.0
    features: Annotated[
        float, Field(ge=0, description="weight of the distance to the teacher's tensors behind rewritten layers")
    ] = 1.0
    mean: Annotated[
        Literal["arithmetic", "geometric"], Field(description="of the probabilities of several teachers")
    ] = "arithmetic"
    momentum: Annotated[float, Field(ge=0, lt=1, description="Nesterov's")] = 0.9
    weight_decay: Annotated[float, Field(ge=0, description="on kernels and matrices")] = 1e-4
    warmup: Annotated[float, Field(ge=0, description="epochs over which the learning rate rises from 0")] = 0.5
    clip: Annotated[float, Field(gt=0, description="largest norm of the gradient")] = 5.0
    patience: Annotated[
        int | None, Field(ge=1, description="epochs without a better state, after which it ends; None: never")
    ] = None
    seconds: Annotated[
        float | None, Field(gt=0, description="after which no epoch begins, or no further part; None: all of them do")
    ] = None
    validation: Annotated[
        float, Field(gt=0, le=0.5, description="share of the training data held out to judge epochs, of 2048 at most")
    ] = 0.1
    augment: Annotated[Augment, Field(description="images mirrored, shifted by up to an eighth, or both")] = "none"
    frozen_norms: Annotated[bool, Field(description="batch norms keep their statistics while training")] = False
    keep_zeros: Annotated[
        bool, Field(description="weights that were pruned to zero stay so; false: they are trained as well, from there")
    ] = True
    reestimate: Annotated[
        int, Field(ge=0, description="batches to take statistics of batch norms from anew, before training")
    ] = 0
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Field(description="where to train; auto: CUDA where there is some")
    ] = "auto"
    precision: Annotated[
        Precision, Field(description="of a step's products; auto: bfloat16 on CUDA, float32 on processors")
    ] = "auto"
    checkpoint: Annotated[
        str | None, Field(description="file that holds the state after each epoch; training goes on from it")
    ] = None

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        _data(context, self.name)
        nodes = [node.name or "" for node in model.graph if any(map(_trainable, node.inputs))]
        why = _obstacle(model)
        yield from (Skipped(node, why) for node in nodes if why)
        if nodes and not why:
            yield Proposal("weights", tuple(nodes))

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        for note in recover(model, self, context):
            context.say(note)


def recover(
    model: Model, how: Recover, context: Context,
    shrinkage: Callable[[Mapping[str, Any]], Shrinkage] | None = None,
) -> list[str]:  # fmt: skip
    """Train a model's weights in place; what is worth telling, one sentence each.

    Args:
        shrinkage: makes what follows each step, from the trained weights by name; for by=whole.

    Raises:
        BadInput: PyTorch is not installed, the model holds an operator that cannot be trained, data do not fit.
    """
    trainer, data = registry.trainer(), _data(context, how.name).for_model(model)
    if why := _obstacle(model):
        raise BadInput(why)
    for teacher in context.teachers:
        _alike(model, teacher)
    if how.by != "whole":
        return _part_by_part(model, how, context)
    if how.labels == 1 and not data.labelled:
        raise BadInput("labels=1 trains on labels alone, and the training data have none: name them under labels")
    rest, held_out = _split(data, how.validation)
    labelled = data.labelled and how.labels > 0
    teachers = (context.teachers or (context.original,)) if how.labels < 1 else ()
    inputs, outputs = [info.name for info in model.inputs], [info.name for info in model.outputs]
    features = [name for name in rewritten(model, teachers) if name not in outputs] if how.features else []
    sessions = [context.backend.session(t, threads=context.threads, expose=features) for t in teachers]
    wanted, probabilities = _teaching(sessions, held_out, how)
    loss = Loss(how.temperature, how.labels if labelled else 0.0, how.features / max(len(features), 1), probabilities)
    with torch_threads(context.threads):
        view = trainer.view(model, expose=features)
        trainer.compose(view)
        held = hold_zeros(trainer, view, model) if how.keep_zeros else []
        reestimate(view, inputs, rest.shuffled(context.seed), how.batch, how.reestimate)
        training = Finetune(
            view, inputs, outputs, rest, held_out, loss, _schedule(how), features=features, wanted=wanted,
            labels=labelled, shrinkage=None if shrinkage is None else shrinkage(trainer.weights(view)),
            device=device(how.device), seed=context.seed, key=_key(model, how, context),
            checkpoint=None if how.checkpoint is None else Path(how.checkpoint), progress=context.progress,
        )  # fmt: skip
        fitted = training.run()
    trainer.write_back(view, model)
    worse = _worse(sessions, outputs, held_out, fitted) if labelled else ()
    return [_told(fitted, how, len(held_out)), *held, *worse]


@dataclass(frozen=True)
class Recovered:
    """A trained model and how it did.

    Attributes:
        notes: what training came to.
        scores: on evaluation data, of "before", "after" and "teacher"; empty without such data.
    """

    model: Model
    notes: tuple[str, ...]
    scores: Mapping[str, Score]


def train(
    model: Model | onnx.ModelProto | str | os.PathLike,
    how: Recover | None = None,
    *,
    data: Spec,
    teachers: Sequence[Model | onnx.ModelProto | str | os.PathLike] = (),
    evaluate_on: Spec | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Recovered:
    """Train a model towards its teachers and labels, outside of any recipe.

    Args:
        model: never changed.
        how: options of the pass.
        data: to train on.
        teachers: what to learn from; by default the model as it is, which keeps it from drifting.
        evaluate_on: data to score the model before and after, and the first teacher, on.

    Raises:
        BadInput: model, data or options cannot be used.
    """
    student, how = capture(model), how or Recover()
    backend = registry.backend("onnxruntime")
    own = [capture(teacher) for teacher in teachers]
    context = Context(
        student, find_target(None), backend, training=open_data(data).for_model(student), teachers=tuple(own),
        threads=threads, seed=seed, progress=progress,
    )  # fmt: skip
    trained = student.clone()
    notes = recover(trained, how, context)
    scores: Mapping[str, Score] = {}
    if evaluate_on is not None:
        models = {"before": student, "after": trained, "teacher": own[0] if own else student}
        sessions = {name: backend.session(each, threads=threads) for name, each in models.items()}
        judged = open_data(evaluate_on).for_model(student)
        scores = evaluate(sessions, judged, batch=student.batch, reference="teacher", progress=progress)
    backend.emit(trained)
    return Recovered(trained, tuple(notes), scores)


def _data(context: Context, name: str) -> Data:
    if context.training is None:
        raise BadInput(f"{name} needs training data: give --train SPEC (Python: train=...)")
    return context.training


def _obstacle(model: Model) -> str | None:
    """Why a model cannot be trained, or None. Raises BadInput where there is nothing to train with."""
    trainer = registry.trainer()
    if model.batch is not None:
        return f"the model's batch is fixed at {model.batch}: training needs a free batch"
    try:
        trainer.view(model)
    except BadInput as error:
        return str(error)
    return None


def _trainable(value: Any) -> bool:
    tensor = None if value is None else constant_tensor(value)
    return tensor is not None and tensor.dtype.is_floating_point()


def _alike(model: Model, teacher: Model) -> None:
    """Raises BadInput where a teacher takes other inputs than the model, or has other outputs."""
    for kind in ("inputs", "outputs"):
        own, other = ({info.name for info in getattr(each, kind)} for each in (model, teacher))
        if not (own >= other if kind == "inputs" else own & other):
            raise BadInput(
                f"the teacher {teacher.name} has {kind} {', '.join(sorted(other))}, the model "
                f"{', '.join(sorted(own))}: they must be called alike"
            )


def _part_by_part(model: Model, how: Recover, context: Context) -> list[str]:
    if how.checkpoint is not None or len(context.teachers) > 1 or how.labels == 1 or how.augment != "none":
        raise BadInput(f"by={how.by} takes one teacher, no labels=1, augment or checkpoint: they are for by=whole")
    teacher = context.teachers[0] if context.teachers else context.original
    return train_parts(
        model, teacher, how.by, _schedule(how), how.validation, device(how.device), context, keep_zeros=how.keep_zeros
    )


def _split(data: Data, share: float) -> tuple[Data, Data]:
    """Training data, and those that are held out."""
    share = min(share, HELD_OUT / max(len(data), 1))
    held_out, rest = data.split(share)
    return rest, held_out


def _teaching(sessions: Sequence[Session], data: Data, how: Recover) -> tuple[Wanted | None, frozenset[str]]:
    """What the teachers say, and which outputs of theirs are probabilities."""
    if not sessions:
        return None, frozenset()

    def wanted(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return ensemble([session.run(feeds) for session in sessions], how.mean)

    seen = wanted(next(iter(data.batches(16))).feeds)
    for name, array in seen.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadInput(f"the teacher's output {name!r} holds NaN or infinity on the training data")
    return wanted, frozenset(name for name, array in seen.items() if are_probabilities(array))


def _schedule(how: Recover) -> Schedule:
    names = Schedule.__dataclass_fields__
    given = {name: value for name, value in asdict(how).items() if name in names and value is not None}
    optimizer: Optimizer = how.optimizer or ("sgd" if how.by == "whole" else "adam")
    rate = how.learning_rate or {"sgd": 0.01, "adam": 0.001}[optimizer]
    return Schedule(**given | {"optimizer": optimizer, "learning_rate": rate})


def _key(model: Model, how: Recover, context: Context) -> str:
    """What a checkpoint has to have in common with a run that goes on from it."""
    digest = hashlib.sha256()
    for value in model.graph.initializers.values():
        digest.update(f"{value.name}".encode())
        digest.update(np.ascontiguousarray(value.const_value.numpy()).tobytes())
    options = {k: v for k, v in asdict(how).items() if k not in ("checkpoint", "device")}
    digest.update(json.dumps([options, context.training.digest, context.seed], sort_keys=True).encode())
    return digest.hexdigest()


def _worse(sessions: Sequence[Session], outputs: Sequence[str], held_out: Data, fitted: Fitted) -> Iterator[str]:
    """Says so where no teacher is right as often as the student has become: it held the student back."""
    own = fitted.scores[fitted.best][0]
    if own is None or not sessions:
        return
    right = [0] * len(sessions)
    for part in held_out.batches(128):
        for number, session in enumerate(sessions):
            made = session.run(part.feeds)
            there = (made[n] for n in outputs if n in made)
            scores = next((array for array in there if array.ndim == 2 and array.shape[1] > 1), None)
            if scores is None:
                return
            labels = class_labels(part.labels, scores.shape[1], held_out.name)
            right[number] += int((scores.argmax(axis=1) == labels).sum())
    best = max(right) / len(held_out)
    if best < own:
        yield (
            f"the teacher makes {100 * best:.2f} % on the held-out samples, less than the student: train it first with"
            " labels=1, or let the student learn from labels alone (labels=1)"
        )


def _told(fitted: Fitted, how: Recover, samples: int) -> str:
    (before, start), (after, best) = fitted.scores[0], fitted.scores[fitted.best]
    share = "" if before is None or after is None else f", top-1 {100 * before:.2f} to {100 * after:.2f} %"
    said = (
        f"{how.name}: loss {start:.4g} to {best:.4g}{share} on {samples} held-out samples, best after epoch "
        f"{fitted.best}"
    )
    ended = f"; {fitted.ended}: the best state so far was kept" if fitted.ended else f" of {how.epochs}"
    if not fitted.best and len(fitted.scores) > 1:
        ended += "; samples that the model knows from an earlier training flatter it as it was: new ones judge better"
    return said + ended
