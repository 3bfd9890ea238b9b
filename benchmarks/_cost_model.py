"""What a prediction is worth: measured beside predicted latency, and the side on which rewrites fall."""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from _zoo import ANCHOR, FLOAT, INT8, Entry, Pair, Zoo, catalogue, pairs

from effc.errors import EffcError
from effc.measure import Latency, compare_many, random_feeds
from effc.model import Model
from effc.predict import Estimate, predict
from effc.quiet import Quiet, lowest
from effc.registry import backend
from effc.target import find

LEAST = 40  # models that latency is judged on
NOISE = 0.03  # allowed of a model against itself
EFFECT = 0.05  # a rewrite's change of latency that counts
SESSIONS = 4  # fresh ones of a model, at most, until two agree
TRIES = 3  # to find the machine undisturbed; then the least time has to do
LONGEST = 2.0  # seconds of a call that is still measured
NEVER = "-"


class Bench:
    """The target, the models, and what was found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.target = find(options.target)
        self.runtime = backend(self.target.runtime)
        self.zoo = Zoo(options.work, options.target)
        self.watches: dict[int, Quiet] = {}
        self.disturbed = 0
        self.rows: list[dict[str, Any]] = []
        self.missed: list[str] = []
        self.unpredicted: Counter[str] = Counter()

    def entries(self) -> list[Entry]:
        """The models asked for; says which are missing and why."""
        found, lacking = catalogue()
        for reason in lacking:
            print(f"- left out: {reason}")
        chosen = [e for e in found if re.search(self.options.models, e.name)]
        return chosen[::8] if self.options.quick else chosen

    def predicted(self, model: Model, batch: int, threads: int, dims: Mapping[str, int]) -> Estimate | None:
        """None where there is no prediction; why is told at the end."""
        try:
            found = predict(model, self.target, backend=self.runtime, batch=batch, dims=dims, threads=threads)
        except EffcError as error:
            self.unpredicted[words(error)] += 1
            return None
        return found.total

    def measured(
        self, models: Mapping[str, Model], batch: int, threads: int, dims: Mapping[str, int]
    ) -> dict[str, Latency]:
        first = next(iter(models))
        feeds = random_feeds(models[first], batch, dims)
        seconds = self.options.seconds * len(models)
        return compare_many(
            models, feeds, backend=self.runtime, reference=first, threads=threads, seconds=seconds, pairs=4
        )

    def alone(self, model: Model, batch: int, threads: int, dims: Mapping[str, int]) -> tuple[float, float]:
        """Milliseconds of one inference while nothing disturbs the machine, as far as patience goes; and the noise.

        Of up to four fresh sessions, until the two quickest agree: their mean, and the share by which they differ.
        """
        found: list[float] = []
        while len(found) < 2 or (sorted(found)[1] / min(found) - 1 > NOISE and len(found) < SESSIONS):
            found.append(self._session(model, batch, threads, dims))
        least, other = sorted(found)[:2]
        return (least + other) / 2, other / least - 1

    def _session(self, model: Model, batch: int, threads: int, dims: Mapping[str, int]) -> float:
        if threads not in self.watches:
            self.watches[threads] = Quiet(self.runtime, threads)
        session, feeds = self.runtime.session(model, threads=threads), random_feeds(model, batch, dims)
        limits = {"seconds": self.options.seconds / 4, "fewest": 3, "most": 60, "patience": self.options.seconds * 2}
        times: list[int] = []
        for _ in range(TRIES):
            own, good = self.watches[threads].runs(lambda: session.run(feeds), **limits)
            if good:
                return lowest(own, good) / 1e6
            times += own
        self.disturbed += 1
        return lowest(times, []) / 1e6

    def drift(self, threads: int) -> float:
        """The machine's speed now over that at calibration, by the network that `effc.quiet` times."""
        then = self.target.roof(threads).watch
        return self.watches[threads].best * 1e-9 / then if then else 1.0

    def obstacle(self, model: Model, batch: int, dims: Mapping[str, int]) -> str:
        """Why a model is not measured at a batch, or ""."""
        if model.batch not in (None, batch):
            return f"its batch is fixed at {model.batch}"
        if batch == 1:
            return ""
        session, feeds = self.runtime.session(model), random_feeds(model, 1, dims)
        session.run(feeds)
        start = time.perf_counter()
        session.run(feeds)
        took = batch * (time.perf_counter() - start)
        return f"a call would take about {took:.1f} s" if took > LONGEST else ""


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"


@dataclass(frozen=True)
class Row:
    """One model, measured and predicted.

    Attributes:
        stated: standard deviation of the prediction, as a share of it.
        noise: share by which two fresh sessions of the same model differed.
        drift: time of the network that `effc.quiet` watches, at best in this run, over that when the target was made.
    """

    model: str
    family: str
    variant: str
    batch: int
    threads: int
    measured_ms: float
    predicted_ms: float | None
    stated: float | None
    basis: str
    noise: float
    drift: float

    @property
    def error(self) -> float | None:
        return None if self.predicted_ms is None else self.predicted_ms / self.measured_ms - 1

    @property
    def steadied(self) -> float | None:
        """The error less the drift."""
        return None if self.error is None else (1 + self.error) * self.drift - 1

    def line(self) -> str:
        predicted = NEVER if self.predicted_ms is None else f"{self.predicted_ms:.3f}"
        stated = NEVER if self.stated is None else f"{self.stated:.0%}"
        measured = f"{self.measured_ms:.3f}", f"{self.noise:.1%}"
        said = predicted, percent(self.error), stated, percent(self.steadied), self.basis
        cells = self.model, self.variant, self.batch, self.threads, *measured, *said
        return f"| {' | '.join(map(str, cells))} |"


def _row(entry: Entry, variant: str, batch: int, threads: int, model: Model, bench: Bench) -> Row:
    ms, noise = bench.alone(model, batch, threads, entry.dims)
    found, drift = bench.predicted(model, batch, threads, entry.dims), bench.drift(threads)
    said = (None, None, "") if found is None else (1e3 * found.seconds, found.error, found.basis)
    return Row(entry.name, entry.family, variant, batch, threads, ms, *said, noise, drift)


def latency(bench: Bench) -> str:
    """Returns the summary."""
    entries = bench.entries()
    noise(bench, entries)
    titles = "model", "variant", "batch", "threads", "measured, ms", "noise", "predicted, ms", "error", "stated"
    titles = *titles, "less drift", "basis"
    print(f"\n| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    rows, skipped = [], []
    for entry in entries:
        found = list(_rows(bench, entry, skipped))
        print("\n".join(row.line() for row in found), flush=True)
        rows += found
        bench.rows += [
            {"part": "latency", **asdict(row), "error": row.error, "steadied": row.steadied} for row in found
        ]
    print("".join(f"\n- {line}" for line in skipped))
    print(f"- {bench.disturbed} sessions were disturbed all the time: their least time counts")
    for threads in bench.watches:
        own = [row.noise for row in rows if row.threads == threads]
        print(
            f"- noise, {threads} threads: two fresh sessions of a model differ by {np.median(own):.1%} in the median;"
            f" {sum(n > NOISE for n in own)} of {len(own)} rows, of which no two of {SESSIONS} came within"
            f" {NOISE:.0%}, are not judged"
        )
    for threads in bench.watches:
        print(f"- machine's time over that at calibration, {threads} threads: {bench.drift(threads):.3f}")
    models = {row.model for row in rows}
    if len(models) < LEAST and not bench.options.quick and bench.options.models == "":
        bench.missed.append(f"latency: {len(models)} models, {LEAST} needed")
    judged = [row for row in rows if row.error is not None and row.noise <= NOISE]
    if not judged:
        return f"latency: {len(rows)} measurements of {len(models)} models, nothing was predicted"
    print(
        f"\n| of them | rows | {' | '.join(_statistics(judged))} |\n| --- | --- |{' --- |' * len(_statistics(judged))}"
    )
    for name, part in _groups(judged):
        print(f"| {name} | {len(part)} | {' | '.join(_statistics(part).values())} |")
    return f"latency: {len(models)} models, {len(judged)} rows: " + ", ".join(
        f"{key} {value}" for key, value in _statistics(judged).items()
    )


def noise(bench: Bench, entries: Sequence[Entry]) -> None:
    """Models against themselves."""
    print("\n| the same model twice | threads | ms | ratio |\n| --- | --- | --- | --- |")
    for entry in (ANCHOR, *entries[:: max(1, len(entries) // 4)][:4]):
        model = bench.zoo.model(entry)
        for threads in bench.options.threads:
            once, again = (bench.alone(model, model.batch or 1, threads, entry.dims)[0] for _ in range(2))
            print(f"| {entry.name} | {threads} | {once:.3f} | {again / once:.3f} |", flush=True)
            if abs(again / once - 1) > NOISE:
                bench.missed.append(f"noise: {entry.name}, {threads} threads: {again / once:.3f}")


def _rows(bench: Bench, entry: Entry, skipped: list[str]) -> Iterator[Row]:
    models: dict[str, Model] = {}
    for variant in (FLOAT, INT8):
        try:
            models[variant] = bench.zoo.model(entry, variant)
        except EffcError as error:
            skipped.append(f"{entry.name}, {variant}: {words(error)}")
    for batch in bench.options.batches if FLOAT in models else ():
        if why := bench.obstacle(models[FLOAT], batch, entry.dims):
            skipped.append(f"{entry.name}, batch {batch}: {why}")
            continue
        for threads in bench.options.threads:
            for variant, model in models.items():
                yield _row(entry, variant, batch, threads, model, bench)


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    yield "all", list(rows)
    keys: dict[str, Callable[[Row], Any]] = {
        "{}": lambda row: row.variant,
        "batch {}": lambda row: row.batch,
        "{} threads": lambda row: row.threads,
        "family {}": lambda row: row.family,
    }
    for text, key in keys.items():
        for value in sorted({key(row) for row in rows}):
            yield text.format(value), [row for row in rows if key(row) == value]


def _statistics(rows: Sequence[Row]) -> dict[str, str]:
    errors, steadied, stated = (
        np.array([getattr(row, name) for row in rows], float) for name in ("error", "steadied", "stated")
    )
    sizes = np.abs(errors)
    sure = np.abs(errors) <= 2 * stated * (1 + errors)  # as shares of the measured time
    return {
        "within 10 %": f"{np.mean(sizes <= 0.1):.0%}",
        "within 20 %": f"{np.mean(sizes <= 0.2):.0%}",
        "median error": f"{np.median(sizes):.1%}",
        "bias": f"{np.median(errors):+.1%}",
        "largest": f"{errors[np.argmax(sizes)]:+.0%}",
        "within twice the stated": f"{np.mean(sure):.0%}",
        "median less drift": f"{np.median(np.abs(steadied)):.1%}",
    }


def percent(value: float | None) -> str:
    return NEVER if value is None else f"{100 * value:+.1f} %"


def signs(bench: Bench) -> str:
    """Returns the summary."""
    chosen = [p for p in (*_wholes(bench.entries()), *pairs()) if re.search(bench.options.models, p.name)]
    print("\n| rewrite | batch | before, ms | measured ratio | 95 % bounds | predicted ratio | same side |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    skipped: list[str] = []
    for pair in chosen[::8] if bench.options.quick else chosen:
        for batch in bench.options.batches:
            _sign(bench, pair, batch, skipped)
    print("".join(f"\n- {line}" for line in skipped))
    rows = [row for row in bench.rows if row["part"] == "signs"]
    judged = [row for row in rows if row["right"] is not None]
    print(f"\n| of them | measured | change by more than {EFFECT:.0%} | side predicted |\n| --- | --- | --- | --- |")
    for kind in ("all", *dict.fromkeys(row["kind"] for row in rows)):
        part, fitting = ([r for r in some if kind in ("all", r["kind"])] for some in (rows, judged))
        right = f"{np.mean([r['right'] for r in fitting]):.0%}" if fitting else NEVER
        print(f"| {kind} | {len(part)} | {len(fitting)} | {right} |")
    for row in judged:
        if not row["right"]:
            print(
                f"- missed: {row['name']}, batch {row['batch']}: {row['ratio']:.3f}, predicted {row['predicted']:.3f}"
            )
    return (
        f"signs: {sum(r['right'] for r in judged)} of {len(judged)} changes by more than {EFFECT:.0%} on the right side"
    )


def _wholes(entries: Sequence[Entry]) -> list[Pair]:
    return [Pair("int8, whole", f"{e.name}-int8", e, e, (FLOAT, INT8)) for e in entries[::4]]


def _sign(bench: Bench, pair: Pair, batch: int, skipped: list[str]) -> None:
    entries = {"before": pair.before, "after": pair.after}
    dims = pair.before.dims
    try:
        models = {k: bench.zoo.model(e, v) for (k, e), v in zip(entries.items(), pair.variants, strict=True)}
    except EffcError as error:
        skipped.append(f"{pair.name}: {words(error)}")
        return
    if why := bench.obstacle(models["before"], batch, dims):
        skipped.append(f"{pair.name}, batch {batch}: {why}")
        return
    found = bench.measured(models, batch, 1, dims)["after"]
    before, after = (bench.predicted(model, batch, 1, dims) for model in models.values())
    predicted = None if before is None or after is None else after.seconds / before.seconds
    counts = predicted is not None and abs(found.ratio - 1) > EFFECT
    right = (predicted < 1) == (found.ratio < 1) if predicted is not None and counts else None
    bench.rows.append(
        {"part": "signs", "kind": pair.kind, "name": pair.name, "batch": batch, "before_ms": found.before_ms,
         "ratio": found.ratio, "low": found.low, "high": found.high, "predicted": predicted, "right": right}
    )  # fmt: skip
    side = {None: "", True: "yes", False: "**no**"}[right]
    said = NEVER if predicted is None else f"{predicted:.3f}"
    bounds = f"{found.low:.3f} to {found.high:.3f}"
    print(
        f"| {pair.name} | {batch} | {found.before_ms:.3f} | {found.ratio:.3f} | {bounds} | {said} | {side} |",
        flush=True,
    )
