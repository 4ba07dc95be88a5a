"""Export to one HTML file that runs the model in a browser, without a network.

The page contains the parameters and, from pictures/page/, the mathematics: model.js computes the logits with the
operations of arithmetic.js, predict.js the metrics and the sampled characters, session.js reads and continues a text,
write.js is the form. Every result equals that of chargpt_jax up to rounding, beyond block_size too. Only the random
numbers of sampling are others.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chargpt_jax.config import Config
from chargpt_jax.data.tokenizer import CharTokenizer
from chargpt_jax.errors import UserError
from chargpt_jax.interop.array_names import LAYER, Params
from chargpt_jax.pictures import page_assets

MAX_PAGE = 50 * 10**6
"""Maximum size of a page, bytes. A browser needs a few times as much memory to read it."""

SCRIPTS = ("subline", "arithmetic", "model", "predict", "session", "write")
"""The scripts of the page, in their order."""

MODEL_FIELDS = (
    *("vocab_size", "used_ids", "block_size", "n_embd", "n_head", "n_head_dim", "n_ff", "n_layer"),
    "mask_unused_ids",
)
"""The fields of ModelConfig that change the mathematics of a trained model; model.js reads all of them."""


@dataclass(frozen=True)
class About:
    """What a page says about its model, besides its config."""

    name: str
    """Of the run."""
    step: int | None = None
    """Training steps of the checkpoint."""
    loss: float | None = None
    """Validation loss, nats per character."""
    texts: Sequence[str] = ()
    """The titles of the training texts."""


def page(config: Config, tokenizer: CharTokenizer, params: Params, about: About) -> str:
    """Return the page of a model.

    Raises:
        UserError: if it would be larger than MAX_PAGE.
    """
    named = dict(arrays(params, config.model.n_layer))
    count = sum(array.size for array in named.values())
    _check_size(4 * -(-4 * count // 3), count)
    values = np.concatenate([array.ravel() for array in named.values()]).astype("<f4")
    data = {
        "config": {name: getattr(config.model, name) for name in MODEL_FIELDS},
        "names": [[name, array.size] for name, array in named.items()],
        "vocabulary": list(tokenizer.vocabulary),
        "prompt": _prompt(config.sample.prompts, tokenizer),
        "sample": {name: getattr(config.sample, name) for name in ("temperature", "top_k", "max_new_tokens")},
        "about": asdict(about),
    }
    encoded = base64.b64encode(values.tobytes()).decode()
    content = page_assets.document(
        f"{about.name}: a chargpt_jax model",
        page_assets.asset("write.html"),
        scripts=SCRIPTS,
        styles=("subline", "page", "write"),
        data={"model": data},
        blocks=f'<script type="application/octet-stream;base64" id="parameters">{encoded}</script>',
    )
    _check_size(len(content.encode()), count)
    return content


def arrays(params: Params, n_layer: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the values of each array, in the order of the page; kernels are [out, in]."""
    yield "wte.embedding", params["wte"]["embedding"]
    for layer in range(n_layer):
        for path in LAYER:
            stacked: Any = params["blocks"]
            for key in path:
                stacked = stacked[key]
            array = stacked[layer]
            yield f"blocks.{layer}.{'.'.join(path)}", array.T if path[-1] == "kernel" else array
    yield "ln_f.scale", params["ln_f"]["scale"]
    yield "ln_f.bias", params["ln_f"]["bias"]


def _prompt(prompts: Sequence[str], tokenizer: CharTokenizer) -> str:
    """Return the first of the config's prompts that the model knows, or a character that it knows."""
    known = [prompt for prompt in prompts if prompt and not tokenizer.unknown(prompt)]
    return known[0] if known else tokenizer.vocabulary[1]


def _check_size(size: int, parameters: int) -> None:
    if size > MAX_PAGE:
        megabytes, most = (f"{count / 1e6:,.0f} MB" for count in (size, MAX_PAGE))
        raise UserError(
            f"The page of this model would have {megabytes} ({parameters:,} parameters), but {most} is the maximum: "
            "export a smaller model, or use --format=hf."
        )
