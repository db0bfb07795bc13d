"""In-domain against transfer: drawn images, a row for each set and seed, the same labels, the table."""

from functools import partial

import domain_bench
import efficientnet_lite0
import pytest
import timm
import torch
from benchlib import RESULTS, read_rows
from PIL import Image

from lejepa_fast.data import open_source
from lejepa_fast.errors import UsageError
from lejepa_fast.train.evaluation import few_shot, fine_tuning


@pytest.fixture
def small(monkeypatch):
    """Short fine-tuning, small images, and weights without their package."""
    torch.manual_seed(0)
    weights = timm.create_model(efficientnet_lite0.MODEL).state_dict()
    monkeypatch.setattr(efficientnet_lite0, "converted_weights", lambda: weights)
    monkeypatch.setattr(fine_tuning, "SMALLEST_NUMBER_OF_STEPS", 1)
    monkeypatch.setattr(domain_bench, "STORED_SIZE", 32)
    monkeypatch.setattr(domain_bench, "FINE_TUNE", 1)


def test_each_set_and_seed_is_a_row_once_and_all_encoders_get_the_same_labels(
    small, image_folder, tmp_path, capsys, monkeypatch
):
    command = ["--rehearse", "--sets", f"tints={image_folder}", "--work", str(tmp_path / "work")]
    command += ["--out", str(tmp_path), "--seeds"]
    drawn, draw_labels = [], few_shot.draw_labels

    def draw(*arguments):
        drawn.append(draw_labels(*arguments))
        return drawn[-1]

    monkeypatch.setattr(few_shot, "draw_labels", draw)
    assert domain_bench.main([*command, "3"]) == 0
    (row,) = read_rows(tmp_path / "domain.jsonl")
    assert (row["set"], row["settings"]["seed"], row["rehearsal"], row["n_train"]) == ("tints", 3, True, 32)
    assert {"device", "torch", "timm", "commit"} <= row.keys()
    assert "from scratch" in capsys.readouterr().out
    tables = row["few_shot"]
    assert list(tables) == ["lejepa", "untrained", "transfer"]
    for name, table in tables.items():
        assert table.keys() == {"1", "all"}
        for scores in table.values():
            assert scores.keys() == {*few_shot.PROBES, *["fine_tuned"] * (name == "untrained")}
    assert len({str(table) for table in tables.values()}) == 3
    assert len(drawn) == 3
    assert all(torch.equal(each, drawn[0]) for each in drawn)

    trained = []

    def measure(cfg, transferred):
        trained.append((cfg.seed, transferred.name, transferred.image_size))
        return {"few_shot": tables, "seconds": 0}

    monkeypatch.setattr(domain_bench, "measure", measure)
    for _ in range(2):
        assert domain_bench.main([*command, "3", "4"]) == 0
    assert trained == [(4, efficientnet_lite0.MODEL, 32)]
    rows = read_rows(tmp_path / "domain.jsonl")
    assert len(rows) == 2

    # Rows from before a setting existed count as rows of its default.
    for each in rows:
        del each["settings"]["eval.linear_blocks"]
    monkeypatch.setattr(domain_bench, "read_rows", lambda path: rows)
    assert domain_bench.main([*command, "4"]) == 0
    assert len(trained) == 1


def test_drawn_images_are_a_fixed_part_reduced_to_the_stored_size(small, image_folder, tmp_path):
    for name in ("first", "second"):
        domain_bench.write_images(str(image_folder), tmp_path / name, {"train": 20, "val": 12})
    files = [
        sorted(path.relative_to(tmp_path / n) for path in (tmp_path / n).rglob("*.jpg"))
        for n in ("first", "second")
    ]
    assert files[0] == files[1]
    train, val = (open_source(str(tmp_path / "first"), split) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (20, 12, ["blue", "red"])
    original = open_source(str(image_folder), "train")
    for file in (tmp_path / "first" / "train").rglob("*.jpg"):
        image, label = original[int(file.stem)]
        assert original.classes[label] == file.parent.name
        with Image.open(file) as stored:
            assert stored.size == (32, 32)
            colors = [each.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for each in (stored, image)]
        assert colors[0] == pytest.approx(colors[1], abs=4)


def test_the_table_has_mean_and_deviation_over_seeds():
    def row(name, value):
        figures = {
            encoder: {"1": {"linear": value + i}}
            for i, encoder in enumerate(("lejepa", "untrained", "transfer"))
        }
        figures["untrained"]["1"]["fine_tuned"] = 2 * value
        return {"set": name, "few_shot": figures}

    header, *lines = domain_bench.summarize([row("a", 10.0), row("b", 50.0), row("a", 14.0)])
    assert header[1:] == ["LeJEPA, frozen", "from scratch", "ImageNet, frozen", "untrained, frozen"]
    assert lines == [
        ["a (2 seeds), 1", "12.0 ± 2.8", "24.0 ± 5.7", "14.0 ± 2.8", "13.0 ± 2.8"],
        ["b (1 seed), 1", "50.0", "100.0", "52.0", "51.0"],
    ]


def test_wrong_use_is_one_line(image_folder, tmp_path, capsys, monkeypatch, small):
    command = ["--work", str(tmp_path), "--out", str(tmp_path)]
    assert domain_bench.main([*command, "--sets", "photos"]) == 2
    assert "error: sets: expected NAME=PATH, got photos" in capsys.readouterr().err
    write = partial(domain_bench.write_images, folder=tmp_path / "photos", limits={"train": 4, "val": 4})
    write(str(image_folder))
    with pytest.raises(UsageError, match="sets: expected another name, got one that stands for"):
        write("trashnet96")

    def missing():
        raise ImportError

    monkeypatch.setattr(efficientnet_lite0, "converted_weights", missing)
    assert domain_bench.main(["--work", str(tmp_path / "other"), "--out", str(tmp_path)]) == 2
    assert "pip install .[bench]" in capsys.readouterr().err
    assert not (tmp_path / "domain.jsonl").exists()


def test_the_published_rows_count_as_measured(tmp_path):
    for row in map(domain_bench.completed, read_rows(RESULTS / "domain.jsonl")):
        seed = row["settings"]["seed"]
        cfg = domain_bench.configuration(tmp_path, tmp_path, seed, domain_bench.EPOCHS)
        assert row["settings"] == domain_bench.settings_of(cfg)
