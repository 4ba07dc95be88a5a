"""A training state as named arrays: round trip, digest, and comparison with the expected ones."""

import jax
import numpy as np
import pytest

from benchmarks.stored import state_at
from chargpt_jax.storage.arrays.state_arrays import check_same, described, digest, named, on_host, placed, stored_shape
from chargpt_jax.storage.manifest import Damaged


def test_state_round_trip_through_host_arrays():
    state = state_at(3)
    arrays, leaves = on_host(state), named(state)
    assert arrays.keys() == {name for name, _ in leaves}
    assert "params.wte.embedding" in arrays
    for name, leaf in leaves:
        assert (arrays[name].shape, arrays[name].dtype) == (stored_shape(leaf).shape, stored_shape(leaf).dtype)
        back = placed(arrays[name], leaf)
        assert back.dtype == leaf.dtype
        assert back.sharding == leaf.sharding
        bits = jax.random.key_data if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray
        np.testing.assert_array_equal(bits(back), bits(leaf))


def test_digest_depends_on_names_dtypes_shapes_and_bytes():
    one = np.arange(6, dtype=np.float32)
    arrays = [{"a": one}, {"b": one}, {"a": one.reshape(2, 3)}, {"a": one.view(np.int32)}, {"a": one + 1}]
    assert len({digest(x) for x in arrays}) == len(arrays)
    assert digest({"a": one, "b": one[:1]}) == digest({"b": one[:1], "a": one})


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "holds no array as 'a', but the model has float32 [6]"),
        ({"a": np.zeros(6)}, "holds float64 [6] as 'a', but the model has float32 [6]"),
        ({"a": np.zeros((2, 3), np.float32)}, r"holds float32 [2, 3] as 'a', but the model has float32 [6]"),
        ({"a": np.zeros(6, np.float32), "b": np.zeros(1)}, "holds float64 [1] as 'b', but the model has no array"),
    ],
)
def test_other_arrays_than_wanted_are_refused_by_name(found, said):
    with pytest.raises(Damaged) as refusal:
        check_same("arrays", described(found), described({"a": np.zeros(6, np.float32)}))
    assert said in str(refusal.value)
