"""Every setting of a run. Nothing in this folder imports JAX."""

from chargpt_jax.config.rules import validate
from chargpt_jax.config.sections import (
    AmpConfig,
    AncestorConfig,
    Config,
    DataConfig,
    LRFinderConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    SchedulerConfig,
    TrainConfig,
)

__all__ = [
    "AmpConfig",
    "AncestorConfig",
    "Config",
    "DataConfig",
    "LRFinderConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SampleConfig",
    "SchedulerConfig",
    "TrainConfig",
    "validate",
]
