"""The flags of the command line, the modes that each belongs to, and the text of --help."""

from absl import flags

from chargpt_jax.config.saved import help_lines
from chargpt_jax.devices.connecting import CONNECT_SECONDS

MODES = {
    "run": "all stages: prepare the text, find a learning rate if none is set, train, generate samples, write a report",
    "prepare": "load the text, remove the licence, repair encoding errors, encode it",
    "find_lr": "run only the learning-rate range test",
    "train": "train, or resume training",
    "sweep": "train several learning rates and seeds at once (config section sweep); print a table, draw sweep.svg",
    "eval": "compute the loss on the full validation set, or on the test set (--split)",
    "generate": "continue --prompt (may be repeated)",
    "score": "compute the loss and the metrics of each character of --text or --text_file",
    "export": "write the model to --out: for Hugging Face transformers or the original PyTorch code, or as one HTML "
    "page that runs it; --format=run writes one run of a sweep (--seed, --learning_rate)",
    "import": "create a run from a checkpoint of the original PyTorch code (--from)",
    "info": "print a run's settings, progress and speed",
    "report": "write a run's report again, and open it in the browser (on a terminal with a display)",
    "compile": "compile a config's programs for GPUs or TPUs that are not there (--topology); print memory, kernels, "
    "FLOP, a bound on the time and the largest batch that fits",
    "selftest": "stop small trainings at random moments, damage their checkpoints, and check that no data is lost",
}
"""What each mode does."""

EXIT_CODES = {
    0: "success, or time limit reached after saving",
    1: "self-test failed",
    2: "invalid arguments or input, or disk not writable",
    3: "no usable checkpoint",
    4: "non-finite loss (NaN or infinity)",
    5: "checkpoint could not be written",
    6: "another process of --distributed was lost (134 if JAX notices it first)",
    130: "stopped by SIGINT (during training: after saving a checkpoint)",
    143: "stopped by SIGTERM or SIGHUP (during training: after saving a checkpoint)",
}
"""What each exit code means."""

NEEDS_CONFIG = ("run", "prepare", "find_lr", "train", "sweep", "compile")
FLAG_MODES = {
    "profile": ("run", "train"),
    "max_minutes": ("run", "train", "sweep"),
    "track": ("run", "find_lr", "train"),
    **dict.fromkeys(("distributed", "connect_seconds"), ("run", "train", "find_lr", "eval")),
    **dict.fromkeys(("prompt", "max_new_tokens", "temperature", "top_k", "top_p", "stream"), ("generate",)),
    **dict.fromkeys(("sampler", "stop", "samples"), ("generate",)),
    **dict.fromkeys(("branch", "sample"), ("generate",)),
    **dict.fromkeys(("skip_unknown", "alternatives", "subline"), ("generate", "score")),
    **dict.fromkeys(("text", "stride"), ("score",)),
    "text_file": ("score", "import"),
    "step": ("generate", "score", "eval", "export"),
    "split": ("eval",),
    "seed": ("generate", "selftest", "export"),
    **dict.fromkeys(("format", "out", "learning_rate"), ("export",)),
    "open": ("report",),
    "from": ("run", "train", "import"),
    **dict.fromkeys(("topology", "largest_batch"), ("compile",)),
    **dict.fromkeys(("kills", "signals", "corruptions"), ("selftest",)),
    "json": ("generate", "score", "eval", "find_lr", "info", "report", "compile", "selftest"),
}
"""The modes that a flag applies to; other flags apply to every mode."""


TEXTS = ("prompt", "text", "branch", "stop", "config.data.start_at", "config.sample.prompts", "config.sample.stop")
"""The flags whose values are texts: they are read as UTF-8, whatever encoding the system uses for file names."""


def define_flags() -> flags.FlagValues:
    """Return the flags of all modes, unparsed."""
    values = flags.FlagValues()
    strings = {
        "workdir": "run folder; default: runs/NAME for --config=NAME; an existing run needs no --config",
        "text": "text to score",
        "text_file": "score: UTF-8 file to score; import: the model's training text",
        "step": "checkpoint to use: 'best' by validation loss, 'latest', or a step number; default: best",
        "sampler": "chain of samplers in place of temperature, top_k and top_p, applied in this order, as in "
        "min_p=0.05,temperature=0.8 (docs/samplers.md): temperature, top_k, top_p, min_p, typical, eta, top_n_sigma, "
        "p_less, xtc, dynatemp, edt, budget, word_start, mirostat, adaptive_p, repetition, presence, frequency, dry",
        "branch": "POSITION:CHARACTER, as in 57:e: continue the first sample of samples/generated.json (of the last "
        "generate without --branch) with another character at this position, counted from 0; the report's and the "
        "notebook's panel show positions; temperature and seed are the config's, or those of the flags",
        "sample": "sample that --branch continues: an index in samples/generated.json, counted from 0, or 'branch' for "
        "samples/branch.json; default: 0",
        "from": "run, train: folder of another run, whose parameters a new run starts from; import: checkpoint of the "
        "original PyTorch code, .pt, .safetensors or .npz",
        "out": "output folder, new or empty; with --format=html: output file, which must not exist",
        "track": "trackers that get the run's numbers: tensorboard, wandb, trackio, or several, separated by commas",
        "distributed": "train with several processes, each started with this command; without a value on Cloud TPU, "
        "GKE, Slurm and Open MPI; elsewhere HOST:PORT,INDEX,COUNT: the address of process 0, the index of this process "
        "from 0, and the number of processes",
        "topology": "what to compile for: h100, h200, a100, l4 or t4, or several, as in h100:8; or a TPU slice, as in "
        "v5e:2x4; default: v5e:2x4",
    }
    integers: dict[str, tuple[int | None, str]] = {
        "max_new_tokens": (
            None,
            "characters to generate; default: as in the config; with --branch, as many as the sample has after this "
            "position",
        ),
        "samples": (1, "number of samples per prompt; default: 1"),
        "top_k": (None, "sample from the k most likely characters"),
        "seed": (
            None,
            "random seed; default: the config's seed (generate), 0 (selftest); export --format=run: seed of the run",
        ),
        "alternatives": (5, "number of most likely characters to save per character; 0: none, which is faster"),
        "stride": (None, "characters between window starts; 1 is exact but slow; default: block_size // 2"),
        "kills": (20, "number of SIGKILL and SIGTERM at random moments; default: 20"),
        "signals": (6, "number of additional SIGTERM, SIGINT and SIGHUP; default: 6"),
        "corruptions": (200, "number of checkpoints to damage; default: 200"),
    }
    floats = {
        "temperature": "sampling temperature; 0: greedy; default: the config's",
        "top_p": "nucleus sampling from the fewest most likely characters whose total probability is at least p",
        "learning_rate": "export --format=run: learning rate of the run; not needed if the sweep has only one",
        "max_minutes": "save a checkpoint and exit within this many minutes; run the command again to resume",
    }
    about = "time in which all processes of --distributed must have started"
    about += f"; default: {CONNECT_SECONDS:g}"
    flags.DEFINE_float("connect_seconds", CONNECT_SECONDS, about, flag_values=values)
    booleans = {
        "stream": "print characters as they are generated",
        "subline": "draw surprisal and entropy under each line, in block characters",
        "skip_unknown": "drop characters that are not in the vocabulary",
        "profile": "write a profiler trace of a few dispatches to WORKDIR/profile",
        "json": "print one JSON object to stdout and everything else to stderr",
    }
    for name, about in strings.items():
        flags.DEFINE_string(name, None, about, flag_values=values)
    for name, (default, about) in integers.items():
        flags.DEFINE_integer(name, default, about, flag_values=values)
    for name, about in floats.items():
        flags.DEFINE_float(name, None, about, flag_values=values)
    for name, about in booleans.items():
        flags.DEFINE_bool(name, False, about, flag_values=values)
    flags.DEFINE_enum("mode", "run", list(MODES), "what to do; default: run", flag_values=values)
    about = (
        "'hf' for Hugging Face transformers, 'original' for the original PyTorch code, 'html' for one file that runs "
    )
    about += "the model in a browser, 'run' for the folder of one run of a sweep; default: hf"
    flags.DEFINE_enum("format", "hf", ("original", "hf", "html", "run"), about, flag_values=values)
    about = "set to evaluate: 'validation', or 'test' (the last data.test_split of the text); default: validation"
    flags.DEFINE_enum("split", "validation", ("validation", "test"), about, flag_values=values)
    about = "text to continue; default: the config's prompts"
    flags.DEFINE_multi_string("prompt", None, about, flag_values=values)
    about = "end a text as soon as it ends with this string, in which \\n is a line break; may be repeated"
    flags.DEFINE_multi_string("stop", None, about, flag_values=values)
    about = "open the report in the browser; --open=false: only write it"
    flags.DEFINE_bool("open", True, about, flag_values=values)
    about = "find the largest batch size that fits; --largest_batch=false: leave out these compilations"
    flags.DEFINE_bool("largest_batch", True, about, flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    return values


def help_text() -> str:
    """Return the text of --help: modes, flags by mode, config fields by section, exit codes."""
    values = define_flags()
    usage = "chargpt --config=NAME [--workdir=DIR] [--mode=MODE] [--config.SECTION.FIELD=VALUE ...]"
    lines = ["Train and use a character-level GPT.", "", f"Usage: {usage}", "", "Modes:"]
    lines += [f"  {mode:<9} {about}" for mode, about in MODES.items()]

    def flag_line(name: str) -> str:
        return f"  --{name}: {' '.join((values[name].help or '').split())}"

    config = (
        "  --config: shipped config by name, as in --config=small, or path of a .py or .json config file, and after "
        "a colon its argument, as in --config=sized:0.3"
    )
    lines += ["", "Flags of all modes:", config, *map(flag_line, ("workdir", "mode", "help"))]
    for modes in dict.fromkeys(FLAG_MODES.values()):
        lines += ["", f"Flags of {', '.join(modes)}:"]
        lines += [flag_line(name) for name, own in FLAG_MODES.items() if own == modes]
    lines += ["", "Config fields with their defaults; set one as in --config.model.n_layer=4:"]
    section = None
    for line in help_lines():
        field = line.partition("=")[0]
        if (new := field.rpartition(".")[0]) != section:
            section = new
            lines += ["", f"  {section}:" if section else "  without a section:"]
        lines.append(f"    {line}")
    lines += ["", "Exit codes:", *(f"  {code:<4}{about}" for code, about in EXIT_CODES.items())]
    return "\n".join(lines)
