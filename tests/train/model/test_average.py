"""The averaged weights: which they are, that checkpoints, evaluations and exports take them along, and the
center of the views from them: the plain formulation, what it leaves alone, resume.

Several ranks are in test_parallel.py, the memory is in test_plan.py.
"""

from itertools import pairwise

import pytest
import torch
from accuracy import authors_sigreg
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from training import CPU, course_of, rows_of, same, saved, spoil, train_only

from lejepa_fast import sample_directions
from lejepa_fast.train import config, export
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.model.center import without_noise
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.pretrain import pretrain

FROM_AVERAGE = {"center_from": "average"}
EMA = {"kind": "ema", "decay": 0.7}
NORMED = {"name": "test_resnet", "projector_norm": "batch"}  # with running statistics


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
    mine, expected = saved(cfg, 6, "average"), theirs.module.state_dict()
    weights = trainer.model.state_dict()
    counts = {name: weights[name] for name in expected if "num_batches" in name}  # no average is an integer
    assert counts
    assert same(mine, expected | counts)
    assert not same(mine, weights)


def test_a_tensor_of_two_names_is_averaged_once_a_step(tiny):
    """Also where the average is a model of its own, which has such a tensor once."""

    def twice():
        layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(layer.weight)
        return nn.Sequential(layer, layer)

    cfg = tiny(average={"kind": "ema", "decay": 0.5, "start": 0.0}).average
    for into in (None, twice()):
        model = twice()
        average = WeightAverage(model, cfg, 10, into)
        average.update(1, torch.tensor(0.0))
        nn.init.ones_(model[0].weight)
        for step in (2, 3):
            average.update(step, torch.tensor(0.0))
        found = average.tensors() if into is None else into.state_dict()
        assert [found[name].item() for name in ("0.weight", "1.weight")] == [0.75, 0.75]


def test_without_a_start_the_plain_mean_is_over_the_last_quarter(tiny):
    assert config.resolve(tiny(average=EMA)).average.start == 0.0
    cfg = tiny(max_steps=4, average={"kind": "swa"}, checkpoint_every=1)
    trainer = train_only(cfg)
    assert saved(cfg, 3, "average") == {}
    assert same(saved(cfg, 4, "average"), saved(cfg, 4, "model"))
    assert trainer.average.state() == {"kind": "swa", "count": 1}


@pytest.mark.parametrize("loss", [{}, FROM_AVERAGE], ids=["views", "center from average"])
def test_a_resumed_run_continues_it(loss, tiny, tmp_path):
    """Bit for bit, from another folder's checkpoint. The second model of the center adds no tensors to it."""
    straight = tiny(model=NORMED, average=EMA, loss=loss, max_steps=6, checkpoint_every=3)
    train_only(straight)
    middle = {"resume": f"{straight.out}/checkpoints/step-00000003", "model": NORMED, "max_steps": 6}
    again = tiny(out=tmp_path / "again", average=EMA, loss=loss, **middle)
    trainer = train_only(again)
    assert course_of(again) == course_of(straight)[3:]
    for section in ("model", "average", "optimizer"):
        tensors = saved(again, 6, section)
        assert same(tensors, saved(straight, 6, section))
        assert section == "optimizer" or tensors.keys() == trainer.model.state_dict().keys()
    assert not same(saved(again, 6, "average"), saved(straight, 3, "average"))
    assert trainer.average.state() == {"kind": "ema", "count": 6}


def test_another_kind_starts_anew_and_without_it_it_is_left_out(tiny, tmp_path):
    straight = tiny(model=NORMED, average=EMA, max_steps=6, checkpoint_every=3)
    train_only(straight)
    middle = {"resume": f"{straight.out}/checkpoints/step-00000003", "model": NORMED, "max_steps": 6}
    other = train_only(tiny(out=tmp_path / "other", average={"kind": "swa", "start": 0.0}, **middle))
    assert other.average.state() == {"kind": "swa", "count": 3}
    without = tiny(out=tmp_path / "without", **middle)
    train_only(without)
    assert saved(without, 6, "average") == {}
    assert same(saved(without, 6, "model"), saved(straight, 6, "model"))  # it never acts on the training


@pytest.mark.usefixtures("white_figures")
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
    assert same(judged[0], saved(cfg, 4, "average"))
    assert same(judged[1], saved(cfg, 6, "average"))
    assert not same(judged[1], saved(cfg, 6, "model"))
    exported = load_file(cfg.out / "encoder.safetensors")
    assert same(exported, saved(cfg, 6, "average.encoder"))
    for options, section in (([], "average.encoder"), (["--no-averaged"], "model.encoder")):
        out = tmp_path / "again.safetensors"
        assert export.main(["--checkpoint", str(cfg.out), "--out", str(out), *options]) == 0
        assert same(load_file(out), saved(cfg, 6, section))


def test_one_that_begins_with_a_bad_step_has_the_running_statistics_from_before(tiny, tmp_path):
    """Also where the run was resumed just before."""
    late = {"model": NORMED, "max_steps": 4, "checkpoint_every": 1, "average": {"kind": "swa", "start": 0.5}}
    straight = tiny(keep_checkpoints=4, **late)
    again = tiny(out=tmp_path / "again", resume=f"{straight.out}/checkpoints/step-00000002", **late)
    for cfg in (straight, again):
        trainer = Trainer(cfg, CPU)
        spoil(trainer, {3})
        trainer.run()
        assert trainer.guard.skipped == 1
    assert same(saved(straight, 3, "average"), saved(straight, 3, "model"))
    assert same(saved(again, 3, "average"), saved(straight, 3, "average"))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("center", "model", "average"),
    [("global", {}, EMA), ("all", NORMED, {"kind": "swa", "start": 0.0})],
)
def test_a_step_is_the_plain_formulation(center, model, average, tiny, double):
    """Loss and all gradients of step 3, in float64; the average of steps 1 and 2 by hand."""
    loss = {"center": center, "lambd": 0.25, **FROM_AVERAGE}  # a lambda that float32 holds exactly
    cfg = tiny(model=model, average=average, loss=loss, max_steps=3)
    trainer = Trainer(cfg, CPU)
    step, before, batches, grads = trainer.train_step, [], [], {}

    def followed(views, epoch):
        batches.append([view.double() for view in views])
        before.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        step(batches[-1], epoch)

    def noted(*_):
        grads.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})

    trainer.train_step = followed
    trainer.optimizer.register_step_pre_hook(noted)
    trainer.run()

    share = 0.7 if average["kind"] == "ema" else 0.5
    trained, second = build_model(cfg), build_model(cfg)
    trained.load_state_dict(before[2])
    for name, tensor in second.named_parameters():
        tensor.data = share * before[1][name] + (1 - share) * before[2][name]
    views = batches[2]
    z = trained(views)[1]
    mu = second(views[:2] if center == "global" else views)[1].mean(0).detach()
    assert not torch.allclose(mu, z[: 2 if center == "global" else 3].mean(0), rtol=1e-4)
    prediction = torch.stack([(mu - view).square().mean() for view in z]).mean()
    sigreg = authors_sigreg(z, sample_directions(16, 32, step=2, seed=cfg.seed, dtype=torch.float64))
    total = 0.75 * prediction + 0.25 * sigreg
    total.backward()
    for found, expected in zip(trainer.last["parts"], (total, prediction, sigreg), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0)  # the loss is float32
    for name, parameter in trained.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-9 * largest)


def test_until_the_average_begins_it_is_the_center_of_the_views(tiny):
    """Bit for bit; then, at first, with the same value and another gradient. Of the views is the default."""
    late = {"max_steps": 5, "average": EMA | {"start": 0.4}}  # the average begins after step 3
    courses = []
    for name, loss in (("views", {}), ("average", FROM_AVERAGE)):
        cfg = tiny(out=tiny().out / name, loss=loss, **late)
        train_only(cfg)
        courses.append(course_of(cfg))
    views, average = courses
    assert average[:3] == views[:3]
    losses = [[row[2] for row in course] for course in courses]
    assert losses[1][3] == pytest.approx(losses[0][3], rel=1e-5)
    assert average[3] != views[3]
    assert losses[1][4] != pytest.approx(losses[0][4], rel=1e-4)


@pytest.mark.parametrize("model", [NORMED, {"drop_path": 0.9, "kwargs": '{"proj_drop_rate": 0.5}'}])
def test_the_averaged_model_has_no_noise_and_changes_no_statistic(model, tiny):
    """Embeddings of the batch as of the model in training without noise."""
    quiet = build_model(tiny(model={**model, "drop_path": 0.0, "kwargs": "{}"}))
    second = without_noise(build_model(tiny(model=model)))
    views = [torch.randn(8, 3, 32, 32)] * 2
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    assert same(dict(quiet.named_parameters()), dict(second.named_parameters()))
    assert any(isinstance(module, _BatchNorm) for module in second.modules()) == (model is NORMED)
    found = [second(views)[1] for _ in range(3)]
    assert all(torch.equal(*pair) for pair in pairwise(found))
    torch.testing.assert_close(found[0], quiet(views)[1].detach())
    assert same(second.state_dict(), before)
    assert not found[0].requires_grad
