"""WebDataset shards: reading, labels, index files, and the embedded set. test_hostile.py attacks them."""

from __future__ import annotations

import io
import os
import pickle
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from odd_files import saved
from PIL import Image

from lejepa_fast.data import open_source
from lejepa_fast.data.commands import main
from lejepa_fast.data.sources import EMBEDDED, ShardSource
from lejepa_fast.data.sources.shards import index_path
from lejepa_fast.errors import RunError, UsageError


def picture(value: int) -> bytes:
    return saved(Image.new("RGB", (9, 7), (value, 0, 0)), "PNG")


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(count: int, start: int = 0) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for number in range(start, start + count):
        members[f"{number:04d}.png"] = picture(number)
        members[f"{number:04d}.cls"] = str(number % 3).encode()
    return members


# --- reading ------------------------------------------------------------------------------------


def test_shards_are_read_at_random(tmp_path):
    first = write_tar(tmp_path / "a.tar", samples(4))
    second = write_tar(tmp_path / "b.tar", samples(3, start=4))
    source = ShardSource([first, second])
    assert (len(source), source.kind, source.targets) == (7, "webdataset", [0, 1, 2, 0, 1, 2, 0])
    for index in (6, 0, 3, 4, 0):
        image, target = source[index]
        assert image.getpixel((0, 0)) == (index, 0, 0)
        assert target == index % 3
    assert source.encoded(5) == picture(5)
    assert source.describe(5) == f"{second}: 0005.png"


def test_long_names_captions_and_unlabelled_shards(tmp_path):
    deep = "d" * 120 + "/" + "n" * 150
    write_tar(tmp_path / "a.tar", {f"{deep}.PNG": picture(1), f"{deep}.json": b"{}", f"{deep}.txt": b"a cat"})
    source = ShardSource([tmp_path / "a.tar"])
    assert source.targets is None
    assert source[0][1] == -1
    assert source.describe(0).endswith(f"{deep}.png")


def test_no_descriptor_stays_open_so_that_workers_share_none(tmp_path):
    source = ShardSource([write_tar(tmp_path / f"{i}.tar", samples(1, start=i)) for i in range(100)])
    source = pickle.loads(pickle.dumps(source))
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(source.encoded, [*range(100), *range(100)]))
    assert read == [picture(i) for i in range(100)] * 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9\n")
    shard = write_tar(tmp_path / "a.tar", {f"{name}.png": picture(3), f"{name}2.png": b"no image"})
    source = ShardSource([shard])
    assert source[0][0].getpixel((0, 0)) == (3, 0, 0)
    assert source.describe(0) == f"{shard}: {name}.png"
    with pytest.raises(RunError) as caught:
        source[1]
    assert r"caf\udce9\n2.png: not an image" in str(caught.value)
    str(caught.value).encode()


def test_truncated_shards_are_named(tmp_path):
    shard = write_tar(tmp_path / "a.tar", samples(4))
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0"))
    # In a header, in the data, between members, after the first member, and empty.
    for size in (512 * 4 + 100, 512 + 20, (end // 512 + 1) * 512, 1024, 0):
        shard.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=re.escape(str(shard))) as caught:
            ShardSource([shard])
        assert re.search("truncated|not a complete tar", str(caught.value))
        assert "\n" not in str(caught.value)
    shard.write_bytes(b"this is text" * 100)
    with pytest.raises(UsageError, match="not a complete tar file"):
        ShardSource([shard])
    shard.write_bytes(whole)
    source = ShardSource([shard])
    shard.write_bytes(whole[: 512 * 3])
    with pytest.raises(RunError, match="ends early"):
        source[3]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("0000.seg.png", b"x", "neither an image nor a .cls label"),  # WebDataset: the suffix is seg.png
        ("0000", b"x", "neither an image nor a .cls label"),
        ("0000.jpg", b"x", "two images with the key '0000'"),
        ("9999.cls", b"1", "9999.cls has no image"),
        ("9999.png", b"x", "has no .cls label while other images do"),
    ],
)
def test_members_that_do_not_fit_together_are_named(tmp_path, name, content, text):
    shard = write_tar(tmp_path / "a.tar", {**samples(2), name: content})
    with pytest.raises(UsageError, match=re.escape(text)) as caught:
        open_source(str(shard), "train")
    assert str(shard) in str(caught.value)


def test_tar_without_images(tmp_path):
    write_tar(tmp_path / "a.tar", {"readme.txt": b"nothing"})
    with pytest.raises(UsageError, match=r"no images in .*a\.tar"):
        open_source(str(tmp_path), "train")


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [b"", b"cat", b"-1", b"1.5", b"\xff\xfe", b"1" * 40])
def test_bad_labels_are_named(tmp_path, label):
    shard = write_tar(tmp_path / "a.tar", {"0.png": picture(0), "0.cls": label})
    with pytest.raises(UsageError, match=r"'0\.cls' must hold a class index"):
        ShardSource([shard])


@pytest.mark.parametrize("label", [b"4000000000", b"1" * 25])
def test_absurd_labels_without_a_class_list_are_refused(tmp_path, label):
    shard = write_tar(tmp_path / "a.tar", {"0.png": picture(0), "0.cls": label})
    with pytest.raises(UsageError, match=r"a\.tar: 0\.png has class \d+; without a classes\.txt"):
        ShardSource([shard])


@pytest.mark.parametrize(
    ("listed", "text"),
    [
        ("ant\nbee\n", r"has class 2, but classes\.txt names 2 classes"),
        ("ant\nant\ncat\n", "one distinct class name per line"),
        (
            "ant\nb\xe9e\ncat\n",
            r"cannot read class names from .*classes\.txt, one per line in UTF-8: .* byte 0xe9",
        ),
        ("ant\nbee\ncat\n", None),
    ],
)
def test_class_lists(tmp_path, listed, text):
    write_tar(tmp_path / "a.tar", samples(6))
    (tmp_path / "classes.txt").write_text(listed, encoding="latin-1")
    if text is None:
        assert open_source(str(tmp_path), "train").classes == ["ant", "bee", "cat"]
    else:
        with pytest.raises(UsageError, match=text):
            open_source(str(tmp_path), "train")


# --- index files --------------------------------------------------------------------------------


def contents(source: ShardSource) -> list:
    return [(source.target(i), source.encoded(i), source.describe(i)) for i in range(len(source))]


@pytest.fixture
def no_walk(monkeypatch):
    """Walking through a shard is an error."""

    def refuse(*_):
        raise AssertionError("the shard was walked through")

    monkeypatch.setattr("lejepa_fast.data.sources.shards.index_shard", refuse)


def test_index_files_save_the_walk(tmp_path, capsys, request):
    name = os.fsdecode(b"caf\xe9\n")
    shards = [
        write_tar(tmp_path / "a.tar", samples(4)),
        write_tar(tmp_path / "deep" / "b.tar", {f"{name}.png": picture(7), f"{name}.cls": b"2"}),
    ]
    walked = contents(ShardSource(shards))
    assert main(["index", str(tmp_path)]) == 0
    assert "2 index files written for 5 images" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.rglob("*.idx")) == ["a.tar.idx", "b.tar.idx"]
    request.getfixturevalue("no_walk")
    assert contents(ShardSource(shards)) == walked


# What happens to the text of the index file.
DAMAGES = {
    "text": lambda text: "not json",
    "cut": lambda text: text[:-9],
    "suffix": lambda text: text.replace(".png", ".pkl"),
    "beyond": lambda text: re.sub(r"(\.png\", )\d+", r"\g<1>99999", text),
    "label": lambda text: re.sub(r", 0\]", ", true]", text),
    "list": lambda text: text.replace('".png"', '[".png"]'),
    "nested": lambda text: text + "[" * 200_000,
    "surrogate": lambda text: re.sub(r'\["\w+"', r'["\\ud800"', text),
    "many": lambda text: text + text.splitlines(keepends=True)[-1] * 99,
    "stale": lambda text: re.sub(r"(mtime_ns\": )\d+", r"\g<1>1", text),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_index_files_that_do_not_fit_are_not_used(tmp_path, damage, request):
    shard = write_tar(tmp_path / "a.tar", samples(3))
    walked = contents(ShardSource([shard]))
    assert main(["index", str(shard)]) == 0
    before = index_path(shard).read_text()
    index_path(shard).write_text(DAMAGES[damage](before))
    assert index_path(shard).read_text() != before
    assert contents(ShardSource([shard])) == walked
    request.getfixturevalue("no_walk")
    with pytest.raises(AssertionError, match="walked through"):
        ShardSource([shard])


def test_index_command_names_what_is_wrong(tmp_path, capsys):
    assert main(["index", str(tmp_path)]) == 2
    assert "no .tar shards in" in capsys.readouterr().err
    write_tar(tmp_path / "a.tar", {"../x.png": b""})
    assert main(["index", str(tmp_path)]) == 2
    assert re.match("error: .* points outside", capsys.readouterr().err)
    assert not list(tmp_path.glob("*.idx"))


# --- the embedded set ---------------------------------------------------------------------------


def test_embedded_set():
    root = EMBEDDED["trashnet96"]
    train, val = open_source("trashnet96", "train"), open_source("trashnet96", "val")
    assert (len(train), len(val), train.name, train.kind) == (2022, 505, "trashnet96", "webdataset")
    assert train.classes == val.classes == ["cardboard", "glass", "metal", "paper", "plastic", "trash"]
    assert np.bincount(train.targets).tolist() == [322, 401, 328, 475, 386, 110]
    assert np.bincount(val.targets).tolist() == [81, 100, 82, 119, 96, 27]
    # One photograph is in TrashNet twice, under two labels (plastic332 and glass389).
    files = [{source.encoded(i) for i in range(len(source))} for source in (train, val)]
    assert len(files[0] & files[1]) == 1
    assert {min(train[i][0].size) for i in range(0, 2022, 40)} == {96}
    assert "Copyright (c) 2017 Gary Thung" in (root / "LICENSE").read_text()
    assert sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) <= 12_000_000
    # Neighbors in the shards are of different classes: 6 uneven classes give about 20 % equal pairs.
    assert np.mean(np.diff(train.targets) == 0) < 0.3
