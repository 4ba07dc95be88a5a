"""Compiled programs, and the search for the largest batch by compiling."""

import dataclasses
import re

import jax
import pytest

from chargpt_jax.compile import compiled
from chargpt_jax.compile.programs import programs
from chargpt_jax.errors import UserError
from chargpt_jax.training.dispatch.pacing import MAX_DISPATCH_STEPS
from tests.compile.test_least_bytes import small


@pytest.mark.slow
def test_compiled_program_holds_its_arguments(training):
    state = sum(training.least_bytes[name] for name in ("parameters", "optimizer state")) // 2
    config = small(n_layer=1)
    windows = MAX_DISPATCH_STEPS * config.data.batch_size * (config.model.block_size + 1)  # of one byte per character
    assert state + windows <= training.arguments < 1.01 * (state + windows)
    assert training.total == training.arguments + training.outputs + training.temporaries
    assert training.temporaries > 0
    assert training.work.total > 0


def test_program_fits_if_the_limit_holds_it(training):
    assert training.fits
    assert dataclasses.replace(training, limit=training.total).fits
    assert not dataclasses.replace(training, limit=training.total - 1).fits
    assert dataclasses.replace(training, limit=None).fits
    assert dataclasses.replace(training, limit=1, compiler_decides=True).fits
    assert not dataclasses.replace(training, refusal="too large").fits


def test_bound_is_the_longer_of_the_two_times(training):
    """The CPU's peak is unknown; its bandwidth here is 1 byte per nanosecond."""
    assert training.flop_seconds is None
    assert training.bound_seconds == training.byte_seconds == sum(training.least_bytes.values()) / 1e9
    assert dataclasses.replace(training, flop_seconds=5.0).bound_seconds == 5
    assert dataclasses.replace(training, flop_seconds=1e-12).bound_seconds == training.byte_seconds
    assert dataclasses.replace(training, byte_seconds=None).bound_seconds is None


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("the total memory required for HLO temporaries (18.73G) exceeds available HBM (15.75G).", 18.73 * 2**30),
        ("Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm.", 512.5 * 2**20),
        ("Ran out of memory.", None),
    ],
)
def test_bytes_of_a_refused_program_are_those_that_the_message_names(training, message, needed):
    assert dataclasses.replace(training, refusal=message).needed == needed


def test_a_tpu_needs_the_smaller_of_total_and_peak(training):
    for decides, peak, needed in (
        (True, 5, 5),
        (True, 0, training.total),
        (True, 10**12, training.total),
        (False, 5, training.total),
    ):
        assert dataclasses.replace(training, compiler_decides=decides, peak=peak).needed == needed


@pytest.mark.slow
def test_other_errors_of_the_compiler_are_raised(cpu, monkeypatch):
    config = small(n_layer=1)
    program = next(programs(config, jax.devices()[:1]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compiled.compile_program(program, config, cpu(compiler_options={"no_such_option": True}))


def test_batch_that_uses_a_part_of_a_large_slice_is_an_error_with_a_fix(cpu):
    program = next(programs(small(n_layer=1), jax.devices()[:1]))._replace(device_count=16)
    topology = cpu(name="v5e:16x16", devices=jax.devices()[:1] * 256, compiler_options={"no_such_option": True})
    with pytest.raises(
        UserError, match=r"training uses 16 of the 256 devices of v5e:16x16, .* that all devices divide"
    ):
        compiled.compile_program(program, small(n_layer=1), topology)


@pytest.mark.slow
def test_largest_batch_is_verified_by_compiling_it_and_the_next(cpu, training):
    limit = 4 * training.total
    tried = []
    config = small(n_layer=1)
    first = dataclasses.replace(training, limit=limit)
    found = compiled.largest_training_batch(config, cpu(limit), first, tried.append)
    sizes = {int(re.search(r"=(\d+)$", program.name)[1]): program.total for program in tried}
    assert sizes[found.batch_size] <= limit < sizes[found.next_size]
    assert found.next_size == found.batch_size + 1
    assert found.batch_size > config.data.batch_size
    assert found.compiles <= 8
