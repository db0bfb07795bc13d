"""The command that packs a folder of images into shards."""

from __future__ import annotations

import hashlib
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from odd_files import BAD, ODD, spoil
from PIL import Image

from lejepa_fast.data import open_source
from lejepa_fast.data.commands import main
from lejepa_fast.data.commands.pack import pack_folder
from lejepa_fast.data.sources import EncodedSource, ShardSource
from lejepa_fast.errors import RunError, UsageError


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


def pack(*arguments: str | Path) -> int:
    return main(["pack", *map(str, arguments)])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_the_same_images_and_seed_give_the_same_bytes(folder, tmp_path):
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
    victim = folder / "val" / "bee" / "img 3.v1.JPG"
    good = victim.read_bytes()
    victim.write_bytes(good[:300])
    assert pack(folder, out) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read image {victim}")
    assert error.count("\n") == 1
    assert names_in(tmp_path) == ["set"]
    assert pack(folder, out, "--no-verify") == 0
    assert pack(folder, out) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    victim.write_bytes(good)
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        pack_folder(folder, tmp_path / "second")
    assert names_in(tmp_path) == ["out", "set"]


def test_pack_leaves_bad_images_out_when_asked_to(folder, tmp_path, capsys):
    ant, bee = folder / "train" / "ant", folder / "val" / "bee"
    spoil(ant, Image.new("RGB", (20, 18), (200, 30, 90)))
    (bee / "img 3.v1.JPG").write_bytes(b"text")
    bad = {str(ant / name): reason for name, (_, reason) in BAD.items()}
    bad[str(bee / "img 3.v1.JPG")] = "not an image"
    out = tmp_path / "out"
    assert pack(folder, out, "--skip-bad", "--shard-mb", "0.01") == 0
    assert capsys.readouterr().out.splitlines() == [
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
    # Without bad images there is no list.
    assert pack(folder / "train" / "bee", tmp_path / "bees", "--skip-bad") == 0
    assert names_in(tmp_path / "bees") == ["shard-00000.tar"]


def test_pack_of_nothing_but_bad_images_fails(folder, tmp_path, capsys):
    for path in (folder / "val").rglob("*.JPG"):
        path.write_bytes(b"text")
    assert pack(folder, tmp_path / "out", "--skip-bad") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: none of the 12 images in {folder / 'val'} is readable; check the data set"
    assert names_in(tmp_path) == ["set"]


def test_pack_usage_errors(tmp_path, capsys):
    assert pack(tmp_path / "missing", tmp_path / "out") == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert pack(tmp_path / "file", tmp_path / "out") == 2
    with pytest.raises(UsageError, match="shard_bytes must be positive; got 0"):
        pack_folder(tmp_path, tmp_path / "out", shard_bytes=0)
    with pytest.raises(UsageError, match="skip_bad needs verify"):
        pack_folder(tmp_path, tmp_path / "out", verify=False, skip_bad=True)
