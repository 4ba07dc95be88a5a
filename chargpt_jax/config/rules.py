"""`validate()`: check every field of a config, and the relations between fields."""

import dataclasses
import typing

from chargpt_jax.config.sections import MAX_STOP, MAX_STOPS, MAX_TEXT, Config, SampleConfig
from chargpt_jax.config.values import MAX_FLOAT32, check_field, plain, shown
from chargpt_jax.errors import UserError

VOCAB_MULTIPLE = 64
"""The size of the embedding table, padding included, is rounded up to a multiple of this."""

MAX_BYTES = 10**12
"""A config that needs more bytes of memory than this, by `min_memory`, is refused."""


def validate(config: Config) -> Config:
    """Check every field's type and limits and the relations between fields; return the config.

    NumPy scalars in the config are replaced by Python's numbers, which JSON can hold.

    Raises:
        UserError: for the first invalid field, with its value and the rule.
    """
    if not isinstance(config, Config):
        raise UserError(f"The config is {shown(config)}, but it must be a Config: use chargpt_jax.load_config.")
    for section in dataclasses.fields(Config):  # a subclass may have further fields, which a run does not use
        value = getattr(config, section.name)
        kind = typing.cast(type, section.type)
        if not dataclasses.is_dataclass(kind):
            setattr(config, section.name, value := plain(value))
            check_field(section.name, section, value)
            continue
        if not isinstance(value, kind):
            rule = f"a {kind.__name__}: set its fields, or leave out the section for the defaults"
            raise UserError(f"{section.name} is {shown(value)}, but it must be {rule}.")
        for item in dataclasses.fields(kind):
            setattr(value, item.name, plain(getattr(value, item.name)))
            check_field(f"{section.name}.{item.name}", item, getattr(value, item.name))
    _check_relations(config)
    return config


def _check_relations(config: Config) -> None:
    """Check the rules that concern several fields."""
    model, data = config.model, config.data
    if model.vocab_size % VOCAB_MULTIPLE:
        raise UserError(
            f"model.vocab_size is {model.vocab_size}, but it must be a multiple of {VOCAB_MULTIPLE}: leave it at 0 to "
            "set it from the corpus."
        )
    if config.lr_finder.start_lr >= config.lr_finder.end_lr:
        raise UserError(
            f"lr_finder.start_lr is {config.lr_finder.start_lr:g}, but it must be less than lr_finder.end_lr "
            f"({config.lr_finder.end_lr:g}): lower it."
        )
    scheduler = config.scheduler
    if scheduler.minutes is not None and scheduler.max_steps is not None:
        raise UserError(
            f"scheduler.minutes is {scheduler.minutes:g} and scheduler.max_steps is {scheduler.max_steps:,}, but only "
            "one of them can set the length of a run: leave one out, or set it to None, for example with "
            "--config.scheduler.max_steps=None."
        )
    rate, factor = config.optimizer.learning_rate, config.optimizer.muon_factor
    if config.optimizer.kind == "muon" and rate is not None and rate * factor > MAX_FLOAT32:
        raise UserError(
            f"optimizer.learning_rate is {rate:g}, but times muon_factor ({factor:g}) it must be at most "
            f"{MAX_FLOAT32:.1e}, the range of float32: lower it."
        )
    if data.train_split + data.test_split >= 1.0:
        raise UserError(
            f"data.test_split is {data.test_split:g}, but with data.train_split ({data.train_split:g}) it must leave a "
            "part for validation: lower one of them."
        )
    if data.unit == "byte":
        for name, unset in (("repair", "auto"), ("encoding", ""), ("start_at", "")):
            if (value := getattr(data, name)) not in (unset, "none"):
                raise UserError(
                    f"data.{name} is {shown(value)}, but must be {unset!r} if data.unit is 'byte', because the bytes "
                    "stay as they are: leave it out."
                )
    if data.batch_size % config.optimizer.accumulation_steps:
        raise UserError(
            f"optimizer.accumulation_steps is {config.optimizer.accumulation_steps}, but it must divide "
            f"data.batch_size ({data.batch_size}): choose a divisor."
        )
    if not config.sample.prompts or "" in config.sample.prompts:
        raise UserError("sample.prompts holds an empty prompt, but each needs at least one character: try ('\\n',).")
    if sum(map(len, config.sample.prompts)) > MAX_TEXT:
        raise UserError(f"sample.prompts holds more than the maximum of {MAX_TEXT:,} characters: shorten them.")
    _check_sampling(config.sample)
    if min_memory(config) > MAX_BYTES:
        raise UserError(
            f"Training this config needs at least {min_memory(config) // 10**9:,} GB of memory, but the limit is "
            f"{MAX_BYTES // 10**9:,} GB: lower the sizes of model, or data.batch_size."
        )


def _check_sampling(how: SampleConfig) -> None:
    """Check stop strings, and that a chain of samplers has no settings beside it; `Sampler.of` reads the chain."""
    if len(how.stop) > MAX_STOPS:
        raise UserError(
            f"sample.stop has {len(how.stop)} strings, but there must be at most {MAX_STOPS}: leave some out."
        )
    for one in how.stop:
        if not 1 <= len(one) <= MAX_STOP:
            raise UserError(
                f"sample.stop has {shown(one)}, but each string must be 1 to {MAX_STOP} characters long: correct it."
            )
    for name in ("temperature", "top_k", "top_p") if how.sampler else ():
        value, unset = getattr(how, name), getattr(SampleConfig, name)
        if value != unset:
            raise UserError(
                f"sample.{name} is {shown(value)}, but it must be {unset} if sample.sampler is set, because a chain of "
                f"samplers has its own settings: write {name} into the chain, or leave sample.sampler empty."
            )


def min_memory(config: Config) -> int:
    """Return a lower bound on the bytes that training needs.

    It counts four float32 values per parameter: the parameter, its gradient and AdamW's two moments, or Muon's momentum
    and update. For each character of a microbatch it counts the ids, the residual stream before every layer, the widest
    array of one layer, and the logits.
    """
    m = config.model
    width, table = m.n_head * m.n_head_dim, max(m.vocab_size, VOCAB_MULTIPLE)
    layer = 4 * m.n_embd * (width + 1) + 3 * width + 2 * m.n_embd * m.n_ff + m.n_ff + 2 * m.n_embd
    characters = config.data.batch_size // config.optimizer.accumulation_steps * m.block_size
    per_character = 2 + m.n_embd * (m.n_layer + 1) + max(3 * width, m.n_ff) + table
    return 16 * (table * m.n_embd + m.n_layer * layer) + 4 * characters * per_character
