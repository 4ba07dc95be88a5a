"""Every setting of a run with its default, unit and limits, and `validate()`, which checks them all.

Sections and fields have the names of the original. A config file, as in `configs/`, returns a `Config` and sets only
the fields that differ from the defaults here. This file does not import JAX.
"""

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from chargpt_jax.errors import UserError

VOCAB_MULTIPLE = 64
"""The size of the embedding table, padding included, is rounded up to a multiple of this."""

MAX_TEXT = 1_000_000
"""Maximum number of characters in a prompt, in a generated text or in a scored text."""

MAX_TEMPERATURE = 1_000.0
"""Maximum sampling temperature. All characters are equally likely here; far above it, masked ids would be sampled."""

MAX_STEPS = 2**31
"""A run has fewer training steps than this: the step is an int32."""

MAX_BYTES = 10**12
"""A config that needs more bytes of memory than this, by `min_memory`, is refused."""

MIN_FLOAT32, MAX_FLOAT32 = 2.0**-126, 2.0**127
"""Learning rates and norms are multiplied as float32: below and above these it has 0 and infinity."""

MAX_INT = 2**63
"""Integers must be less than this."""


KINDS = {float: "a number", int: "an integer", str: "a string", bool: "True or False"}
"""The types of fields and arguments, in words."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def setting(default: Any, about: str, **limits: Any) -> Any:
    """Declare a field with its meaning and limits (`above`, `least`, `below`, `most`, `choices`, `even`, `float32`)."""
    return field(default=default, metadata={"about": about, **limits})


class Settings:
    """The config or one of its sections: assigning to a name that is not a field raises `UserError`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in {item.name for item in dataclasses.fields(typing.cast(Any, self))}:
            sections = (f.name for f in dataclasses.fields(Config) if isinstance(self, typing.cast(type, f.type)))
            raise unknown_field(".".join([*sections, name]))
        super().__setattr__(name, value)


@dataclass(unsafe_hash=True)  # jax.jit uses it as a static argument
class ModelConfig(Settings):
    """Shape of the model. `vocab_size` and `used_ids` are set from the corpus."""

    kind: str = setting(
        "gpt",
        "'gpt', or 'ngpt': the normalised transformer, in which all hidden states have length 1",
        choices=("gpt", "ngpt"),
    )
    vocab_size: int = setting(0, "size of the embedding table, a multiple of 64; 0: set from the corpus", least=0)
    used_ids: int = setting(0, "token ids in use, padding included; 0: set from the corpus", least=0)
    block_size: int = setting(512, "context length, in characters", least=1)
    n_embd: int = setting(32, "width of the residual stream", least=1)
    n_head: int = setting(8, "attention heads per layer", least=1)
    n_head_dim: int = setting(8, "width of one head; need not be n_embd / n_head", least=2, even=True)
    n_ff: int = setting(128, "hidden width of the MLP", least=1)
    n_layer: int = setting(15, "transformer blocks", least=1)
    dropout: float = setting(
        0.0, "dropout rate for attention weights, attention output and MLP output", least=0.0, below=1.0
    )
    mask_unused_ids: bool = setting(True, "set the probability of padding and unused token ids to 0")
    remat: bool = setting(
        True, "recompute cheap activations in the backward pass: saves memory, and time in these models"
    )
    attention_block: int = setting(64, "queries per attention block; a block's scores are in memory together", least=1)


@dataclass
class DataConfig(Settings):
    """Source of the text, and how it is split into batches."""

    source: str = setting("60", "Gutenberg number, URL, text file, folder or 'stdlib'; separate several with commas")
    unit: str = setting(
        "character",
        "what a token is: 'character', or 'byte' (any file, unchanged; the vocabulary is all 256 bytes)",
        choices=("character", "byte"),
    )
    encoding: str = setting("", "encoding of texts without a byte order mark; '': as declared, else UTF-8")
    repair: str = setting(
        "auto",
        "ftfy fixes to run: 'auto' (all for Project Gutenberg, else mojibake, line ends and NFC), 'all', 'none', or a "
        "list of mojibake, line_ends, nfc, entities, quotes, width, ligatures, controls",
    )
    start_at: str = setting("", "regular expression; each text starts at its first match; '': keep the full text")
    allow_stand_in: bool = setting(True, "if a download fails, use the help texts that ship with Python")
    mirrors: tuple[str, ...] = setting(
        (
            "https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt",
            "https://www.gutenberg.org/ebooks/{number}.txt.utf-8",
            "https://gutenberg.pglaf.org/cache/epub/{number}/pg{number}.txt",
        ),
        "URLs to try for a Gutenberg number, in this order",
    )
    timeout: float = setting(20.0, "seconds to wait for a response before a download is retried", above=0.0, most=1e6)
    max_megabytes: float = setting(100.0, "maximum size of all texts together in MB", above=0.0, most=1e6)
    batch_size: int = setting(16, "sequences per training step", least=1)
    oversample: float = setting(1.0, "passes over the training text per epoch", above=0.0, most=1e6)
    train_split: float = setting(
        0.8,
        "fraction of the corpus, from its start, used for training; the rest is the validation set",
        above=0.0,
        below=1.0,
    )
    test_split: float = setting(
        0.0, "fraction of the corpus, at its end, left out of training and validation", least=0.0, below=1.0
    )
    padding_chance: float = setting(
        0.0, "probability that a training sequence starts with padding", least=0.0, most=1.0
    )


@dataclass
class OptimizerConfig(Settings):
    """AdamW or Muon. If the learning rate is None, the range test chooses it before training."""

    learning_rate: float | None = setting(None, "peak learning rate; None: use the range test", above=0.0, float32=True)
    weight_decay: float = setting(0.1, "decoupled weight decay for arrays of rank 2 or more", least=0.0, most=1.0)
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "AdamW: decay rates of the first and second moment", least=0.0, below=1.0
    )
    clip_norm: float | None = setting(None, "maximum global gradient norm; None: no clipping", above=0.0, float32=True)
    accumulation_steps: int = setting(1, "gradient accumulation: microbatches per training step; saves memory", least=1)
    kind: str = setting(
        "adamw",
        "'adamw', or 'muon': Muon for the layers' weight matrices, AdamW for the rest",
        choices=("adamw", "muon"),
    )
    muon_factor: float = setting(
        10.0, "muon: learning rate of the weight matrices, as a multiple of learning_rate", above=0.0, most=1e6
    )
    muon_momentum: float = setting(0.9, "muon: momentum coefficient", least=0.0, below=1.0)
    muon_steps: int = setting(5, "muon: orthogonalisation iterations per step", least=1, most=5)


@dataclass
class SchedulerConfig(Settings):
    """Linear warm-up from min_lr_factor x peak to the peak, then cosine decay to min_lr_factor x peak."""

    epochs: float = setting(100.0, "run length in epochs", above=0.0, most=1e6)
    max_steps: int | None = setting(None, "run length in training steps; overrides epochs", least=1, below=MAX_STEPS)
    warmup_epochs: float = setting(1.0, "epochs of linear warm-up", least=0.0, most=1e6)
    min_lr_factor: float = setting(0.1, "lowest learning rate, as a fraction of the peak", least=0.0, most=1.0)


@dataclass
class AmpConfig(Settings):
    """Mixed precision: parameters stay float32, matrix multiplications run in `dtype`."""

    enabled: bool = setting(True, "use mixed precision; False: float32 everywhere")
    dtype: str = setting(
        "auto",
        "'auto' is bfloat16 on TPU and newer GPUs, float16 on older GPUs, float32 on CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


@dataclass
class LRFinderConfig(Settings):
    """Learning-rate range test with several zooms."""

    start_lr: float = setting(1e-10, "lowest learning rate of the first zoom", above=0.0, float32=True)
    end_lr: float = setting(10.0, "highest learning rate of the first zoom", above=0.0, float32=True)
    num_zooms: int = setting(5, "number of zooms; each searches a narrower range", least=1, most=1_000)
    steps_per_zoom: int = setting(10, "training steps per zoom", least=2, most=10_000)
    zoom_factor: float = setting(
        0.5,
        "fraction of the (log) distance from the proposed rate to each end that the next zoom keeps",
        above=0.0,
        below=1.0,
    )
    method: str = setting(
        "steepest",
        "learning rate to choose: at the steepest descent, at the lowest loss, or the mean of both ('balanced')",
        choices=("steepest", "lowest", "balanced"),
    )


@dataclass
class MeshConfig(Settings):
    """How devices share a training: data x fsdp x tensor devices. docs/devices.md explains the axes."""

    data: int = setting(0, "devices that split the batch; 0: all that the other two leave", least=0, most=2**20)
    fsdp: int = setting(1, "devices that split the batch and the parameters", least=1, most=2**20)
    tensor: int = setting(1, "devices that split each matrix multiplication", least=1, most=2**20)


@dataclass
class TrainConfig(Settings):
    """Dispatches, logging, validation and checkpoints. These settings do not change what the model learns."""

    steps_per_dispatch: int = setting(
        0, "training steps per dispatch (one call of the compiled loop); 0: about two seconds' worth", least=0
    )
    attention: str = setting(
        "auto",
        "attention in training steps: 'blocks', 'kernel' (Pallas), 'cudnn', or 'auto' (a trial on the device decides)",
        choices=("auto", "blocks", "kernel", "cudnn"),
    )
    stream: str = setting(
        "auto",
        "read batches from the file during training, so that the training set need not fit on the device: 'always', "
        "'never', or 'auto' (if it takes more than 25 % of the device's free memory)",
        choices=("auto", "always", "never"),
    )
    log_every: int = setting(10, "training steps between lines in metrics.jsonl", least=1)
    validate_every: float = setting(1.0, "epochs between validations; a checkpoint follows each", above=0.0, most=1e6)
    keep_last: int = setting(
        2, "number of newest checkpoints to keep, in addition to the one with the best validation loss", least=1
    )


@dataclass
class SampleConfig(Settings):
    """Samples that `run` generates after each validation and at the end of training."""

    prompts: tuple[str, ...] = setting(("\n",), "texts to continue")
    max_new_tokens: int = setting(300, "characters to generate", least=1, most=MAX_TEXT)
    temperature: float = setting(0.8, "sampling temperature; 0: greedy", least=0.0, most=MAX_TEMPERATURE)
    at_validation: bool = setting(True, "generate samples after each validation, so that the report shows the progress")
    top_k: int | None = setting(None, "sample from the k most likely characters; None: all", least=1)
    top_p: float | None = setting(
        None,
        "nucleus sampling: the fewest most likely characters with total probability of at least p; None: all",
        above=0.0,
        most=1.0,
    )


@dataclass
class AncestorConfig(Settings):
    """Bugs of the original, for comparison only: docs/fidelity.md describes each."""

    short_epochs: bool = setting(False, "like the original: an epoch covers 1/batch_size of the text")
    random_validation: bool = setting(False, "like the original: validate on a few new random crops each time (noisy)")
    decay: str = setting(
        "cosine",
        "schedule after the warm-up: 'cosine', or 'none' (constant at the peak, like the original)",
        choices=("cosine", "none"),
    )


@dataclass
class Config(Settings):
    """All settings of a run. Equal configs and corpora on equal devices give bit-identical results."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    amp: AmpConfig = field(default_factory=AmpConfig)
    lr_finder: LRFinderConfig = field(default_factory=LRFinderConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    ancestor: AncestorConfig = field(default_factory=AncestorConfig)
    seed: int = setting(0, "random seed of the run", least=0, below=2**31)


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


def unknown_field(path: str) -> UserError:
    """Return the error for an unknown field; it names the new name or suggests the nearest field."""
    if (renamed := renamed_field(path)) is not None:
        return renamed
    known = known_fields()
    tails = {name.rpartition(".")[2]: name for name in known}
    path = path[:200]  # the comparison is slow
    near = difflib.get_close_matches(path, known, 1, 0.6)
    near = near or [tails[t] for t in difflib.get_close_matches(path.rpartition(".")[2], list(tails), 1, 0.6)]
    sections = ", ".join(section.name for section in dataclasses.fields(Config))
    hint = f"did you mean {near[0]}?" if near else f"the sections are {sections}."
    return UserError(f"The config has no field {shown(path)}: {hint}")


def known_fields() -> list[str]:
    """Return the names of all fields, 'section.field', in order."""
    names: list[str] = []
    for section in dataclasses.fields(Config):
        kind = typing.cast(type, section.type)
        inner = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        names += [f"{section.name}.{item.name}" for item in inner] or [section.name]
    return names


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
            _check_field(section.name, section, value)
            continue
        if not isinstance(value, kind):
            rule = f"a {kind.__name__}: set its fields, or leave out the section for the defaults"
            raise UserError(f"{section.name} is {shown(value)}, but it must be {rule}.")
        for item in dataclasses.fields(kind):
            setattr(value, item.name, plain(getattr(value, item.name)))
            _check_field(f"{section.name}.{item.name}", item, getattr(value, item.name))
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
    if min_memory(config) > MAX_BYTES:
        raise UserError(
            f"Training this config needs at least {min_memory(config) // 10**9:,} GB of memory, but the limit is "
            f"{MAX_BYTES // 10**9:,} GB: lower the sizes of model, or data.batch_size."
        )
    return config


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


def shown(value: Any) -> str:
    """Return a value as code for a message; long ones are truncated."""
    if isinstance(value, int) and abs(value) >= MAX_INT:
        return "an integer of more than 18 digits"
    return _SHORT.repr(value)


def plain(value: Any) -> Any:
    """Return a value with Python's numbers in place of NumPy's and JAX's scalars, also inside a tuple or list."""
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else value
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def argument(name: str, value: Any, kind: type, fix: str) -> Any:
    """Return an argument of a Python function as a plain value, if it is of a kind in `KINDS`.

    Raises:
        UserError: if it is of another kind; the message ends with the fix.
    """
    value = plain(value)
    if not _is_a(kind, value):
        raise UserError(f"{name} is {shown(value)}, but it must be {KINDS[kind]}: {fix}.")
    return value


def _is_a(kind: type, value: Any) -> bool:
    accepted = (float, int) if kind is float else kind
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


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
            _check_value(name, item, args[0], part, value)
    else:
        _check_value(name, item, typing.cast(type, kind), value, value)


def _check_value(name: str, item: dataclasses.Field, kind: type, value: Any, given: Any) -> None:
    """Check a value, or one element of a given tuple."""
    limits, must = item.metadata, "it must be" if value is given else "each value must be"

    def wrong(rule: str) -> UserError:
        return UserError(f"{name} is {shown(given)}, but {must} {rule} ({item.metadata.get('about', '')}).")

    if not _is_a(kind, value):
        raise wrong(KINDS[kind])
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise wrong("an integer of at most 18 digits")
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
    if limits.get("float32") and not MIN_FLOAT32 <= value <= MAX_FLOAT32:
        raise wrong(f"within the range of float32, {MIN_FLOAT32:.1e} to {MAX_FLOAT32:.1e}")
    if limits.get("even") and typing.cast(int, value) % 2:
        raise wrong("even, because rotary position embedding rotates its two halves")
