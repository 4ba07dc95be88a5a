"""The search for the largest batch size that fits."""

from hypothesis import given
from hypothesis import strategies as st

from chargpt_jax.compile.largest_batch import MAX_COMPILES, Found, Need, largest_batch

MOST = 2**20


def search(bytes_at, limit: float, start: int = 16, unit: int = 1, refuses=lambda needed: False) -> tuple[Found, set]:
    tried = set()

    def need_at(batch_size: int) -> Need:
        assert batch_size not in tried, "compiled twice"
        assert batch_size % unit == 0
        tried.add(batch_size)
        needed = bytes_at(batch_size)
        return Need(None if refuses(needed) else needed, needed <= limit)

    return largest_batch(need_at, limit, start, unit, MOST), tried


@given(
    fixed=st.floats(0, 1e9),
    each=st.floats(2e5, 1e8),
    limit=st.floats(1e9, 1e11),
    start=st.integers(1, 4096),
    unit=st.sampled_from([1, 2, 8, 48, 256]),
)
def test_search_finds_the_crossing_of_a_line(fixed, each, limit, start, unit):
    found, tried = search(lambda size: fixed + each * size, limit, start, unit)
    assert found.exact
    assert found.next_size == found.batch_size + unit
    assert fixed + each * found.batch_size <= limit or not found.batch_size
    assert fixed + each * found.next_size > limit
    assert {found.batch_size, found.next_size} - {0} <= tried
    assert found.compiles == len(tried) <= 12


def test_search_of_a_line_takes_few_compilations():
    found, _ = search(lambda size: 5e8 + 2e6 * size + size % 7 * 256, 6.4e10)
    assert found.batch_size == 31749  # 31750 needs 5e8 + 6.35e10 bytes and 5 x 256 more
    assert found.compiles <= 6


@given(limit=st.floats(1e9, 1e11), bend=st.integers(100, 10_000), factor=st.floats(0.3, 3), start=st.integers(1, 4096))
def test_search_is_exact_if_memory_is_not_linear(limit, bend, factor, start):
    """The compiler may start to recompute activations, or refuse without naming the size."""

    def bytes_at(size: int) -> float:
        return 1e8 + 3e6 * (min(size, bend) + factor * max(0, size - bend))

    found, tried = search(bytes_at, limit, start, refuses=lambda needed: needed > limit)
    assert found.exact
    assert bytes_at(found.batch_size) <= limit < bytes_at(found.next_size)
    assert {found.batch_size, found.next_size} <= tried


def test_search_finds_none_if_one_sequence_is_too_large():
    found, tried = search(lambda size: 2e9 + size, 1e9, start=64, unit=4)
    assert (found.batch_size, found.need, found.next_size) == (0, None, 4)
    assert 4 in tried


def test_search_ends_at_the_largest_size_that_it_considers():
    found, _ = search(lambda size: size, 1e12)
    assert (found.batch_size, found.next_size) == (MOST, 0)


def test_search_ends_after_a_number_of_compilations():
    found, tried = search(lambda size: 2.0 ** min(size, 900), 2.0**800, start=1, refuses=lambda needed: True)
    assert len(tried) <= MAX_COMPILES
    assert found.batch_size == 800 or not found.exact
