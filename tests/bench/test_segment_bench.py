"""The pictures with masks that segmentation is measured on: shapes, and photos on a plain background."""

import csv

import numpy as np
import pytest
import segment_bench
import shapes
import torch
from PIL import Image, ImageDraw
from segment_bench import PATCH, Pixels, object_mask
from shapes import draw_picture, write_labels, write_shapes

from lejepa_fast.train.evaluation.segmentation import score_maps, set_maps


def parts(mask):
    """Number of connected parts of a mask."""
    image, count = Image.fromarray(mask.astype(np.uint8) * 255).copy(), 0
    while (left := np.argwhere(np.asarray(image) == 255)).size:
        ImageDraw.floodfill(image, (int(left[0][1]), int(left[0][0])), 0)
        count += 1
    return count


def test_shapes_are_a_function_of_seed_and_index_and_labels_say_what_is_there(tmp_path):
    write_shapes(tmp_path, 12, size=64)
    with (tmp_path / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{i:05d}.png" for i in range(12)]
    assert {int(row["count"]) for row in rows} == {1, 2, 3, 4, 5}
    for index, row in enumerate(rows):
        picture = draw_picture(index, 64)
        mask = np.asarray(Image.open(tmp_path / "masks" / row["file"]))
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "images" / row["file"])), picture.pixels
        )
        np.testing.assert_array_equal(mask, 255 * picture.mask)
        assert parts(picture.mask) == int(row["count"])
        # The nearest center lies at most a radius, 0.17 sides, from the nearest pixel of a shape.
        nearest = np.hypot(*(np.argwhere(picture.mask) + 0.5 - 32).T).min()
        assert nearest - 1 <= float(row["distance"]) <= nearest + 0.17 * 64 + 1
    assert (draw_picture(0, 64, 1).pixels != draw_picture(0, 64).pixels).any()


def test_labels_are_there_only_when_all_pictures_are(tmp_path, monkeypatch):
    def dies(index, size, seed):
        if index == 3:
            raise KeyboardInterrupt
        return draw_picture(index, size, seed)

    monkeypatch.setattr(shapes, "draw_picture", dies)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path, 12, size=64)
    assert len(list((tmp_path / "masks").iterdir())) == 3
    assert not (tmp_path / "labels.csv").exists()


def test_a_rehearsal_leaves_the_pictures_of_the_bench_alone_and_each_set_is_completed(tmp_path, monkeypatch):
    written = []

    def fake(folder, *_, **__):
        written.append(folder.relative_to(tmp_path).as_posix())
        folder.mkdir(parents=True)
        write_labels(folder, [("file",)])

    monkeypatch.setattr(segment_bench, "write_shapes", fake)
    monkeypatch.setattr(segment_bench, "write_photos", fake)
    monkeypatch.setattr(segment_bench, "train", lambda cfg: None)
    monkeypatch.setattr(segment_bench, "measured", lambda *_: [])
    options = ["--work", str(tmp_path), "--out", str(tmp_path / "rows")]
    sets = ["shapes", "shapes-measured", "trashnet96-measured"]
    segment_bench.main([*options, "--rehearse"])
    assert written == [f"rehearsal/{name}" for name in sets]
    written.clear()
    (tmp_path / "shapes").mkdir()
    write_labels(tmp_path / "shapes", [("file",)])
    segment_bench.main(options)
    assert written == sets[1:]


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
