"""torchvision's data sets on disk: torchvision's own items, within the limits of all image files."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from odd_files import png_bomb
from PIL import Image
from torchvision import datasets

from lejepa_fast.data import open_source
from lejepa_fast.data.sources import EncodedSource, UnreadableImageError
from lejepa_fast.data.sources.torchvision_sets import open_torchvision_set, split_options
from lejepa_fast.errors import UsageError

COUNT = 6  # images of each data set below


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (12, 10), (20 * number, 90, 7))


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
            picture(content).save(path)


def images(pattern: str, *groups: str) -> dict[str, str | int]:
    """`COUNT` pictures, in turn over the groups: {i} is the number of one, {n} that in its group, from 1."""
    return {
        pattern.format(group=groups[i % len(groups)], n=i // len(groups) + 1, i=i): i for i in range(COUNT)
    }


def scenes() -> str:
    scenes = [{"image_filename": f"{i}.png", "objects": [{}] * (COUNT - i)} for i in range(COUNT)]
    return json.dumps({"scenes": scenes})


# What must lie on the disk for the training split, in the order that each set wants.
LAYOUTS: dict[str, dict[str, str | int]] = {
    "Food101": {
        "food-101/meta/train.json": json.dumps({"b": ["b/2", "b/1", "b/0"], "a": ["a/0", "a/1", "a/2"]}),
        **{f"food-101/images/{'ab'[i % 2]}/{i // 2}.jpg": i for i in range(COUNT)},
    },
    "GTSRB": images("gtsrb/GTSRB/Training/{group}/{i}.ppm", "00000", "00001"),
    "DTD": {
        "dtd/dtd/labels/train1.txt": "".join(f"{'zy'[i % 2]}/{i}.jpg\n" for i in range(COUNT)),
        **images("dtd/dtd/images/{group}/{i}.jpg", "z", "y"),
    },
    "FGVCAircraft": {
        "fgvc-aircraft-2013b/data/variants.txt": "a\nb\n",
        "fgvc-aircraft-2013b/data/images_variant_train.txt": "".join(
            f"{9 - i} {'ab'[i % 2]}\n" for i in range(COUNT)
        ),
        **{f"fgvc-aircraft-2013b/data/images/{9 - i}.jpg": i for i in range(COUNT)},
    },
    "Imagenette": images("imagenette2/train/{group}/{i}.jpeg", "n01440764", "n02102040"),
    "RenderedSST2": images("rendered-sst2/train/{group}/{i}.png", "negative", "positive"),
    "CLEVRClassification": {
        "clevr/CLEVR_v1.0/scenes/CLEVR_train_scenes.json": scenes(),
        **images("clevr/CLEVR_v1.0/images/train/{i}.png", ""),
    },
    "Country211": images("country211/train/{group}/{i}.jpg", "AD", "ZW"),
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
    assert isinstance(ours, EncodedSource)
    assert ours.kind == "torchvision"

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


def test_files_have_the_limits_of_all_image_files(tmp_path, monkeypatch):
    write(tmp_path, images("eurosat/2750/{group}/{i}.png", "Forest", "River"))
    bad = tmp_path / "eurosat" / "2750" / "Forest"
    (bad / "bomb.png").write_bytes(png_bomb(picture(0)))
    (bad / "large.png").write_bytes(b"")
    os.truncate(bad / "large.png", 200 << 30)  # sparse
    (bad / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some programs do
    source, _ = open_torchvision_set(f"torchvision:EuroSAT:{tmp_path}", "train")
    reasons = {}
    for index in range(len(source)):
        try:
            source.load(index)
        except UnreadableImageError as error:
            reasons[source.describe(index)] = error.reason
    assert reasons == {
        str(bad / "bomb.png"): "20000 x 20000 px, more than the 178,956,970 pixels an image may have",
        str(bad / "large.png"): "204,800 MiB, more than the 256 that an image file may have",
        str(bad / "script.png"): "not an image",
    }


def test_an_unknown_layout_is_explained(tmp_path, monkeypatch):
    write(tmp_path, LAYOUTS["EuroSAT"])
    whole = datasets.EuroSAT(tmp_path)

    class Other:
        def __len__(self) -> int:
            return len(whole)

    monkeypatch.setattr(datasets, "EuroSAT", lambda root: Other())
    assert "keeps the files or labels of Other" in usage_error(f"torchvision:EuroSAT:{tmp_path}")


def usage_error(path: str) -> str:
    with pytest.raises(UsageError) as caught:
        open_source(path, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert (len(train), len(val), train.kind, train.name) == (12, 5, "torchvision", "FashionMNIST")
    assert train.targets == [*range(10), 0, 1]
    assert train.classes[9] == "Ankle boot"
    image, target = train[11]
    assert (image.mode, image.size, image.getpixel((3, 3)), target) == ("RGB", (28, 28), (11,) * 3, 1)
    assert pickle.loads(pickle.dumps(val))[4][1] == 4


def test_torchvision_set_without_splits_is_held_out(tmp_path):
    for name in ("Forest", "River"):
        write(tmp_path, {f"eurosat/2750/{name}/{number}.png": number for number in range(10)})
    sizes = {split: len(open_source(f"torchvision:EuroSAT:{tmp_path}", split)) for split in ("train", "val")}
    assert sizes == {"train": 18, "val": 2}


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
    text = usage_error(path.format(tmp_path))
    for part in parts:
        assert part in text
