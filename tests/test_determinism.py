"""The same seed gives the same bits on one machine; another order of summation changes only the last digits.

benchmarks/determinism.py makes the runs, with dropout and padding, and prints the differences. Related tests are in
test_stages.py (dispatch size and interruptions), test_sharding.py (eight devices compared with one in float64) and
test_generate.py (generation in pieces).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from benchmarks import determinism
from benchmarks.determinism import (
    BFLOAT16,
    CADENCE,
    COLD,
    EIGHT_DEVICES,
    GENERATION,
    ONE_THREAD,
    PARTS,
    PLAIN,
    SEED,
    Case,
    difference,
    generated,
    in_child,
    joined,
    learned,
    same_bits,
    write_text,
)
from chargpt_jax import api
from chargpt_jax.devices.platform import BFLOAT16_ON_CPU

pytestmark = pytest.mark.slow

# Without optimisations compiling takes half the time, and sums have another order too.
DEVICES = replace(EIGHT_DEVICES, environment={**EIGHT_DEVICES.environment, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
SUMS = Case("sums", {"optimizer.accumulation_steps": 4, "model.attention_block": 128, "model.remat": False})
NARROW = jax.__version_info__ >= BFLOAT16_ON_CPU
FIRST, LATER, HERE = (COLD, DEVICES), (CADENCE, ONE_THREAD), (SUMS, SEED, *([BFLOAT16] if NARROW else []))


def trained(case, folder):
    """Train in this process."""
    folder.mkdir()
    write_text(folder / "text.txt")
    determinism.train(folder / "text.txt", folder / "run", case.fields)
    return learned(folder / "run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tmp_path_factory.mktemp("plain") / "run"


@pytest.fixture(scope="module")
def model(runs, plain):
    return api.load(plain / "run", "latest")


@pytest.fixture(scope="module")
def runs(plain, tmp_path_factory):
    """Return the results of each case: FIRST and LATER in other processes, while the others train in this one."""
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    with ThreadPoolExecutor(1) as pool:

        def begin(cases):
            return {case: pool.submit(in_child, case, tmp_path_factory.mktemp("child"), cache) for case in cases}

        waiting = begin(FIRST)
        found = {PLAIN: trained(PLAIN, plain)}
        writer = api.load(plain / "run", "latest")
        found[PLAIN] |= joined(writer, generated(writer))
        waiting |= begin(LATER)  # their programs are in the cache now
        found |= {case: trained(case, tmp_path_factory.mktemp("here") / "run") for case in HERE}
        return found | {case: result.result() for case, result in waiting.items()}


@pytest.mark.parametrize("case", [COLD, CADENCE], ids=["cold cache", "from the cache, logging and validating less"])
def test_another_process_learns_and_writes_the_same_bits(runs, case):
    assert runs[PLAIN].keys() == runs[case].keys()
    for name in runs[PLAIN]:
        assert same_bits(runs[PLAIN], runs[case], name), name


@pytest.mark.parametrize("case", [SUMS, DEVICES, ONE_THREAD], ids=["blocks and parts", "eight devices", "one thread"])
def test_sums_in_another_order_change_last_digits(runs, case):
    """Measured: 3e-5, in the biases of the keys, whose gradients are small; and 1e-7."""
    assert difference(runs[PLAIN], runs[case], "parameters") < 1e-3
    assert difference(runs[PLAIN], runs[case], "losses") < 2e-6
    assert difference(runs[PLAIN], runs[case], "validation") < 2e-6


@pytest.mark.skipif(not NARROW, reason="this JAX cannot multiply bfloat16 on a CPU")
def test_bfloat16_losses_are_near_those_of_float32(runs):
    """Measured: 4e-4."""
    assert 1e-5 < difference(runs[PLAIN], runs[BFLOAT16], "losses") < 5e-3
    assert difference(runs[PLAIN], runs[BFLOAT16], "parameters") > 1e-2


def test_another_seed_is_another_run_from_the_first_update_on(runs):
    assert difference(runs[PLAIN], runs[SEED], "parameters") > 0.5
    assert abs(runs[PLAIN]["losses"][0] - runs[SEED]["losses"][0]) > 1e-2


def test_eval_of_a_checkpoint_has_the_loss_of_training(runs, plain):
    assert api.evaluate(plain / "run", "latest")["loss"] == runs[PLAIN]["validation"][-1]


@pytest.mark.parametrize("what", ["without the other prompt", "with a prompt longer than block_size"])
def test_sample_does_not_depend_on_other_prompts(model, what):
    alone, batched = (joined(model, samples) for samples in (generated(model)[:1], [GENERATION[what](model)]))
    assert same_bits(alone, batched, "text")
    assert difference(alone, batched, "surprisal") < 1e-5


def test_the_bits_of_every_part_are_compared(runs):
    """Every result of a run belongs to a part, and a change of one last bit is detected."""
    assert all(name.startswith((*PARTS, "surprisal")) for name in runs[PLAIN])
    for part in PARTS:
        assert any(name.startswith(part) for name in runs[PLAIN])
    touched = {**runs[PLAIN], "losses": runs[PLAIN]["losses"] * (1 + 2**-52)}
    assert not same_bits(runs[PLAIN], touched, "losses")
    assert same_bits(runs[PLAIN], touched, "parameters")
