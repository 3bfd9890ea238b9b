"""int8 by effc and by others on the same networks: accuracy, latency, size, and what it takes to get there.

    python benchmarks/int8.py [--models resnet20 ...] [--batches 1 32] [--dynamic] [--nncf PYTHON] [--json OUT.json]

Networks and data lie in $EFFC_DATA. Every model is a file, all latencies of a table are taken in one interleaved run
with one thread. `effc` is what `effc optimize` gives with calibration and evaluation data, so rewrites that lose too
much or do not pay are already undone; where that changed anything, `effc, all of it` is what the passes had made.

Exit status 1 when a mark is missed; the marks are listed under the tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peers
from _zoo_nets import resnet18

from effc.api import optimize, real_feeds
from effc.capture import load
from effc.data import Data, open_data
from effc.evaluate import Score, evaluate, paired_p
from effc.history import UNDONE
from effc.measure import SLOWER, Latency, compare_many
from effc.registry import backend
from effc.runtime import Session
from effc.save import save

RECIPE = "simplify,fold-batchnorm,int8"
NNCF, IN_OPENVINO = "nncf-mixed", Path(__file__).with_name("_in_openvino.py")
NEVER = "-"


@dataclass(frozen=True)
class Network:
    """One network, its data, and what effc may lose on it.

    Attributes:
        file: below $EFFC_DATA/models; or what makes a model.
        calibrate, evaluate: data specs, their sources below $EFFC_DATA/data.
        max_drop: as given to effc; None leaves its default.
        allowed: the mark: largest loss of the metric, in its unit; None where only latency has a mark.
        least: the mark: smallest value of the metric, in its unit.
        fastest: the mark: batch -> largest share of the float original's latency.
        agreed: the mark: smallest share of samples that all rewrites together leave in their class.
    """

    file: str | Callable[[], onnx.ModelProto]
    calibrate: str | Mapping[str, Any]
    evaluate: str | Mapping[str, Any]
    max_drop: float | None = None
    allowed: float | None = None
    least: float | None = None
    fastest: Mapping[int, float] = field(default_factory=dict)
    agreed: float | None = None


def images() -> Iterator[dict[str, np.ndarray]]:
    """Smooth random images, for networks of random weights."""
    coarse = np.random.default_rng(0).standard_normal((32, 3, 14, 14), np.float32)
    yield {"input": coarse.repeat(16, axis=2).repeat(16, axis=3)}


CIFAR = {"calibrate": "cifar10-train.yaml{limit=256}", "evaluate": "cifar10-test.yaml"}
FACES = {"source": "imagenet-500", "resize": [240, 320], "scale": 128, "mean": 127 / 128, "shuffle": 0}
NETWORKS = {
    "resnet20": Network("resnet20-cifar10.onnx", **CIFAR, allowed=0.3),
    "resnet56": Network("resnet56-cifar10.onnx", **CIFAR, allowed=0.3),
    "vgg-small": Network("vgg-small-cifar10.onnx", **CIFAR),
    "mobilenet": Network(
        "mobilenet_v1_025-imagenet.onnx",
        "imagenet-500.yaml{shuffle=0,limit=150}",
        "imagenet-500.yaml{shuffle=0,start=150}",
        max_drop=0.5,
        allowed=0.5,
        fastest={1: 0.8, 32: 0.75},
        agreed=0.93,
    ),
    # No labels here: the signal to noise ratio of the outputs, 20 dB being a relative squared error of 1 %.
    "ultraface": Network(
        "ultraface-rfb-320.onnx", {**FACES, "limit": 150}, {**FACES, "start": 150, "metric": "sqnr"}, least=20.0
    ),
    # Random weights: latency alone counts.
    "resnet18": Network(
        lambda: resnet18(224),
        {"source": images, "limit": 16},
        {"source": images, "start": 16, "metric": "sqnr"},
        fastest={1: 1 / 3.9},
    ),
}


@dataclass
class Candidate:
    """A model that stands in a table, or the reason why it does not."""

    name: str
    path: Path
    seconds: float | None = None
    failure: str = ""
    remarks: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Of what the file computes: metadata, which say how it came about, aside."""
        proto = onnx.load(self.path)
        del proto.metadata_props[:]
        return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


class Replayed(Session):
    """Outputs that were computed elsewhere, handed out in order."""

    def __init__(self, outputs: Mapping[str, np.ndarray]) -> None:
        self._outputs, self._place = outputs, 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        begin = self._place
        self._place += len(next(iter(feeds.values())))
        return {name: array[begin : self._place] for name, array in self._outputs.items()}


class Bench:
    """One network: makes each candidate once, evaluates each file once, and prints a table a batch."""

    def __init__(self, name: str, network: Network, folder: Path, options: argparse.Namespace) -> None:
        root = Path(os.environ["EFFC_DATA"])
        self.name, self.network, self.folder, self.options = name, network, folder, options
        self.float = Candidate("float32", folder / "float32.onnx")
        if isinstance(network.file, str):
            self.float.path = root / "models" / network.file
        else:
            onnx.save(network.file(), self.float.path)
        self.model = load(self.float.path)
        self.calibration, self.evaluation = (
            open_spec(spec, root / "data").for_model(self.model) for spec in (network.calibrate, network.evaluate)
        )
        self.runtime = backend("onnxruntime")
        self.scores: dict[str, Score] = {}
        self.missed: list[str] = []
        self.all_of_it = self._effc("effc, all of it", judged=False)
        self.peers = self._peers()

    def table(self, batch: int) -> list[dict[str, Any]]:
        """Print one table; returns its rows as plain data."""
        judged = self._effc("effc", judged=True, batch=batch)
        candidates = [self.float, judged, *self.peers]
        if not judged.failure and judged.digest != self.all_of_it.digest:
            candidates.insert(2, self.all_of_it)
        candidates[1].remarks.append(f"{self.all_of_it.seconds:.1f} s without evaluating and measuring")
        running = {c.name: c for c in candidates if not c.failure}
        self._evaluate(running)
        latencies = compare_many(
            {name: c.path for name, c in running.items()},
            real_feeds(self.model, batch, {}, self.evaluation),
            backend=self.runtime,
            reference=self.float.name,
            seconds=self.options.seconds,
        )
        rows = [self._row(c, latencies.get(c.name), batch) for c in candidates]
        elsewhere = next((c for c in self.peers if c.name == NNCF and not c.failure), None)
        if elsewhere is not None:
            rows.append(self._in_openvino(elsewhere, rows[0], batch))
        self._print(rows, batch)
        self._judge({row["candidate"]: row for row in rows}, batch)
        return rows

    def _effc(self, name: str, *, judged: bool, batch: int | None = None) -> Candidate:
        made = Candidate(name, self.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{batch}.onnx")
        settings: dict[str, Any] = {"calibrate": self.calibration, "batch": batch, "measure": judged}
        if judged:
            settings |= {"evaluate": self.evaluation, "max_drop": self.network.max_drop}

        def make() -> None:
            result = optimize(self.float.path, RECIPE, **settings)
            save(result.model, made.path)
            onnx.checker.check_model(str(made.path), full_check=True)
            for stage in result.history.stages:
                for step in stage.passes:
                    reason = f" ({step.reason})" if step.status == UNDONE else ""
                    made.remarks.append(f"{step.name} {step.status}{reason}")
                    made.remarks += step.notes
            made.remarks += result.history.notes
            if result.history.fell_back:
                made.remarks.append(f"{len(result.history.fell_back)} quantised nodes run in float")

        return _timed(made, make)

    def _peers(self) -> list[Candidate]:
        batches = self.folder / "batches.npz"
        count = len(self.calibration)
        size = self.model.batch or max(n for n in range(1, 33) if count % n == 0)
        feeds = [part.feeds for part in self.calibration.batches(size)]
        np.savez(batches, **{name: np.stack([f[name] for f in feeds]) for name in feeds[0]})
        wanted = ["onnxruntime-default", "onnxruntime-best"]
        wanted += ["onnxruntime-dynamic"] if self.options.dynamic else []
        found = [self._peer(name, lambda n, out: peers.PEERS[n](self.float.path, feeds, out)) for name in wanted]
        if self.options.nncf:
            found.append(self._peer(NNCF, lambda n, out: self._command(n, batches, out)))
        return found

    def _peer(self, name: str, make: Callable[[str, Path], object]) -> Candidate:
        made = Candidate(name, self.folder / f"{name}.onnx")
        return _timed(made, lambda: make(name, made.path))

    def _command(self, peer: str, batches: Path, out: Path) -> None:
        self._elsewhere(peers.__file__, peer, self.float.path, batches, out)

    def _in_openvino(self, made: Candidate, float32: dict[str, Any], batch: int) -> dict[str, Any]:
        """The row of a model in OpenVINO; times are over the float original's in onnxruntime."""
        other = Candidate(f"{made.name}, in OpenVINO", made.path, made.seconds)
        inputs, out = self.folder / "inputs.npz", self.folder / "outputs.npz"
        parts = [part.feeds for part in self.evaluation.batches(32)]
        np.savez(inputs, **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        try:
            self._elsewhere(IN_OPENVINO, made.path, self.float.path, inputs, batch, self.options.seconds, out)
        except RuntimeError as error:
            other.failure = str(error)
            return self._row(other, None, batch)
        with np.load(out) as arrays:
            ratio = float(arrays["ratio"])
            outputs = {n.removeprefix("output "): arrays[n] for n in arrays.files if n.startswith("output ")}
        sessions = {"float32": self.runtime.session(self.float.path, threads=1), "other": Replayed(outputs)}
        score = evaluate(sessions, self.evaluation, batch=self.model.batch, reference="float32")["other"]
        row = self._row(other, Latency(**float32["latency"]), batch, score)
        row["latency"] |= {"ratio": ratio, "low": ratio, "high": ratio, "after_ms": ratio * row["latency"]["after_ms"]}
        return row

    def _elsewhere(self, *arguments: object) -> None:
        """Run a script under the interpreter that has NNCF."""
        done = subprocess.run([str(part) for part in (self.options.nncf, *arguments)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])

    def _evaluate(self, candidates: dict[str, Candidate]) -> None:
        """Scores by digest, of the files that have none yet."""
        new = {c.digest: c.path for c in candidates.values() if c.digest not in self.scores}
        if not new:
            return
        new[self.float.digest] = self.float.path
        sessions = {digest: self.runtime.session(path, threads=1) for digest, path in new.items()}
        self.scores |= evaluate(sessions, self.evaluation, batch=self.model.batch, reference=self.float.digest)

    def _row(self, made: Candidate, latency: Latency | None, batch: int, score: Score | None = None) -> dict[str, Any]:
        row: dict[str, Any] = {"network": self.name, "batch": batch, "candidate": made.name, "seconds": made.seconds}
        if latency is None:
            return {**row, "failure": made.failure, "remarks": made.remarks}
        score, original = score or self.scores[made.digest], self.scores[self.float.digest]
        return {
            **row,
            "metric": score.metric,
            "points": score.points,
            "change": score.points - original.points,
            "p": None if score.per_sample is None else paired_p(score, original),
            "samples": score.samples,
            "agreement": score.agreement,
            "damage": score.damage,
            "latency": asdict(latency),
            "size": made.path.stat().st_size / self.float.path.stat().st_size,
            "remarks": made.remarks,
        }

    def _print(self, rows: list[dict[str, Any]], batch: int) -> None:
        first = rows[0]
        print(f"\n### {self.name}, batch {batch} ({first['samples']} evaluation samples)\n")
        print(f"| model | {first['metric']} | change | p | agreement | damage | ms | x float32 | size | compile s |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in rows:
            print(_line(row))
        print()
        for row in rows:
            if row["remarks"]:
                print(f"- {row['candidate']}: {'; '.join(row['remarks'])}")
        sys.stdout.flush()

    def _judge(self, rows: dict[str, dict[str, Any]], batch: int) -> None:
        """Hold effc's row to the marks."""
        where, own, network = f"{self.name}, batch {batch}", rows["effc"], self.network
        if "failure" in own:
            self.missed.append(f"{where}: {own['failure']}")
            return
        if network.allowed is not None and own["change"] < -network.allowed - 1e-9:
            self.missed.append(f"{where}: {-own['change']:.2f} points lost, {network.allowed:g} allowed")
        if network.least is not None and own["points"] < network.least:
            self.missed.append(f"{where}: {own['metric']} is {own['points']:.1f}, {network.least:g} needed")
        ratio, low = own["latency"]["ratio"], own["latency"]["low"]
        if low > SLOWER:
            self.missed.append(f"{where}: slower than float32 ({ratio:.2f}x)")
        if ratio > network.fastest.get(batch, np.inf):
            self.missed.append(f"{where}: {ratio:.3f}x, at most {network.fastest[batch]:.3f} wanted")
        whole = rows.get("effc, all of it", own)
        if network.agreed is not None and whole["agreement"] < network.agreed:
            self.missed.append(f"{where}: all of it agrees on {whole['agreement']:.1%}, {network.agreed:.0%} wanted")
        best = rows["onnxruntime-best"]
        if "failure" not in best and ratio > SLOWER * best["latency"]["ratio"]:
            bounds = f"[{best['latency']['low']:.3f}, {best['latency']['high']:.3f}]"
            self.missed.append(
                f"{where}: {ratio:.3f}x [{low:.3f}, {own['latency']['high']:.3f}], slower than onnxruntime-best's"
                f" {best['latency']['ratio']:.3f}x {bounds}"
            )


def _timed(made: Candidate, make: Callable[[], object]) -> Candidate:
    """Carry out what writes the candidate's file; a peer that fails is a finding, not an end."""
    started = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):
            make()
    except Exception as error:  # peers raise what their own defects raise
        made.failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    made.seconds = time.perf_counter() - started
    return made


def _line(row: Mapping[str, Any]) -> str:
    seconds = NEVER if row["seconds"] is None else f"{row['seconds']:.1f}"
    if "failure" in row:
        return f"| {row['candidate']} | failed: {row['failure']} | | | | | | | | {seconds} |"
    reference = row["seconds"] is None
    latency = row["latency"]
    agreement = NEVER if row["agreement"] is None else f"{100 * row['agreement']:.2f} %"
    bounds = "1" if reference else f"{latency['ratio']:.3f} [{latency['low']:.3f}, {latency['high']:.3f}]"
    change = NEVER if reference or not np.isfinite(row["change"]) else f"{row['change']:+.2f}"
    chance = NEVER if reference or row["p"] is None else f"{row['p']:.2g}"
    return (
        f"| {row['candidate']} | {row['points']:.2f} | {change} | {chance} | {agreement} | {row['damage']:.4f} |"
        f" {latency['after_ms']:.3f} | {bounds} | {row['size']:.2f} | {seconds} |"
    )


def open_spec(spec: str | Mapping[str, Any], folder: Path) -> Data:
    """A data spec whose source lies in a folder."""
    if isinstance(spec, str):
        return open_data(f"{folder}/{spec}")
    return open_data(spec if callable(spec["source"]) else {**spec, "source": str(folder / spec["source"])})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--dynamic", action="store_true", help="onnxruntime's dynamic quantisation as well")
    parser.add_argument("--nncf", metavar="PYTHON", help="interpreter of an environment with NNCF")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time for each two models")
    parser.add_argument("--json", type=Path, help="write all rows here as well")
    options = parser.parse_args()
    if "EFFC_DATA" not in os.environ:
        print("skipped: set EFFC_DATA to the folder that holds models/ and data/")
        return 0
    print(f"{RECIPE}; onnxruntime {backend('onnxruntime').version()}, one thread; ratios with 95 % bounds")
    print("agreement: share of samples with float32's class; damage: KL divergence in nats, or relative squared error")
    rows, missed = [], []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(name, NETWORKS[name], Path(folder), options)
            for batch in options.batches:
                if bench.model.batch not in (None, batch):
                    print(f"\n### {name}, batch {batch}: skipped, the batch is fixed at {bench.model.batch}")
                    continue
                rows += bench.table(batch)
            missed += bench.missed
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    print(f"\n{len(missed)} marks missed")
    print("".join(f"- {line}\n" for line in missed), end="")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
