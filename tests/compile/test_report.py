"""The report of a compilation in words."""

import dataclasses
import re

import jax
import pytest

from chargpt_jax.compile import report
from chargpt_jax.compile.hlo import NOTHING
from chargpt_jax.compile.largest_batch import Found, Need
from chargpt_jax.config import Config


def test_kernels_of_a_gpu_are_listed_by_kind(training):
    opcodes = {"fusion": 790, "custom-call": 1, "copy": 2, "all-reduce": 3, "sort": 4}
    work = dataclasses.replace(NOTHING, opcodes=NOTHING.opcodes + type(NOTHING.opcodes)(opcodes), unknown_loops=1)
    program = dataclasses.replace(training, work=work)
    assert report.work_in_words(program, is_gpu=True) == (
        "per training step: 800 kernels (790 fusions, 1 library call, 2 copies, 3 collectives, 4 other); "
        "1 loop of unknown length counted as one iteration"
    )
    assert report.work_in_words(program, is_gpu=False).startswith("per training step: 790 fusions, 1 custom call;")


def test_slices_of_several_hosts_are_named(cpu):
    many = cpu(devices=jax.devices()[:1] * 256)
    assert any("several hosts" in line for line in report.introduction(Config(), many, "blocks"))
    assert not any("several hosts" in line for line in report.introduction(Config(), cpu(), "blocks"))


@pytest.mark.parametrize("attention", ["blocks", "kernel", "cudnn"])
def test_attention_that_a_trial_decides_on_is_marked(cpu, attention):
    (line,) = [line for line in report.introduction(Config(), cpu(), attention) if line.startswith("Attention")]
    assert line.startswith(f"Attention of training steps: {attention}.")
    assert ("first tries it on its device" in line) == (attention != "blocks")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Found(96, Need(1.5e9, True), 97, 4), "data.batch_size=96, 1.50 GB of 2.00 GB per device; 97 does not"),
        (Found(96, Need(1.5e9, True), 0, 4), "at least data.batch_size=96, the largest that is tried, 1.50 GB"),
        (
            Found(96, Need(1.5e9, True), 0, 3, predicted=99),
            "data.batch_size=96, 1.50 GB of 2.00 GB per device, which was compiled; the limit is at about 99 by a line",
        ),
        (Found(0, None, 8, 1), "none; data.batch_size=8 does not fit"),
    ],
)
def test_result_of_the_search_in_words(found, words):
    assert re.match(f"largest batch that fits: {words}", report.largest_in_words(found, 2 * 10**9))


@pytest.mark.parametrize(("flop", "words"), [(2.474e9, "2.47"), (8.2e5, "0.00082"), (1.1503e12, "1,150")])
def test_flop_have_three_significant_digits_and_no_exponent(flop, words):
    assert report.gigaflop(flop) == words
