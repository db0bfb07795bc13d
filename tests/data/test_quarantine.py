"""Bad images in the middle of a run: written down, and replaced by others."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from loader_backends import on
from PIL import Image

from lejepa_fast.data import MultiCropRecipe, eval_loader, multicrop_loader
from lejepa_fast.data import bad_images as quarantine
from lejepa_fast.data.backends.reading import read_image
from lejepa_fast.data.bad_images import Quarantine
from lejepa_fast.data.sources import FolderSource, ImageSource
from lejepa_fast.data.sources.shards import ShardSource
from lejepa_fast.errors import RunError, UsageError


def flat_folder(root: Path, count: int = 70) -> Path:
    root.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(root / f"{number:03d}.png")
    return root


PLAIN = MultiCropRecipe(
    global_size=24, local_crops=0, jitter_prob=0, grayscale_prob=0, blur_prob=0, solarize_prob=0
)


def numbers(made) -> list[int]:
    """The red channel tells which image it is."""
    return [int(value) for views, _ in made for value in views[0][:, 0, 12, 12]]


def read_quarantine(file: Path) -> dict[str, str]:
    """Reasons by file name."""
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    assert all(len(row) == 3 for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
    return {Path(row[0]).name: row[2] for row in rows}


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_and_small_images_are_quarantined_and_replaced(tmp_path, backend, workers):
    source = FolderSource(flat_folder(tmp_path / "images", 70))
    listing = tmp_path / "run" / "quarantine.txt"
    options = {
        "batch_size": 8,
        "num_workers": workers,
        **on(backend),
        "dtype": torch.uint8,
        "quarantine": listing,
    }
    recipe = PLAIN
    Path(source.describe(3)).write_bytes(b"no image at all")
    Image.new("RGB", (40, 23)).save(source.describe(9))
    seen = numbers(multicrop_loader(source, recipe, **options))
    # 64 places, 68 good images: nobody is seen twice, and no bad one at all.
    assert len(seen) == len(set(seen)) == 64
    assert not {3, 9} & set(seen)
    reasons = {"003.png": "not an image", "009.png": "40 x 23 px, the crops need a short side of 24 px"}
    found = read_quarantine(listing)
    assert found.items() <= reasons.items()  # those that this epoch would have dropped are not met
    # What the file lists is not written again, and other places stay as they were.
    before = listing.read_text()
    assert numbers(multicrop_loader(source, recipe, **options)) == seen
    assert listing.read_text() == before
    one = multicrop_loader(source, recipe, **options)
    plain = [key.indices for key in one._schedule.keys(0)]
    differing = [a for a, b in zip([i for key in plain for i in key], seen, strict=True) if a != b]
    assert set(differing) <= {3, 9}
    with pytest.raises(
        RunError, match=r"1 of 70 images are bad, more than the allowed 0 % \(max_bad_f"
    ) as caught:
        list(multicrop_loader(source, recipe, **{**options, "quarantine": None}, max_bad_fraction=0.0))
    assert "\n" not in str(caught.value)


def test_data_without_a_readable_image_end_the_run(tmp_path, backend):
    source = FolderSource(flat_folder(tmp_path / "images", 4))
    for index in range(4):
        Path(source.describe(index)).write_bytes(b"no image at all")
    loader = multicrop_loader(source, PLAIN, batch_size=2, **on(backend), max_bad_fraction=1.0)
    with pytest.raises(RunError, match=r"^no readable image is left in the data set"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_listed_images_are_not_tried_again(tmp_path, backend, workers):
    # The listed files are good: only the list can keep them out, as it must after a passing fault.
    source = FolderSource(flat_folder(tmp_path / "images", 70))
    listing = tmp_path / "quarantine.txt"
    listing.write_text("".join(f"{source.describe(index)}\t{index}\tdisk error\n" for index in (3, 9)))
    shared = {"num_workers": workers, **on(backend), "quarantine": listing, "max_bad_fraction": 0.2}
    options = {"batch_size": 8, "dtype": torch.uint8, **shared}
    made = multicrop_loader(source, PLAIN, **options)
    for epoch in range(3):
        plain = [index for key in made._schedule.keys(epoch) for index in key.indices]
        seen = numbers(made)
        assert not {3, 9} & set(seen)
        assert len(set(seen)) == 64
        assert {a for a, b in zip(plain, seen, strict=True) if a != b} == {3, 9} & set(
            plain
        )  # other places stay
    assert len(listing.read_text().splitlines()) == 2
    # What becomes known between two passes reaches workers that live already, and a resumed run agrees.
    made._quarantine.learn([20, 21, 22])
    made.set_epoch(0)
    whole = []
    for views, _ in made:
        whole.append(numbers([(views, None)]))
        if len(whole) == 4:
            state = made.state_dict()
    assert not {3, 9, 20, 21, 22} & {index for batch in whole for index in batch}
    resumed = multicrop_loader(source, PLAIN, **options)
    resumed.load_state_dict(state)
    assert numbers(resumed) == [index for batch in whole[4:] for index in batch]
    images = eval_loader(source, image_size=8, batch_size=70, **shared)
    assert [len(batch) for batch, _ in images] == [65]


def test_a_state_of_other_images_hands_over_the_epoch_alone(tmp_path, backend, caplog):
    def of(name: str, **options):
        source = FolderSource(tmp_path / name)
        return multicrop_loader(source, PLAIN, batch_size=4, **on(backend), **options)

    for name in ("first", "moved", "other"):
        flat_folder(tmp_path / name, 18)
    (tmp_path / "other" / "017.png").rename(tmp_path / "other" / "018.png")  # as many images
    listing = tmp_path / "quarantine.txt"
    listing.write_text("".join(f"{tmp_path}/first/00{index}.png\t{index}\ttext\n" for index in (5, 6)))
    made = of("first", quarantine=listing, max_bad_fraction=0.2)
    states = [made.state_dict() for _ in made]
    middle, state = states[1], states[-1]
    moved = of("moved")
    moved.load_state_dict(state)
    assert (moved.quarantined, moved.epoch) == ([5, 6], 1)
    assert "other images" not in caplog.text
    other = of("other")
    other.load_state_dict(state)
    assert (other.quarantined, other.epoch) == ([], 1)
    assert "of other images" in caplog.text
    with pytest.raises(UsageError, match=r"mid-epoch of other images.*from the end of an epoch"):
        other.load_state_dict(middle)
    del middle["names_sha256"]  # of an older version: only the number of images tells
    other.load_state_dict(middle)
    assert other.quarantined == [5, 6]


def test_an_older_state_of_more_images_hands_over_the_bad_ones_that_are_left(tmp_path, backend):
    source = FolderSource(flat_folder(tmp_path / "images", 18))

    def resume(state):
        made = multicrop_loader(source, PLAIN, batch_size=4, max_bad_fraction=0.2, **on(backend))
        made.load_state_dict(state)
        return made

    old = {"epoch": 3, "batch": 0, "bad": [17, 18, 5, 30], "reasons": ["a", "b", "c", "d"]}
    made = resume(old)
    assert (made.epoch, made.quarantined, made.state_dict()["reasons"]) == (3, [5, 17], ["c", "a"])
    assert resume({k: v for k, v in old.items() if k != "reasons"}).quarantined == [5, 17]
    # One that tells its images cannot know of others, and in mid-epoch these must be the same.
    for change in ({"images": 18}, {"batch": 2}):
        with pytest.raises(UsageError, match="'bad' must be numbers of 18 images"):
            resume({**old, **change})


def resumed_elsewhere(tmp_path: Path, backend: str):
    """A run of 2 epochs, all 4 bad ones of its 18 images known: (their reasons, how to make its loader)."""
    source = FolderSource(flat_folder(tmp_path / "images", 18))
    for index in (1, 5, 9):
        Path(source.describe(index)).write_bytes(b"no image at all")
    Image.new("RGB", (40, 23)).save(source.describe(13))
    text = "not an image"
    small = "40 x 23 px, the crops need a short side of 24 px"
    reasons = {"001.png": text, "005.png": text, "009.png": text, "013.png": small}

    def make(listing: Path | None, max_bad_fraction: float = 0.5):
        options = {"quarantine": listing, "max_bad_fraction": max_bad_fraction, "backend": backend}
        return multicrop_loader(source, PLAIN, batch_size=9, **options)

    return reasons, make


def test_a_resumed_run_lists_what_it_knows_in_a_new_file(tmp_path, backend):
    reasons, make = resumed_elsewhere(tmp_path, backend)
    first = make(None)
    state = [first.state_dict() for _ in first][-1]
    assert state["bad"] == [1, 5, 9, 13]
    listing = tmp_path / "other" / "quarantine.txt"
    resumed = make(listing)
    assert not listing.exists()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert read_quarantine(listing) == reasons
    before = listing.read_text()
    again = make(listing)
    again.load_state_dict(state)
    assert listing.read_text() == before
    # A file that somebody deletes in the middle is whole again with the next bad image.
    listing.unlink()
    resumed._quarantine.add(17, "broken")
    assert read_quarantine(listing) == reasons | {"017.png": "broken"}
    del state["reasons"]  # of an older version
    older = make(tmp_path / "older.txt")
    older.load_state_dict(state)
    assert read_quarantine(tmp_path / "older.txt") == dict.fromkeys(
        reasons, "bad in an earlier part of the run"
    )


@pytest.mark.parametrize("known_by", ["file", "state"])
def test_too_many_bad_images_of_an_earlier_part_are_told_as_such(tmp_path, backend, known_by):
    _, make = resumed_elsewhere(tmp_path, backend)
    first = make(tmp_path / "quarantine.txt")
    state = [first.state_dict() for _ in first][-1]
    for index in (1, 5, 9, 13):  # repaired, so nothing else tells of them
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / f"{index:03d}.png")
    resumed = make(tmp_path / "quarantine.txt" if known_by == "file" else None, max_bad_fraction=0.1)
    if known_by == "state":
        resumed.load_state_dict(state)
    with pytest.raises(RunError) as caught:
        next(iter(resumed))
    last = re.escape(f"the last one: {tmp_path}/images/0") + r"\d+.png: (not an image|40 x 23 px, .* 24 px); "
    assert re.fullmatch(
        r"4 of 18 images are bad \(4 of them known from an earlier part of the run or the quarantine file\), "
        rf"more than the allowed 10 % \(max_bad_fraction\); {last}raise max_bad_fraction to go on without "
        "them, or repair them and start a new run, with an empty quarantine file",
        str(caught.value),
    )


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_huge_files_are_not_read(tmp_path, backend, kind):
    # Sparse: 200 GiB of zeros that take no space, in a folder and as the last member of a shard.
    source: ImageSource = FolderSource(flat_folder(tmp_path / "images", 9))
    huge, bytes_ = 4, 200 << 30
    if kind == "folder":
        os.truncate(source.describe(huge), bytes_)
    else:
        shard, huge = tmp_path / "a.tar", 8
        with open(shard, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for index in range(8):
                tar.add(source.describe(index), f"{index}.png")
            info = tarfile.TarInfo("8.png")
            info.size = bytes_
            tar.addfile(info)
            file.seek(bytes_, os.SEEK_CUR)
            tar.offset += bytes_
        source = ShardSource([shard])
    listing = tmp_path / "quarantine.txt"
    options = {**on(backend), "quarantine": listing, "max_bad_fraction": 0.2}
    images = eval_loader(source, image_size=8, batch_size=9, **options)
    assert [len(batch) for batch, _ in images] == [8]
    (line,) = listing.read_text().splitlines()
    reason = "204,800 MiB, more than the 256 that an image file may have"
    assert line.split("\t")[1:] == [str(huge), reason]


def test_what_is_no_file_is_quarantined(tmp_path, backend):
    # Reading the one would wait for a writer for ever, reading the other would never end.
    flat_folder(tmp_path / "images", 9).rename(tmp_path / "plain")
    root = tmp_path / "images" / "ant"
    root.parent.mkdir()
    (tmp_path / "plain").rename(root)
    os.mkfifo(root / "pipe.png")
    (root / "zero.png").symlink_to("/dev/zero")
    listing = tmp_path / "quarantine.txt"
    options = {**on(backend), "quarantine": listing, "max_bad_fraction": 0.3}
    images = eval_loader(FolderSource(root.parent), image_size=8, batch_size=11, **options)
    assert [len(batch) for batch, _ in images] == [9]
    reason = "a pipe or device, not a file"
    assert read_quarantine(listing) == {"pipe.png": reason, "zero.png": reason}


# --- the file -----------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path) -> FolderSource:
    return FolderSource(flat_folder(tmp_path / "images", 3))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_fork_under_the_lock_does_not_keep_it(tmp_path):
    file = tmp_path / "quarantine.txt"
    with quarantine._locked(file):
        worker = os.fork()  # as a loader worker, it lives on with what was open
        if worker == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with open(file) as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_file_that_cannot_be_written_shows_at_once(tmp_path, three):
    (tmp_path / "plain").touch()
    for file in (tmp_path / "images", tmp_path / "plain" / "quarantine.txt"):
        with pytest.raises(UsageError, match=rf"^quarantine: cannot write {file}: .*; choose another file"):
            Quarantine(three, file)


def test_a_look_that_fails_is_tried_again(tmp_path, three, monkeypatch, caplog):
    file = tmp_path / "quarantine.txt"
    one, other = (Quarantine(three, file, max_bad_fraction=1.0) for _ in range(2))
    other.add(1, "broken")
    with monkeypatch.context() as patch:

        def stale(path, **_):
            raise OSError(errno.ESTALE, "Stale file handle")

        patch.setattr(Path, "stat", stale)
        one.check()
        one.check()
    assert one.known == set()
    (warning,) = (record.message for record in caplog.records if "Stale" in record.message)
    assert warning == f"cannot read {file}: Stale file handle; trying again at every step"
    one.check()
    assert one.known == {1}


def test_a_disk_that_becomes_full_stops_the_run_and_spoils_no_line(tmp_path, three, monkeypatch):
    file = tmp_path / "quarantine.txt"
    one = Quarantine(three, file, max_bad_fraction=1.0)
    write, room = os.write, 5

    def short(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        data, room = data[:room], max(0, room - len(data))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        with pytest.raises(RunError, match=r"No space left on device; free some space$"):
            one.add(1, "broken")
    assert one.known == set()
    assert len(file.read_bytes()) == 5
    one.add(2, "broken")
    assert Quarantine(three, file).known == {2}


def test_a_file_system_without_locks_is_told_of_once(tmp_path, three, monkeypatch, caplog):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(quarantine.fcntl, "flock", no_lock)
    one = Quarantine(three, tmp_path / "quarantine.txt", max_bad_fraction=1.0)
    one.add(0, "broken")
    one.add(1, "broken")
    assert Quarantine(three, tmp_path / "quarantine.txt").known == {0, 1}
    (warning,) = (record.message for record in caplog.records if "lock" in record.message)
    assert "give each machine its own file" in warning


def test_a_number_of_any_length_is_no_image(tmp_path, three):
    file = tmp_path / "quarantine.txt"
    file.write_text(f"{three.describe(1)}\t{'1' * 5000}\tbroken\n{three.describe(2)}\t2\tbroken\n")
    assert Quarantine(three, file).known == {2}


# --- shortages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_a_shortage_of_files_is_not_blamed_on_an_image(tmp_path, three, kind):
    source: ImageSource = three
    if kind == "shard":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for index in range(3):
                tar.add(three.describe(index), f"{index}.png")
        source = ShardSource([tmp_path / "a.tar"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_free = os.open(os.devnull, os.O_RDONLY)
    os.close(next_free)
    calls = [
        lambda: source.load(1),
        lambda: source.image_size(1),
        lambda: read_image(source, 1, 1),
        lambda: read_image(source, 1, 1, careful=True),
    ]
    if kind == "shard":
        calls.append(lambda: ShardSource([tmp_path / "a.tar"]))
    said = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, hard))
    try:
        for call in calls:
            try:
                said.append(call())
            except Exception as error:
                said.append(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for error in said:
        assert type(error) is RunError, error
        assert "raise the limit, 'ulimit -n'" in str(error)
