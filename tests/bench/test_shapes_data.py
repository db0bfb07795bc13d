"""The pictures of shapes: labels are right, and need the shapes to be seen."""

import csv

import numpy as np
import pytest
import shapes
from PIL import Image
from shapes import DISTANCE, draw_balanced, draw_picture, write_set, write_shapes

from lejepa_fast.data import open_source
from lejepa_fast.train.evaluation.label_table import labeled, read_labels


@pytest.fixture(scope="module")
def pictures():
    return [draw_balanced(index, 64) for index in range(400)]


def test_shapes_have_masks_and_labels(tmp_path):
    write_shapes(tmp_path, 12, size=64)
    with (tmp_path / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["count"]) for row in rows} == {1, 2, 3, 4, 5}
    for index, row in enumerate(rows):
        picture, name = draw_picture(index, 64), f"{index:05d}.png"
        assert row == {"file": name, "count": str(len(picture.shapes)), "distance": f"{picture.distance:.2f}"}
        assert (np.asarray(Image.open(tmp_path / "images" / name)) == picture.pixels).all()
        assert (np.asarray(Image.open(tmp_path / "masks" / name)) == 255 * picture.shapes.any(0)).all()


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


def test_the_tables_label_the_pictures_that_are_there(tmp_path):
    write_set(tmp_path, train=10, val=5, size=64)
    splits = [open_source(str(tmp_path), name) for name in ("train", "val")]
    for table, label in (("count.csv", lambda p: len(p.shapes)), ("distance.csv", lambda p: p.distance)):
        parts = labeled(read_labels(tmp_path / table), *splits)
        found = np.concatenate([part.values for part in parts])
        assert found == pytest.approx([label(draw_balanced(i, 64)) for i in range(15)], abs=0.006)
    for index, name in ((0, "train/00000.png"), (14, "val/00014.png")):
        assert (np.asarray(Image.open(tmp_path / name)) == draw_balanced(index, 64).pixels).all()


@pytest.mark.parametrize("draw", [draw_picture, draw_balanced])
def test_count_and_distance_are_those_of_the_masks(draw):
    """The center of a shape is its center of mass, to within the pixels that it is drawn on."""
    assert (draw(0, 64, 1).pixels != draw(0, 64).pixels).any()
    for picture in (draw(index, 64) for index in range(100)):
        assert (picture.shapes.sum(0) <= 1).all()
        assert picture.shapes.any((1, 2)).all()
        centers = [np.argwhere(shape).mean(0) + 0.5 for shape in picture.shapes]
        nearest = min(np.hypot(*(center - 32)) for center in centers)
        assert picture.distance == pytest.approx(nearest, abs=0.5)


def test_counts_are_balanced_and_nothing_simpler_gives_them_away(pictures):
    counts = np.array([len(picture.shapes) for picture in pictures])
    assert np.bincount(counts).tolist() == [0, 80, 80, 80, 80, 80]
    assert [len(set(counts[i : i + 5])) for i in range(0, 400, 5)] == [5] * 80
    assert len({tuple(counts[i : i + 5]) for i in range(0, 400, 5)}) > 20
    simple = np.array(
        [[*p.pixels.mean((0, 1)), *p.pixels.std((0, 1)), p.shapes.sum(), p.distance, 1.0] for p in pictures]
    )
    known = np.linalg.lstsq(simple, counts, rcond=None)[0]
    assert 1 - np.var(counts - simple @ known) / np.var(counts) < 0.06  # 8 numbers explain 0.02 by chance
    for picture in pictures[:100]:
        background = picture.pixels[~picture.shapes.any(0)].mean(0)
        for shape in picture.shapes:
            assert np.linalg.norm(picture.pixels[shape].mean(0) - background) > 30
    covered, distance = simple[:, 6] / 64**2, simple[:, 7] / 64
    assert 0.045 < covered.min() < 0.055 < 0.075 < covered.max() < 0.085
    assert np.histogram(distance, 5, range=DISTANCE)[0] == pytest.approx([80] * 5, abs=40)
