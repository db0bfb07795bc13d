"""Backbones of others, with their weights, evaluated by the protocol of our encoders."""

from typing import NamedTuple

from lejepa_fast.train.evaluation.protocol import EvalResult


class BackboneResult(NamedTuple):
    """Figures of a backbone, and where it comes from."""

    result: EvalResult
    """Its `z_val` are the features: a backbone has no projector."""
    weights: str
    """A file, or "hub"."""
    parameters: int
