"""The loader's benchmark: a rehearsal of everything, and its targets."""

from __future__ import annotations

import benchlib
import loader_bench
import loader_contenders
import loader_files
import pytest
import torch
from loader_contenders import FALLBACK, OURS, PLAIN, PLAIN_TENSORS, STABLE, Setting

from lejepa_fast.data import MultiCropRecipe


def test_rehearsal_measures_everything_and_says_what_cannot_run(tmp_path, monkeypatch, capsys):
    def unavailable():
        raise RuntimeError("no such thing\nmore")

    everything = loader_contenders.contenders
    monkeypatch.setattr(loader_contenders, "contenders", lambda s: {**everything(s), "broken": unavailable})
    loader_bench.main(["--rehearse", "--device", "cpu", "--workers", "1", "--out", str(tmp_path)])
    rows = benchlib.read_rows(tmp_path / "loader.jsonl")
    speeds = {row["contender"]: row["images_per_s"] for row in rows if row["kind"] == "speed"}
    assert {PLAIN, PLAIN_TENSORS, OURS, FALLBACK, "bytes only", "decode only, Pillow"} <= speeds.keys()
    assert all(speed > 0 for speed in speeds.values())
    assert {row["contender"] for row in rows if row["kind"] == "memory"} == {OURS, FALLBACK}
    assert all(row["rehearsal"] and row["commit"] and row["triton"] for row in rows)
    assert "broken: not available here: RuntimeError: no such thing" in capsys.readouterr().out


def test_passes_make_every_view_of_every_image(tmp_path):
    recipe = MultiCropRecipe(global_size=32, local_size=16, local_crops=1)
    loader_files.make_folder(tmp_path / "files", 4)
    setting = Setting(
        tmp_path / "files", recipe, batch_size=2, workers=1, device=torch.device("cpu"), copies=3
    )
    # One of 4 files is held out; 9 make 4 batches.
    assert loader_contenders.ours(setting, "torchvision")() == 8
    assert loader_contenders.plain(setting, tensors=False)() == 4
    if benchlib.installed_version(STABLE):
        assert loader_contenders.stable_pretraining(setting)() == 4


@pytest.mark.parametrize(
    ("ours", "memory", "peer", "met"), [(501.0, 1.04, 50.0, True), (499.0, 1.06, 50.1, False)]
)
def test_targets_are_judged(ours, memory, peer, met):
    rows = [
        {"kind": "speed", "contender": PLAIN, "images_per_s": 100.0},
        {"kind": "speed", "contender": PLAIN_TENSORS, "images_per_s": 100.0},
        {"kind": "speed", "contender": OURS, "images_per_s": ours},
        {"kind": "peers", "contender": STABLE, "images_per_s": peer},
        {"kind": "peers", "contender": OURS, "images_per_s": 500.0},
        {"kind": "memory", "contender": OURS, "growth": memory},
    ]
    assert [row["met"] for row in loader_bench.targets(rows, on_gpu=False)] == 4 * [met]
