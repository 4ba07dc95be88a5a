"""Every setting of a run: its name, default, unit and limits, and the one `validate()`.

Sections and fields keep the names of the PyTorch notebook this project descends from. A config file under `configs/`
returns a `Config` and changes only what differs from the defaults here. Nothing in this file imports JAX.
"""

import dataclasses
import math
import reprlib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from chargpt_jax.errors import UserError

VOCAB_MULTIPLE = 64
"""The embedding table's rows are rounded up to a multiple of this, the padding id included."""

MOST_TEXT = 1_000_000
"""Characters that are continued, written or scored in one go, at most."""

MOST_TEMPERATURE = 1_000.0
"""Where every character is as likely as any other; far above it, even ids without a character would be drawn."""

MOST_STEPS = 2**31
"""A run has fewer updates: they are counted in int32."""

MOST_BYTES = 10**12
"""A run whose training would take more memory than this, by the least estimate, is refused before it is tried."""

MOST_WHOLE = 2**63
"""Whole numbers are less than this."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def setting(default: Any, about: str, **limits: Any) -> Any:
    """Declare a field with its meaning and its limits (`above`, `least`, `below`, `most`, `choices`, `even`)."""
    return field(default=default, metadata={"about": about, **limits})


@dataclass(unsafe_hash=True)  # a compiled function is looked up by the model it was made for
class ModelConfig:
    """The decoder's shape. `vocab_size` and `used_ids` are filled in from the corpus."""

    vocab_size: int = setting(0, "rows of the embedding table, a multiple of 64; 0: from the corpus", least=0)
    used_ids: int = setting(0, "ids that a character (or padding) has; 0: from the corpus", least=0)
    block_size: int = setting(512, "longest context, in characters", least=1)
    n_embd: int = setting(32, "width of the residual stream", least=1)
    n_head: int = setting(8, "attention heads a layer", least=1)
    n_head_dim: int = setting(8, "width of one head; need not be n_embd / n_head", least=2, even=True)
    n_ff: int = setting(128, "hidden width of the MLP", least=1)
    n_layer: int = setting(15, "transformer blocks", least=1)
    dropout: float = setting(0.0, "on attention weights, attention output and MLP output", least=0.0, below=1.0)
    mask_unused_ids: bool = setting(True, "give padding and ids without a character no probability")
    remat: bool = setting(True, "recompute what is cheap in the backward pass: less memory, and here less time too")
    attention_block: int = setting(64, "query positions whose scores are held at once", least=1)


@dataclass
class DataConfig:
    """Where the text comes from and how it is cut into batches."""

    source: str = setting("60", "Gutenberg number, URL, .txt file, folder, or 'stdlib'; several with commas between")
    start_at: str = setting("", "regular expression at whose first match a source's text begins; '': at its start")
    allow_stand_in: bool = setting(True, "use the text that ships with Python when a download fails")
    mirrors: tuple[str, ...] = setting(
        (
            "https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt",
            "https://www.gutenberg.org/ebooks/{number}.txt.utf-8",
            "https://gutenberg.pglaf.org/cache/epub/{number}/pg{number}.txt",
        ),
        "where a Gutenberg number is looked for, in this order",
    )
    timeout: float = setting(20.0, "seconds without an answer before a download is tried again", above=0.0, most=1e6)
    max_megabytes: float = setting(100.0, "largest text, from the web or a file", above=0.0, most=1e6)
    batch_size: int = setting(16, "sequences an update", least=1)
    oversample: float = setting(1.0, "times the training text is covered in an epoch", above=0.0, most=1e6)
    train_split: float = setting(0.8, "leading part of the corpus that is trained on", above=0.0, below=1.0)
    padding_chance: float = setting(0.0, "chance that a training sequence begins with padding", least=0.0, most=1.0)


@dataclass
class OptimizerConfig:
    """AdamW, or Muon. A learning rate of None is found by the range test before training."""

    learning_rate: float | None = setting(None, "peak rate; None: found by the range test", above=0.0)
    weight_decay: float = setting(0.1, "decoupled decay, on arrays of rank 2 and more", least=0.0, most=1.0)
    betas: tuple[float, float] = setting((0.9, 0.95), "decay of the first and second moments", least=0.0, below=1.0)
    clip_norm: float | None = setting(None, "largest global norm of the gradient; None: no clipping", above=0.0)
    accumulation_steps: int = setting(1, "parts that a batch is split into to save memory", least=1)
    kind: str = setting("adamw", "'muon': the layers' matrices by Muon, all else by AdamW", choices=("adamw", "muon"))
    muon_factor: float = setting(10.0, "muon: the matrices' rate as a multiple of learning_rate", above=0.0, most=1e6)
    muon_momentum: float = setting(0.9, "muon: decay of the mean of the matrices' gradients", least=0.0, below=1.0)
    muon_steps: int = setting(5, "muon: polynomials that make a matrix orthogonal", least=1, most=5)


@dataclass
class SchedulerConfig:
    """Linear warm-up from min_lr_factor x peak to the peak, then cosine decay to min_lr_factor x peak."""

    epochs: float = setting(100.0, "length of the run", above=0.0, most=1e6)
    max_steps: int | None = setting(None, "length of the run in steps; overrides epochs", least=1, below=MOST_STEPS)
    warmup_epochs: float = setting(1.0, "epochs of linear warm-up", least=0.0, most=1e6)
    min_lr_factor: float = setting(0.1, "lowest rate as a part of the peak", least=0.0, most=1.0)


@dataclass
class AmpConfig:
    """Mixed precision: parameters stay float32, matrix products run in `dtype`."""

    enabled: bool = setting(True, "off: compute in float32 everywhere")
    dtype: str = setting(
        "auto",
        "'auto' is bfloat16 on TPU and newer GPUs, float16 on older GPUs, float32 on CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


@dataclass
class LRFinderConfig:
    """The multi-zoom learning-rate range test."""

    start_lr: float = setting(1e-10, "lowest rate of the first zoom", above=0.0)
    end_lr: float = setting(10.0, "highest rate of the first zoom", above=0.0)
    num_zooms: int = setting(5, "times the range is narrowed", least=1, most=1_000)
    steps_per_zoom: int = setting(10, "training steps a zoom", least=2, most=10_000)
    zoom_factor: float = setting(0.5, "part of the old range's margin that is kept", above=0.0, below=1.0)
    method: str = setting("steepest", "which rate is proposed", choices=("steepest", "lowest", "balanced"))


@dataclass
class TrainConfig:
    """How a run is looked after. None of these changes what is learned."""

    steps_per_dispatch: int = setting(0, "updates a call of the compiled step; 0: about two seconds of work", least=0)
    log_every: int = setting(10, "steps between two lines of metrics.jsonl", least=1)
    validate_every: float = setting(
        1.0, "epochs between two validations, each followed by a checkpoint", above=0.0, most=1e6
    )
    keep_last: int = setting(2, "newest checkpoints that are kept, besides the best by validation", least=1)


@dataclass
class SampleConfig:
    """What `run` writes when training is done."""

    prompts: tuple[str, ...] = setting(("\n",), "texts to continue")
    max_new_tokens: int = setting(300, "characters to write", least=1, most=MOST_TEXT)
    temperature: float = setting(0.8, "0 takes the likeliest character", least=0.0, most=MOST_TEMPERATURE)
    top_k: int | None = setting(None, "sample among the k likeliest; None: all", least=1)
    top_p: float | None = setting(
        None, "sample among the likeliest that hold this mass; None: all", above=0.0, most=1.0
    )


@dataclass
class AncestorConfig:
    """Bugs of the original, for comparison only: docs/fidelity.md describes each."""

    short_epochs: bool = setting(False, "like the original: an epoch covers 1/batch_size of the text")
    random_validation: bool = setting(False, "like the original: validate on a few new random crops each time (noisy)")
    decay: str = setting(
        "cosine",
        "schedule after the warm-up: 'cosine', or 'none' (constant at the peak, like the original)",
        choices=("cosine", "none"),
    )


@dataclass
class Config:
    """A whole run. Two runs with equal configs and corpora on equal devices learn the same bits."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    amp: AmpConfig = field(default_factory=AmpConfig)
    lr_finder: LRFinderConfig = field(default_factory=LRFinderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    ancestor: AncestorConfig = field(default_factory=AncestorConfig)
    seed: int = setting(0, "every random number of a run follows from it", least=0, below=2**31)


RENAMED = {
    "data.short_epochs": "ancestor.short_epochs",
    "data.random_validation": "ancestor.random_validation",
    "scheduler.decay": "ancestor.decay",
}
"""Fields that had another name in earlier versions: old name to new name."""

DROPOUT_BITS = "model.dropout_bits"
"""A field that earlier versions had: 'hash', or 'jax' for dropout masks from JAX's own random bits."""


def renamed_field(path: str) -> UserError | None:
    """Return the error for a field of an earlier version, 'section.field'; None if `path` is no such field."""
    if path == DROPOUT_BITS:
        return UserError(
            f"The config field {path} was removed, and dropout masks always come from the hash: delete it."
        )
    return UserError(f"The config field {path} was renamed: use {RENAMED[path]}.") if path in RENAMED else None


def validate(config: Config) -> Config:
    """Check every field's type and limits and the relations between fields; return the config.

    Raises:
        UserError: naming the first field that is wrong, its value and what it must be.
    """
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if not dataclasses.is_dataclass(value):
            _check_field(section.name, section, value)
            continue
        for name in vars(value):  # assigning to a field that a dataclass no longer has raises nothing
            if (renamed := renamed_field(f"{section.name}.{name}")) is not None:
                raise renamed
        for item in dataclasses.fields(value):
            _check_field(f"{section.name}.{item.name}", item, getattr(value, item.name))
    model, data = config.model, config.data
    if model.vocab_size % VOCAB_MULTIPLE:
        raise UserError(
            f"model.vocab_size is {model.vocab_size}, but it must be a multiple of {VOCAB_MULTIPLE}: leave it at 0 to "
            "take it from the corpus."
        )
    if config.lr_finder.start_lr >= config.lr_finder.end_lr:
        raise UserError(
            f"lr_finder.start_lr is {config.lr_finder.start_lr:g}, but it must be less than lr_finder.end_lr "
            f"({config.lr_finder.end_lr:g}): lower it."
        )
    if data.batch_size % config.optimizer.accumulation_steps:
        raise UserError(
            f"optimizer.accumulation_steps is {config.optimizer.accumulation_steps}, but it must divide "
            f"data.batch_size ({data.batch_size}): choose a divisor."
        )
    if not config.sample.prompts or "" in config.sample.prompts:
        raise UserError("sample.prompts holds an empty text, but each prompt needs a character: try ('\\n',).")
    if sum(map(len, config.sample.prompts)) > MOST_TEXT:
        raise UserError(f"sample.prompts holds more than {MOST_TEXT:,} characters, which is the most: shorten them.")
    if least_bytes(config) > MOST_BYTES:
        raise UserError(
            f"This model and batch take at least {least_bytes(config) // 10**9:,} GB of memory to train, but more than "
            f"{MOST_BYTES // 10**9:,} GB are not tried: lower the sizes of model, or data.batch_size."
        )
    return config


def least_bytes(config: Config) -> int:
    """Return the bytes that training takes at least.

    Four float32 numbers a parameter (itself, its gradient and AdamW's moments, or Muon's mean and direction), and for
    the sequences that are worked on at once their ids, the residual stream before each layer, one layer's widest array,
    and the logits.
    """
    m = config.model
    width, table = m.n_head * m.n_head_dim, max(m.vocab_size, VOCAB_MULTIPLE)
    layer = 4 * m.n_embd * (width + 1) + 3 * width + 2 * m.n_embd * m.n_ff + m.n_ff + 2 * m.n_embd
    characters = config.data.batch_size // config.optimizer.accumulation_steps * m.block_size
    kept = 2 + m.n_embd * (m.n_layer + 1) + max(3 * width, m.n_ff) + table
    return 16 * (table * m.n_embd + m.n_layer * layer) + 4 * characters * kept


def shown(value: Any) -> str:
    """Return a value as code, cut where it is long, for a message."""
    if isinstance(value, int) and abs(value) >= MOST_WHOLE:
        return "a number of many digits"
    return _SHORT.repr(value)


def _check_field(name: str, item: dataclasses.Field, value: Any) -> None:
    kind, optional = item.type, False
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        optional = True
    if value is None and optional:
        return
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        fixed = Ellipsis not in args
        if not isinstance(value, tuple | list) or (fixed and len(value) != len(args)):
            wanted = f"{len(args)} values" if fixed else "a tuple"
            raise UserError(f"{name} is {shown(value)}, but it must be {wanted}: write it as in {item.default!r}.")
        for part in value:
            _check_value(name, item, args[0], part)
    else:
        _check_value(name, item, typing.cast(type, kind), value)


def _check_value(name: str, item: dataclasses.Field, kind: type, value: Any) -> None:
    limits = item.metadata

    def wrong(rule: str) -> UserError:
        return UserError(f"{name} is {shown(value)}, but it must be {rule} ({item.metadata.get('about', '')}).")

    accepted: tuple[type, ...] = (float, int) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        names = {float: "a number", int: "a whole number", str: "a text", bool: "True or False"}
        raise wrong(names.get(kind, kind.__name__))
    if isinstance(value, int) and abs(value) >= MOST_WHOLE:
        raise wrong("of at most 18 digits")
    if kind is float and not abs(typing.cast(float, value)) < math.inf:
        raise wrong("a finite number")
    if "choices" in limits and value not in limits["choices"]:
        raise wrong("one of " + ", ".join(limits["choices"]))
    if "above" in limits and not value > limits["above"]:
        raise wrong(f"above {limits['above']:g}")
    if "least" in limits and not value >= limits["least"]:
        raise wrong(f"at least {limits['least']:g}")
    if "below" in limits and not value < limits["below"]:
        raise wrong(f"below {limits['below']}")
    if "most" in limits and not value <= limits["most"]:
        raise wrong(f"at most {limits['most']:,.10g}")
    if limits.get("even") and typing.cast(int, value) % 2:
        raise wrong("even, since rotary encoding pairs its two halves")
