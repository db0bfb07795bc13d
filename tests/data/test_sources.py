"""Sources: folders, torchvision sets on disk, hold-outs, kinds of image files, and their error messages."""

from __future__ import annotations

import gzip
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from lejepa_fast.data import open_source
from lejepa_fast.data.draws import HOLDOUT, permutation
from lejepa_fast.data.sources.base import EncodedSource, FolderSource, ImageSource
from lejepa_fast.data.sources.base import base as sources
from lejepa_fast.data.sources.decoding import to_rgb
from lejepa_fast.errors import RunError, UsageError


def write_images(folder: Path, count: int, *, shade: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    """`count` PNG files whose red channel is their number and green channel is `shade`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", size, (number, shade, 7)).save(folder / f"{number:03d}.png")


class Labelled(ImageSource):
    """Labels without images."""

    def __init__(self, labels: np.ndarray) -> None:
        super().__init__(name="labels", kind="folder", classes=None, targets=labels)

    def __len__(self) -> int:
        return len(self._targets)

    def describe(self, index: int) -> str:
        return str(index)

    def open_image(self, index: int) -> Image.Image:
        raise NotImplementedError


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for label, name in enumerate(["ant", "bee", "cat"]):
        write_images(root / name, 20, shade=label)
    return root


def usage_error(*arguments, **options) -> str:
    with pytest.raises(UsageError) as caught:
        open_source(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- folders ------------------------------------------------------------------------------------


def test_class_folders(class_folders):
    (class_folders / "bee" / "deeper").mkdir()
    Image.new("RGB", (5, 5), (99, 1, 7)).save(class_folders / "bee" / "deeper" / "X.JPG")
    (class_folders / "bee" / "notes.txt").write_text("not an image")
    (class_folders / "bee" / ".hidden.png").write_text("not an image")
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
    again = open_source(str(class_folders), "val")
    assert {again.describe(i) for i in range(len(again))} == names[1]
    other = open_source(str(class_folders), "val", seed=1)
    assert {other.describe(i) for i in range(len(other))} != names[1]
    assert len(open_source(str(class_folders), "val", val_fraction=0.5)) == 30
    assert val[0][0].getpixel((0, 0))[1] == val.targets[0]
    assert val.encoded(0) == Path(val.describe(0)).read_bytes()


def test_hold_out_depends_on_the_images_of_a_class_alone():
    """In whatever order they come; each class by a draw of its own."""
    labels = np.random.default_rng(0).integers(0, 5, 200)
    labels[7] = 11  # the only one of its class
    source = Labelled(labels)
    held_out = set(sources._hold_out(source, "val", 0.2, seed=3)._indices.tolist())
    expected = set()
    for label in range(5):
        members = [i for i in range(200) if labels[i] == label]
        drawn = permutation(3, HOLDOUT, 0, label, len(members))
        expected |= {members[place] for place in drawn[: round(len(members) * 0.2)]}
    assert held_out == expected
    kept = sources._hold_out(source, "train", 0.2, seed=3)._indices.tolist()
    assert kept == sorted(set(range(200)) - expected)


def test_flat_folder_has_no_labels(tmp_path):
    write_images(tmp_path / "flat", 10)
    source = open_source(str(tmp_path / "flat"), "train")
    assert (len(source), source.targets, source.classes, source.labelled) == (9, None, None, False)
    assert source[0][1] == -1


@pytest.mark.parametrize("held_out", ["val", "test", "valid"])
def test_splits_on_disk(tmp_path, held_out):
    for name, count in (("train", 6), (held_out, 4)):
        write_images(tmp_path / name / "bee", count, shade=1)
        if name == "train":
            write_images(tmp_path / name / "ant", count, shade=0)
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
    (tmp_path / "flat" / "000.png").rename(tmp_path / "flat" / "__000.png")
    flat = FolderSource(tmp_path / "flat")
    assert [flat.relative_path(i) for i in range(len(flat))] == ["__000.png"]
    write_images(tmp_path / "classes" / "__MACOSX", 1)
    deep = FolderSource(tmp_path / "classes")
    assert deep.classes == ["__ant", "bee"]
    assert [deep.relative_path(i) for i in range(len(deep))] == [
        "__ant/000.png",
        "bee/000.png",
        "bee/__deep/000.png",
    ]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_images(tmp_path / "elsewhere", 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "ant").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    assert len(FolderSource(tmp_path / "set")) == 3


def test_sources_pickle(class_folders):
    source = open_source(str(class_folders), "val")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3][0].tobytes() == source[3][0].tobytes()
    assert copy.targets == source.targets


# --- image files --------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **options) -> Image.Image:
    """The image after a round trip through a file, as Pillow opens it."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return Image.open(file)


def test_gray_palette_and_cmyk_become_rgb():
    gray = Image.linear_gradient("L").resize((16, 16))
    assert np.array_equal(
        np.asarray(to_rgb(saved(gray, "PNG"))), np.repeat(np.asarray(gray)[..., None], 3, 2)
    )
    colours = Image.merge(
        "RGB", [gray, gray.transpose(Image.Transpose.ROTATE_90), Image.new("L", (16, 16), 40)]
    )
    palette = colours.quantize(8)
    assert np.array_equal(np.asarray(to_rgb(saved(palette, "GIF"))), np.asarray(palette.convert("RGB")))
    cmyk = to_rgb(saved(Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(np.asarray(cmyk).astype(int) - (200, 30, 60)).max() <= 4
    assert np.asarray(to_rgb(saved(gray.convert("1"), "PNG"))).max() == 255


def test_16_bit_is_scaled_not_clipped():
    values = np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)
    image = to_rgb(saved(Image.fromarray(values), "PNG"))
    assert np.asarray(image)[0].tolist() == [[v] * 3 for v in (0, 1, 100, 255)]
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert np.asarray(to_rgb(saved(unit, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(np.array([[0, 7, 300]], dtype=np.int32))))[0, :, 0].tolist() == [
        0,
        0,
        1,
    ]


def test_transparency_is_composed_over_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0] = [(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)]
    expected = [[10, 20, 30], [255, 255, 255], [127, 127, 127]]
    assert np.asarray(to_rgb(saved(Image.fromarray(rgba), "PNG")))[0].tolist() == expected
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.putpixel((1, 0), 1)
    opened = saved(palette, "PNG", transparency=0)
    assert np.asarray(to_rgb(opened))[0].tolist() == [[255, 255, 255], [50, 60, 70]]
    gray_alpha = Image.merge("LA", [Image.new("L", (1, 1), 80), Image.new("L", (1, 1), 255)])
    assert np.asarray(to_rgb(saved(gray_alpha, "PNG"))).ravel().tolist() == [80] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(kind):
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))  # black on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = to_rgb(saved(image, kind, exif=exif))
    assert upright.size == (8, 16)
    assert np.asarray(upright)[:7].max() < 30 < 220 < np.asarray(upright)[9:].min()  # black on top


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "bomb"])
def test_unreadable_files_are_named(tmp_path, how, monkeypatch):
    write_images(tmp_path, 2)
    file = tmp_path / "000.jpg"
    good = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(good, "JPEG")
    contents = {"empty": b"", "text": b"hello", "truncated": good.getvalue()[:600], "bomb": good.getvalue()}
    file.write_bytes(contents[how])
    if how == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RunError) as caught:
        FolderSource(tmp_path)[0]
    text = str(caught.value)
    assert text.startswith(f"cannot read image {file}: ")
    assert text.endswith("repair it, or remove it from the data set")
    assert "BytesIO" not in text
    assert "\n" not in text


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A Ghostscript that leaves a file behind when it runs; returns that file's path."""
    ran, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return ran


def test_no_image_runs_ghostscript(tmp_path, ghostscript):
    file = tmp_path / "images" / "5.jpg"
    file.parent.mkdir()
    file.write_bytes(POSTSCRIPT)
    with pytest.raises(RunError, match=r"5\.jpg: not an image"):
        FolderSource(file.parent)[0]
    assert not ghostscript.exists()
    with pytest.raises(OSError), Image.open(file) as image:
        image.load()
    assert ghostscript.exists()  # the trap does work


def test_unreadable_class_folders_are_named(class_folders, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"cannot list the folder {class_folders / 'bee'}: Permission" in usage_error(
        str(class_folders), "train"
    )


@pytest.mark.parametrize("name", ["stray.tar", "stray.tar.gz"])
def test_shards_beside_images_are_refused(class_folders, name):
    (class_folders / name).write_bytes(b"")
    text = usage_error(str(class_folders), "train")
    assert f"holds both shards ({name}) and images (ant/000.png)" in text


# --- bad paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["pipe:touch {}/owned", "https://host/x.tar", "s3://bucket/x-{{0..9}}.tar", "file:///etc"]
)
def test_commands_and_urls_are_refused(tmp_path, path):
    assert "only local folders" in usage_error(path.format(tmp_path), "train")
    assert not (tmp_path / "owned").exists()


def test_bad_folders(tmp_path, class_folders):
    missing = tmp_path / "missing"
    text = usage_error(str(missing), "train")
    assert str(missing) in text
    assert "embedded sets (trashnet96)" in text
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    assert f"no images in {tmp_path / 'empty'}" in usage_error(str(tmp_path / "empty"), "train")
    (tmp_path / "file.txt").write_text("x")
    assert "is a file; give a folder" in usage_error(str(tmp_path / "file.txt"), "train")
    write_images(class_folders, 1)
    assert "both images (000.png) and folders" in usage_error(str(class_folders), "train")
    write_images(tmp_path / "s" / "train" / "ant", 2)
    write_images(tmp_path / "s" / "val" / "bee", 2)
    assert "class 'bee', which the training split does not have" in usage_error(str(tmp_path / "s"), "val")
    write_images(tmp_path / "one", 1)
    assert "too few images" in usage_error(str(tmp_path / "one"), "train")
    assert "split must be 'train' or 'val'; got 'test'" in usage_error("trashnet96", "test")
    assert "val_fraction must lie" in usage_error("trashnet96", "val", val_fraction=1.0)


def test_compressed_shards_are_refused(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"x" * 1000))
    assert "x.tar.gz is compressed" in usage_error(str(tmp_path), "train")
