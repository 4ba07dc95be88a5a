import gc

import pytest

from chargpt_jax.devices import startup


@pytest.fixture(autouse=True)
def _gc_enabled():
    yield
    gc.unfreeze()
    gc.enable()


def test_gc_is_paused_inside_and_restored_after():
    with startup.gc_paused():
        assert not gc.isenabled()
        with startup.gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_gc_is_restored_after_an_error():
    with pytest.raises(KeyError), startup.gc_paused():
        raise KeyError
    assert gc.isenabled()


def test_gc_stays_disabled_if_it_was_disabled():
    gc.disable()
    with startup.gc_paused():
        pass
    assert not gc.isenabled()


def test_objects_created_inside_are_in_the_oldest_generation():
    with startup.gc_paused():
        made = [[]]
    assert any(item is made for item in gc.get_objects(generation=2))


def test_objects_frozen_by_the_user_stay_frozen():
    frozen = [[]]
    gc.freeze()
    with startup.gc_paused():
        pass
    assert not any(item is frozen for item in gc.get_objects())


def test_garbage_is_collected_later():
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
