"""Rows are placed where they are taken from."""

import jax
import numpy as np
import pytest

from o1jax.parallel import make_mesh
from o1jax.parallel.ambient import spread
from o1jax.sampling.rows import NONE, evenly_full, parts_of, side_by_side, take_rows


def test_one_device_has_one_part():
  assert [p.tolist() for p in parts_of([5, 0, 3], 6)] == [[0, 1, 2]]
  assert side_by_side([[2, 0]], 3).tolist() == [2, 0, NONE]
  assert evenly_full(np.array([True, False, True])) == 2


@pytest.mark.parametrize('shape', [{'data': 4, 'fsdp': 2}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_each_part_takes_its_own_rows(shape):
  rng, rows = np.random.default_rng(0), 16
  values = rng.normal(size=(rows, 3, 2))
  with jax.set_mesh(make_mesh(shape)):
    wanted = rng.integers(0, rows, 20)
    parts = parts_of(wanted, rows)
    count = len(parts)
    size = count * max(map(len, parts))
    places = side_by_side(parts, size)
    assert sorted(places[places != NONE]) == list(range(20))
    index = np.where(places == NONE, 0, wanted[places])
    found = jax.jit(take_rows)(spread(values.astype(np.float32)), index)
    live = places != NONE
    np.testing.assert_array_equal(found[live], values[wanted[places[live]]].astype(np.float32))
    assert found.addressable_shards[0].data.shape == (size // count, 3, 2)
    assert evenly_full(live) == size
    # What does not divide is taken from anywhere.
    few = jax.jit(take_rows)(values, np.array([15, 0, 7]))
    np.testing.assert_allclose(few, values[[15, 0, 7]], rtol=1e-6)
    assert len(parts_of(wanted, rows + 1)) == 1
