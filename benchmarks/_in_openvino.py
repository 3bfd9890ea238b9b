"""One model in OpenVINO beside its float original in onnxruntime: its outputs on given inputs, and how fast it is.

    python benchmarks/_in_openvino.py MODEL.onnx FLOAT.onnx INPUTS.npz BATCH SECONDS OUT.npz

Runs under an interpreter that has openvino and onnxruntime; nothing here imports effc. INPUTS.npz holds an array of
samples for each input. OUT.npz holds an array for each output, and `ratio`: the median latency of single inferences of
BATCH samples, one thread, over that of the float model in onnxruntime, both in turns, of processor time. What stays
float is computed in float32: the default, bfloat16 where the processor has units for it, fails on models with integers
in OpenVINO 2026.4.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import onnxruntime as ort
import openvino as ov  # pyright: ignore[reportMissingImports]  # the other interpreter's


def main() -> int:
    path, original, inputs, batch, seconds, out = sys.argv[1:]
    with np.load(inputs) as arrays:
        samples = {name: arrays[name] for name in arrays.files}
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(original, options, providers=["CPUExecutionProvider"])
    size, count = int(batch), len(next(iter(samples.values())))
    made = []
    for start in range(0, count, size):
        found = request.infer({name: x[start : start + size] for name, x in samples.items()})
        made.append({port.get_any_name(): np.array(value) for port, value in found.items()})
    feeds = {name: x[:size] for name, x in samples.items()}
    runs = (lambda: request.infer(feeds), lambda: session.run(None, feeds))
    times, end = [], time.perf_counter() + float(seconds)
    while time.perf_counter() < end or len(times) < 20:
        each = []
        for run in runs:
            started = time.process_time()
            run()
            each.append(time.process_time() - started)
        times.append(each)
    own, other = np.median(times, axis=0)
    outputs = {name: np.concatenate([part[name] for part in made]) for name in made[0]}
    np.savez(out, ratio=own / other, **{f"output {name}": value for name, value in outputs.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
