"""A small character-level GPT in JAX: train it on a text, generate samples, and score texts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chargpt_jax.api import (
        Comparison,
        Inspection,
        LettersOfWords,
        Model,
        Sample,
        Samples,
        backed_up,
        by_letter,
        copy_run,
        corpus_text,
        evaluate,
        export,
        extract,
        find_lr,
        import_original,
        info,
        inspect,
        load,
        prepare,
        run,
        sweep,
        train,
        write_report,
        write_samples,
    )
    from chargpt_jax.cli.progress import show
    from chargpt_jax.config import Config
    from chargpt_jax.config.files import load_config
    from chargpt_jax.errors import UserError

    __version__: str

_MODULES = {
    "Config": "config",
    "UserError": "errors",
    "load_config": "config.files",
    "show": "cli.progress",
    **dict.fromkeys(
        (
            *("Model", "Sample", "Samples", "evaluate", "find_lr", "info", "load", "prepare", "run", "train"),
            *("Comparison", "Inspection", "LettersOfWords", "by_letter", "inspect"),
            *("corpus_text", "export", "import_original", "write_report", "write_samples", "backed_up", "copy_run"),
            *("extract", "sweep"),
        ),
        "api",
    ),
}

__all__ = [
    "Comparison",
    "Config",
    "Inspection",
    "LettersOfWords",
    "Model",
    "Sample",
    "Samples",
    "UserError",
    "backed_up",
    "by_letter",
    "copy_run",
    "corpus_text",
    "evaluate",
    "export",
    "extract",
    "find_lr",
    "import_original",
    "info",
    "inspect",
    "load",
    "load_config",
    "prepare",
    "run",
    "show",
    "sweep",
    "train",
    "write_report",
    "write_samples",
]


def __getattr__(name: str) -> Any:
    """Import on first use: a mistyped command gets its error message without waiting for JAX."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("chargpt_jax")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from chargpt_jax.devices import startup

    with startup.gc_paused():
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)
