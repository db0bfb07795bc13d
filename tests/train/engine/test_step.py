"""The step: learning rate, weight decay, clipping, and no wait for the device."""

import contextlib
import traceback
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training import CPU, rows_of

from lejepa_fast.errors import RunError
from lejepa_fast.train.engine import optimization
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.world import setup_world


def test_learning_rate_rises_linearly_and_ends_at_a_thousandth():
    factors = [optimization.lr_factor(s, warmup=4, total=20, final=1e-3) for s in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(a > b for a, b in pairwise(factors[4:]))
    assert factors[-1] == pytest.approx(1e-3)
    middle = optimization.lr_factor(10, warmup=0, total=21, final=0.0)
    assert middle == pytest.approx(0.5)


def test_decay_spares_biases_norms_and_position_embeddings(tiny):
    trainer = Trainer(tiny(optim={"weight_decay": 0.3}), CPU)
    decay = {p: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    tokens = ("encoder.pos_embed", "encoder.cls_token")
    parameters = dict(trainer.model.named_parameters())
    assert set(tokens) <= set(parameters)
    assert {name: decay[parameter] for name, parameter in parameters.items()} == {
        name: 0.3 if parameter.ndim > 1 and name not in tokens else 0.0
        for name, parameter in parameters.items()
    }


def test_clipping_and_skipping_by_the_norm_before_it_which_is_logged(tiny):
    norms = []

    def note_norm(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(sum(grad.square().sum() for grad in grads)) ** 0.5)

    cfg = tiny(max_steps=2)
    for limit, skipped in ((1e3, 0), (1e-2, 2)):
        optim = replace(cfg.optim, clip_grad_norm=1e-3, skip_grad_norm=limit)
        trainer = Trainer(replace(cfg, out=cfg.out.with_name(str(limit)), optim=optim), CPU)
        trainer.optimizer.register_step_pre_hook(note_norm)
        trainer.run()
        assert trainer.guard.skipped == skipped
        assert rows_of(trainer.cfg)[0]["grad_norm"] > 1e-2
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)
    worse = replace(cfg, out=cfg.out.with_name("worse"), max_steps=3, optim=optim)
    with pytest.raises(RunError, match=r"--optim.skip-grad-norm 0.01 in 3 steps in a row .*step 3"):
        Trainer(worse, CPU).run()


class Reads(TorchDispatchMode):
    """The functions on the stack at each read of a tensor's value on the host."""

    def __init__(self):
        super().__init__()
        self.stacks: list[set[str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.stacks.append({frame.name for frame in traceback.extract_stack()})
        return func(*args, **(kwargs or {}))


LEJEPA = {"loss": {"center_from": "average"}}
IJEPA = {
    "objective": "ijepa",
    "crops": {"global_crops": 1, "local_crops": 0},
    "model": {"kwargs": '{"patch_size": 8}'},
    "masked": {"min_keep": 1, "predictor_depth": 1, "target_area": (0.1, 0.3)},
}


@pytest.mark.parametrize(("planted", "options"), [(False, LEJEPA), (True, LEJEPA), (False, IJEPA)])
def test_a_step_reads_no_value_on_the_host(planted, options, tiny, monkeypatch):
    """But for the guard's flags, which are on the host already, and SIGReg's knots on a CPU (`_fits`)."""
    cfg = tiny(log_every=10, average={"kind": "ema"}, **options)
    with Trainer(cfg, CPU) as trainer:
        views = next(iter(trainer.loader))[0]
        trainer.train_step(views, epoch=0)
        if planted:
            monkeypatch.setattr(trainer.guard, "before_forward", lambda step: torch.ones(()).item())
        with Reads() as reads:
            trainer.train_step(views, epoch=0)
        assert len([stack for stack in reads.stacks if "_fits" not in stack]) == planted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch reports waits for a GPU only on one")
@pytest.mark.parametrize("planted", [False, True])
def test_a_step_never_waits_for_the_gpu(planted, tiny, monkeypatch):
    options = {"average": {"kind": "ema"}, "loss": {"center_from": "average"}}
    cfg = tiny(log_every=10, device="cuda", optim={"clip_grad_norm": 1.0}, **options)
    with Trainer(cfg, setup_world("cuda")) as trainer:
        views = next(iter(trainer.loader))[0]
        for _ in range(2):
            trainer.train_step(views, epoch=0)
        if planted:
            monkeypatch.setattr(
                trainer.guard, "before_forward", lambda step: torch.ones((), device="cuda").item()
            )
        waits = pytest.raises(RuntimeError, match="synchronizing")
        torch.cuda.set_sync_debug_mode("error")
        try:
            with waits if planted else contextlib.nullcontext():
                trainer.train_step(views, epoch=0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
