"""What segmentation is measured on: sets of pictures, masks of photos on a plain background, the baseline."""

from unittest.mock import MagicMock

import numpy as np
import pytest
import segment_bench
import torch
from PIL import Image
from segment_bench import PATCH, Pixels, object_mask
from shapes import write_labels

from lejepa_fast.train.evaluation.segmentation import score_maps, set_maps


def test_each_set_is_completed_and_none_is_written_twice(tmp_path, monkeypatch):
    written = []

    def fake(folder, *_, **__):
        written.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_labels(folder, [("file",)])

    monkeypatch.setattr(segment_bench, "write_shapes", fake)
    monkeypatch.setattr(segment_bench, "write_photos", fake)
    monkeypatch.setattr(segment_bench, "Trainer", MagicMock())
    monkeypatch.setattr(segment_bench, "measured", lambda *_: [])
    (tmp_path / "shapes-measured").mkdir()  # without labels: unfinished
    (tmp_path / "shapes").mkdir()
    write_labels(tmp_path / "shapes", [("file",)])
    for _ in range(2):
        segment_bench.main(["--work", str(tmp_path), "--out", str(tmp_path / "rows")])
    assert written == ["shapes-measured", "trashnet96-measured"]


@pytest.mark.parametrize(
    ("color", "shadow", "clear"),
    [((200, 40, 40), 0, True), ((200, 40, 40), 30, True), ((205, 200, 195), 0, False)],
    ids=["red", "red with a shadow", "as the background"],
)
def test_a_mask_is_the_object_without_its_shadow_where_it_is_clear(color, shadow, clear):
    x = np.linspace(0.8, 1, 96)[None, :, None]
    pixels = np.array([210.0, 205.0, 200.0]) * np.repeat(x, 96, 0)
    pixels[30:70, 62:70] -= shadow
    pixels[30:70, 30:62] = color
    pixels += np.random.default_rng(0).normal(0, 2, pixels.shape)
    mask = object_mask(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    if not clear:
        assert mask is None
        return
    expected = np.zeros((96, 96), bool)
    expected[30:70, 30:62] = True
    assert mask is not None
    assert (mask & expected).sum() / (mask | expected).sum() > 0.95


def test_the_baseline_of_pixels_finds_what_has_another_color():
    images = torch.full((3, 3, 32, 32), 0.7)
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[:, 8:24, 8:24] = True
    images[:, 0] -= 0.5 * masks
    maps = set_maps(Pixels(), [(images, masks)], "cpu")
    assert maps.components.shape[2:] == (32 // PATCH, 32 // PATCH)
    assert score_maps(maps, masks)["pca"].iou > 80
