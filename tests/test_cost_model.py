"""benchmarks/cost_model.py: its figures follow laws, and docs/scaling.md has its tables."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import cost_model
from benchmarks.cost_model import DEVICES, MODELS, Device
from chargpt_jax.config import validate
from chargpt_jax.devices import layout
from chargpt_jax.model.init import abstract_model, create
from chargpt_jax.ops.choose import ops_for
from chargpt_jax.training import optimizer
from chargpt_jax.training.step import create_state, cross_entropy_sum
from tests.devices.test_layout import EIGHT

PAGE = cost_model.PAGE.read_text(encoding="utf-8")
SMALLEST = "small"


def create_shapes(model):
    return abstract_model(model, ops_for(jnp.bfloat16, model.attention_block, platform="tpu"))


@pytest.mark.slow
def test_page_has_the_tables_of_the_cost_model():
    """To renew the page: python -m benchmarks.cost_model --write"""
    assert cost_model.renewed(PAGE) == PAGE


@pytest.mark.parametrize("change", [lambda page: page + "\n<!-- cost_model: links -->\n", lambda page: ""])
def test_renewing_refuses_a_page_without_all_tables(change):
    with pytest.raises(ValueError, match="each of them once"):
        cost_model.renewed(change(PAGE))


def test_renewing_replaces_only_tables():
    stale = re.sub(r"\| together \|.*\n", "| together | 1 | 2 |\n", PAGE)
    assert stale != PAGE
    assert cost_model.renewed(stale) == PAGE


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_a_valid_config(name):
    assert validate(cost_model.config_named(name))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_bytes_are_those_of_real_arrays(kind):
    config = cost_model.config_named(SMALLEST)
    config.optimizer.kind = kind
    _, params = create(config.model, 0)
    state = create_state(params, optimizer.make_optimizer(config, 1e-3), 0)
    found = cost_model.bytes_per_parameter(kind, SMALLEST)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for name, tree in (("parameters", state.params), ("optimizer state", state.opt_state), ("gradient", params)):
        assert found[name] == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree)) / count


@pytest.mark.slow
def test_xla_holds_the_saved_activations_and_some_more():
    """The difference between two batch sizes leaves out all arrays that do not grow with the batch."""
    model = dataclasses.replace(cost_model.config_named(SMALLEST).model, n_layer=8)
    graphdef, params = create(model, 0, ops_for(jnp.float32, model.attention_block, platform="tpu"))

    def temporaries(batch):
        tokens, seeds = jnp.ones((batch, model.block_size), jnp.int32), jnp.ones((batch, 2), jnp.uint32)
        gradient = jax.jit(jax.grad(lambda p, t, s: cross_entropy_sum(nnx.merge(graphdef, p)(t, s), t)))
        return gradient.lower(params, tokens, seeds).compile().memory_analysis().temp_size_in_bytes

    held = (temporaries(24) - temporaries(8)) / (16 * model.block_size)
    assert 0.25 * held < cost_model.saved_bytes(model.block_size, graphdef, params) < held


def test_each_layer_saves_the_same_activations():
    def saved(**sizes):
        model = dataclasses.replace(cost_model.config_named(SMALLEST).model, block_size=128, **sizes)
        return cost_model.saved_bytes(128, *create_shapes(model))

    one, two, four = (saved(n_layer=n) for n in (1, 2, 4))
    assert four - two == 2 * (two - one)
    assert two - one > 4 * 32, "at least the residual stream in float32"


@pytest.mark.parametrize("name", ["nanogpt_baby", "85 M"])
def test_more_devices_hold_a_smaller_shard(name):
    sequence = cost_model.activation_bytes(name) * cost_model.config_named(name).model.block_size
    state = cost_model.state_bytes(name)
    for count in (1, 2, 8):
        exactly = (sequence + state / count) / 1e9
        assert cost_model.fewest_devices(name, Device("H100", 1.001 * exactly, 1)) == count
        assert cost_model.fewest_devices(name, Device("H100", 0.999 * exactly, 1)) == 2 * count
    assert cost_model.fewest_devices(name, Device("H100", sequence / 1e9, 1)) is None


@pytest.mark.parametrize("name", ["85 M", "1.2 B", "39 B"])
def test_flops_are_6_n_and_attention(name):
    model = cost_model.config_named(name).model
    count = sum(leaf.size for leaf in jax.tree.leaves(cost_model.parameters(name)))
    attention = 12 * model.n_layer * model.n_embd * model.block_size
    assert cost_model.flops_per_token(name) == pytest.approx(6 * count + attention, rel=0.01)


def test_computation_takes_as_long_as_the_traffic_it_hides():
    device = DEVICES["H100"]
    tokens = cost_model.hidden_tokens("1.2 B", device)
    seconds = cost_model.seconds_for(tokens * cost_model.flops_per_token("1.2 B"), device)
    assert seconds * 1e9 * device.link == pytest.approx(6 * 1.21e9, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00072, "0.00072 s"), (15.2, "15 s"), (60, "1 min"), (9_000, "2.5 h"), (1.9e6, "22 days"), (1e10, "317 years")],
)
def test_duration_has_a_readable_unit(seconds, text):
    assert cost_model.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(258_000, "258 K"), (999_900, "1 M"), (38.7e9, "38.7 B"), (12, "12")])
def test_amount_has_three_digits_and_a_unit(value, text):
    assert cost_model.amount(value) == text


def test_figures_in_the_pages_sentences_are_those_of_the_model():
    params = cost_model.size_of(cost_model.parameters("85 M"))
    inside = params + 4 * 1024 * cost_model.activation_bytes("85 M")
    assert f"are {inside / 1e9:.1f} GB of that in this model" in " ".join(PAGE.split())
    assert 450 / (400 / 8) == 9
    assert DEVICES["H100"].link == 450
    assert cost_model.ASSUMED_MFU == 0.4
    reached = [mfu for _, _, mfu in cost_model.measured_mfu()]
    assert max(reached) < 0.4, "the page says that this code has not reached the assumed MFU"
    rate = json.loads((cost_model.PAGE.parents[1] / "benchmarks/results/h100.json").read_text())["tables"][0]["rows"][0]
    assert f"| {rate[1]} |" in PAGE


def test_the_large_model_of_the_page_fits_its_mesh():
    (command,) = re.findall(r"python -m chargpt_jax.main (.*mesh\.fsdp=8)$", PAGE, re.MULTILINE)
    config = cost_model.config_named("nanogpt_baby")
    for section, field, value in re.findall(r"--config\.(model|mesh)\.(\w+)=(\d+)", command):
        setattr(getattr(config, section), field, int(value))
    assert dict(layout.device_mesh(validate(config), EIGHT).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    shape = cost_model.config_named("1.2 B").model
    names = ("n_layer", "n_embd", "n_head", "n_head_dim", "n_ff", "block_size")
    assert all(getattr(config.model, name) == getattr(shape, name) for name in names)
