"""The center from averaged weights: the plain formulation, what it leaves alone, resume.

Several ranks are in test_parallel.py, the memory is in test_plan.py.
"""

from itertools import pairwise

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from training import CPU, course_of, train_only

from lejepa_fast import sample_directions
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model.center import without_noise
from lejepa_fast.train.model.model import build_model

NORMED = {"name": "test_resnet", "projector_norm": "batch"}  # with running statistics
FROM_AVERAGE = {"center_from": "average"}
EMA = {"kind": "ema", "decay": 0.7}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def plain_sigreg(z, A):
    """From the formula of the paper, with the authors' knots: z (V, N, K), A (K, M)."""
    t = torch.linspace(0, 3, 17)
    weights = torch.full((17,), 2 * 3 / 16)
    weights[[0, -1]] /= 2
    phi = torch.exp(-t.square() / 2)
    phase = (z @ A).unsqueeze(-1) * t
    error = (phase.cos().mean(1) - phi).square() + phase.sin().mean(1).square()
    return (z.shape[1] * (error @ (weights * phi))).mean()


@pytest.mark.parametrize(
    ("center", "model", "average"),
    [("global", {}, EMA), ("all", NORMED, {"kind": "swa", "start": 0.0})],
)
def test_a_step_is_the_plain_formulation(center, model, average, tiny, double):
    """Loss and all gradients of step 3, in float64; the average of steps 1 and 2 by hand."""
    loss = {
        "center": center,
        "lambd": 0.25,
        **FROM_AVERAGE,
    }  # the library's weights of both parts are float32
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
    sigreg = plain_sigreg(z, sample_directions(16, 32, step=2, seed=cfg.seed, dtype=torch.float64))
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


def saved(cfg, step):
    path = checkpoint.checkpoint_path(cfg.out / "checkpoints", step)
    return {section: checkpoint.load_model(path, section) for section in ("model", "average", "optimizer")}


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tiny, tmp_path):
    """The checkpoint has the tensors of any run with an average, and the second model none of its own."""
    options = {"model": NORMED, "max_steps": 4, "average": EMA, "loss": FROM_AVERAGE, "checkpoint_every": 2}
    straight = tiny(**options)
    train_only(straight)
    start = str(straight.out / "checkpoints" / "step-00000002")
    again = tiny(resume=start, out=tmp_path / "again", **options)
    trainer = train_only(again)
    assert course_of(again) == course_of(straight)[2:]
    expected = saved(straight, 4)
    for section, tensors in saved(again, 4).items():
        assert same(tensors, expected[section])
        assert section == "optimizer" or tensors.keys() == trainer.model.state_dict().keys()


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
