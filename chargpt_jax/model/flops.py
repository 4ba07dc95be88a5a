"""Floating-point operations (FLOPs) of a training step, and the peak FLOP/s of a device.

FLOPs are counted as in Chowdhery et al. 2022, "PaLM" (appendix B): matrix multiplications only, two FLOPs per
multiply-add, the backward pass counts twice, recomputation does not count, and attention counts as if it had no mask.
"""

import re
from typing import Any

from chargpt_jax.config import ModelConfig

PEAK_TFLOPS = {
    "bfloat16": {"TPU v2": 22.5, "TPU v3": 61.5, "TPU v4": 275.0, "TPU v5": 459.0, "TPU v5 lite": 197.0}
    | {"TPU v6 lite": 918.0, "A100": 312.0, "H100": 989.0, "H200": 989.0, "L4": 121.0},
    "float16": {"T4": 65.0, "P100": 18.7, "V100": 125.0, "A100": 312.0, "H100": 989.0, "H200": 989.0, "L4": 121.0},
}
"""Dense peak of one device (of TPU v2 and v3: one core), 10**12 FLOP/s, from the manufacturers' data sheets."""


def training_flops(model: ModelConfig, batch_size: int) -> float:
    """Return the FLOPs of one training step: 6 per weight of a matrix and token, plus those of attention."""
    width = model.n_head * model.n_head_dim
    mlp = 3 if model.kind == "ngpt" else 2  # matrices
    layer = model.n_embd * 3 * width + width * model.n_embd + mlp * model.n_embd * model.n_ff
    weights = model.n_layer * layer + model.vocab_size * model.n_embd
    attention = 12 * model.n_layer * width * model.block_size
    return float(6 * weights + attention) * batch_size * model.block_size


def peak_flops(device: Any, dtype: str) -> float | None:
    """Return the peak FLOP/s of a JAX device in a dtype; None if it is not known."""
    kind = str(device.device_kind)
    peaks = PEAK_TFLOPS.get(dtype, {})
    name = kind if kind in peaks else next((word for word in re.split("[ -]", kind) if word in peaks), None)
    return None if name is None else peaks[name] * 1e12
