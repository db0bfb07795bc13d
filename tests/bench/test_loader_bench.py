"""The loader's benchmark: a rehearsal of everything."""

import benchlib
import loader_bench
import timing
import torch
from loader_bench import FALLBACK, OURS, PLAIN, PLAIN_TENSORS, STABLE, Setting

from lejepa_fast.data import MultiCropRecipe


def test_rehearsal_measures_everything_and_says_what_cannot_run(tmp_path, monkeypatch, capsys):
    def unavailable():
        raise RuntimeError("no such thing\nmore")

    # Two short epochs, in this process: `test_memory_is_measured_in_a_fresh_process` starts one.
    monkeypatch.setattr(timing, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(loader_bench, "MEMORY_EPOCHS", 2)
    monkeypatch.setattr(loader_bench, "MEMORY_COPIES", 1)
    makers = loader_bench.contenders
    monkeypatch.setattr(loader_bench, "contenders", lambda *args: {**makers(*args), "broken": unavailable})
    loader_bench.main(["--rehearse", "--device", "cpu", "--workers", "1", "--out", str(tmp_path)])
    rows = benchlib.read_rows(tmp_path / "loader.jsonl")
    speeds = {row["contender"]: row["images_per_s"] for row in rows if row["kind"] == "speed"}
    assert {PLAIN, PLAIN_TENSORS, OURS, FALLBACK, "bytes only", "decode only, Pillow"} <= speeds.keys()
    assert all(speed > 0 for speed in speeds.values())
    assert {row["contender"] for row in rows if row["kind"] == "memory"} == {OURS, FALLBACK}
    assert {row["met"] for row in rows if row["kind"] == "target"} == {None}, "a rehearsal measures nothing"
    assert all(row["rehearsal"] and row["commit"] and row["triton"] for row in rows)
    assert "broken: not available here: RuntimeError: no such thing" in capsys.readouterr().out


def test_passes_make_every_view_of_every_image(tmp_path):
    recipe = MultiCropRecipe(global_size=32, local_size=16, local_crops=1)
    loader_bench.make_folder(tmp_path, 4)
    setting = Setting(tmp_path, recipe, batch_size=2, workers=1, device=torch.device("cpu"), copies=3)
    # One of 4 files is held out; 9 make 4 batches.
    assert loader_bench.ours(setting, "torchvision")() == 8
    assert loader_bench.plain(setting, tensors=False)() == 4
    if benchlib.installed_version(STABLE):
        assert loader_bench.stable_pretraining(setting)() == 4
