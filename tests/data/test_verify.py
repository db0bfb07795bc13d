"""The command that decodes every image before a run."""

from __future__ import annotations

import fcntl
import os
import runpy
import select
import struct
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source
from lejepa_fast.data.commands import main
from lejepa_fast.data.sources import FolderSource


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train/ and val/ with one class each; three bad files and a CMYK one among them."""
    for split, count in (("train", 30), ("val", 4)):
        folder = tmp_path / "set" / split / "ant"
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02d}.jpg")
    train = tmp_path / "set" / "train" / "ant"
    (train / "03.jpg").write_bytes((train / "03.jpg").read_bytes()[:300])
    (train / "07.jpg").write_bytes(b"text")
    (tmp_path / "set" / "val" / "ant" / "01.jpg").write_bytes(b"")
    Image.new("CMYK", (30, 9)).save(train / "09.jpg")
    return tmp_path / "set"


def test_bad_files_are_listed_and_counted(data, tmp_path, capsys, monkeypatch):
    listing = tmp_path / "run" / "quarantine.txt"
    assert main(["verify", str(data), "--quarantine", str(listing)]) == 1
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal
    rows = [line.split() for line in out.splitlines()]
    assert ["train", "30", "28", "2", "30", "x", "9", "24", "x", "20"] in rows
    assert ["val", "4", "3", "1", "24", "x", "20", "24", "x", "20"] in rows
    assert ["2", "x", "not", "an", "image"] in rows
    assert out.count("03.jpg") == out.count("07.jpg") == out.count("01.jpg") == 1
    assert len(listing.read_text().splitlines()) == 3
    # A run that is given the list never touches those files.
    recipe = MultiCropRecipe(global_size=8, local_crops=0, min_image_size=1)
    read: list[int] = []
    encoded = FolderSource.encoded
    monkeypatch.setattr(FolderSource, "encoded", lambda self, i: read.append(i) or encoded(self, i))
    source = open_source(str(data), "train")
    loader = multicrop_loader(
        source, recipe, batch_size=30, bad_images=listing, backend="torchvision", max_bad_fraction=0.1
    )
    assert loader.bad_images == [3, 7]
    list(loader)
    assert set(read) == set(range(30)) - {3, 7}


def test_progress_is_shown_on_a_terminal(data, monkeypatch, capsys):
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # 24 lines of 100 columns
    with os.fdopen(end, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["verify", str(data)]) == 1
        stream.flush()
        shown = ""
        while not shown.endswith("\r\n") or select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 4096).decode()
    os.close(terminal)
    for count in (30, 4):  # of each split, from nothing to everything
        assert f"| 0/{count} " in shown
        assert f"| {count}/{count} " in shown
    assert "%|" not in capsys.readouterr().out


def test_small_images_and_good_sets(data, tmp_path, capsys):
    assert main(["verify", str(data), "--split", "val", "--min-size", "21"]) == 1
    assert "24 x 20 px, the crops need a short side of 21 px" in capsys.readouterr().out
    (data / "val" / "ant" / "01.jpg").unlink()
    assert main(["verify", str(data), "--split", "val"]) == 0


def test_one_image_per_class_leaves_none_out(tmp_path, capsys):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "few" / name / "0.png")
    assert main(["verify", str(tmp_path / "few")]) == 0
    (tmp_path / "few" / "bee" / "0.png").write_bytes(b"text")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "few")]) == 1
    out, err = capsys.readouterr()
    assert ["all", "3", "2", "1"] in [line.split()[:4] for line in out.splitlines()]
    assert err == ""


def test_the_package_is_the_command(data, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lejepa_fast.data", "verify", str(data), "--split", "val"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module("lejepa_fast.data", run_name="__main__")
    assert "01.jpg\tnot an image" in capsys.readouterr().out


def test_usage_errors(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert main(["verify", str(tmp_path / "missing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["verify", str(tmp_path), "--threads", "0"]) == 2
