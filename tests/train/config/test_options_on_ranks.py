"""Averaged weights, probes while training, parameters gathered once: on two ranks as on one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import options_worker as worker
import pytest
import torch
import torch.multiprocessing as mp
from parallel_worker import train
from training import CPU, install_wandb_stand_in, rows_of

from lejepa_fast.train import export
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.config import Config, ParallelConfig
from lejepa_fast.train.planning.memory import trace_step

NAMES = ("ddp", "fsdp", "one to fsdp", "fsdp to one")


@pytest.fixture(scope="module")
def runs(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """One process; then two ranks, in one pair of processes; then one that goes on with a run of two."""
    folder, images = tmp_path_factory.mktemp("options"), str(image_folder)
    install_wandb_stand_in(folder / "site")
    one = worker.options_config(images, folder / "one")
    train(one, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "site"))
        patch.setenv("WANDB_CALLS", str(folder / "calls.jsonl"))
        mp.spawn(worker.run, args=(2, str(folder), images), nprocs=2)
    resume = worker.middle_of(folder / "fsdp")
    train(worker.options_config(images, folder / "fsdp to one", resume=resume), CPU)
    return {name: replace(one, out=folder / name) for name in ("one", *NAMES)}


def averaged(cfg: Config, section: str = "average") -> dict[str, torch.Tensor]:
    assert cfg.out is not None
    return checkpoint.load_model(checkpoint.checkpoint_path(cfg.out / "checkpoints", worker.STEPS), section)


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_and_the_average_are_those_of_one_process(name: str, runs: dict[str, Config]) -> None:
    found = {row["step"]: row["loss"] for row in rows_of(runs[name])}
    expected = {row["step"]: row["loss"] for row in rows_of(runs["one"]) if row["step"] in found}
    assert len(expected) == (worker.STEPS - worker.MIDDLE if " to " in name else worker.STEPS)
    assert found == pytest.approx(expected, rel=1e-5)
    mine, theirs = averaged(runs[name]), averaged(runs["one"])
    assert mine.keys() == theirs.keys()
    weights = averaged(runs["one"], "model")
    moved = 0.0
    for key, value in theirs.items():
        # Against how far the average is from the weights: where no gradient is, AdamW steps on rounding.
        away = float((weights[key] - value).norm())
        assert float((mine[key] - value).norm()) <= 1e-5 * float(value.norm()) + 0.05 * away, key
        moved += away
    assert moved > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_both_probes_run_between_epochs(name: str, runs: dict[str, Config]) -> None:
    found = {row["step"]: (row["knn"], row["linear"]) for row in rows_of(runs[name], "eval")}
    expected = {row["step"]: (row["knn"], row["linear"]) for row in rows_of(runs["one"], "eval")}
    assert list(expected) == [4]
    assert found[4] == expected[4]
    assert None not in found[4]


def test_a_sharded_average_is_exported_whole(runs: dict[str, Config], tmp_path: Path) -> None:
    out = runs["fsdp"].out
    assert out is not None
    again = tmp_path / "again.safetensors"
    assert export.main(["--checkpoint", str(out), "--out", str(again)]) == 0
    assert again.read_bytes() == (out / "encoder.safetensors").read_bytes()


def test_one_rank_speaks_to_wandb(runs: dict[str, Config]) -> None:
    assert runs["one"].out is not None
    calls = [json.loads(line) for line in (runs["one"].out.parent / "calls.jsonl").read_text().splitlines()]
    assert [call["call"] for call in calls if call["call"] != "log"] == ["init", "define_metric", "finish"]
    losses = [call["step"] for call in calls if "train/loss" in call]
    assert losses == list(range(1, worker.STEPS + 1))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_kept_parameters_are_sent_once_a_step(recompute: str, tmp_path: Path) -> None:
    """Else four times, for two sizes of crops; what is summed of the gradients is the same."""
    gathered, scattered = {}, {}
    for keep in (False, True):
        parallel = ParallelConfig("fsdp", keep_gathered=keep, activation_checkpointing=recompute)
        cfg = worker.run_config("planned", tmp_path, parallel=parallel)
        cfg = replace(cfg, loss=replace(cfg.loss, impl="torch"))
        traffic = trace_step(cfg, shards=2, images=2).traffic
        gathered[keep], scattered[keep] = traffic.gathered, traffic.scattered
    assert gathered[True] == scattered[True] == scattered[False]
    assert 3 < gathered[False] / gathered[True] < 4  # all but patch embedding and projector are blocks
