"""Configuration of a run: settings, presets, command line."""
# ruff: noqa: F401 - this package re-exports what the rest of the trainer uses

from lejepa_fast.train.config.cli import parse
from lejepa_fast.train.config.settings import (
    EMBEDDED_DATA,
    AverageConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    MaskedConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    flat,
    from_dict,
    load_json,
    loader_workers,
    resolve,
    shots,
    small_batch_warning,
    to_dict,
    total_steps,
    validate,
    write,
)
