"""AdamW without decay on biases, norms and other 1-D parameters; schedules of the rate and of the decay."""

import math
from functools import partial

import torch
from timm.optim import param_groups_weight_decay
from torch.optim.lr_scheduler import LambdaLR

from lejepa_fast.train.config import OptimConfig
from lejepa_fast.train.model.model import TrainedModule


def build_optimizer(model: TrainedModule, cfg: OptimConfig) -> torch.optim.AdamW:
    """Build a fused AdamW, which skips a bad step on the device (`found_inf`, see guard.py).

    Not decayed: 1-D parameters, biases, the predictor's mask token, and what the encoder names in timm's
    `no_weight_decay` (position embeddings and tokens of a transformer). `cfg.weight_decay` must be a number
    (config.resolve).
    """
    assert not isinstance(cfg.weight_decay, str)
    names = [f"encoder.{name}" for name in getattr(model.encoder, "no_weight_decay", set)()]
    names.append("predictor.mask_token")
    groups = param_groups_weight_decay(model, cfg.weight_decay, no_weight_decay_list=names)
    for group, decayed in zip(groups, (False, True), strict=True):
        group["decayed"] = decayed
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, cfg: OptimConfig, total_steps: int, done: int = 0
) -> LambdaLR:
    """Build the schedule after `done` steps; step it after every optimizer step. For a `done` above 0 the
    optimizer must have had a schedule before, which noted its peak rate there."""
    warmup = min(total_steps - 1, math.ceil(cfg.warmup_fraction * total_steps))
    start, final = cfg.start_lr_fraction, cfg.final_lr_fraction
    factor = partial(lr_factor, warmup=warmup, total=total_steps, start=start, final=final)
    return LambdaLR(optimizer, factor, last_epoch=done - 1)


def lr_factor(step: int, *, warmup: int, total: int, final: float, start: float = 0.0) -> float:
    """Share of the peak rate at `step` = 0, 1, ..., total - 1: linear from one `warmup`-th of the way between
    `start` and 1 to 1, then half a cosine that reaches `final` at the last step."""
    if step < warmup:
        return start + (1 - start) * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return half_cosine(1.0, final, progress)


def half_cosine(first: float, last: float, progress: float) -> float:
    """From `first` at progress 0 to `last` at 1."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


def set_weight_decay(
    optimizer: torch.optim.Optimizer, cfg: OptimConfig, step: int, total_steps: int
) -> float:
    """Set the decay of `step` = 0, 1, ... and return it: a function of the step, as a resume needs."""
    assert not isinstance(cfg.weight_decay, str)
    if cfg.final_weight_decay is None:
        return cfg.weight_decay
    progress = min(1.0, step / max(1, total_steps - 1))
    decay = half_cosine(cfg.weight_decay, cfg.final_weight_decay, progress)
    for group in optimizer.param_groups:
        if group["decayed"]:
            group["weight_decay"] = decay
    return decay
