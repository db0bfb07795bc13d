"""Learning rate, weight decay and clipping."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from training import CPU, Make, rows_of

from lejepa_fast.train.engine import optimization
from lejepa_fast.train.engine.trainer import Trainer


def test_learning_rate_rises_linearly_and_ends_at_a_thousandth() -> None:
    factors = [optimization.lr_factor(s, warmup=4, total=20, final=1e-3) for s in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(a > b for a, b in pairwise(factors[4:]))
    assert factors[-1] == pytest.approx(1e-3)
    middle = optimization.lr_factor(10, warmup=0, total=21, final=0.0)
    assert middle == pytest.approx(0.5)


def test_decay_spares_biases_norms_and_position_embeddings(tiny: Make) -> None:
    trainer = Trainer(tiny(optim={"weight_decay": 0.3}), CPU)
    decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    spared = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert decayed | spared == set(names)
    assert not decayed & spared
    assert {"encoder.pos_embed", "encoder.cls_token"} <= {names[i] for i in spared}
    for name, parameter in trainer.model.named_parameters():
        if parameter.ndim > 1 and name not in ("encoder.pos_embed", "encoder.cls_token"):
            assert id(parameter) in decayed, name
        else:
            assert id(parameter) in spared, name


def test_clipping_bounds_the_step_and_logs_the_norm_before(tiny: Make, tmp_path: Path) -> None:
    free, clipped = (
        tiny(out=tmp_path / str(limit), optim={"clip_grad_norm": limit}, max_steps=2) for limit in (0.0, 1e-3)
    )
    norms = []

    def note_norm(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(sum(grad.square().sum() for grad in grads)) ** 0.5)

    for cfg in (free, clipped):
        trainer = Trainer(cfg, CPU)
        trainer.optimizer.register_step_pre_hook(note_norm)
        trainer.run()
    norms = [norms[0], norms[2]]  # of two steps each, the first
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)
    assert rows_of(clipped)[0]["grad_norm"] == rows_of(free)[0]["grad_norm"]
