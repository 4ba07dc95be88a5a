"""Everything that depends on the devices: dtypes, XLA compiler options, sharding, start-up."""

from typing import Any

__all__ = ["compute_dtype"]


def __getattr__(name: str) -> Any:
    """Import JAX on first use, so that `startup` can be imported before it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from chargpt_jax.devices.platform import compute_dtype

    return compute_dtype
