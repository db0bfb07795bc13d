"""Opening data by its path: folders, splits, hold-outs, and error messages."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lejepa_fast.data import open_source
from lejepa_fast.data.draws import HOLDOUT, permutation
from lejepa_fast.data.sources import EncodedSource, FolderSource
from lejepa_fast.errors import UsageError


def write_images(folder: Path, count: int, *, shade: int = 0) -> None:
    """`count` PNG files whose red channel is their number and green channel is `shade`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (12, 10), (number, shade, 7)).save(folder / f"{number:03d}.png")


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for label, name in enumerate(["ant", "bee", "cat"]):
        write_images(root / name, 20, shade=label)
    return root


def usage_error(*arguments, **options) -> str:
    with pytest.raises(UsageError) as caught:
        open_source(*map(str, arguments), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_of(source: FolderSource) -> list[str]:
    return [source.relative_path(index) for index in range(len(source))]


def test_class_folders(class_folders):
    (class_folders / "bee" / "deeper").mkdir()
    Image.new("RGB", (5, 5), (99, 1, 7)).save(class_folders / "bee" / "deeper" / "X.JPG")
    (class_folders / "bee" / "notes.txt").write_text("not an image")
    (class_folders / "empty").mkdir()
    source = FolderSource(class_folders)
    assert (source.kind, source.name, source.classes) == ("folder", "set", ["ant", "bee", "cat"])
    assert source.targets == [0] * 20 + [1] * 21 + [2] * 20
    assert len(source) == 61
    for index in (0, 19, 20, 60):
        image, target = source[index]
        assert image.mode == "RGB"
        assert image.getpixel((0, 0))[1] == target == source.target(index)
    assert source.describe(40) == str(class_folders / "bee" / "deeper" / "X.JPG")
    assert source.image_size(40) == (5, 5)
    with pytest.raises(IndexError):
        source[61]


def test_hold_out_is_per_class_disjoint_and_repeatable(class_folders):
    train, val = (open_source(str(class_folders), split) for split in ("train", "val"))
    assert isinstance(train, EncodedSource)
    assert np.bincount(train.targets).tolist() == [18] * 3
    assert np.bincount(val.targets).tolist() == [2] * 3
    names = [{source.describe(i) for i in range(len(source))} for source in (train, val)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 60
    again, other = (open_source(str(class_folders), "val", seed=seed) for seed in (0, 1))
    assert {again.describe(i) for i in range(len(again))} == names[1]
    assert {other.describe(i) for i in range(len(other))} != names[1]
    assert len(open_source(str(class_folders), "val", val_fraction=0.5)) == 30
    copy = pickle.loads(pickle.dumps(val))
    assert copy.targets == val.targets
    assert copy[3][0].getpixel((0, 0))[1] == val.targets[3]
    assert copy.encoded(0) == Path(val.describe(0)).read_bytes()


def test_hold_out_depends_on_the_images_of_a_class_alone(tmp_path):
    """Each class has its own draw, and a single image stays in training."""
    counts = {"ant": 23, "bee": 1, "cat": 40}
    for name, count in counts.items():
        write_images(tmp_path / name, count)
    val = open_source(str(tmp_path), "val", val_fraction=0.2, seed=3)
    held_out = [os.path.relpath(val.describe(i), tmp_path) for i in range(len(val))]
    assert held_out == [
        f"{name}/{place:03d}.png"
        for label, (name, count) in enumerate(counts.items())
        if count > 1
        for place in sorted(permutation(3, HOLDOUT, 0, label, count)[: round(count * 0.2)].tolist())
    ]


def test_flat_folder_has_no_labels(tmp_path):
    write_images(tmp_path / "flat", 10)
    source = open_source(str(tmp_path / "flat"), "train")
    assert (len(source), source.targets, source.classes, source.labelled) == (9, None, None, False)
    assert source[0][1] == -1


@pytest.mark.parametrize("held_out", ["val", "test", "valid"])
def test_splits_on_disk(tmp_path, held_out):
    write_images(tmp_path / "train" / "ant", 6)
    for name, count in (("train", 6), (held_out, 4)):
        write_images(tmp_path / name / "bee", count, shade=1)
    train, val = open_source(str(tmp_path), "train"), open_source(str(tmp_path), "val")
    assert (len(train), len(val)) == (12, 4)
    assert train.classes == val.classes == ["ant", "bee"]
    # A class that the held-out part lacks must not shift the indices.
    assert val.targets == [1] * 4
    assert train.name == val.name == tmp_path.name


def test_a_lone_train_folder_is_a_split_but_a_class_called_train_is_not(tmp_path):
    write_images(tmp_path / "a" / "train" / "ant", 10)
    assert open_source(str(tmp_path / "a"), "train").classes == ["ant"]
    for name in ("bus", "train"):
        write_images(tmp_path / "b" / name, 10)
    assert open_source(str(tmp_path / "b"), "train").classes == ["bus", "train"]


def test_hidden_names_are_the_same_at_any_depth(tmp_path):
    for folder in ("flat", "classes/__ant", "classes/bee/__deep", "classes/bee"):
        write_images(tmp_path / folder, 1)
        for hidden in (".png", "._000.png", ".cache/0.png", "__MACOSX/0.png"):
            file = tmp_path / folder / hidden
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"no image")
    write_images(tmp_path / "classes" / "__MACOSX", 1)
    assert files_of(FolderSource(tmp_path / "flat")) == ["000.png"]
    deep = FolderSource(tmp_path / "classes")
    assert deep.classes == ["__ant", "bee"]
    assert files_of(deep) == ["__ant/000.png", "bee/000.png", "bee/__deep/000.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_images(tmp_path / "elsewhere", 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "ant").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    assert len(FolderSource(tmp_path / "set")) == 3


# --- what is refused ----------------------------------------------------------------------------


def test_unreadable_class_folders_are_named(class_folders, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    text = usage_error(class_folders, "train")
    assert f"cannot list the folder {class_folders / 'bee'}: Permission" in text


@pytest.mark.parametrize("name", ["stray.tar", "stray.tar.gz"])
def test_shards_beside_images_are_refused(class_folders, name):
    (class_folders / name).write_bytes(b"")
    assert f"holds both shards ({name}) and images (ant/000.png)" in usage_error(class_folders, "train")


def test_bad_folders(tmp_path, class_folders):
    text = usage_error(tmp_path / "missing", "train")
    assert f"{tmp_path / 'missing'} does not exist" in text
    assert "embedded sets (trashnet96)" in text
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    assert f"no images in {tmp_path / 'empty'}" in usage_error(tmp_path / "empty", "train")
    (tmp_path / "file.txt").write_text("x")
    assert "is a file; give a folder" in usage_error(tmp_path / "file.txt", "train")
    write_images(class_folders, 1)
    assert "both images (000.png) and folders" in usage_error(class_folders, "train")
    write_images(tmp_path / "s" / "train" / "ant", 2)
    write_images(tmp_path / "s" / "val" / "bee", 2)
    assert "class 'bee', which the training split does not have" in usage_error(tmp_path / "s", "val")
    write_images(tmp_path / "one", 1)
    assert "too few images" in usage_error(tmp_path / "one", "train")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"x" * 1000))
    assert "x.tar.gz is compressed" in usage_error(tmp_path / "x.tar.gz", "train")


def test_bad_arguments():
    assert "split must be 'train' or 'val'; got 'test'" in usage_error("trashnet96", "test")
    assert "val_fraction must lie between 0 and 1; got 1.0" in usage_error(
        "trashnet96", "val", val_fraction=1.0
    )
