"""WebDataset shards: reading, labels, index files, the embedded set, and attacks on all backends."""

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hostile_worker import BATCH
from odd_files import png_bomb, saved
from PIL import Image

from lejepa_fast.data import open_source
from lejepa_fast.data.commands import main
from lejepa_fast.data.sources import EMBEDDED, ShardSource
from lejepa_fast.errors import RunError, UsageError


def picture(value: int) -> bytes:
    return saved(Image.new("RGB", (9, 7), (value, 0, 0)), "PNG")


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "", size: int | None = None
) -> bytes:
    """A member as it stands in a tar. size: what its header claims."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(1024)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(member(name, content) for name, content in members.items()) + END)
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
    assert (len(source), source.targets) == (7, [0, 1, 2, 0, 1, 2, 0])
    for index in (6, 0, 3, 4, 0):
        image, target = source[index]
        assert image.getpixel((0, 0)) == (index, 0, 0)
        assert target == index % 3
    assert source.encoded(5) == picture(5)
    assert source.describe(5) == f"{second}: 0005.png"


def test_long_names_captions_and_unlabeled_shards(tmp_path):
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
        ("img.v1.jpg", b"x", "(its key ends at the first dot, so its suffix is '.v1.jpg')"),
        ("0000.jpg", b"x", "two images with the key '0000'"),
        ("0000.CLS", b"1", "two labels with the key '0000'"),
        ("9999.cls", b"1", "9999.cls has no image"),
        ("9999.png", b"x", "has no .cls label while other images do"),
        ("readme.txt", b"nothing", "no images in "),
    ],
)
def test_members_that_do_not_fit_together_are_named(tmp_path, name, content, text):
    shard = write_tar(
        tmp_path / "a.tar", {name: content} if name == "readme.txt" else {**samples(2), name: content}
    )
    with pytest.raises(UsageError, match=re.escape(text)) as caught:
        open_source(str(shard), "train")
    assert str(shard) in str(caught.value)


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        ("imagenet1k-train-0 imagenet1k-train-1 imagenet1k-validation-00", 2, 1),
        ("shards/imagenet1k-train-0 shards/imagenet1k-train-1 shards/imagenet1k-validation-00", 2, 1),
        ("Training_0 test_0 VAL_0 val_1", 1, 2),
        ("train-0 train-1", 2, None),
        ("shard-0 shard-1", 2, None),
        ("validation-00 test-00", "a held-out split (validation-00.tar) and none for training; name", None),
        ("shard-0 train-0 val-0", "a held-out split (val-0.tar) and shards of no split (shard-0.tar)", None),
    ],
)
def test_shards_in_one_folder_are_split_by_their_names(tmp_path, names, train, val):
    for number, name in enumerate(names.split()):
        write_tar(tmp_path / f"{name}.tar", samples(10, start=10 * number))
    if isinstance(train, str):
        with pytest.raises(UsageError, match=re.escape(train)):
            open_source(str(tmp_path), "val")
    else:
        sizes = [len(open_source(str(tmp_path), split)) for split in ("train", "val")]
        assert sizes == ([10 * train, 10 * val] if val else [10 * train - 3, 3])


def test_files_that_macos_adds_are_skipped(tmp_path):
    hidden = ("._0000.png", "._0000.cls", "__MACOSX/._0000.png", ".DS_Store", "deep/.cache/0.png")
    shard = write_tar(tmp_path / "a.tar", {**samples(4), **dict.fromkeys(hidden, b"x")})
    (tmp_path / "._a.tar").write_bytes(b"x")
    assert len(open_source(str(tmp_path), "train").base) == 4
    assert main(["index", str(tmp_path)]) == 0
    source = ShardSource([shard])
    assert [(source.target(i), source.encoded(i)) for i in range(4)] == [
        (i % 3, picture(i)) for i in range(4)
    ]


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label", [b"", b"cat", b"-1", b"1.5", b"\xff\xfe", b"1" * 40, b"4000000000", b"1" * 25]
)
def test_bad_labels_are_named(tmp_path, label):
    shard = write_tar(tmp_path / "a.tar", {"0.png": picture(0), "0.cls": label})
    absurd = label.isdigit() and len(label) < 40
    text = (
        r"a\.tar: 0\.png has class \d+; without a classes\.txt" if absurd else r"'0\.cls': expected a class"
    )
    with pytest.raises(UsageError, match=text):
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
    index = tmp_path / "a.tar.idx"
    before = index.read_text()
    index.write_text(DAMAGES[damage](before))
    assert index.read_text() != before
    assert contents(ShardSource([shard])) == walked
    request.getfixturevalue("no_walk")
    with pytest.raises(AssertionError, match="walked through"):
        ShardSource([shard])


# --- the embedded set ---------------------------------------------------------------------------


def test_embedded_set():
    root = EMBEDDED["trashnet96"]
    train, val = open_source("trashnet96", "train"), open_source("trashnet96", "val")
    assert (len(train), len(val), train.name) == (2022, 505, "trashnet96")
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


# --- attacks: nothing is written, unpickled or executed, memory is bounded ----------------------


HUGE = 3 << 29  # 1.5 GiB, of zeros that take no space on the disk
WORKER = Path(__file__).parents[1] / "helpers" / "hostile_worker.py"


def good(first: int, count: int) -> bytes:
    numbers = range(first, first + count)
    return b"".join(member(f"{n:03d}.png", picture(n)) + member(f"{n:03d}.cls", b"%d" % n) for n in numbers)


class Writes:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "owned"))


def between(hostile: bytes) -> bytes:
    """A member among the good ones."""
    return good(0, 3) + hostile + good(3, BATCH - 3) + END


def special(kind: bytes, target: str = "") -> bytes:
    return between(member("9.png", kind=kind, target=target))


def image(data: bytes, suffix: str = ".png") -> bytes:
    """A shard with one more image, whose content is `data`."""
    return between(member("500" + suffix, data) + member("500.cls", b"500"))


def header_of(kind: bytes) -> bytes:
    """A header that claims to be a name, or the like, of gigabytes."""
    return member("x", kind=kind, size=HUGE)


GLOBAL_HEADER = member("x", b"11 comm=x\n", tarfile.XGLTYPE, size=11)

# Shards that are refused as a whole: what is in them, and what the error says.
REFUSED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "dots": (lambda _: between(member("../evil.png", picture(1))), "points outside the archive"),
    "deep-dots": (lambda _: between(member("a/../../evil.cls", b"1")), "points outside the archive"),
    "absolute": (lambda out: between(member(f"{out}.png", picture(1))), "points outside the archive"),
    "symlink": (lambda _: special(tarfile.SYMTYPE, target="/etc/passwd"), "not a plain file"),
    "hard-link": (lambda _: special(tarfile.LNKTYPE, target="000.png"), "not a plain file"),
    "pipe": (lambda _: special(tarfile.FIFOTYPE), "not a plain file"),
    "device": (lambda _: special(tarfile.CHRTYPE), "not a plain file"),
    "pickle": (lambda out: between(member("9.pkl", pickle.dumps(Writes(out)))), "neither an image nor"),
    "module": (lambda _: between(member("9.py", b"open('owned', 'w')")), "neither an image nor"),
    "pickled-label": (
        lambda out: between(member("9.png", b"") + member("9.cls", pickle.dumps(Writes(out)))),
        "expected a class index",
    ),
    "gzip-bomb": (lambda _: gzip.compress(bytes(1 << 26)), "is compressed"),
    "name-of-gigabytes": (lambda _: header_of(tarfile.GNUTYPE_LONGNAME), "header of more than 1 M"),
    "pax-of-gigabytes": (lambda _: header_of(tarfile.XHDTYPE), "header of more than 1 MiB"),
    "pax-for-all-of-gigabytes": (lambda _: header_of(tarfile.XGLTYPE), "header of more than 1 MiB"),
    "label-of-gigabytes": (lambda _: member("9.cls", size=HUGE), "expected a class index"),
    "chain-of-headers": (lambda _: GLOBAL_HEADER * 1100 + good(0, BATCH) + END, "not a complete tar"),
    "backwards": (lambda _: between(member("9.png", size=-4096)), "claims -4096 bytes"),
}
# Shards whose good images are all seen, and why a bad one is left out (None: there is none).
USED: dict[str, tuple[Callable[[Path], bytes], str | None]] = {
    "pickle-as-image": (lambda out: image(pickle.dumps(Writes(out))), "not an image"),
    "gzip-bomb-as-image": (lambda _: image(gzip.compress(bytes(1 << 26)), ".jpg"), "not an image"),
    "huge-image": (lambda _: image(png_bomb(Image.new("RGB", (1, 1)))), "400000000 pixels|20000 x 20000 px"),
    "image-of-gigabytes": (
        lambda _: good(0, BATCH) + member("500.cls", b"500") + member("500.png", size=HUGE),
        "MiB, more than the 256",
    ),
    "pickle-as-text": (lambda out: between(member("0.json", pickle.dumps(Writes(out)))), None),
    "command-as-name": (
        lambda _: between(member("|touch owned;.png", b"x") + member("|touch owned;.cls", b"500")),
        "not an image",
    ),
    "folder-outside": (lambda _: between(member("../../evil", kind=tarfile.DIRTYPE)), None),
    "index-of-gigabytes": (lambda _: good(0, BATCH) + END, None),
    "index-that-waits": (lambda _: good(0, BATCH) + END, None),
}
# Not shards at all.
OTHER = {
    "pipe:touch owned": "never commands or URLs",
    "pipe:touch owned|.tar": "never commands or URLs",
    "file:///etc/passwd": "never commands or URLs",
    "waiting.tar": "a pipe or device, not a file",
    "broken.tar.gz": "is compressed",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A folder of hostile shards. An `owned` in it, or beside it, tells that code has run."""
    folder = tmp_path_factory.mktemp("hostile") / "shards"
    folder.mkdir()
    (folder / "clean.tar").write_bytes(good(0, 2 * BATCH) + END)
    for name, (content, _) in (REFUSED | USED).items():
        (folder / f"{name}.tar").write_bytes(content(folder.parent / "owned"))
        if "of-gigabytes" in name and "index" not in name:
            os.truncate(folder / f"{name}.tar", HUGE + (1 << 20))
    os.mkfifo(folder / "waiting.tar")
    (folder / "broken.tar.gz").write_bytes(gzip.compress(good(0, BATCH))[:-9])
    return folder


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_hostile_shards_do_no_harm(hostile):
    owned = hostile.parent / "owned"
    pickle.loads(pickle.dumps(Writes(owned)))  # what would happen if one were unpickled
    assert owned.exists()
    owned.unlink()
    (hostile / "index-of-gigabytes.tar.idx").touch()
    os.truncate(hostile / "index-of-gigabytes.tar.idx", HUGE)
    os.mkfifo(hostile / "index-that-waits.tar.idx")
    before = listing(hostile.parent)
    names = [f"{name}.tar" for name in REFUSED | USED] + list(OTHER)
    process = subprocess.run(
        [sys.executable, str(WORKER), *names],
        cwd=hostile,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    answer = json.loads(process.stdout)
    # Far below the gigabytes that some of them claim to hold.
    assert answer["grown"] < 150
    found = answer["found"]
    for name, text in [(f"{name}.tar", text) for name, (_, text) in REFUSED.items()] + list(OTHER.items()):
        for epoch in found[name]["epochs"].values():
            assert re.fullmatch(f"UsageError: .*{re.escape(name)}.*({text}).*", epoch), found[name]
        for program in ("verify", "index"):
            code, said = found[name][program]
            assert code == 2
            assert re.fullmatch(r"error: .*\n", said), (name, said)
    written = set()
    for name, (_, reason) in USED.items():
        shard = f"{name}.tar"
        assert found[shard]["index"] == [0, ""]
        assert found[shard]["verify"] == [int(reason is not None), ""]
        written |= {f"shards/{shard}.idx"}
        for backend, epoch in found[shard]["epochs"].items():
            # A good image may stand twice, in the place of a bad one.
            assert len(epoch) == BATCH, shard
            assert set(epoch) <= set(range(BATCH)), shard
            if reason is not None:  # without a bad image there is no list of them
                written |= {f"shards/bad-{backend}-{shard}.txt"}
                [line] = (hostile / f"bad-{backend}-{shard}.txt").read_text().splitlines()
                assert re.search(reason, line.split("\t")[2])
    assert listing(hostile.parent) - before == written - before
