"""effc.compressed: bytes of weights after a general compressor."""

import zlib

import numpy as np

from effc.capture import from_proto
from effc.compressed import compressed_size
from effc.edit import set_initializer
from tests.networks import NETWORKS


def test_each_weight_is_compressed_by_itself():
    model = from_proto(NETWORKS["plain"]())
    arrays = [v.const_value.numpy() for v in model.graph.initializers.values()]
    assert compressed_size(model) == sum(len(zlib.compress(a.tobytes(), 6)) for a in arrays)


def test_zeros_shorten_it_and_an_edit_is_seen():
    model = from_proto(NETWORKS["plain"]())
    before, value = compressed_size(model), model.graph.initializers["conv3.weight"]
    weight = value.const_value.numpy()
    set_initializer(model, value, np.where(np.arange(weight.size).reshape(weight.shape) % 10 == 0, weight, 0))
    saved = before - compressed_size(model)
    assert 0.7 * weight.nbytes < saved < weight.nbytes
