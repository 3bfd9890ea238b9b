"""What holds for every registered pass, tried on the small networks: helpers of the test and of the README's table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import onnx

import effc
from effc import registry, target
from effc.api import DEFAULT_PASSES
from effc.contract import Pass
from effc.history import KEPT, UNCHANGED, UNDONE, PassRecord
from effc.recipe import build, parse
from tests.networks import NETWORKS, feeds

DIMS = {"T": 6}  # the size that `feeds` gives dimensions other than the batch
SAMPLES = 16
TARGET = target.find("onnxruntime-avx2").name  # whose weights keep to 7 bits: right on every processor

# Every option of a pass with a value that is not its default: what text and YAML have to carry.
OPTIONS: dict[str, list[str]] = {
    "simplify": [],
    "fold-batchnorm": [],
    "equalize": ["equalize{margin=0.25, least=0.5}"],
    "bound-masks": [],
    "unfuse": [],
    "smooth": ["smooth{insert=0.01}"],
    "int8": [
        "int8{activations=static}",
        "int8{calibrator=percentile, percentile=99.5}",
        "int8{calibrator=entropy, rounding=nearest, bias_correction=false, size=0.5}",
        "int8{rounding=balanced, asymmetric=false, split=false}",
        "int8{keep_float=[conv1, 'block [0-9]*', \"a, b\"], max_drop=0.25}",
    ],
    "low-rank": [
        "low-rank{method=tucker, relaxation=0.5, nonlinear=false, asymmetric=false, multiple=4}",
        "low-rank{method=depthwise, terms=1}",
        "low-rank{min_gain=1.5, macs=0.5}",
        "low-rank{size=0.5, speedup=1.5, damage=0.1, max_drop=0.25}",
    ],
    "prune-weights": [
        "prune-weights{saliency=obs, scope=layer, sparsity=0.5, compensate=true}",
        "prune-weights{sparsity=0.8, rounds=5, max_drop=0.25}",
        "prune-weights{pattern=2:4, remove_dead=true}",
        "prune-weights{deviations=0.5}",
    ],
    "prune-channels": [
        "prune-channels{saliency=l2, correct=false, nonlinear=false, multiple=2, most=0.5, macs=0.7}",
        "prune-channels{scope=layer, labels=true, size=0.5, speedup=1.5, damage=0.1, max_drop=0.25}",
        "prune-channels{zeros=true}",
    ],
    "prune-blocks": [
        "prune-blocks{count=2, correct=false}",
        "prune-blocks{macs=0.5, size=0.5, speedup=1.5, damage=0.1, max_drop=0.25}",
    ],
    "prune-groups": [
        "prune-groups{saliency=l1, forms=[crop, taps], nonlinear=false, min_gain=1.5}",
        "prune-groups{macs=0.5, size=0.5, speedup=1.5, damage=0.1, max_drop=0.25}",
        "prune-groups{zeros=true}",
    ],
    "weight-only": [
        "weight-only{bits=8, block=64, symmetric=true, scales=max, rounding=nearest, embeddings=false}",
        "weight-only{form=dequantize, rounding=gptq}",
        "weight-only{bits=2, activations=float, keep_float=[head, 'block [0-9]*'], size=0.5, max_drop=0.25}",
    ],
    "recover": [
        "recover{epochs=3, learning_rate=0.1, batch=8, labels=0.5, temperature=2, features=0.5, mean=geometric}",
        "recover{momentum=0.5, weight_decay=0.001, warmup=1, clip=1, patience=2, validation=0.25, augment=flip}",
        "recover{frozen_norms=true, keep_zeros=false, reestimate=4, device=cpu, checkpoint=a.pt, seconds=1000}",
        "recover{by=block, optimizer=sgd, precision=bfloat16}",
    ],
    "group-lasso": [
        "group-lasso{sparsity=0.7, groups=channels, epochs=3, learning_rate=0.1, batch=8, labels=0.5, temperature=2}",
        "group-lasso{features=0.5, mean=geometric, momentum=0.5, weight_decay=0.001, warmup=1, clip=1, patience=2}",
        "group-lasso{validation=0.25, augment=flip, frozen_norms=true, keep_zeros=false, reestimate=4, device=cpu}",
        "group-lasso{optimizer=sgd, checkpoint=a.pt, seconds=1000, precision=bfloat16}",
    ],
}

# The least that makes a pass do something: recipes that the networks are put through. A name where it needs no option.
RECIPES: dict[str, str] = {
    "low-rank": "low-rank{damage=0.02}",
    "prune-weights": "prune-weights{sparsity=0.3, compensate=true}",
    "prune-channels": "prune-channels{macs=0.7}",
    "prune-blocks": "prune-blocks{count=1}",
    "prune-groups": "prune-groups{macs=0.7}",
    "recover": "recover{epochs=1, batch=4, learning_rate=0.001, validation=0.25, reestimate=2}",
    "group-lasso": "group-lasso{sparsity=0.2, epochs=1, batch=4, learning_rate=0.001, validation=0.25, reestimate=2}",
}

# Largest max|a - b| / max|a| of a lossy pass's outputs from the original's, on any of the networks. For recover,
# statistics of batch norms are taken anew, and those of the networks are random.
BOUNDS: dict[str, float] = {
    "int8": 0.1,
    "low-rank": 0.6,
    "prune-channels": 1.0,
    "prune-blocks": 1.0,
    "prune-groups": 1.0,
    "prune-weights": 0.5,
    "weight-only": 0.3,
    "recover": 10.0,
    "group-lasso": 10.0,
}


def pass_names() -> list[str]:
    """The passes that rewrite something themselves, and can do so here."""
    left_out = {"repeat"} if find_spec("torch") else {"repeat", "recover", "group-lasso"}
    return [name for name in registry.pass_names() if name not in left_out]


def recipe(name: str) -> str:
    return RECIPES.get(name, name)


def make(name: str) -> Pass:
    return build(parse(recipe(name)))[0]


def calibration(proto: onnx.ModelProto, count: int = SAMPLES) -> dict:
    """Made-up samples for a model, as a function that yields them: names of inputs -> normal numbers."""

    def made() -> Iterator[dict[str, np.ndarray]]:
        for seed in range(count):
            yield feeds(proto, batch=1, seed=1000 + seed)

    return {"source": made}


def put_through(text: str, network: str, **options) -> tuple[onnx.ModelProto, effc.Result]:
    """A recipe run over a network with made-up calibration data, nothing timed: the original and the result."""
    proto = NETWORKS[network]()
    data = calibration(proto)
    settings = {"calibrate": data, "train": data, "target_name": TARGET, "dims": DIMS, "measure": False} | options
    return proto, effc.optimize(proto, text, **settings)


@dataclass(frozen=True)
class Cell:
    """What a pass made of a network.

    Attributes:
        status: kept, unchanged or undone, as the history has it.
        changed: how many of how many nodes.
        reasons: why nodes, or the whole, were left alone, most frequent first.
    """

    status: str
    changed: int = 0
    nodes: int = 0
    reasons: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, record: PassRecord) -> Cell:
        reasons = Counter(refusals(record))
        told = [reason for reason, _ in reasons.most_common()]
        if record.status == UNDONE:
            told = [record.reason]
        return cls(record.status, record.counts["changed"], len(record.ledger), told)

    def __str__(self) -> str:
        if self.status == KEPT:
            return f"changed {self.changed} of {self.nodes}"
        if self.status == UNCHANGED and not self.reasons:
            return "nothing to do"
        return f"{'undone' if self.status == UNDONE else 'refused'}: {self.reasons[0]}"


def refusals(record: PassRecord) -> list[str]:
    """The reasons of a ledger but for those of nodes that the pass has no business with."""
    return [e.reason for e in record.ledger if e.status == "skipped" and not e.reason.startswith("nothing for ")]


def table(recipes: list[str] | None = None) -> str:
    """Recipe x network as Markdown: what its last pass did. Reasons stand below, by number.

    By default each pass alone and, last, the recipe that is run when none is given.
    """
    recipes = recipes or [*map(recipe, pass_names()), DEFAULT_PASSES]
    notes: dict[str, int] = {}
    rows = []
    for network in NETWORKS:
        cells = []
        for text in recipes:
            record = put_through(text, network)[1].history.passes[-1]
            kind, colon, reason = str(Cell.of(record)).partition(": ")
            cells.append(f"{kind} [{notes.setdefault(reason, len(notes) + 1)}]" if colon else kind)
        about = (NETWORKS[network].__doc__ or "").strip().splitlines()[0].rstrip(".")
        rows.append(f"| {network}: {about} | {' | '.join(cells)} |")
    head = [f"| network | {' | '.join(f'`{text}`' for text in recipes)} |", f"|{' --- |' * (len(recipes) + 1)}"]
    return "\n".join([*head, *rows, "", *(f"{number}. {reason}" for reason, number in notes.items())])
