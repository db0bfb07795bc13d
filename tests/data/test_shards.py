"""WebDataset shards: reading them safely, packing them, and the embedded set."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from odd_files import BAD, ODD, spoil
from PIL import Image

from lejepa_fast.data import open_source
from lejepa_fast.data.commands.index import index_path
from lejepa_fast.data.commands.index import main as index_main
from lejepa_fast.data.commands.pack import main, pack_folder
from lejepa_fast.data.sources.base import EMBEDDED, EncodedSource
from lejepa_fast.data.sources.shards import ShardSource
from lejepa_fast.errors import RunError, UsageError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


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
    assert len(ShardSource([first])) == 4


def test_long_names_captions_and_unlabelled_shards(tmp_path):
    deep = "d" * 120 + "/" + "n" * 150
    write_tar(tmp_path / "a.tar", {f"{deep}.PNG": picture(1), f"{deep}.json": b"{}", f"{deep}.txt": b"a cat"})
    source = ShardSource([tmp_path / "a.tar"])
    assert source.targets is None
    assert source[0][1] == -1
    assert source.describe(0).endswith(f"{deep}.png")


def _read_all(source: ShardSource, start: int, answers) -> None:
    answers.put([source[(start + i) % len(source)][0].getpixel((0, 0))[0] for i in range(500)])


def test_forked_processes_do_not_disturb_each_other(tmp_path):
    source = ShardSource([write_tar(tmp_path / "a.tar", samples(50))])
    source.encoded(0)  # a descriptor that were left open would be shared
    context = get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=_read_all, args=(source, 7, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    got = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert got == [[(7 + i) % 50 for i in range(500)]] * 3


def test_pickled_sources_open_their_own_files(tmp_path):
    source = ShardSource([write_tar(tmp_path / "a.tar", samples(50))])
    source.encoded(3)
    copy = pickle.loads(pickle.dumps(source))
    del source
    assert copy[49][0].getpixel((0, 0))[0] == 49


def test_a_header_that_claims_a_huge_name_is_refused(tmp_path):
    header = special("x", tarfile.GNUTYPE_LONGNAME)
    header.size = 1 << 60
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UsageError, match=r"a\.tar is not a complete tar file \(.+\); copy or pack"):
        ShardSource([tmp_path / "a.tar"])


def test_no_descriptor_stays_open(tmp_path):
    source = ShardSource([write_tar(tmp_path / f"{i}.tar", samples(1, start=i)) for i in range(100)])
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(source.encoded, [*range(100), *range(100)]))
    assert read == [picture(i) for i in range(100)] * 2
    assert len(os.listdir("/proc/self/fd")) == before


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "owned"))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("../evil.png", b"x", "points outside the archive"),
        ("a/../../evil.png", b"x", "points outside the archive"),
        ("/etc/evil.png", b"x", "points outside the archive"),
        ("x.png", special("x.png", tarfile.SYMTYPE, "/etc/passwd"), "not a plain file"),
        ("x.png", special("x.png", tarfile.LNKTYPE, "0000.png"), "not a plain file"),
        ("x.png", special("x.png", tarfile.FIFOTYPE), "not a plain file"),
        ("x.png", special("x.png", tarfile.CHRTYPE), "not a plain file"),
        ("0000.pyd", b"pickle", "neither an image nor a .cls label"),
        ("0000.pickle", b"pickle", "neither an image nor a .cls label"),
        ("0000.pth", b"pickle", "neither an image nor a .cls label"),
        ("0000.seg.png", b"x", "neither an image nor a .cls label"),  # WebDataset: the suffix is seg.png
        ("0000", b"x", "neither an image nor a .cls label"),
        ("0000.jpg", b"x", "two images with the key '0000'"),
        ("9999.cls", b"1", "9999.cls has no image"),
        ("9999.png", b"x", "has no .cls label while other images do"),
    ],
)
def test_unsafe_and_broken_members_are_refused(tmp_path, name, content, text):
    shard = write_tar(tmp_path / "in" / "a.tar", {**samples(2), name: content})
    with pytest.raises(UsageError, match=re.escape(text)) as caught:
        open_source(str(shard), "train")
    assert str(shard) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_nothing_is_unpickled(tmp_path):
    owned = tmp_path / "owned"
    payload = pickle.dumps(Bomb(owned))
    for name in ("0000.pyd", "0001.cls", "0001.png"):
        members = {**samples(1), name: payload}
        if name == "0001.png":
            members["0001.cls"] = b"0"
            with pytest.raises(RunError, match=r"0001\.png: not an image"):
                ShardSource([write_tar(tmp_path / "a.tar", members)])[1]
        else:
            with pytest.raises(UsageError):
                ShardSource([write_tar(tmp_path / "a.tar", members)])
    assert not owned.exists()
    pickle.loads(payload)
    assert owned.exists()  # the bomb does work


@pytest.mark.parametrize("label", [b"", b"cat", b"-1", b"1.5", b"\xff\xfe", b"1" * 40])
def test_bad_labels_are_named(tmp_path, label):
    shard = write_tar(tmp_path / "a.tar", {"0.png": picture(0), "0.cls": label})
    with pytest.raises(UsageError, match=r"'0\.cls' must hold a class index"):
        ShardSource([shard])


def test_labels_must_be_in_the_class_list(tmp_path):
    write_tar(tmp_path / "a.tar", samples(6))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(UsageError, match=r"has class 2, but classes\.txt names 2 classes"):
        open_source(str(tmp_path), "train")
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    assert open_source(str(tmp_path), "train").classes == ["ant", "bee", "cat"]
    (tmp_path / "classes.txt").write_text("ant\nant\ncat\n")
    with pytest.raises(UsageError, match="one distinct class name per line"):
        open_source(str(tmp_path), "train")


def test_absurd_labels_without_a_class_list_are_refused(tmp_path):
    for label in (b"4000000000", b"1" * 25):
        shard = write_tar(tmp_path / "a.tar", {"0.png": picture(0), "0.cls": label})
        with pytest.raises(UsageError, match=r"0\.png has class \d+; without a classes\.txt") as caught:
            ShardSource([shard])
        assert str(shard) in str(caught.value)


def test_class_lists_must_be_utf_8(tmp_path):
    write_tar(tmp_path / "a.tar", samples(6))
    (tmp_path / "classes.txt").write_bytes("ant\nbée\ncat\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"classes\.txt is not UTF-8"):
        open_source(str(tmp_path), "train")


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


def test_tar_without_images(tmp_path):
    write_tar(tmp_path / "a.tar", {"readme.txt": b"nothing"})
    with pytest.raises(UsageError, match=r"no images in .*a\.tar"):
        open_source(str(tmp_path), "train")


# --- index files --------------------------------------------------------------------------------


def same_source(one: ShardSource, other: ShardSource) -> bool:
    return one.targets == other.targets and all(
        one.encoded(i) == other.encoded(i) and one.describe(i) == other.describe(i) for i in range(len(one))
    )


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
    walked = ShardSource(shards)
    assert index_main([str(tmp_path)]) == 0
    assert "2 index files written for 5 images" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.rglob("*.idx")) == ["a.tar.idx", "b.tar.idx"]
    request.getfixturevalue("no_walk")
    assert same_source(ShardSource(shards), walked)


@pytest.mark.parametrize(
    "change",
    [
        lambda shard, index: os.utime(shard, ns=(0, 0)),
        lambda shard, index: index.write_text("not json"),
        lambda shard, index: index.write_bytes(index.read_bytes()[:-9]),
        lambda shard, index: index.write_text(index.read_text().replace(".png", ".pkl")),
        lambda shard, index: index.write_text(re.sub(r"(\.png\", )\d+", r"\g<1>99999", index.read_text())),
        lambda shard, index: index.write_text(re.sub(r", 0\]", ", true]", index.read_text())),
        lambda shard, index: index.write_text(index.read_text().replace('".png"', '[".png"]')),
        lambda shard, index: index.write_text(index.read_text() + "[" * 200_000),
        lambda shard, index: index.write_text(re.sub(r'\["\w+"', r'["\\ud800"', index.read_text())),
        lambda shard, index: index.write_text(
            index.read_text() + index.read_text().splitlines(True)[-1] * 99
        ),
        lambda shard, index: index.unlink(),
    ],
    ids=["stale", "text", "cut", "suffix", "beyond", "label", "list", "nested", "surrogate", "many", "gone"],
)
def test_index_files_that_do_not_fit_are_not_used(tmp_path, change, request):
    shard = write_tar(tmp_path / "a.tar", samples(3))
    walked = ShardSource([shard])
    assert index_main([str(shard)]) == 0
    change(shard, index_path(shard))
    assert same_source(ShardSource([shard]), walked)
    request.getfixturevalue("no_walk")
    with pytest.raises(AssertionError, match="walked through"):
        ShardSource([shard])


def test_index_command_names_what_is_wrong(tmp_path, capsys):
    assert index_main([str(tmp_path)]) == 2
    assert "no .tar shards in" in capsys.readouterr().err
    write_tar(tmp_path / "a.tar", {"../x.png": b""})
    assert index_main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "points outside" in error
    assert not list(tmp_path.glob("*.idx"))


# --- packing ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label, name in enumerate(["ant", "bee"]):
        for split, count in (("train", 30), ("val", 6)):
            path = tmp_path / "set" / split / name
            path.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"img {number}.v{label}.JPG", quality=80)
    return tmp_path / "set"


def digests(source: EncodedSource) -> list[tuple[str, int]]:
    return sorted(
        (hashlib.sha256(source.encoded(i)).hexdigest(), source.target(i)) for i in range(len(source))
    )


def test_pack_keeps_every_byte_and_label(folder, tmp_path):
    out = tmp_path / "out"
    assert pack_folder(folder, out, shard_bytes=8000) == {"train": 60, "val": 12}
    assert (out / "classes.txt").read_text() == "ant\nbee\n"
    shards = sorted((out / "train").iterdir())
    assert shards[0].name == "shard-00000.tar"
    assert len(shards) > 2
    for split in ("train", "val"):
        packed = open_source(str(out), split)
        assert packed.kind == "webdataset"
        assert packed.classes == ["ant", "bee"]
        assert digests(packed) == digests(open_source(str(folder), split))
    for shard in shards[:-1]:
        counts = np.bincount(ShardSource([shard]).targets, minlength=2)
        assert counts.min() > 0  # classes are mixed
        assert sum(len(ShardSource([shard]).encoded(i)) for i in range(counts.sum())) <= 8000
        with tarfile.open(shard) as tar:
            for info in tar:
                assert (info.uid, info.gid, info.mtime, info.uname, info.mode) == (0, 0, 0, "", 0o644)
                assert re.fullmatch(r"\d{8}_img-\d+-v\d\.(jpg|cls)", info.name)


def test_pack_is_deterministic(folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack_folder(folder, tmp_path / name, seed=seed)
    contents = [(tmp_path / name / "train" / "shard-00000.tar").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_pack_a_folder_without_splits(folder, tmp_path):
    assert pack_folder(folder / "train", tmp_path / "out") == {"": 60}
    assert len(open_source(str(tmp_path / "out"), "train")) == 54
    assert pack_folder(folder / "train" / "ant", tmp_path / "flat") == {"": 30}
    assert open_source(str(tmp_path / "flat"), "train").targets is None
    assert not (tmp_path / "flat" / "classes.txt").exists()


def test_pack_leaves_nothing_half_done(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    before = sorted(p.name for p in tmp_path.iterdir())
    victim = folder / "val" / "bee" / "img 3.v1.JPG"
    good = victim.read_bytes()
    victim.write_bytes(good[:300])
    assert main([str(folder), str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read image {victim}")
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert main([str(folder), str(out), "--no-verify"]) == 0
    assert main([str(folder), str(out)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    victim.write_bytes(good)
    monkeypatch.setattr("lejepa_fast.data.commands.pack._add", full)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        pack_folder(folder, tmp_path / "second")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "set"]


def test_pack_leaves_bad_images_out_when_asked_to(folder, tmp_path, capsys):
    ant, bee = folder / "train" / "ant", folder / "val" / "bee"
    spoil(ant, Image.new("RGB", (20, 18), (200, 30, 90)))  # ahead of most good ones, by their names
    (bee / "img 3.v1.JPG").write_bytes(b"text")
    bad = {str(ant / name): reason for name, (_, reason) in BAD.items()}
    bad[str(bee / "img 3.v1.JPG")] = "not an image"
    out = tmp_path / "out"
    assert main([str(folder), str(out), "--skip-bad", "--shard-mb", "0.01"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{out / 'train'}: {60 + len(ODD)} images",
        f"{out / 'val'}: 11 images",
        f"{len(bad)} bad images left out, listed in {out / 'skipped.txt'}",
    ]
    rows = [line.split("\t") for line in (out / "skipped.txt").read_text().splitlines()]
    assert len(rows) == len(bad)
    assert all(re.search(bad[name], reason) for name, _, reason in rows)
    for split in ("train", "val"):
        whole = open_source(str(folder), split)
        good = [i for i in range(len(whole)) if whole.describe(i) not in bad]
        assert digests(open_source(str(out), split)) == digests(whole.subset(good))
    # Without bad ones there is no list; without good ones there are no shards.
    assert main([str(folder / "train" / "bee"), str(tmp_path / "bees"), "--skip-bad"]) == 0
    assert sorted(path.name for path in (tmp_path / "bees").iterdir()) == ["shard-00000.tar"]
    for path in bee.parent.rglob("*.JPG"):
        path.write_bytes(b"text")
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert main([str(folder), str(tmp_path / "second"), "--skip-bad"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: none of the 12 images in {folder / 'val'} is readable; check the data set"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_pack_usage_errors(tmp_path, capsys):
    assert main([str(tmp_path / "missing"), str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert main([str(tmp_path / "file"), str(tmp_path / "out")]) == 2
    with pytest.raises(UsageError, match="shard_bytes must be positive"):
        pack_folder(tmp_path, tmp_path / "out", shard_bytes=0)
    with pytest.raises(UsageError, match="skip_bad needs verify"):
        pack_folder(tmp_path, tmp_path / "out", verify=False, skip_bad=True)


# --- the embedded set ---------------------------------------------------------------------------


def test_embedded_set():
    root = EMBEDDED["trashnet96"]
    train, val = open_source("trashnet96", "train"), open_source("trashnet96", "val")
    assert (len(train), len(val), train.name, train.kind) == (2022, 505, "trashnet96", "webdataset")
    assert train.classes == val.classes == ["cardboard", "glass", "metal", "paper", "plastic", "trash"]
    assert np.bincount(train.targets).tolist() == [322, 401, 328, 475, 386, 110]
    assert np.bincount(val.targets).tolist() == [81, 100, 82, 119, 96, 27]
    # One photograph is in TrashNet twice, under two labels (plastic332 and glass389).
    assert len({d for d, _ in digests(train)} & {d for d, _ in digests(val)}) == 1
    assert {min(train[i][0].size) for i in range(0, 2022, 40)} == {96}
    assert "Copyright (c) 2017 Gary Thung" in (root / "LICENSE").read_text()
    assert sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) <= 12_000_000
    # Neighbours in the shards are of different classes: 6 uneven classes give about 20 % equal pairs.
    assert np.mean(np.diff(train.targets) == 0) < 0.3


@pytest.mark.skipif(not (SHARED / "trashnet-96.tar").exists(), reason="the original images are not here")
def test_embedded_set_holds_the_original_bytes():
    original: dict[str, list[tuple[str, int]]] = {"train": [], "val": []}
    classes = open_source("trashnet96", "train").classes
    with tarfile.open(SHARED / "trashnet-96.tar") as tar:
        for info in tar:
            if info.name.endswith(".jpg"):
                _, split, name, _ = info.name.split("/")
                data = tar.extractfile(info).read()
                original[split].append((hashlib.sha256(data).hexdigest(), classes.index(name)))
    for split, expected in original.items():
        assert digests(open_source("trashnet96", split)) == sorted(expected)
