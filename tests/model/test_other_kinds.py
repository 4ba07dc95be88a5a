"""Laws of every kind of model but the GPT: probabilities, dropout, generation, the operations of other devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chargpt_jax.devices.platform import BFLOAT16_ON_CPU
from chargpt_jax.generation.generate import predict_last
from chargpt_jax.model.gpt import MASKED
from chargpt_jax.ops.dropout import seeds_for
from chargpt_jax.ops.kv_cache import StackedKVCache
from tests.model import test_modern, test_ngpt
from tests.pairing import built, logits_of


@pytest.fixture(scope="module", params=[test_ngpt.CONFIG, test_modern.CONFIG], ids=["ngpt", "modern"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def made(config):
    """A model with random parameters. The layers of a new modern one change nothing, so it gets those of a GPT."""
    graphdef, params = built(config, 0)
    if config.kind == "modern":
        blocks = built(dataclasses.replace(config, kind="gpt"), 0)[1]["blocks"]
        mixture = np.random.default_rng(7).uniform(0.3, 1.5, (config.n_layer, 2)).astype(np.float32)
        params = {**params, "blocks": {**blocks, "mixture": mixture}}
    return graphdef, params


@pytest.fixture(scope="module")
def tokens(config):
    return jnp.asarray(np.random.default_rng(1).integers(1, config.used_ids, (2, config.block_size)), jnp.int32)


def test_unused_ids_have_no_probability(config, made, tokens):
    probability = np.asarray(jax.nn.softmax(logits_of(config, made[1], tokens)))
    assert np.all(probability[..., 0] == 0)
    assert np.all(probability[..., config.used_ids :] == 0)
    free = logits_of(dataclasses.replace(config, mask_unused_ids=False), made[1], tokens)
    assert np.all(np.asarray(free) > MASKED / 2)


def test_dropout_needs_seeds(config, made, tokens):
    dropping = dataclasses.replace(config, dropout=0.3)
    np.testing.assert_array_equal(logits_of(dropping, made[1], tokens), logits_of(config, made[1], tokens))
    twice = jnp.stack([tokens[0], tokens[0]])
    dropped = logits_of(dropping, made[1], twice, seeds=seeds_for(jax.random.key(5), 2))
    assert np.abs(np.asarray(dropped[0] - dropped[1]))[..., 1:40].max() > 0.01


@pytest.mark.parametrize("rows", [1, 2])
def test_prefill_and_decode_equal_the_full_model(config, made, tokens, rows):
    graphdef, params = made
    tokens = tokens[:rows]
    whole = logits_of(config, params, tokens)
    prefill = jax.jit(lambda p, t: nnx.merge(graphdef, p).prefill(t))
    decode = jax.jit(lambda p, t, at, cache: nnx.merge(graphdef, p).decode(t, at, cache))
    _, kept = prefill(params, tokens.at[:, 9:].set(0))
    cache = StackedKVCache.of(*kept).enlarged(config.block_size)
    for t in range(9, config.block_size):
        logits, cache = decode(params, tokens[:, t], jnp.full(rows, t), cache)
        np.testing.assert_allclose(logits, whole[:, t], atol=3e-6)


def test_prediction_at_one_position_equals_the_full_call(config, made, tokens):
    graphdef, params = made
    whole = logits_of(config, params, tokens)
    predict = jax.jit(lambda p, t, last: predict_last(nnx.merge(graphdef, p), t, last))
    for last in ([0, config.block_size - 1], [7, 3]):
        np.testing.assert_allclose(
            predict(params, tokens, jnp.array(last)), whole[jnp.arange(2), jnp.array(last)], atol=3e-6
        )


@pytest.mark.slow
def test_operations_of_a_gpu_give_the_same_logits_and_gradients(config, made, tokens):
    def loss(params, graphdef):
        return jnp.sum(jax.nn.log_softmax(nnx.merge(graphdef, params)(tokens))[..., 1 : config.used_ids] ** 2)

    (graphdef, params), (of_gpu, _) = made, built(config, 0, jnp.float32, "cuda")
    expected, found = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, one) for one in (graphdef, of_gpu))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.skipif(jax.__version_info__ < BFLOAT16_ON_CPU, reason="this JAX cannot multiply bfloat16 on a CPU")
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_bfloat16_logits_are_float32_and_near(config, made, tokens, platform):
    graphdef, _ = built(config, 0, jnp.bfloat16, platform)
    rough = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(made[1], tokens)
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, logits_of(config, made[1], tokens), atol=0.05)
