"""Chains that run as one convolution, against the same network with each layer for itself."""

from __future__ import annotations

import pytest

import effc
from effc.registry import trainer

torch = pytest.importorskip("torch")
chains = pytest.importorskip("effc.backends._torch_chains")  # it imports torch
compose, convolved = chains.compose, chains.convolved
nn = torch.nn

CLOSE = 1e-5  # of the largest number: sums of float32 in another order


def chain(channels=4, each=3, outputs=6, *, stride=1, padding=1, dilation=1, inner=True, outer=True):
    return nn.Sequential(
        nn.Conv2d(channels, channels * each, 3, stride, padding, dilation, groups=channels, bias=inner),
        nn.Conv2d(channels * each, outputs, 1, bias=outer),
    )


def near(a, b) -> bool:
    return (a - b).abs().max().item() <= CLOSE * b.abs().max().item()


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 0, 1), (1, (0, 1), 1)]
)
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_a_chain_as_one_convolution(stride, padding, dilation, inner, outer):
    torch.manual_seed(0)
    net = chain(stride=stride, padding=padding, dilation=dilation, inner=inner, outer=outer)
    x = torch.randn(2, 4, 9, 8)
    first, last = net
    where = {name: getattr(first, name) for name in ("stride", "padding", "dilation")}
    assert near(convolved(x, first.weight, last.weight, first.bias, last.bias, **where), net(x))


def test_outputs_and_gradients_of_a_composed_view():
    torch.manual_seed(0)
    net = nn.Sequential(*chain(3, 4, 8), nn.BatchNorm2d(8), nn.ReLU(), *chain(8, 2, 8, stride=2), nn.ReLU())
    model = effc.capture(net, torch.zeros(2, 3, 8, 8))
    plain, composed = (trainer().view(model).train() for _ in range(2))
    trainer().compose(composed)
    x = torch.randn(4, 3, 8, 8)
    made = [view(x) for view in (plain, composed)]
    assert near(made[1], made[0])
    for y in made:
        (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    a, b = (trainer().weights(view) for view in (plain, composed))
    largest = max(float(w.grad.abs().max()) for w in a.values() if w.requires_grad)
    assert a.keys() == b.keys()
    for name, weight in a.items():  # biases in front of a batch norm have no gradient but noise
        assert not weight.requires_grad or float((weight.grad - b[name].grad).abs().max()) <= CLOSE * largest, name


def test_trained_factors_are_written_back_and_masks_hold():
    torch.manual_seed(0)
    model = effc.capture(nn.Sequential(*chain()), torch.zeros(2, 4, 8, 8))
    view = trainer().view(model)
    name = next(name for name, w in trainer().weights(view).items() if w.shape == (6, 12, 1, 1))
    kept = (torch.arange(72).reshape(6, 12, 1, 1) % 3 > 0).numpy()
    assert compose(view) == 1
    trainer().mask(view, name, kept)
    optimizer = torch.optim.SGD(view.parameters(), lr=0.1)
    x = torch.randn(2, 4, 8, 8)
    view(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        wanted = view(x)
    trainer().write_back(view, model)
    again = trainer().view(model)
    with torch.no_grad():
        assert near(again(x), wanted)
    assert not model.graph.initializers[name].const_value.numpy()[~kept].any()


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 1)),  # groups of two
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, 3)),  # not pointwise
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, 1, stride=2)),
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, 1, groups=2)),
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 6, 1)),
        nn.Sequential(nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 1)),  # eight times as many products
    ],
)
def test_other_layers_stay(net):
    channels = net[0].in_channels
    view = trainer().view(effc.capture(net, torch.zeros(2, channels, 8, 8)))
    assert compose(view) == 0


def test_a_tensor_in_between_that_is_read_stays():
    model = effc.capture(nn.Sequential(*chain()), torch.zeros(2, 4, 8, 8))
    inner = next(iter(model.nodes("Conv"))).outputs[0].name
    view = trainer().view(model, expose=[inner])
    assert compose(view) == 0
    assert len(view(torch.zeros(1, 4, 8, 8))) == 2
