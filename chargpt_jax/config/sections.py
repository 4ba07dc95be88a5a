"""Every setting of a run with its default, unit and limits.

Sections and fields have the names of the original. A config file, as in `configs/`, returns a `Config` and sets only
the fields that differ from the defaults here.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from typing import Any

from chargpt_jax.config.values import shown
from chargpt_jax.errors import UserError

MAX_TEXT = 1_000_000
"""Maximum number of characters in a prompt, in a generated text or in a scored text."""

MAX_TEMPERATURE = 1_000.0
"""Maximum sampling temperature. All characters are equally likely here; far above it, masked ids would be sampled."""

LR_METHODS = ("steepest", "lowest", "balanced", "valley", "slide")
"""How the range test chooses a learning rate."""

MAX_STOP, MAX_STOPS = 256, 64
"""Maximum length of a stop string, characters, and maximum number of stop strings."""

MAX_STEPS = 2**31
"""A run has fewer training steps than this: the step is an int32."""


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
    kind: str = setting(
        "gpt",
        "'gpt'; 'ngpt': the normalised transformer, in which all hidden states have length 1; 'modern': a GPT with "
        "value residuals, whose layers start as the identity",
        choices=("gpt", "ngpt", "modern"),
    )


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
    minutes: float | None = setting(
        None,
        "run length in minutes, start-up, compilation and samples included; overrides epochs: the number of steps "
        "follows from the speed measured",
        above=0.0,
        most=1e6,
    )
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
        "learning rate to choose: at the steepest descent, at the lowest loss, the mean of both ('balanced'), in the "
        "longest 'valley', or before the loss shoots up ('slide')",
        choices=LR_METHODS,
    )
    smoothing: float = setting(
        0.0,
        "weight of the earlier losses in the exponential average that the methods use; 0: the losses themselves",
        least=0.0,
        below=1.0,
    )
    stop_factor: float | None = setting(
        None, "end a zoom when its loss, smoothed, exceeds this many times the lowest one; None: never", above=1.0
    )
    seeds: int = setting(
        1, "seeds, of initial parameters and batches, whose mean loss the methods use; 1: the run's", least=1, most=100
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
    sampler: str = setting(
        "",
        "chain of samplers in place of temperature, top_k and top_p, as in 'min_p=0.05,temperature=0.8' "
        "(docs/samplers.md); '': these three",
    )
    stop: tuple[str, ...] = setting((), "strings; a sample ends as soon as it ends with one of them")


@dataclass
class SweepConfig(Settings):
    """The runs that `--mode=sweep` trains at once: one for each learning rate and each seed."""

    seeds: int = setting(8, "sweep: number of seeds; the first one is the config's seed", least=1, most=1_000)
    learning_rates: tuple[float, ...] = setting(
        (), "sweep: peak learning rates, as in (1e-3,3e-3); (): optimizer.learning_rate", above=0.0, float32=True
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
    sweep: SweepConfig = field(default_factory=SweepConfig)
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
    near = [name for name in known if name.endswith(f".{path}")][:1] or difflib.get_close_matches(path, known, 1, 0.6)
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
