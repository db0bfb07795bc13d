"""The command `lejepa-data`: verify decodes every image before a run, pack makes shards of a folder."""

import hashlib
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_folders import write_images
from PIL import Image

from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source
from lejepa_fast.data.commands import main
from lejepa_fast.data.commands.pack import pack_folder
from lejepa_fast.data.sources import EncodedSource, FolderSource, ShardSource
from lejepa_fast.errors import RunError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ and val/ with two classes each."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(["ant", "bee"]):
        for split, count in (("train", 30), ("val", 6)):
            path = tmp_path / "set" / split / name
            path.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / f"img {number}.v{label}.JPG", quality=80)
    return tmp_path / "set"


@pytest.fixture
def damaged(folder: Path) -> Path:
    """Three bad files and a CMYK one among the others."""
    train, val = folder / "train" / "ant", folder / "val" / "ant"
    (train / "img 3.v0.JPG").write_bytes((train / "img 3.v0.JPG").read_bytes()[:300])
    (train / "img 7.v0.JPG").write_bytes(b"text")
    (val / "img 1.v0.JPG").write_bytes(b"")
    Image.new("CMYK", (20, 9)).save(train / "img 9.v0.JPG")
    return folder


def test_bad_files_are_listed_and_counted(damaged, tmp_path, capsys, monkeypatch):
    listing = tmp_path / "run" / "bad_images.txt"
    assert main(["verify", str(damaged), "--bad-images", str(listing)]) == 1
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "60", "58", "2", "20", "x", "9", "16", "x", "16"] in rows
    assert ["val", "12", "11", "1", "16", "x", "16", "16", "x", "16"] in rows
    assert ["2", "x", "not", "an", "image"] in rows
    assert all(out.count(f"ant/img {number}.v0.JPG") == 1 for number in (1, 3, 7))
    assert len(listing.read_text().splitlines()) == 3
    # A run that is given the list never touches those files.
    recipe = MultiCropRecipe(global_size=8, local_crops=0, min_image_size=1)
    read: list[int] = []
    encoded = FolderSource.encoded
    monkeypatch.setattr(FolderSource, "encoded", lambda self, i: read.append(i) or encoded(self, i))
    source = open_source(str(damaged), "train")
    bad = {i for i in range(60) if Path(source.describe(i)).name in ("img 3.v0.JPG", "img 7.v0.JPG")}
    options = {"backend": "torchvision", "max_bad_fraction": 0.1}
    loader = multicrop_loader(source, recipe, batch_size=60, bad_images=listing, **options)
    assert set(loader.bad_images) == bad
    list(loader)
    assert set(read) == set(range(60)) - bad


def test_one_image_per_class_leaves_none_out(tmp_path, capsys):
    for name in ("ant", "bee", "cat"):
        write_images(tmp_path / name, 1)
    (tmp_path / "bee" / "000.png").write_bytes(b"text")
    assert main(["verify", str(tmp_path)]) == 2
    assert (
        "none to hold out for validation; add images, or train on all of them with val_fraction 0"
        in capsys.readouterr().err
    )
    assert main(["verify", str(tmp_path), "--val-fraction", "0"]) == 1
    out, err = capsys.readouterr()
    rows = [line.split()[:4] for line in out.splitlines()]
    assert ["train", "3", "2", "1"] in rows
    assert ["val", "0", "0", "0"] in rows
    assert err == ""


def test_a_list_fits_the_share_that_it_was_made_for(tmp_path, capsys, caplog):
    """And where another share is held out, the loader says that its lines are not used."""
    root, lists = tmp_path / "images", [tmp_path / "none.txt", tmp_path / "tenth.txt"]
    for name in ("ant", "bee"):
        write_images(root / name, 40)
        for number in (11, 23, 38):
            (root / name / f"{number:03d}.png").write_bytes(b"text")
    for file, options in zip(lists, (["--val-fraction", "0"], []), strict=True):
        assert main(["verify", str(root), "--bad-images", str(file), *options]) == 1

    def bad_of(file: Path, fraction: float) -> set[str]:
        source = open_source(str(root), "train", val_fraction=fraction)
        recipe, options = MultiCropRecipe(global_size=8, local_crops=0), {"max_bad_fraction": 0.2}
        loader = multicrop_loader(source, recipe, batch_size=8, bad_images=file, **options)
        return {source.describe(index) for index in loader.bad_images}

    bad = {str(root / name / f"{number:03d}.png") for name in ("ant", "bee") for number in (11, 23, 38)}
    training = open_source(str(root), "train")
    in_training = bad & {training.describe(index) for index in range(len(training))}
    assert bad_of(lists[0], 0) == bad
    assert bad_of(lists[1], 0.1) == in_training
    assert not caplog.records  # not even of bad images of the other split
    known = bad_of(lists[0], 0.1)
    assert known < in_training
    (record,) = caplog.records
    text = f"{lists[0]}: {len(in_training - known)} images have other numbers there than here"
    assert record.getMessage().startswith(text)


def test_one_split_alone(damaged, capsys):
    assert main(["verify", str(damaged), "--split", "val"]) == 1
    out = capsys.readouterr().out
    assert "img 1.v0.JPG\tnot an image" in out
    assert ["val", "12", "11", "1"] in [line.split()[:4] for line in out.splitlines()]
    assert "train" not in out
    (damaged / "val" / "ant" / "img 1.v0.JPG").unlink()
    assert main(["verify", str(damaged), "--split", "val"]) == 0


# --- pack ---------------------------------------------------------------------------------------


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
    assert pack_folder(folder, out, shard_mb=8000 / 2**20) == {"train": 60, "val": 12}
    assert (out / "classes.txt").read_text() == "ant\nbee\n"
    shards = sorted((out / "train").iterdir())
    for seed in (0, 1):
        pack_folder(folder, tmp_path / f"seed {seed}", shard_mb=8000 / 2**20, seed=seed)
        again = tmp_path / f"seed {seed}" / "train" / shards[0].name
        assert (again.read_bytes() == shards[0].read_bytes()) == (seed == 0)
    assert shards[0].name == "shard-00000.tar"
    assert len(shards) > 2
    for split in ("train", "val"):
        packed = open_source(str(out), split)
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


def test_pack_a_folder_without_splits(folder, tmp_path):
    assert pack_folder(folder / "train", tmp_path / "out") == {"": 60}
    assert len(open_source(str(tmp_path / "out"), "train")) == 54
    assert pack_folder(folder / "train" / "ant", tmp_path / "flat") == {"": 30}
    assert open_source(str(tmp_path / "flat"), "train").targets is None
    assert not (tmp_path / "flat" / "classes.txt").exists()


def test_verify_and_pack_see_the_files_that_training_sees(folder, tmp_path, capsys, caplog):
    root, out = tmp_path / "data" / "images", tmp_path / "out"
    for split in ("Training", "testing"):
        ant = shutil.copytree(folder / "val" / "ant", root / split / "ant")
        Image.new("RGB", (9, 9)).save(ant / "x.jfif", "JPEG")
        (ant / "x.heic").write_bytes(b"x")
    assert main(["verify", str(root.parent)]) == 0
    printed = capsys.readouterr().out
    assert "train: not read: 1 other files (1 .heic), such as ant/x.heic" in printed
    assert [line.split()[:2] for line in printed.splitlines()][-2:] == [["train", "7"], ["val", "7"]]
    assert pack(root.parent, out) == 0
    assert f"{root / 'testing'}: not packed: 1 other files (1 .heic)" in caplog.text
    for split in ("train", "val"):
        assert digests(open_source(str(out), split)) == digests(open_source(str(root.parent), split))
    assert pack(out, tmp_path / "again") == 2
    assert "expected a folder of images, which alone is packed, got 7 images" in capsys.readouterr().err


def test_pack_leaves_nothing_half_done(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    victim = folder / "val" / "bee" / "img 3.v1.JPG"
    good = victim.read_bytes()
    victim.write_bytes(good[:300])
    assert pack(folder, out) == 1
    error = capsys.readouterr().err
    message = rf"error: cannot read image {victim}: [^<]+; repair it, or remove it from the data set\n"
    assert re.fullmatch(message, error)
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


def test_usage_errors(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    for arguments, text in (
        (["verify", tmp_path / "missing"], "does not exist"),
        (["pack", tmp_path / "missing", tmp_path / "out"], "does not exist"),
        (["index", tmp_path], "no .tar shards in"),
    ):
        assert main([*map(str, arguments)]) == 2
        assert text in capsys.readouterr().err
    assert main(["verify", str(tmp_path), "--threads", "0"]) == 2
    (tmp_path / "file").write_text("x")
    assert pack(tmp_path / "file", tmp_path / "out") == 2
    for size in ("nan", "inf", "-1", "0"):
        assert pack(tmp_path, tmp_path / "out", "--shard-mb", size) == 2
        assert f"shard_mb: expected a size in MiB, above 0, got {float(size)}" in capsys.readouterr().err
    for name in ("a\nb", "caf\udce9"):
        root = tmp_path / repr(name)
        for label in (name, "other"):
            write_images(root / label, 1)
        assert pack(root, tmp_path / "out") == 2
        assert "classes.txt needs names of one line in UTF-8; rename the folder" in capsys.readouterr().err
