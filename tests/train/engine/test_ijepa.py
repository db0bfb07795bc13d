"""I-JEPA and masked LeJEPA in the trainer: schedules, resume, ranks, evaluation and export of the target."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import ijepa_runs
import pytest
import timm
import torch
from ijepa_runs import run_config
from parallel_worker import count_graphs
from safetensors.torch import load_file
from training import CPU, course_of, rows_of, run_ranks, same, saved, train_only

from lejepa_fast.errors import UsageError
from lejepa_fast.train import export
from lejepa_fast.train.checkpoint.trained_model import load_trained
from lejepa_fast.train.engine.objectives import Masked
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.model.model import build_model
from lejepa_fast.train.parallel import parallelize
from lejepa_fast.train.pretrain import pretrain

OBJECTIVES = ["ijepa", "masked-lejepa"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(objective, image_folder, tmp_path):
    """From the middle of an epoch: masks, target encoder, predictor, moments, schedules, directions."""
    options = {"objective": objective, "max_steps": 8, "checkpoint_every": 3}
    straight = run_config(str(image_folder), tmp_path / "straight", **options)
    train_only(straight)
    again = run_config(str(image_folder), tmp_path / "again", **options)
    (again.out / "checkpoints").mkdir(parents=True)
    shutil.copytree(*(cfg.out / "checkpoints" / "step-00000003" for cfg in (straight, again)))
    train_only(again)
    assert course_of(again) == course_of(straight)[3:]
    for section in ("model", "optimizer"):
        assert same(saved(again, 8, section), saved(straight, 8, section))
    if objective == "ijepa":
        target, encoder = saved(again, 8, "model.target"), saved(again, 8, "model.encoder")
        assert not same(target, encoder)
        assert not same(target, saved(straight, 3, "model.target"))
    other = next(each for each in OBJECTIVES if each != objective)
    with pytest.raises(UsageError, match=f"objective {objective}.*another --out"):
        train_only(run_config(str(image_folder), again.out, other, max_steps=9))


def test_schedules_and_figures_are_logged(image_folder, tmp_path):
    optim = {"lr": 1e-3, "weight_decay": 0.04, "final_weight_decay": 0.4, "start_lr_fraction": 0.2}
    cfg = run_config(str(image_folder), tmp_path, max_steps=9, optim=optim | {"warmup_fraction": 0.4})
    trainer = train_only(cfg)
    rows = rows_of(cfg)
    assert [row["lr"] for row in rows][:4] == pytest.approx([0.4e-3, 0.6e-3, 0.8e-3, 1e-3])
    decays = [row["weight_decay"] for row in rows]
    assert (decays[0], decays[4], decays[8]) == pytest.approx((0.04, 0.22, 0.4))
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, decays[8]}
    assert [row["momentum"] for row in rows] == pytest.approx([0.9 + 0.1 * step / 9 for step in range(9)])
    for row in rows:
        assert 0.1 < row["target_std"] <= 1.01  # of layer-normalized features
        assert 0.05 < row["within_std"] <= row["target_std"]
        assert 1 < row["between_rank"] <= 7
        assert 1 < row["within_rank"] <= 64
        assert 0 < row["padding"] < 0.5
        assert row["loss"] == row["prediction"]


def test_figures_are_those_of_planted_targets(tmp_path):
    """Images differ in 3 directions; columns of the grid, alike in all images, in 7 (8 around their mean)."""
    cfg = run_config("", tmp_path)
    objective = Masked(cfg, build_model(cfg), None, CPU, 9)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(64, 64, 16)  # (B, P, K)
    tokens[..., :3] = torch.randn(64, 1, 3, generator=generator)
    without = tokens + 1e-5 * torch.randn(tokens.shape, generator=generator)
    tokens[..., 8:] = torch.eye(8)[torch.arange(64) % 8]
    found, alike = objective.figures(tokens), objective.figures(without)
    assert found["between_rank"] == pytest.approx(3, abs=0.3)
    assert found["within_rank"] == pytest.approx(7, abs=0.1)
    assert found["within_std"] == pytest.approx(0.5 * (7 / 64) ** 0.5, rel=1e-3)
    assert alike["within_std"] < 2e-5
    assert alike["target_std"] == pytest.approx(3 / 16, abs=0.03)


def test_a_log_row_of_a_skipped_step_has_no_ranks(tiny):
    """Bad values have no singular values: the guard skips the step, and its figures are NaN."""
    objective = Masked(tiny(), SimpleNamespace(target=None), None, CPU, 1)
    figures = objective.figures(torch.randn(4, 9, 8).index_fill(0, torch.tensor(2), torch.nan))
    assert math.isnan(figures["between_rank"])
    assert math.isnan(figures["within_rank"])


@pytest.mark.usefixtures("white_figures")
def test_the_target_encoder_is_evaluated_and_exported(image_folder, tmp_path, monkeypatch):
    """The context encoder only where it is asked for; encoder.json says which one it is."""
    cfg = run_config(str(image_folder), tmp_path / "run", max_steps=4)
    judged = []
    evaluate = Trainer.evaluate

    def noted(self, model, **options):
        judged.append({name: tensor.clone() for name, tensor in model.encoder.state_dict().items()})
        return evaluate(self, model, **options)

    monkeypatch.setattr(Trainer, "evaluate", noted)
    pretrain(cfg, CPU)
    target, context = (saved(cfg, 4, f"model.{part}") for part in ("target", "encoder"))
    assert not same(target, context)
    assert same(judged[0], target)
    assert same(load_trained(cfg.out).model.encoder.state_dict(), target)
    assert same(load_file(cfg.out / "encoder.safetensors"), target)
    assert json.loads((cfg.out / "encoder.json").read_text())["encoder"] == "target"
    for which, expected in (("target", target), ("context", context)):
        out = tmp_path / which / "encoder.safetensors"
        assert export.main(["--checkpoint", str(cfg.out), "--out", str(out), "--encoder", which]) == 0
        assert json.loads(out.with_suffix(".json").read_text())["encoder"] == which
        loaded = timm.create_model(f"local-dir:{out.parent}", pretrained=True)
        assert same(loaded.state_dict(), expected)
    image = torch.randn(2, 3, 32, 32)
    features = load_trained(cfg.out).model.eval().encoder(image)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'target'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(image), features)
    torch.testing.assert_close(loaded.forward_features(image).mean(1), features)  # average-pooled patches


def test_without_target_encoder_and_sigreg_it_collapses_and_the_verdict_says_so(image_folder, tmp_path):
    """Masked LeJEPA with lambda 0, and with SIGReg on the same steps. The pictures differ in about one
    direction, their tint, so that the rank alone would tell nothing."""
    results = {}
    for lambd in (0.0, 0.2):
        loss = {"num_slices": 64, "lambd": lambd}
        cfg = run_config(
            str(image_folder), tmp_path / str(lambd), "masked-lejepa", loss=loss, max_steps=60, log_every=60
        )
        with Trainer(cfg, CPU) as trainer:
            trainer.train()
            results[lambd] = trainer.evaluate(trainer.whole_model(), during_training=True)
        row = rows_of(cfg)[-1]
        assert (row["target_std"] < 0.05) == (lambd == 0.0)
    assert results[0.0].verdict.state == "collapsed"
    assert results[0.0].embedding_std < 0.02
    assert results[0.2].embedding_std > 0.1


@pytest.fixture(scope="module")
def ranks(image_folder, tmp_path_factory):
    """Runs of one process, averages of its encoder beside the run, and the results of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = {o: run_config(str(image_folder), folder / o, o) for o in OBJECTIVES}
    averages = {o: average_beside(cfg) for o, cfg in runs.items()}
    run_ranks(ijepa_runs.run, 2, str(folder), str(image_folder), ranks=2)
    return runs, averages, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def average_beside(cfg):
    """Train one process; returns what the target encoder must then be, averaged step by step beside it."""
    trainer = Trainer(cfg, CPU)
    step, averaged = trainer.train_step, ijepa_runs.whole(trainer, "encoder")

    def followed(views, epoch):
        momentum = cfg.masked.momentum + (1 - cfg.masked.momentum) * trainer.step / trainer.total_steps
        step(views, epoch)
        for name, tensor in trainer.model.encoder.named_parameters():
            averaged[name].mul_(momentum).add_(tensor.detach(), alpha=1 - momentum)

    trainer.train_step = followed
    trainer.run()
    return averaged


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "strategy"), ijepa_runs.CASES)
def test_two_ranks_equal_one_process(objective, strategy, ranks):
    """Losses of 20 steps; of I-JEPA the target encoder, which is an average of one process."""
    runs, averages, results = ranks
    name, cfg = f"{objective} {strategy}", runs[objective]
    course = course_of(replace(cfg, out=cfg.out.with_name(name)))
    for found, expected in zip(course, course_of(cfg), strict=True):
        assert found[2] == pytest.approx(expected[2], rel=1e-5), found[0]  # the loss
    for held in (rank[name] for rank in results):
        assert (held["sharded"] > 0) == (strategy == "fsdp")
        expected = averages[objective] if objective == "ijepa" else {}
        assert held["target"].keys() == expected.keys()
        for key, tensor in held["target"].items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)
            assert float((tensor - held["encoder"][key]).abs().max()) > 1e-4  # it is behind


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit(ranks):
    """From half of its steps: losses, encoder and target encoder."""
    runs, _, results = ranks
    out = runs["ijepa"].out
    straight, again = (
        course_of(replace(runs["ijepa"], out=out.with_name(n))) for n in ("ijepa fsdp", "resumed")
    )
    assert len(again) == ijepa_runs.STEPS // 2
    assert again == straight[-len(again) :]
    for rank in results:
        assert rank["resumed"]["sharded"] > 0
        for part in ("target", "encoder"):
            assert same(rank["resumed"][part], rank["ijepa fsdp"][part])


@pytest.mark.slow
def test_ragged_batches_compile_once(image_folder, tmp_path, monkeypatch):
    """The number of patches differs at each step, and no step after the second compiles anything."""
    monkeypatch.setattr(parallelize, "COMPILE_BACKEND", "aot_eager")
    runs = [run_config(str(image_folder), tmp_path / c, compile=c, max_steps=4) for c in ("off", "on")]
    graphs = []
    for cfg in runs:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = Trainer(cfg, CPU)
        graphs += count_graphs(trainer)
    assert graphs[:4] == [0] * 4
    assert graphs[4] > 0
    assert graphs[5:] == [graphs[5]] * 3
    for eager, compiled in zip(*map(course_of, runs), strict=True):
        assert compiled[2] == pytest.approx(eager[2], rel=1e-4)
