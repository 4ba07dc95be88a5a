"""FLOP of traced programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from chargpt_jax.compile.matmul_flop import matmul_flop
from chargpt_jax.compile.programs import programs, with_vocabulary
from chargpt_jax.config import Config
from chargpt_jax.model.flops import training_flops

M, K, N = 3, 5, 7
X, W = jnp.zeros((M, K)), jnp.zeros((K, N))


def flop(f, *args) -> float:
    return matmul_flop(jax.make_jaxpr(f)(*args))


def test_a_multiply_add_is_two_flop():
    assert flop(lambda x, w: x @ w, X, W) == 2 * M * K * N


def test_batch_axes_multiply():
    batched = jnp.zeros((4, M, K)), jnp.zeros((4, K, N))
    assert flop(lambda x, w: jnp.einsum("bmk,bkn->bmn", x, w), *batched) == 4 * 2 * M * K * N


def test_elementwise_operations_are_free():
    assert flop(lambda x: jnp.exp(x) + x, X) == 0


def test_gradients_of_both_operands_take_two_more_multiplications():
    assert flop(jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), (0, 1)), X, W) == 3 * 2 * M * K * N


def test_a_scan_multiplies_by_its_length():
    square = jnp.zeros((9, K, K))
    assert flop(lambda x, ws: jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0], X, square) == 9 * 2 * M * K * K


def test_a_loop_of_unknown_length_counts_once():
    square = jnp.zeros((K, K))
    loop = lambda x, w, n: jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)  # noqa: E731
    assert flop(loop, X, square, 5) == 2 * M * K * K


def test_the_most_expensive_branch_counts():
    branches = [lambda x, w: x @ w, lambda x, w: 2 * x @ w + x @ (3 * w), lambda x, w: jnp.zeros((M, N))]
    assert flop(lambda i, x, w: jax.lax.switch(i, branches, x, w), 0, X, W) == 2 * 2 * M * K * N


def test_recomputation_counts():
    f = lambda x, w: jnp.sum(jnp.sin(x @ w))  # noqa: E731
    once, again = flop(jax.grad(f), X, W), flop(jax.grad(jax.checkpoint(f)), X, W)
    assert again == once + 2 * M * K * N


def test_sharding_over_devices_does_not_change_the_total():
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    split, whole = PartitionSpec("data"), PartitionSpec()
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(split, whole), out_specs=split)
    x = jnp.zeros((4 * len(devices), K))
    assert flop(f, x, W) == flop(lambda x, w: x @ w, x, W)


@pytest.mark.parametrize("remat", [False, True])
def test_training_has_the_flop_of_the_formula_and_those_of_recomputation(remat):
    config = with_vocabulary(Config())
    m = config.model
    m.block_size, m.n_embd, m.n_head, m.n_head_dim, m.n_ff, m.n_layer, m.attention_block = 32, 16, 2, 8, 32, 3, 32
    m.remat, config.data.batch_size = remat, 4
    program = next(programs(config, jax.devices()[:1]))
    found = matmul_flop(program.function.trace(*program.args).jaxpr)
    # The backward pass of attention computes the scores again; the gradient of the embeddings is a multiplication with
    # one-hot vectors. The formula has neither.
    width = m.n_head * m.n_head_dim
    more = 2 * m.n_layer * width * m.block_size + 2 * m.vocab_size * m.n_embd
    assert found == training_flops(m, config.data.batch_size) + more * config.data.batch_size * m.block_size
