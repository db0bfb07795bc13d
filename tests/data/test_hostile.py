"""Hostile shards end to end, on all backends: nothing written, unpickled or executed, memory bounded."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_worker import BATCH
from loader_backends import skip_without
from odd_files import png_bomb, saved
from PIL import Image

HUGE = 3 << 29  # 1.5 GiB, of zeros that take no space on the disk
WORKER = Path(__file__).parents[1] / "helpers" / "hostile_worker.py"


def picture(number: int) -> bytes:
    return saved(Image.new("RGB", (9, 7), (number, 0, 0)), "PNG")


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "", size: int | None = None
) -> bytes:
    """A member as it stands in a tar. size: what its header claims."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


END = bytes(1024)


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
    "symlink": (
        lambda _: between(member("9.png", kind=tarfile.SYMTYPE, target="/etc/passwd")),
        "not a plain file",
    ),
    "hard-link": (
        lambda _: between(member("9.png", kind=tarfile.LNKTYPE, target="000.png")),
        "not a plain file",
    ),
    "pipe": (lambda _: between(member("9.png", kind=tarfile.FIFOTYPE)), "not a plain file"),
    "device": (lambda _: between(member("9.png", kind=tarfile.CHRTYPE)), "not a plain file"),
    "pickle": (lambda out: between(member("9.pkl", pickle.dumps(Writes(out)))), "neither an image nor"),
    "module": (lambda _: between(member("9.py", b"open('owned', 'w')")), "neither an image nor"),
    "pickled-label": (
        lambda out: between(member("9.png", b"") + member("9.cls", pickle.dumps(Writes(out)))),
        "must hold a class index",
    ),
    "cut-in-data": (lambda _: good(0, BATCH)[:-1100], "not a complete tar"),
    "cut-between": (lambda _: good(0, BATCH), "is truncated"),
    "gzip-bomb": (lambda _: gzip.compress(bytes(1 << 26)), "is compressed"),
    "name-of-gigabytes": (lambda _: header_of(tarfile.GNUTYPE_LONGNAME), "header of more than 1 M"),
    "pax-of-gigabytes": (lambda _: header_of(tarfile.XHDTYPE), "header of more than 1 MiB"),
    "pax-for-all-of-gigabytes": (lambda _: header_of(tarfile.XGLTYPE), "header of more than 1 MiB"),
    "label-of-gigabytes": (lambda _: member("9.cls", size=HUGE), "must hold a class index"),
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
    "waiting.tar": "is not a file",
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


def is_one_line(said: str) -> bool:
    return said.startswith("error: ") and said.endswith("\n") and said.count("\n") == 1


@pytest.mark.parametrize("backend", ["torchvision", "cpu", "dali"])
def test_hostile_shards_do_no_harm(hostile, backend):
    skip_without(backend)
    for left in [*hostile.glob("quarantine-*"), *hostile.glob("*.idx")]:
        left.unlink()
    (hostile / "index-of-gigabytes.tar.idx").touch()
    os.truncate(hostile / "index-of-gigabytes.tar.idx", HUGE)
    os.mkfifo(hostile / "index-that-waits.tar.idx")
    before = listing(hostile.parent)
    names = [f"{name}.tar" for name in REFUSED | USED] + list(OTHER)
    process = subprocess.run(
        [sys.executable, str(WORKER), backend, *names],
        cwd=hostile,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    answer = json.loads(process.stdout)
    # Far below the gigabytes that some of them claim to hold.
    assert answer["grown"] < 100
    found = answer["found"]
    for name, text in [(f"{name}.tar", text) for name, (_, text) in REFUSED.items()] + list(OTHER.items()):
        assert re.match(f"UsageError: .*{re.escape(name)}.*({text})", found[name]["epoch"]), found[name]
        assert "\n" not in found[name]["epoch"]
        for program in ("verify", "index"):
            code, said = found[name][program]
            assert code == 2
            assert is_one_line(said), (name, said)
    written = set()
    for name, (_, reason) in USED.items():
        shard = f"{name}.tar"
        # A good image may stand twice, in the place of a bad one.
        assert len(found[shard]["epoch"]) == BATCH, shard
        assert set(found[shard]["epoch"]) <= set(range(BATCH)), shard
        assert found[shard]["index"] == [0, ""]
        assert found[shard]["verify"] == [int(reason is not None), ""]
        written |= {f"shards/{shard}.idx"}
        if reason is not None:  # without a bad image there is no list of them
            written |= {f"shards/quarantine-{shard}.txt"}
            [line] = (hostile / f"quarantine-{shard}.txt").read_text().splitlines()
            assert re.search(reason, line.split("\t")[2])
    assert listing(hostile.parent) - before == written - before


def test_unpickling_them_leaves_a_file(hostile):
    """So the test above would see it if one were unpickled."""
    owned = hostile.parent / "written"
    pickle.loads(pickle.dumps(Writes(owned)))
    assert owned.exists()
    owned.unlink()
