"""AdamW without decay on biases, norms and other 1-D parameters; linear warm-up, then cosine."""

import math
from functools import partial

import torch
from timm.optim import param_groups_weight_decay
from torch.optim.lr_scheduler import LambdaLR

from lejepa_fast.train.config import OptimConfig
from lejepa_fast.train.model.model import LeJEPAModel


def build_optimizer(model: LeJEPAModel, cfg: OptimConfig) -> torch.optim.AdamW:
    """Build a fused AdamW, which skips a bad step on the device (`found_inf`, see guard.py).

    Not decayed: 1-D parameters, biases, and what the encoder names in timm's `no_weight_decay` (position
    embeddings and tokens of a transformer). `cfg.weight_decay` must be a number (config.resolve).
    """
    assert not isinstance(cfg.weight_decay, str)
    names = [f"encoder.{name}" for name in getattr(model.encoder, "no_weight_decay", set)()]
    groups = param_groups_weight_decay(model, cfg.weight_decay, no_weight_decay_list=names)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


def build_scheduler(optimizer: torch.optim.Optimizer, cfg: OptimConfig, total_steps: int) -> LambdaLR:
    """Build the schedule; step it after every optimizer step. Its state is one counter, so that a resumed run
    can be extended."""
    warmup = min(total_steps - 1, math.ceil(cfg.warmup_fraction * total_steps))
    factor = partial(lr_factor, warmup=warmup, total=total_steps, final=cfg.final_lr_fraction)
    return LambdaLR(optimizer, factor)


def lr_factor(step: int, *, warmup: int, total: int, final: float) -> float:
    """Share of the peak rate at `step` = 0, 1, ..., total - 1: linear from 1/warmup to 1, then half a cosine
    that reaches `final` at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
