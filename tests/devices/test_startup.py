import gc

import pytest

from chargpt_jax.devices import startup


@pytest.fixture(autouse=True)
def _looked_for_again():
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_looked_for_within_and_again_afterwards():
    with startup.gc_paused():
        assert not gc.isenabled()
        with startup.gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_within_changes_nothing_about_that():
    with pytest.raises(KeyError), startup.gc_paused():
        raise KeyError
    assert gc.isenabled()


def test_who_looks_for_none_is_left_alone():
    gc.disable()
    with startup.gc_paused():
        pass
    assert not gc.isenabled()


def test_what_was_made_within_counts_as_old_at_once():
    with startup.gc_paused():
        made = [[]]
    assert any(item is made for item in gc.get_objects(generation=2))


def test_what_its_user_froze_stays_frozen():
    frozen = [[]]
    gc.freeze()
    with startup.gc_paused():
        pass
    assert not any(item is frozen for item in gc.get_objects())


def test_garbage_is_found_later():
    class Node:
        pass

    found = []
    with startup.gc_paused():
        node = Node()
        node.self = node
        node.end = type("End", (), {"__del__": lambda _: found.append(True)})()
        del node
    gc.collect()
    assert found
