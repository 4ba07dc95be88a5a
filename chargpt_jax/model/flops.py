"""How much arithmetic a training step asks for, and how much a device could do: what "achieved" is measured by.

Counted as in Chowdhery et al. 2022, "PaLM" (appendix B): products of matrices only, two operations a multiply-add, the
backward pass twice the forward one, whatever is computed again left out, and attention as if nothing were masked.
"""

import re
from typing import Any

from chargpt_jax.config import ModelConfig

PEAK_TFLOPS = {
    "bfloat16": {"TPU v2": 22.5, "TPU v3": 61.5, "TPU v4": 275.0, "TPU v5": 459.0, "TPU v5 lite": 197.0}
    | {"TPU v6 lite": 918.0, "A100": 312.0, "H100": 989.0, "H200": 989.0, "L4": 121.0},
    "float16": {"T4": 65.0, "P100": 18.7, "V100": 125.0},
}
"""Dense 10**12 operations a second of one device (of TPU v2 and v3: of one core), by its makers' data sheets."""


def training_flops(model: ModelConfig, batch_size: int) -> float:
    """Count the operations of one update: 6 for each weight of a product and each token, and attention's."""
    width = model.n_head * model.n_head_dim
    layer = model.n_embd * 3 * width + width * model.n_embd + 2 * model.n_embd * model.n_ff
    weights = model.n_layer * layer + model.vocab_size * model.n_embd
    attention = 12 * model.n_layer * width * model.block_size
    return float(6 * weights + attention) * batch_size * model.block_size


def peak_flops(device: Any, dtype: str) -> float | None:
    """Return the operations a second that a JAX device could do in a dtype, or None where that is not known."""
    kind = str(device.device_kind)
    peaks = PEAK_TFLOPS.get(dtype, {})
    name = kind if kind in peaks else next((word for word in re.split("[ -]", kind) if word in peaks), None)
    return None if name is None else peaks[name] * 1e12
