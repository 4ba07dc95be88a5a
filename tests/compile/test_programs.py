"""The programs of a run compile for accelerators without such a device."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from chargpt_jax.compile import programs as ahead
from chargpt_jax.config import Config
from chargpt_jax.devices import platform as device_platform
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.training import optimizer
from chargpt_jax.training.dispatch.feed import feed_of
from chargpt_jax.training.run import Run
from chargpt_jax.training.setup import Setup
from chargpt_jax.training.stages import prepare
from tests.corpus_text import small_config, write_words

NAMES = ["training", "validation", "prefill", "decoding"]
ELEMENTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def every_feature(dtype: str) -> Config:
    """Return a small config that uses every branch of the programs."""
    config = small_config(Path("none.txt"))
    config.amp.dtype = dtype
    config.optimizer.accumulation_steps, config.optimizer.clip_norm = 2, 1.0
    config.sample.top_k, config.sample.top_p, config.sample.max_new_tokens = 5, 0.9, 100
    return config


def wide_products(module: str, dtype: str, least: int) -> list[str]:
    """Return the operands of the matrix products in a module, `least` or more, that have another dtype."""
    products = re.findall(r"stablehlo\.dot_general .* : \((.*)\) ->", module)
    assert len(products) >= least
    return [product for product in products if f"x{ELEMENTS[dtype]}>" not in product]


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "dtype"), [("tpu", "bfloat16"), ("cuda", "bfloat16"), ("cuda", "float16")])
def test_programs_lower_for_accelerators_without_wide_products(platform, dtype, monkeypatch):
    # The CPU is a placeholder: the model is that of the accelerator, and no program runs.
    monkeypatch.setattr(device_platform, "BFLOAT16_ON_CPU", (0,))
    monkeypatch.setattr(ahead, "ops_for", lambda dtype, query_block, *_: ops_for(dtype, query_block, platform))
    names = []
    for program in ahead.programs(every_feature(dtype), jax.devices()[:1]):
        function = getattr(program.function, "fused", program.function)
        exported = export.export(function, platforms=[platform])(*program.args, **program.static)
        module = exported.mlir_module()
        assert exported.platforms == (platform,)
        assert exported.mlir_module_serialized
        older = jax.__version_info__ < (0, 10, 2)  # older versions may lower erf, an operation of XLA, to a call
        assert "custom_call" not in (module.replace("custom_call @mhlo.erf(", "erf(") if older else module)
        # Except the gradient of the logits, 128 per character, which is multiplied in float32.
        least = 4 if (platform, program.name) == ("cuda", "decoding") else 6  # a GPU decodes with sums in their place
        assert all("x128xf32" in product for product in wide_products(module, dtype, least))
        names.append(program.name)
    assert names == [*NAMES, "beyond the context"]


def test_programs_have_the_shapes_of_a_real_run(tmp_path):
    config = small_config(write_words(tmp_path / "words.txt"))
    list(prepare(config, tmp_path / "run"))
    setup = Setup.of(Run.load(tmp_path / "run"))
    tx = optimizer.make_optimizer(setup.config, optimizer.warmup_cosine(setup.config.scheduler, 1e-2, 10))
    training, validation, *_ = ahead.programs(setup.config, jax.local_devices())
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)  # noqa: E731
    assert shapes(training.args[0]) == shapes(setup.initial_state(tx))
    given, used = jax.tree.leaves(training.args[1]), jax.tree.leaves(feed_of(setup, print).text_for(0, 1))
    assert shapes(given) == shapes(used)
    assert shapes(validation.args[0]) == shapes(setup.initial_state(tx).params)


@pytest.mark.slow
def test_programs_contain_the_configs_chain_of_samplers():
    config = small_config(Path("none.txt"))
    config.sample.sampler, config.sample.max_new_tokens = "min_p=0.1,budget=3,word_start", 100
    *_, decoding, beyond = ahead.programs(config, jax.devices()[:1])
    for program in (decoding, beyond):
        state = program.args[1][1]
        assert set(state.series) == {"budget", "word_start"}
        assert getattr(program.function, "fused", program.function).lower(*program.args, **program.static)


def test_model_is_created_for_the_target_devices(monkeypatch):
    monkeypatch.setattr(ahead, "training_mesh", lambda config, on: SimpleNamespace(devices=np.array(on), axis_names=()))
    monkeypatch.setattr(ahead, "_training", lambda config, mesh, dtype, plain, *sharded: iter([nnx.merge(*sharded)]))
    config = small_config(Path("none.txt"))
    programs = ahead.programs(config, [SimpleNamespace(platform="tpu", device_kind="TPU v3")])
    assert next(programs).ops == ops_for(jnp.bfloat16, config.model.attention_block, "tpu")


def test_unknown_vocabulary_size_is_assumed():
    config = small_config(Path("none.txt"))
    first = next(ahead.programs(config, jax.devices()[:1]))
    assert first.args[0].params["wte"]["embedding"].shape == (128, 16)
    assert config.model.vocab_size == 0
