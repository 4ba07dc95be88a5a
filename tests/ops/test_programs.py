"""The compiled programs have the same operations as at commit 8e95aa3: counts of HLO opcodes, by version of JAX.

opcodes.json was recorded once from that commit, before the operations moved behind `Ops`. A version of JAX that is not
in it is skipped. Renew an entry only together with a measurement that shows what the change costs or gains.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from chargpt_jax.config import ModelConfig
from chargpt_jax.generation.generate import beyond_context, bucket, decoding_program, inside_context, prefill
from chargpt_jax.generation.sampler import Sampler
from chargpt_jax.model.init import abstract_model
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.ops.cpu_decode import layers_in_place
from chargpt_jax.ops.cpu_kv_cache import BlockedKVCache, CpuKVCache
from chargpt_jax.ops.kv_cache import KVCache, StackedKVCache

CONFIG = ModelConfig(
    vocab_size=64,
    used_ids=40,
    block_size=128,
    n_embd=32,
    n_head=4,
    n_head_dim=8,
    n_ff=64,
    n_layer=3,
    attention_block=32,
)
RECORDED: dict[str, dict[str, int]] = json.loads(Path(__file__).with_name("opcodes.json").read_text()).get(
    jax.__version__, {}
)


LOCKSTEP_SAVES = Counter({"bitcast": 1, "get-tuple-element": 2, "parameter": 1})
"""Operations that generation in lockstep no longer needs: its loop does not carry the sequences' indices any more."""
if jax.__version__ != "0.7.2":
    LOCKSTEP_SAVES["fusion"] = 1


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def model(dtype: str, platform: str = "cpu", rate: float = 0.0) -> tuple[Any, Any]:
    config = replace(CONFIG, dropout=rate)
    return abstract_model(config, ops_for(jnp.dtype(dtype), config.attention_block, platform))


def training(platform: str, dtype: str, rate: float) -> Any:
    graphdef, params = model(dtype, platform, rate)

    def loss(params, tokens, seeds):
        logits = nnx.merge(graphdef, params)(tokens, seeds)
        return jnp.mean(
            optax.softmax_cross_entropy(logits, jax.nn.one_hot(tokens, CONFIG.vocab_size, dtype=logits.dtype))
        )

    seeds = jax.ShapeDtypeStruct((4, 2), jnp.uint32)
    return jax.jit(jax.value_and_grad(loss)).lower(params, ints(4, 128), seeds)


def decoding(platform: str, dtype: str, rows: int, kind: type[KVCache]) -> Any:
    graphdef, params = model(dtype, platform)
    _, kept = jax.eval_shape(lambda p, t: nnx.merge(graphdef, p).prefill(t), params, ints(rows, 16))
    cache = jax.eval_shape(lambda k, v: kind.of(k, v).enlarged(CONFIG.block_size), *kept)
    layers = None
    if kind is BlockedKVCache:
        cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype), cache)
        layers = functools.partial(layers_in_place, fused_kernel=True) if dtype == "float32" else None
    decode = jax.jit(lambda p, t, at, c: nnx.merge(graphdef, p).decode(t, at, c, layers), donate_argnums=3)
    return decode.lower(params, ints(rows), ints(rows), cache)


def generation(rows: int, final: bool, top_k: int | None, part: str) -> Any:
    graphdef, params = model("float32")
    read = functools.partial(prefill, graphdef=graphdef, width=64, final=final)
    prompts = (params, ints(rows, bucket(200)), ints(rows))
    if part == "prefill":
        return jax.jit(read).lower(*prompts)
    state = jax.eval_shape(read, *prompts)
    sampler = jax.eval_shape(Sampler(1.0, top_k, None).with_key, jax.eval_shape(jax.random.key, 0))
    generate, carry = type(state.cache).generate, (ints(rows), replace(state, cache=None))
    if part == "past":
        program = decoding_program(beyond_context, graphdef, None, generate, False)
        return program.fused.lower(params, carry, None, sampler)
    program = decoding_program(inside_context, graphdef, None, generate, final and state.cache.one_by_one)
    return program.fused.lower(params, carry, state.cache, sampler)


def programs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each program's name and the function that lowers it."""
    for platform in ("cpu", "tpu"):
        batch = CpuKVCache if platform == "cpu" else StackedKVCache
        for dtype in ("float32", "bfloat16"):
            for rate in (0.0, 0.2):
                name = f"training {platform} {dtype} dropout {rate}"
                yield name, functools.partial(training, platform, dtype, rate)
            for rows in (2, 1):
                name = f"decode {platform} {dtype} rows {rows}"
                yield name, functools.partial(decoding, platform, dtype, rows, batch)
    yield "decode cpu float32 blocks 1", functools.partial(decoding, "cpu", "float32", 1, BlockedKVCache)
    for rows in (1, 3):
        for final in (False, True):
            yield f"prefill float32 {rows} once {final}", functools.partial(generation, rows, final, None, "prefill")
            name = f"window float32 {rows} once {final} top_k None"
            yield name, functools.partial(generation, rows, final, None, "window")
        name = f"window float32 {rows} once False top_k 5"
        yield name, functools.partial(generation, rows, False, 5, "window")
        yield f"past float32 {rows}", functools.partial(generation, rows, False, None, "past")


def opcodes(lowered: Any) -> dict[str, int]:
    """Return how often each opcode occurs in the optimised HLO."""
    line = r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\([^=]*?\)|\S+) ([a-z][\w\-]*)\("
    return dict(Counter(re.findall(line, lowered.compile().as_text(), re.MULTILINE)))


@pytest.mark.slow
@pytest.mark.skipif(not RECORDED, reason="no opcodes are recorded for this version of JAX")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="recorded on a CPU")
@pytest.mark.parametrize(("name", "lower"), [pytest.param(*pair, id=pair[0]) for pair in programs()])
def test_compiled_program_has_the_recorded_opcodes(name, lower):
    saved = LOCKSTEP_SAVES if name.startswith(("window float32 3", "past float32 3")) else Counter()
    assert opcodes(lower()) == Counter(RECORDED[name]) - saved


def test_every_recorded_program_is_compiled():
    assert not RECORDED or set(RECORDED) == {name for name, _ in programs()}
