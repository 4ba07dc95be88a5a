"""A character-level GPT in JAX: train one on a book, watch it learn, read what it writes and what surprises it."""

from importlib import metadata as _metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chargpt_jax.api import (
        Model,
        Sample,
        Samples,
        corpus_text,
        evaluate,
        export,
        find_lr,
        import_original,
        info,
        load,
        prepare,
        run,
        train,
        write_report,
        write_samples,
    )
    from chargpt_jax.cli.progress import show
    from chargpt_jax.config import Config
    from chargpt_jax.config_io import load_config
    from chargpt_jax.errors import UserError

__version__ = _metadata.version("chargpt_jax")

_HOMES = {
    "Config": "config",
    "UserError": "errors",
    "load_config": "config_io",
    "show": "cli.progress",
    **dict.fromkeys(
        (
            *("Model", "Sample", "Samples", "evaluate", "find_lr", "info", "load", "prepare", "run", "train"),
            *("corpus_text", "export", "import_original", "write_report", "write_samples"),
        ),
        "api",
    ),
}

__all__ = [
    "Config",
    "Model",
    "Sample",
    "Samples",
    "UserError",
    "corpus_text",
    "evaluate",
    "export",
    "find_lr",
    "import_original",
    "info",
    "load",
    "load_config",
    "prepare",
    "run",
    "show",
    "train",
    "write_report",
    "write_samples",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that a mistyped command is answered before JAX has started."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from chargpt_jax.devices import startup

    with startup.gc_paused():
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    return getattr(home, name)
