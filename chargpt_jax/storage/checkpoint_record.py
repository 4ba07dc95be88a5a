"""The record of a checkpoint: what its arrays mean, as JSON. `complete` creates it, `check` verifies it."""

import functools
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from chargpt_jax.config.saved import from_dict
from chargpt_jax.errors import UserError
from chargpt_jax.storage.arrays.state_arrays import Description
from chargpt_jax.storage.manifest import Damaged

NAME = "record.json"

FORMAT = 2
"""Version of the content of a checkpoint; a newer one is rejected."""

MAX_BYTES = 32_000_000
"""Maximum size of a record: a vocabulary of all Unicode characters takes half of it."""

FIELDS = {"config": dict, "vocabulary": list, "corpus_sha256": str, "arrays": dict, "digest": str, "loss": float}
"""The fields of every record, in addition to format and step."""

Record = dict[str, Any]
"""What a checkpoint states of its state, as JSON."""


def complete(
    record: Mapping[str, object], step: int, loss: float, arrays: Description, digest: str
) -> dict[str, object]:
    """Return a record with all of its fields.

    Args:
        record: config, vocabulary, corpus_sha256, and anything else that JSON can hold.
        step: number of training steps done.
        loss: validation loss, nats per character.
        arrays: names, dtypes and shapes of the arrays.
        digest: of the arrays.
    """
    return {
        "format": FORMAT,
        "step": step,
        "loss": float(loss),
        "versions": _versions(),
        "config_sha256": _sha256_of_json(record.get("config")),
        "arrays": arrays,
        "digest": digest,
        **record,
    }


def check(record: Record, step: int) -> None:
    """Check the fields of a record.

    Raises:
        Damaged: naming the first one that is missing or invalid.
    """
    if not isinstance(record.get("format"), int) or record["format"] > FORMAT:
        shown = f"{record.get('format')!a}"
        raise Damaged(NAME, f"has format {shown}, but this version reads up to {FORMAT}: install a newer chargpt_jax")
    missing = [name for name, kind in FIELDS.items() if not isinstance(record.get(name), kind)]
    if missing:
        raise Damaged(NAME, f"has no {missing[0]}")
    if record.get("step") != step:
        raise Damaged(NAME, f"is of step {record.get('step')!a}")
    if record.get("config_sha256") != _sha256_of_json(record["config"]):
        raise Damaged(NAME, "has a config that differs from the saved one")
    _check_vocabulary(record["vocabulary"])
    try:
        from_dict(record["config"])
    except UserError as error:
        raise Damaged(NAME, f"has a config that this version does not support ({str(error).rstrip('.')})") from None


def _check_vocabulary(vocabulary: list[object]) -> None:
    """Reject a vocabulary that a tokenizer would sort into another order, since its ids would then differ."""
    strings = [text for text in vocabulary if isinstance(text, str) and len(text) <= 1]
    if len(strings) != len(vocabulary) or strings != sorted({"", *strings}):
        raise Damaged(NAME, "has a vocabulary that is not '' and single characters in order")


def _sha256_of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
