"""How far a model seems to differ from itself: the error of every latency that effc states.

    python benchmarks/noise.py [--seconds 4] [--threads 1] [MODEL.onnx ...]

Without models, those in $EFFC_DATA/models. Exit status 1 when a ratio is off by more than 3 %.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from effc.capture import load
from effc.errors import BadInput
from effc.measure import compare, random_feeds
from effc.registry import backend

ALLOWED = 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    models = options.models
    if not models:
        if "EFFC_DATA" not in os.environ:
            print("skipped: name models, or set EFFC_DATA to the folder that holds models/")
            return 0
        models = sorted(Path(os.environ["EFFC_DATA"], "models").glob("*.onnx"))
    runtime = backend("onnxruntime")
    print(f"the same model against itself; onnxruntime {runtime.version()}, threads: {options.threads}\n")
    print("| model | batch | ms | ratio | 95 % bounds | rounds | took s |\n| --- | --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for path in models:
        model = load(path)
        for batch in options.batch:
            try:
                feeds = random_feeds(model, batch)
            except BadInput as error:
                print(f"| {path.stem} | {batch} | skipped: {error} | | | | |")
                continue
            start = time.perf_counter()
            x = compare(model, model, feeds, backend=runtime, threads=options.threads, seconds=options.seconds)
            took = time.perf_counter() - start
            bounds = f"{x.low:.3f} to {x.high:.3f}"
            print(f"| {path.stem} | {batch} | {x.before_ms:.2f} | {x.ratio:.3f} | {bounds} | {x.rounds} | {took:.1f} |")
            sys.stdout.flush()
            worst = max(worst, abs(x.ratio - 1))
    print(f"\nlargest |ratio - 1|: {worst:.3f} (allowed {ALLOWED})")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
