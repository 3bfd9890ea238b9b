"""Recurrent layers. PyTorch has the gates in another order; weights stay as ONNX has them, and are read in its."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effc.errors import BadInput

from ._torch_ops import function

# Where each gate of PyTorch's stands in ONNX: LSTM i f g o among i o f c, GRU r z n among z r h.
GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
LAYERS: dict[str, Callable] = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": torch.rnn_tanh}
USUAL = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
EITHER_WAY = {kind: (usual, usual * 2) for kind, usual in USUAL.items()}  # forward, and in both directions
KNOWN = {"direction": ("forward", "bidirectional"), "layout": (0,)}


def recurrent(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    op_type: str,
    hidden_size: int = 0,
    direction: str = "forward",
    layout: int = 0,
    input_forget: int = 0,
    linear_before_reset: int = 1,
    activations: Sequence[str] = (),
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    if peepholes is not None:
        raise BadInput(f"{op_type} with peepholes has no trainable form")
    start = _start(hidden, x, recurrence)
    given = (start, _start(cell, x, recurrence)) if op_type == "LSTM" else start
    made = _run(op_type, x, weight, recurrence, bias, lengths, given)
    return made[:outputs] if outputs > 1 else made[0]


function("LSTM", only=KNOWN | {"input_forget": (0,), "activations": EITHER_WAY["LSTM"]})(recurrent)
function("GRU", only=KNOWN | {"activations": EITHER_WAY["GRU"]}, needs={"linear_before_reset": 1})(recurrent)
function("RNN", only=KNOWN | {"activations": EITHER_WAY["RNN"]})(recurrent)


def _run(
    kind: str, x: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor | None, lengths: Tensor | None, start: object
) -> tuple[Tensor, ...]:
    """Y [steps, directions, N, H], and the last states [directions, N, H]."""
    directions, _, size = recurrence.shape
    if lengths is not None and not bool((lengths == x.shape[0]).all()):
        raise BadInput(f"{kind} over sequences of several lengths has no trainable form")
    flat: list[Tensor] = []
    for at in range(directions):
        flat += [_ordered(kind, matrix[at]) for matrix in (weight, recurrence)]
        flat += [] if bias is None else [_ordered(kind, half) for half in bias[at].chunk(2)]
    made = LAYERS[kind](x, start, flat, bias is not None, 1, 0.0, False, directions == 2, False)
    y = made[0].reshape(*x.shape[:2], directions, size).transpose(1, 2)
    return (y, *made[1:])


def _ordered(kind: str, rows: Tensor) -> Tensor:
    """Rows of all gates, in PyTorch's order."""
    gates = rows.chunk(len(GATES[kind]))
    return torch.cat([gates[at] for at in GATES[kind]])


def _start(state: Tensor | None, x: Tensor, recurrence: Tensor) -> Tensor:
    """Given, or zeros: [directions, N, H]."""
    return x.new_zeros(recurrence.shape[0], x.shape[1], recurrence.shape[2]) if state is None else state
