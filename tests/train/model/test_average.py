"""The averaged weights: which they are, and that checkpoints, evaluations and exports take them along."""

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from training import CPU, rows_of, train_only

from lejepa_fast.train import config, export
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.pretrain import pretrain

EMA = {"kind": "ema", "decay": 0.7}
NORMED = {"name": "test_resnet", "projector_norm": "batch"}  # with running statistics


def saved(cfg, step, section="average"):
    return checkpoint.load_model(checkpoint.checkpoint_path(cfg.out / "checkpoints", step), section)


def same(one, other):
    assert one.keys() == other.keys()
    assert len(one) > 20
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("kind", "first"), [("ema", 1), ("swa", 4)])
def test_it_is_the_one_of_pytorch(kind, first, tiny):
    """`AveragedModel` beside the training, from the same step on: bit for bit."""
    cfg = tiny(model=NORMED, max_steps=6, average={"kind": kind, "decay": 0.7, "start": (first - 1) / 6})
    trainer = Trainer(cfg, CPU)
    function = get_ema_multi_avg_fn(0.7) if kind == "ema" else get_swa_multi_avg_fn()

    def floats(averaged, current, count):
        if averaged[0].is_floating_point():  # PyTorch's plain mean refuses counts
            function(averaged, current, count)

    theirs = AveragedModel(trainer.model, multi_avg_fn=floats, use_buffers=True)
    step = trainer.train_step

    def followed(views, epoch):
        step(views, epoch)
        if trainer.step >= first:
            theirs.update_parameters(trainer.model)

    trainer.train_step = followed
    trainer.run()
    mine, expected = saved(cfg, 6), theirs.module.state_dict()
    weights = trainer.model.state_dict()
    counts = {name: weights[name] for name in expected if "num_batches" in name}  # no average is an integer
    assert counts
    assert same(mine, expected | counts)
    assert not same(mine, weights)


def test_without_a_start_the_plain_mean_is_over_the_last_quarter(tiny):
    assert config.resolve(tiny(average=EMA)).average.start == 0.0
    cfg = tiny(max_steps=4, average={"kind": "swa"}, checkpoint_every=1)
    trainer = train_only(cfg)
    assert saved(cfg, 3) == {}
    assert same(saved(cfg, 4), saved(cfg, 4, "model"))
    assert trainer.average.state() == {"kind": "swa", "count": 1}


def test_a_resumed_run_continues_it(tiny, tmp_path):
    """Bit for bit, from another folder's checkpoint; another kind starts anew; without it, it is left out."""
    straight = tiny(model=NORMED, average=EMA, max_steps=6, checkpoint_every=3)
    train_only(straight)
    middle = {"resume": f"{straight.out}/checkpoints/step-00000003", "model": NORMED, "max_steps": 6}
    again = tiny(out=tmp_path / "again", average=EMA, **middle)
    trainer = train_only(again)
    assert same(saved(again, 6), saved(straight, 6))
    assert not same(saved(again, 6), saved(straight, 3))
    assert trainer.average.state() == {"kind": "ema", "count": 6}
    other = train_only(tiny(out=tmp_path / "other", average={"kind": "swa", "start": 0.0}, **middle))
    assert other.average.state() == {"kind": "swa", "count": 3}
    without = tiny(out=tmp_path / "without", **middle)
    train_only(without)
    assert saved(without, 6) == {}
    assert same(saved(without, 6, "model"), saved(straight, 6, "model"))  # it never acts on the training


def test_it_is_evaluated_and_exported(tiny, tmp_path, monkeypatch):
    cfg = tiny(average=EMA, max_steps=6, eval={"every": 1, "linear_steps": 0})
    judged: list[dict[str, torch.Tensor]] = []
    evaluate = Trainer.evaluate

    def noted(self, model, *args, **options):
        judged.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return evaluate(self, model, *args, **options)

    monkeypatch.setattr(Trainer, "evaluate", noted)
    pretrain(cfg, CPU)
    assert [(row["step"], row["linear"] is None) for row in rows_of(cfg, "eval")] == [(4, True), (6, False)]
    assert same(judged[0], saved(cfg, 4))
    assert same(judged[1], saved(cfg, 6))
    assert not same(judged[1], saved(cfg, 6, "model"))
    exported = load_file(cfg.out / "encoder.safetensors")
    assert same(exported, saved(cfg, 6, "average.encoder"))
    for options, section in (([], "average.encoder"), (["--no-averaged"], "model.encoder")):
        out = tmp_path / "again.safetensors"
        assert export.main(["--checkpoint", str(cfg.out), "--out", str(out), *options]) == 0
        assert same(load_file(out), saved(cfg, 6, section))


def train_with_a_bad_step(cfg, bad, *, lag=False):
    """With a lag the host puts running statistics back a step late, as on a GPU."""
    trainer = Trainer(cfg, CPU)
    trainer.guard.lag = lag
    step = trainer.train_step

    def poisoned(views, epoch):
        if trainer.step + 1 == bad:
            views[0][0] = torch.nan
        step(views, epoch)

    trainer.train_step = poisoned
    trainer.run()
    assert trainer.guard.skipped == 1


def test_one_that_begins_with_a_bad_step_has_the_running_statistics_from_before(tiny, tmp_path):
    """Also where the run was resumed just before."""
    late = {"model": NORMED, "max_steps": 4, "checkpoint_every": 1, "average": {"kind": "swa", "start": 0.5}}
    straight = tiny(keep_checkpoints=4, **late)
    train_with_a_bad_step(straight, 3)
    assert same(saved(straight, 3), saved(straight, 3, "model"))
    again = tiny(out=tmp_path / "again", resume=f"{straight.out}/checkpoints/step-00000002", **late)
    train_with_a_bad_step(again, 3)
    assert same(saved(again, 3), saved(straight, 3))


def test_a_bad_step_does_not_enter(tiny):
    cfg = tiny(model=NORMED, average=EMA, max_steps=4)
    train_with_a_bad_step(cfg, 2, lag=True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved(cfg, 4).values())
