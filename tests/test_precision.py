"""benchmarks/precision.py: the operations round where they say so, and the measures count correctly."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import precision
from benchmarks.precision_ops import ALONE, alone, variants, whole
from chargpt_jax.ops import plain
from tests.corpus_text import write_words


def normal(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


ARGUMENTS = {
    "attention logits": lambda: (normal(2, 2, 8, 4), normal(2, 2, 8, 4) * 3, normal(2, 2, 8, 4)),
    "LayerNorm": lambda: (normal(3, 4, 16) * 5, 1 + normal(16) / 9, normal(16) / 9, jnp.float32),
    "log-softmax": lambda: (normal(2, 8, 16), normal(32, 16)),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize(("low", "bound"), [(jnp.bfloat16, 2**-7), (jnp.float16, 2**-10)])
def test_a_single_operation_differs_from_the_plain_one_by_its_rounding(name, low, bound):
    field, _ = ALONE[name]
    arguments = ARGUMENTS[name]()
    found = getattr(alone(name, low), field)(*arguments)
    expected = getattr(plain, field)(*arguments)
    if name == "log-softmax":
        expected = jax.nn.log_softmax(expected, axis=-1)
    difference = float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))
    assert found.dtype == jnp.float32
    assert bound / 1000 < difference < 6 * bound


def test_a_single_operation_leaves_the_others_in_float32():
    ops, base = alone("LayerNorm", jnp.float16), whole(jnp.float32)
    assert (ops.activations, ops.residual) == (jnp.float32, jnp.float32)
    assert (ops.attention, ops.linear, ops.unembed) == (base.attention, base.linear, base.unembed)
    assert ops.layer_norm != base.layer_norm


def test_variants_have_one_with_loss_scaling():
    assert [variant.name for variant in variants() if variant.loss_scaling] == ["float16, loss scaling"]
    assert len({variant.name for variant in variants()}) == len(variants()) == 10


def test_quality_counts_unknown_words_and_repeated_strings():
    found = precision.quality(["xx one two zwei yy"], {"one", "two"})
    assert found == {"unknown_words": pytest.approx(1 / 3), "repeated": 0.0}
    assert precision.quality(["ab" * 20 + " one two three"], {"one"})["repeated"] > 0.5


@pytest.mark.slow
def test_the_tables_have_a_row_for_each_precision_and_results_are_kept(tmp_path, capsys, monkeypatch):
    some = [*variants()[:4], variants()[-1]]  # all operations in each precision, and one alone
    monkeypatch.setattr(precision, "variants", lambda: some)
    text = write_words(tmp_path / "words.txt")
    sizes = {"seeds": 2, "steps": 4, "width": 16, "layers": 1, "context": 32, "batch": 4, "characters": 200}
    command = [f"--text_file={text}", f"--out={tmp_path}", *(f"--{name}={value}" for name, value in sizes.items())]
    precision.main(command)
    printed = capsys.readouterr().out
    for variant in some:
        assert f"| {variant.name} |" in printed
    precision.main(command)
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit):
        precision.main([*command, "--steps=5"])
