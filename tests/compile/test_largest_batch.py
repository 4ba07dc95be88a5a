"""The search for the largest batch size that fits."""

from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.compile.largest_batch import MAX_COMPILES, RESOLUTION, Found, Need, largest_batch, predicted_batch

MOST = 2**20


def search(
    bytes_at, limit: float, start: int = 16, unit: int = 1, refuses=lambda needed: False, how=largest_batch
) -> tuple[Found, set]:
    tried = set()

    def need_at(batch_size: int) -> Need:
        assert batch_size not in tried, "compiled twice"
        assert batch_size % unit == 0
        tried.add(batch_size)
        needed = bytes_at(batch_size)
        return Need(None if refuses(needed) else needed, needed <= limit)

    return how(need_at, limit, start, unit, MOST), tried


def is_verified(found: Found, tried: set, unit: int = 1) -> bool:
    """Whether the answer and a larger size that does not fit were compiled, the latter at most 1.6 % larger."""
    gap = found.next_size - found.batch_size
    return {found.batch_size, found.next_size} - {0} <= tried and gap <= max(unit, found.batch_size / RESOLUTION)


@given(
    fixed=st.floats(0, 1e9),
    each=st.floats(2e5, 1e8),
    limit=st.floats(1e9, 1e11),
    start=st.integers(1, 4096),
    unit=st.sampled_from([1, 2, 8, 48, 256]),
)
def test_search_finds_the_crossing_of_a_line(fixed, each, limit, start, unit):
    found, tried = search(lambda size: fixed + each * size, limit, start, unit)
    assert is_verified(found, tried, unit)
    assert fixed + each * found.batch_size <= limit or not found.batch_size
    assert fixed + each * found.next_size > limit
    assert found.compiles == len(tried) <= 10


def test_search_of_a_line_takes_few_compilations():
    found, _ = search(lambda size: 5e8 + 2e6 * size + size % 7 * 256, 6.4e10)
    assert (found.batch_size, found.next_size) == (31744, 32000)  # multiples of 256 next to 31,750
    assert found.compiles <= 5


def test_small_answers_are_exact():
    found, _ = search(lambda size: 1e9 * size, 1.15e11)
    assert (found.batch_size, found.next_size) == (115, 116)


@given(limit=st.floats(1e9, 1e11), bend=st.integers(100, 10_000), factor=st.floats(0.3, 3), start=st.integers(1, 4096))
def test_search_is_verified_if_memory_is_not_linear(limit, bend, factor, start):
    """The compiler may start to recompute activations, or refuse without naming the size."""

    def bytes_at(size: int) -> float:
        return 1e8 + 3e6 * (min(size, bend) + factor * max(0, size - bend))

    found, tried = search(bytes_at, limit, start, refuses=lambda needed: needed > limit)
    assert is_verified(found, tried)
    assert bytes_at(found.batch_size) <= limit < bytes_at(found.next_size)


@given(limit=st.floats(1e9, 1e11), saved=st.floats(0, 1))
def test_search_continues_where_the_compiler_saves_memory(limit, saved):
    """Up to twice the batch size of the line fits, at any number of bytes that is measured."""
    tried = set()
    true_end = limit / 3e6 * (1 + saved)

    def need_at(size: int) -> Need:
        tried.add(size)
        return Need(3e6 * size, size <= true_end)

    found = largest_batch(need_at, limit, 16, 1, MOST)
    assert is_verified(found, tried)
    assert found.batch_size <= true_end < found.next_size
    assert found.compiles <= 16


def test_search_finds_none_if_one_sequence_is_too_large():
    found, tried = search(lambda size: 2e9 + size, 1e9, start=64, unit=4)
    assert (found.batch_size, found.need, found.next_size) == (0, None, 4)
    assert 4 in tried


def test_search_ends_at_the_largest_size_that_it_considers():
    found, _ = search(lambda size: size, 1e12)
    assert found.batch_size > MOST * (1 - 1 / RESOLUTION)
    assert found.next_size == 0


def test_search_ends_after_a_number_of_compilations():
    found, tried = search(lambda size: 2.0 ** min(size, 900), 2.0**800, start=1, refuses=lambda needed: True)
    assert len(tried) <= MAX_COMPILES
    assert found.batch_size <= 800 < found.next_size


# Prediction, for compilers that take long near the limit


@given(
    fixed=st.floats(0, 1e9),
    each=st.floats(2e5, 1e8),
    limit=st.floats(2e9, 1e11),
    start=st.integers(1, 4096),
    unit=st.sampled_from([1, 2, 8]),
)
def test_prediction_is_just_below_the_crossing_of_a_line(fixed, each, limit, start, unit):
    found, tried = search(lambda size: fixed + each * size, limit, start, unit, how=predicted_batch)
    true_end = (limit - fixed) / each
    assert found.batch_size in tried or not found.batch_size
    assert found.batch_size <= true_end
    assert found.batch_size >= 0.85 * true_end - 2 * unit or found.batch_size >= MOST // unit * unit * 0.9
    assert found.compiles == len(tried) <= 7
    assert found.predicted == 0 or found.batch_size <= found.predicted <= true_end + unit


def test_prediction_compiles_once_near_the_limit():
    found, tried = search(lambda size: 5e8 + 2e6 * size, 1.6e10, how=predicted_batch)
    assert tried == {16, 60, 968, 7488}
    assert found == Found(7488, Need(5e8 + 2e6 * 7488, True), 0, 4, predicted=7750)


@given(start=st.integers(1, 10_000), saved=st.floats(0.2, 3), limit=st.floats(1e9, 1e11))
def test_prediction_fits_where_memory_bends_at_small_sizes(start, saved, limit):
    """Arrays of small batches may stay on the chip of a TPU, or the compiler does not name what it would need."""

    def bytes_at(size: int) -> float:
        return 1e6 + 3e6 * (saved * min(size, 8) + max(0, size - 8))

    found, tried = search(bytes_at, limit, start, refuses=lambda needed: needed > limit, how=predicted_batch)
    assert found.compiles == len(tried) <= 7
    assert bytes_at(found.batch_size) <= limit
    if found.batch_size and start < 100:
        assert found.batch_size >= 0.7 * limit / 3e6


def test_prediction_says_if_nothing_fits():
    found, _ = search(lambda size: 2e9 + size, 1e9, start=64, unit=4, how=predicted_batch)
    assert (found.batch_size, found.need, found.predicted) == (0, None, 0)
    assert found.next_size > 0
