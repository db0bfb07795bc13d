"""Opening data by its path: folders, splits, hold-outs, torchvision's data sets, and error messages."""

import gzip
import os
import pickle
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from image_folders import write_images
from PIL import Image
from torchvision import datasets

from lejepa_fast.data import MultiCropRecipe, eval_loader, multicrop_loader, open_source
from lejepa_fast.data.draws import HOLDOUT, permutation
from lejepa_fast.data.sources import EncodedSource, FolderSource
from lejepa_fast.data.sources.folder import FileSource
from lejepa_fast.data.sources.torchvision_sets import open_torchvision_set, split_options
from lejepa_fast.errors import UsageError


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


def test_class_folders(class_folders):
    (class_folders / "bee" / "deeper").mkdir()
    Image.new("RGB", (5, 5), (99, 1, 7)).save(class_folders / "bee" / "deeper" / "X.JPG")
    (class_folders / "bee" / "notes.txt").write_text("not an image")
    (class_folders / "empty").mkdir()
    source = FolderSource(class_folders)
    assert (source.name, source.classes) == ("set", ["ant", "bee", "cat"])
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


def test_held_out_images_are_a_part_of_their_own(class_folders):
    train, val = (open_source(str(class_folders), split) for split in ("train", "val"))
    names = [{source.describe(i) for i in range(len(source))} for source in (train, val)]
    assert not names[0] & names[1]
    assert (len(names[0] | names[1]), np.bincount(val.targets).tolist()) == (60, [2] * 3)
    copy = pickle.loads(pickle.dumps(val))
    assert isinstance(copy, EncodedSource)
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
    write_images(tmp_path, 10)
    source = open_source(str(tmp_path), "train")
    assert (len(source), source.targets, source.classes, source[0][1]) == (9, None, None, -1)


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ("images/train/a images/train/b images/Val/a", "2 images, 2 classes (a, b) from folder images/Val"),
        (
            "Data/CLS-LOC/train/a Data/CLS-LOC/val/a Data/CLS-LOC/train/b",
            "2 images, 2 classes (a, b) from folder Data/CLS-LOC/val",
        ),
        # A class that the held-out part lacks must not shift the indices.
        *[
            (
                f"Training/a Training/b {name}/b annotations/deeper/",
                f"2 images, 2 classes (a, b) from folder {name}",
            )
            for name in ("val", "test", "Valid", "EVAL", "dev", "testing", "validation")
        ],
        ("val/a val/b train/a train/b test/a other/c", "4 images, 2 classes (a, b) from folder val"),
        ("train/a train/b", "2 images, 2 classes (a, b) from folder train, held out"),
        ("train/a train/b annotations/", "2 images, 2 classes (a, b) from folder train, held out"),
        ("bus train", "2 images, 2 classes (bus, train) from folder ., held out"),
        (
            "steam_train bullet_train",
            "2 images, 2 classes (bullet_train, steam_train) from folder ., held out",
        ),
        ("valid invalid", "2 images, 2 classes (invalid, valid) from folder ., held out"),
        ("train/a train/b val", "2 images, no classes from folder val"),
        # A single class is none: any classifier would be right.
        ("train/a val/a", "2 images, no classes from folder val, all of one class"),
        ("photos/deeper", "1 images, no classes from folder ., all of one class, held out"),
        # What names of splits tell, and no split can be made of.
        ("val/a val/b", "error: images in . are in folders named like splits (val/)"),
        ("images/val/a", "error: images in images are in folders named like splits (val/)"),
        ("train val_images", "error: images in . are in folders named like splits (train/, val_images/)"),
        (
            "train2017 val2017 annotations/",
            "error: images in . are in folders named like splits (train2017/, val2017/)",
        ),
        ("train/a train/b extra", "error: images in . are in folders named like splits (train/, extra/)"),
        (
            "train_set val_set extra",
            "error: images in . are in folders named like splits (train_set/, val_set/)",
        ),
        (
            "train2017 val2017 unlabeled2017",
            "error: images in . are in folders named like splits (train2017/, val2017/)",
        ),
        (
            "trainA trainB testA testB other",
            "error: images in . are in folders named like splits (testA/, testB/, trainA/, trainB/)",
        ),
        ("Train training", "error: images in . are in folders named like splits (Train/, training/)"),
        ("train/a train/b val/", "error: no images in val; expected"),
        ("train/a train/b val/c", "error: val has the class 'c', which the training split does not have"),
        (
            "train/a train/c/ val/c",
            "error: val has the class 'c', whose folder in the training split holds no",
        ),
        ("cat/train cat/val dog/train", "error: cat holds train/, val/ as a data set does"),
        ("images/Train masks/Train", "error: images holds Train/ as a data set does"),
    ],
)
def test_layouts_of_splits(tmp_path, monkeypatch, folders, found):
    """Two images in each folder, and none in those that end in /; what the val split is then."""
    for folder in folders.split():
        (tmp_path / folder).mkdir(parents=True)
        if not folder.endswith("/"):
            write_images(tmp_path / folder, 2)
    monkeypatch.chdir(tmp_path)
    if found.startswith("error: "):
        assert usage_error(".", "val").startswith(found.removeprefix("error: "))
        return
    val = open_source(".", "val")
    assert val.summary() == found
    assert val.labeled == ("no classes" not in found)
    for index in range(len(val) if val.labeled else 0):
        assert val.classes[val.target(index)] == Path(val.describe(index)).parent.name
    train = open_source(".", "train")
    assert train.name == val.name == "."
    assert not {train.describe(i) for i in range(len(train))} & {val.describe(i) for i in range(len(val))}


def test_a_folder_that_cannot_be_read_beside_splits_does_not_matter(tmp_path, monkeypatch):
    """Such as lost+found at the root of a disk."""
    for folder in ("train/a", "train/b", "val/a", "lost+found"):
        write_images(tmp_path / folder, 1)
    refuse_folder("lost+found", monkeypatch)
    assert len(open_source(str(tmp_path), "val")) == 1


def test_every_suffix_of_pillow_is_read_and_other_files_are_counted_once(tmp_path):
    names = ("JPE", "jfif", "jpg_large", "mpo", "tif", "jp2", "j2k", "avif", "apng", "pnm", "bmp")
    suffixes = [f".{name}" for name in names]
    formats = Image.registered_extensions() | {".jpg_large": "JPEG"}
    for name in ("ant", "bee"):
        write_images(tmp_path / name, 0)
        for suffix in suffixes:
            Image.new("RGB", (32, 32), "white").save(tmp_path / name / f"0{suffix}", formats[suffix.lower()])
    for name in ("ant/1.HEIC", "ant/2.heic", "ant/notes.txt", "bee/README", "labels.csv", "none/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    train, val = (open_source(str(tmp_path), split) for split in ("train", "val"))
    assert len(train) + len(val) == 2 * len(suffixes)
    for source in (train, val):
        assert all(source[i][0].getextrema() == ((255, 255),) * 3 for i in range(len(source)))
    assert train.left_out == (
        "4 other files (2 .heic, 1 .txt, 1 without suffix), such as ant/1.HEIC; folders without images: none"
    )
    assert not val.left_out


def test_hidden_names_are_the_same_at_any_depth(tmp_path):
    for folder in ("flat", "classes/__ant", "classes/bee/__deep", "classes/bee"):
        write_images(tmp_path / folder, 1)
        for hidden in (".png", "._000.png", ".cache/0.png", "__MACOSX/0.png"):
            file = tmp_path / folder / hidden
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"no image")
    write_images(tmp_path / "classes" / "__MACOSX", 1)
    flat, deep = FolderSource(tmp_path / "flat"), FolderSource(tmp_path / "classes")
    assert [flat.relative_path(i) for i in range(len(flat))] == ["000.png"]
    assert deep.classes == ["__ant", "bee"]
    files = [deep.relative_path(i) for i in range(len(deep))]
    assert files == ["__ant/000.png", "bee/000.png", "bee/__deep/000.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_images(tmp_path / "elsewhere", 3)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "ant").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    assert len(FolderSource(tmp_path / "set")) == 3


# --- what is refused ----------------------------------------------------------------------------


def refuse_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_unreadable_class_folders_are_named(class_folders, monkeypatch):
    refuse_folder("bee", monkeypatch)
    text = usage_error(class_folders, "train")
    assert f"cannot list the folder {class_folders / 'bee'}: Permission" in text


def test_bad_folders(tmp_path, class_folders):
    text = usage_error(tmp_path / "missing", "train")
    assert f"{tmp_path / 'missing'} does not exist" in text
    assert "embedded sets (trashnet96)" in text
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    assert f"no images in {tmp_path / 'empty'}" in usage_error(tmp_path / "empty", "train")
    (tmp_path / "file.txt").write_text("x")
    assert "is a file; give a folder" in usage_error(tmp_path / "file.txt", "train")
    for name in ("stray.tar", "stray.tar.gz"):
        (class_folders / name).write_bytes(b"")
        assert f"holds both shards ({name}) and images (ant/000.png)" in usage_error(class_folders, "train")
        (class_folders / name).unlink()
    write_images(class_folders, 1)
    assert "both images (000.png) and folders" in usage_error(class_folders, "train")
    with_break = tmp_path / "line\nbreak"
    assert r"line\nbreak does not exist" in usage_error(with_break, "train")
    write_images(tmp_path / "one", 1)
    assert "too few images" in usage_error(tmp_path / "one", "train")
    for name in ("ant", "bee"):
        write_images(tmp_path / "singles" / name, 1)
    assert "a single image in every class" in usage_error(tmp_path / "singles", "train")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"x" * 1000))
    assert "x.tar.gz is compressed" in usage_error(tmp_path / "x.tar.gz", "train")
    assert "split: expected 'train' or 'val', got 'test'" in usage_error("trashnet96", "test")
    text = usage_error("trashnet96", "val", val_fraction=1.0)
    assert "val_fraction: expected a number between 0 and 1, got 1.0" in text


# --- torchvision's data sets: its own items, within the limits of all image files ---------------


COUNT = 6  # images of each data set below


def write(root: Path, contents: dict[str, str | int]) -> None:
    """Files by path: texts, and pictures by number. A path that ends in / is an empty folder."""
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            Image.new("RGB", (12, 10), (20 * content, 90, 7)).save(path)


def images(pattern: str, *groups: str) -> dict[str, str | int]:
    """`COUNT` pictures, in turn over the groups: {i} is the number of one, {n} that in its group, from 1."""
    return {
        pattern.format(group=groups[i % len(groups)], n=i // len(groups) + 1, i=i): i for i in range(COUNT)
    }


# What must lie on the disk for the training split, one set for each
# place where torchvision keeps files and labels.
LAYOUTS: dict[str, dict[str, str | int]] = {
    "GTSRB": images("gtsrb/GTSRB/Training/{group}/{i}.ppm", "00000", "00001"),
    "DTD": {
        "dtd/dtd/labels/train1.txt": "".join(f"{'zy'[i % 2]}/{i}.jpg\n" for i in range(COUNT)),
        **images("dtd/dtd/images/{group}/{i}.jpg", "z", "y"),
    },
    "OxfordIIITPet": {
        "oxford-iiit-pet/annotations/trainval.txt": "".join(
            f"{'cd'[i % 2]}_{i} {i % 2 + 1} 1 1\n" for i in range(COUNT)
        ),
        **images("oxford-iiit-pet/images/{group}_{i}.jpg", "c", "d"),
    },
    "EuroSAT": images("eurosat/2750/{group}/{i}.png", "Forest", "River"),
    "SUN397": {
        "SUN397/ClassName.txt": "/a/abbey\n/a/alley\n",
        **images("SUN397/a/{group}/sun_{i}.jpg", "abbey", "alley"),
    },
    "Caltech101": {
        "caltech101/101_ObjectCategories/BACKGROUND_Google/": 0,
        **images("caltech101/101_ObjectCategories/{group}/image_{n:04d}.jpg", "ant", "bass"),
    },
    "Caltech256": {
        **{f"caltech256/256_ObjectCategories/001.a/001_{n:04d}.jpg": n - 1 for n in (1, 2, 3)},
        **{f"caltech256/256_ObjectCategories/002.b/002_{n:04d}.jpg": n + 2 for n in (1, 2, 3)},
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_items_are_those_of_torchvision(tmp_path, name, monkeypatch):
    for module in ("scipy", "scipy.io"):  # which Caltech101 imports for its annotations
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    write(tmp_path, LAYOUTS[name])
    theirs = getattr(datasets, name)(tmp_path, **(split_options(name, "train") or {}))
    ours, _ = open_torchvision_set(f"torchvision:{name}:{tmp_path}", "train")
    assert type(ours) is FileSource  # the limits of all image files hold

    def items(source) -> list[tuple[bytes, int]]:
        return sorted((source[i][0].convert("RGB").tobytes(), int(source[i][1])) for i in range(len(source)))

    assert items(ours) == items(theirs)
    assert len(set(items(ours))) == COUNT
    # In the order of their names: SUN397 comes in that of the disk, which differs between machines.
    names = [ours.describe(i) for i in range(COUNT)]
    assert names == sorted(names)
    assert pickle.loads(pickle.dumps(ours)).encoded(3) == Path(names[3]).read_bytes()
    theirs_named = [c for c in [getattr(theirs, "classes", None)] if c and isinstance(c[0], str)]
    assert ours.classes == (theirs_named[0] if theirs_named else None)


def test_a_set_without_splits_is_held_out_and_an_unknown_layout_is_explained(tmp_path, monkeypatch):
    write(tmp_path, LAYOUTS["EuroSAT"])
    whole = datasets.EuroSAT(tmp_path)
    parts = [len(open_source(f"torchvision:EuroSAT:{tmp_path}", split)) for split in ("train", "val")]
    assert parts == [COUNT - 2, 2]

    class Other:
        def __len__(self) -> int:
            return len(whole)

    monkeypatch.setattr(datasets, "EuroSAT", lambda root: Other())
    assert "keeps the files or labels of Other" in usage_error(f"torchvision:EuroSAT:{tmp_path}", "train")


def write_fashion_mnist(root: Path) -> None:
    """The files of FashionMNIST with 12 training and 5 test images."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 12), ("t10k", 5)):
        pixels = np.arange(count, dtype=np.uint8).repeat(28 * 28).tobytes()
        labels = (np.arange(count, dtype=np.uint8) % 10).tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)


def test_torchvision_set_with_its_own_splits(tmp_path):
    write_fashion_mnist(tmp_path)
    train = open_source(f"torchvision:FashionMNIST:{tmp_path}", "train")
    val = open_source(f"torchvision:FashionMNIST:{tmp_path}", "val")
    assert (len(train), len(val), train.name) == (12, 5, "FashionMNIST")
    assert train.targets == [*range(10), 0, 1]
    assert train.classes[9] == "Ankle boot"
    image, target = train[11]
    assert (image.mode, image.size, image.getpixel((3, 3)), target) == ("RGB", (28, 28), (11,) * 3, 1)
    assert pickle.loads(pickle.dumps(val))[4][1] == 4


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("torchvision:CIFAR11:{}", ["'CIFAR11'", "known: CIFAR10, CIFAR100"]),
        ("torchvision:CIFAR10", ["expected torchvision:NAME:/dir"]),
        ("torchvision:CIFAR10:{}", ["CIFAR10 cannot be opened in", "nothing is downloaded", "download=True"]),
        ("torchvision:DTD:{}", ["DTD cannot be opened in"]),
        ("torchvision:CIFAR10:{}/nowhere", ["no such folder", "nowhere"]),
        ("torchvision:ImageFolder:{}", ["'ImageFolder' is not known here"]),
    ],
)
def test_bad_torchvision_paths(tmp_path, path, parts):
    text = usage_error(path.format(tmp_path), "train")
    for part in parts:
        assert part in text


def test_what_is_not_opened_is_no_source():
    for make in (
        lambda: multicrop_loader("/data", MultiCropRecipe(), batch_size=2),
        lambda: eval_loader("/data", image_size=8, batch_size=2),
    ):
        with pytest.raises(TypeError, match=r"source: expected what open_source\(path\) returns, got str;"):
            make()
