"""The diagonal of the error's curvature in weights, by one backward pass (LeCun, Denker, Solla 1990, section 2.2).

For y = f(x) with h_i = d^2E/dy_i^2 the recursion is, off-diagonal terms and those with f'' dropped,

    h_j = sum_i (dy_i/dx_j)^2 h_i

so it runs like a gradient, with each Jacobian squared number by number. A product (convolution, matrix product) does so
where the vector-Jacobian product is taken at squared operands: h_x = h_y * W^2 and h_W = h_y * x^2 at once, summed over
the places that share a weight. Functions of single numbers square their slope, norms and softmax have formulas below,
and what selects, moves, adds or takes a maximum has a Jacobian of zeros and ones. A view runs under a mode that puts
these rules in; afterwards autograd's graph is searched for any function that has none, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree

from effc.errors import BadInput

from ._torch_outputs import feeding, judged

PRODUCTS = (
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul", "mm",
    "bmm", "mv", "einsum",
)  # fmt: skip
ELEMENTWISE = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "celu", "cos", "cosh", "elu", "erf", "exp", "expm1",
    "gelu", "hardsigmoid", "hardswish", "leaky_relu", "log", "log1p", "mish", "neg", "reciprocal", "rsqrt", "selu",
    "sigmoid", "silu", "sin", "sinh", "softplus", "softsign", "sqrt", "square", "tan", "tanh",
)  # fmt: skip
# Nodes of autograd's graph whose Jacobians hold zeros and ones alone.
SELECTING = frozenset({
    "Add", "Alias", "Amax", "Amin", "Cat", "Clamp", "ClampMax", "ClampMin", "Clone", "ConstantPadNd", "Cumsum",
    "Embedding", "Expand", "Flip", "Gather", "Hardtanh", "Index", "IndexPut", "IndexSelect", "MaxPool2DWithIndices",
    "MaxPool3DWithIndices", "Maximum", "Minimum", "Permute", "Relu", "Repeat", "ReshapeAlias", "Scatter", "ScatterAdd",
    "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "Sum", "T", "Threshold", "ToCopy", "Topk",
    "Transpose", "Tril", "Triu", "Unbind", "UnsafeView", "Unsqueeze", "View", "Where",
})  # fmt: skip


def curvature(view: fx.GraphModule, feeds: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Trained initializer -> h = d^2E/dw^2 >= 0 of each of its numbers, mean over samples, float32, in its layout.

    E is the mean over outputs of: for class scores [N, C > 1] the cross entropy, whose own predictions are the targets
    (h = p (1 - p) of a logit, and 1/p of a probability), in nats a sample; for others |y - d|^2 / mean |y|^2. So
    1/2 h w^2 is, to this order, the damage of setting w to zero. Batch norms use their statistics.

    Raises:
        BadInput: no rule is known for a function of the network, or there are no samples.
    """
    with judged(view, feeds) as (batches, outputs, trained):
        sums = {name: torch.zeros_like(w) for name, w in trained.items()}
        for batch in batches:
            with torch.enable_grad(), Squaring():
                made = outputs.differentiable(view(*feeding(view, batch)))
            refuse_unknown(view, made.values())
            second = [outputs.curvature(name, y.detach()) for name, y in made.items()]
            found = torch.autograd.grad(list(made.values()), list(trained.values()), second, allow_unused=True)
            for total, h in zip(sums.values(), found, strict=True):
                if h is not None:
                    total += h
    return {name: (total / outputs.samples).cpu().float().numpy() for name, total in sums.items()}


class Squaring(TorchFunctionMode):
    """Within it, the functions that have a rule run with their Jacobians squared on the way back."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        rule = RULES.get(getattr(func, "__name__", ""))
        differentiable = any(isinstance(v, Tensor) and v.requires_grad for v in tree.tree_leaves((args, kwargs)))
        if rule is None or not differentiable or not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        return rule(func, *args, **(kwargs or {}))


def refuse_unknown(view: fx.GraphModule, outputs: Iterable[Tensor]) -> None:
    """Raises BadInput where a function that made the outputs has neither a rule nor a Jacobian of zeros and ones."""
    waiting, seen = [y.grad_fn for y in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = node.name().rpartition("::")[2]
        plain = kind.rstrip("0123456789").removesuffix("Backward")
        weighted = getattr(node, "_saved_alpha", 1) != 1  # a + alpha b
        if (plain not in SELECTING or weighted) and kind not in ("AccumulateGrad", *_OWN):
            raise BadInput(
                f"the curvature behind {plain.lstrip('_')} is not known: a rule for it belongs into"
                " backends/_torch_curvature.py; saliency=magnitude needs none"
            )
        waiting += [before for before, _ in node.next_functions]


class _Product(torch.autograd.Function):
    """A function that is linear in each of its tensors; backwards at their squares."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        return compute(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            squares = [t.square().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)]
            made = ctx.compute(*squares)
            wanted = [s for s, n in zip(squares, needed, strict=True) if n]
            found = iter(torch.autograd.grad(made, wanted, gradients[0]))
        return None, *(next(found) if n else None for n in needed)


class _Elementwise(torch.autograd.Function):
    """y_i = f(x_i): h_x = f'(x)^2 h_y."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(x)
        return compute(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            (slope,) = torch.autograd.grad(ctx.compute(x).sum(), x)
        return None, slope.square() * gradients[0]


class _Mean(torch.autograd.Function):
    """A mean of n numbers: h_x = h_y / n^2."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.compute, ctx.shape = compute, x.shape
        return compute(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            x = gradients[0].new_zeros(ctx.shape).requires_grad_()
            made = ctx.compute(x)
            (shared,) = torch.autograd.grad(made, x, gradients[0])
        return None, shared * (made.numel() / x.numel())


class _Softmax(torch.autograd.Function):
    """dp_i/dx_j = p_i (d_ij - p_j), and d log p_i/dx_j = d_ij - p_j."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, log: bool) -> Tensor:
        p = torch.softmax(x, axis)
        ctx.axis, ctx.log = axis, log
        ctx.save_for_backward(p)
        return torch.log_softmax(x, axis) if log else p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (p,), h = ctx.saved_tensors, gradients[0]
        h = h if ctx.log else p.square() * h
        return p.square() * h.sum(ctx.axis, keepdim=True) + (1 - 2 * p) * h, None, None


class _Standardised(torch.autograd.Function):
    """z = (x - mean) / s over the last axis, of n numbers: dz_i/dx_j = (d_ij - (1 + z_i z_j) / n) / s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float) -> Tensor:
        inverse = (x.var(-1, correction=0, keepdim=True) + epsilon).rsqrt()
        z = (x - x.mean(-1, keepdim=True)) * inverse
        ctx.save_for_backward(z, inverse)
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (z, inverse), h = ctx.saved_tensors, gradients[0]
        n = z.shape[-1]
        s0, s1, s2 = ((h * z**k).sum(-1, keepdim=True) for k in (0, 1, 2))
        own = h * (1 - 2 * (1 + z.square()) / n)
        return inverse.square() * (own + (s0 + 2 * z * s1 + z.square() * s2) / n**2), None


_OWN = tuple(f"{kind.__name__}Backward" for kind in (_Product, _Elementwise, _Mean, _Softmax, _Standardised))


def _product(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    leaves, spec = tree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    tensors = [leaves[i] for i in places]
    if len({id(t) for t in tensors}) < len(tensors):
        raise BadInput("the curvature behind a product of a tensor with itself is not known; take saliency=magnitude")

    def compute(*given: Tensor) -> Tensor:
        filled = list(leaves)
        for i, tensor in zip(places, given, strict=True):
            filled[i] = tensor
        own, named = tree.tree_unflatten(filled, spec)
        return func(*own, **named)

    return _Product.apply(compute, *tensors)


def _elementwise(func: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Elementwise.apply(lambda value: func(value, *args, **kwargs), x)


def _mul(func: Callable, a: Tensor, b: Any) -> Tensor:
    if a is b:
        return _elementwise(torch.square, a)
    return _product(torch.mul, a, b if isinstance(b, Tensor) else torch.as_tensor(b, dtype=a.dtype, device=a.device))


def _div(func: Callable, a: Tensor, b: Any) -> Tensor:
    return _mul(func, a, _elementwise(torch.reciprocal, b) if isinstance(b, Tensor) else 1 / b)


def _sub(func: Callable, a: Tensor, b: Any) -> Tensor:
    return a + (_elementwise(torch.neg, b) if isinstance(b, Tensor) else -b)


def _pow(func: Callable, x: Any, exponent: Any) -> Tensor:
    fixed = not (isinstance(exponent, Tensor) and exponent.requires_grad)
    if not isinstance(x, Tensor) or not fixed or (isinstance(exponent, Tensor) and exponent.numel() > 1):
        raise BadInput("the curvature behind a power with exponents that vary is not known; take saliency=magnitude")
    return _elementwise(func, x, exponent)


def _mean(func: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Mean.apply(lambda value: func(value, *args, **kwargs), x)


def _softmax(func: Callable, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
    return _Softmax.apply(x, dim, func.__name__ == "log_softmax")


def _scaled(z: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    z = z if weight is None else _product(torch.mul, z, weight.reshape(shape))
    return z if bias is None else z + bias.reshape(shape)


def _batch_norm(
    func: Callable, x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """By its statistics: z = (x - mean) / sqrt(var + eps), then a scale and a shift."""
    if training or mean is None or var is None:
        raise BadInput("the curvature behind a batch norm that takes the batch's own statistics is not known")
    shape = [1, -1, *[1] * (x.dim() - 2)]
    inverse = _elementwise(torch.rsqrt, var + eps)
    off = _sub(func, x, mean.reshape(shape))
    return _scaled(_product(torch.mul, off, inverse.reshape(shape)), weight, bias, shape)


def _layer_norm(
    func: Callable, x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    z = _Standardised.apply(x.flatten(x.dim() - len(normalized_shape)), eps).reshape(x.shape)
    return _scaled(z, weight, bias, list(normalized_shape))


def _group_norm(
    func: Callable, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    z = _Standardised.apply(x.reshape(x.shape[0], num_groups, -1), eps).reshape(x.shape)
    return _scaled(z, weight, bias, [-1, *[1] * (x.dim() - 2)])


def _instance_norm(
    func: Callable, x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return _group_norm(func, x, x.shape[1], weight, bias, eps)


def _prelu(func: Callable, x: Tensor, slope: Tensor) -> Tensor:
    shape = [-1, *[1] * (x.dim() - 2)] if slope.numel() > 1 else []
    return torch.where(x > 0, x, _product(torch.mul, x, slope.reshape(shape)))


RULES: dict[str, Callable[..., Tensor]] = (
    dict.fromkeys(PRODUCTS, _product)
    | dict.fromkeys(ELEMENTWISE, _elementwise)
    | {
        "mul": _mul, "div": _div, "sub": _sub, "pow": _pow, "mean": _mean,
        "__rsub__": lambda func, a, b: _sub(func, b, a), "__rdiv__": lambda func, a, b: _div(func, b, a),
        "softmax": _softmax, "log_softmax": _softmax, "batch_norm": _batch_norm, "layer_norm": _layer_norm,
        "group_norm": _group_norm, "instance_norm": _instance_norm, "prelu": _prelu,
    }
)  # fmt: skip
