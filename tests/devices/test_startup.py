import gc

import jax
import pytest

from chargpt_jax.devices import processes, startup
from chargpt_jax.errors import UserError


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


@pytest.mark.parametrize("name", ["jax_enable_x64", "jax_disable_jit"])
@pytest.mark.parametrize("check", [startup.check_settings, processes.check])
def test_a_setting_under_which_programs_fail_is_named(monkeypatch, name, check):
    check()
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, True)
        with pytest.raises(UserError, match=rf"{name} is on, .*: unset {name.upper()}, or call jax\.config\.update"):
            check()
    finally:
        jax.config.update(name, before)
    check()


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no TPU"), ValueError("no TPU")])
def test_jax_without_a_device_is_reported(monkeypatch, error):
    def fail() -> None:
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(UserError, match=r"JAX cannot start \((no TPU|it finds no device for JAX_PLATFORMS=.*)\)"):
        startup.start()


def test_jax_without_memory_is_no_wrong_setting(monkeypatch):
    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(MemoryError):
        startup.start()


def test_a_low_limit_of_open_files_is_named(monkeypatch):
    resource = pytest.importorskip("resource")
    for limit in (resource.RLIM_INFINITY, startup.MIN_OPEN_FILES):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        startup.check_open_files()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    with pytest.raises(UserError, match="The limit of open files is 8, but must be at least 64: raise it with ulimit"):
        startup.use_every_core()
