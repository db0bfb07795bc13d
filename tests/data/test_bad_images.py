"""Bad images in the middle of a run: listed, replaced by others, the same ones on any number of ranks."""

import errno
import json
import logging
import os
import re
import resource
import signal
import socket
import tarfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from loader_backends import (
    CROPS_ONLY,
    AwayFolder,
    NumberedFolder,
    NumberedSource,
    broken_png,
    numbered_folder,
    on,
    picture,
    skip_without,
)
from odd_files import bad_huffman, saved
from PIL import Image

from lejepa_fast.data import MultiCropLoader, bad_images, eval_loader, multicrop_loader, open_source
from lejepa_fast.data.backends import choose_backend
from lejepa_fast.data.bad_images import BadImages
from lejepa_fast.data.sampler import EpochSchedule
from lejepa_fast.data.sources import FolderSource, ImageSource, UnreadableImageError, outages
from lejepa_fast.data.sources.shards import ShardSource
from lejepa_fast.data.sources.torchvision_sets import ArraySource
from lejepa_fast.data.views import EvalViews, TrainViews
from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.regular_files import open_regular

RECIPE = CROPS_ONLY
BAD = (1, 2, 5, 30, 31, 44, 60)  # of 79


def damaged_folder(root: Path, count: int = 79, bad: Iterable[int] = BAD) -> NumberedFolder:
    """The headers of the bad files are fine: nobody sees them before the run."""
    return numbered_folder(root, count, **{f"n{number}": broken_png() for number in bad})


def loaders_of(source: ImageSource, world: int, batch: int, **options) -> list[MultiCropLoader]:
    options = {"dtype": torch.uint8, "max_bad_fraction": 0.5, "seed": 3, **options}
    return [
        multicrop_loader(source, RECIPE, batch_size=batch, rank=rank, world_size=world, **options)
        for rank in range(world)
    ]


def steps_of(loaders: list[MultiCropLoader], count: int | None = None) -> tuple[list[list[int]], dict]:
    """The images of so many steps (None: all) over all ranks, and the state of rank 0 after them."""
    steps: list[list[int]] = []
    passes = [iter(loader) for loader in loaders]
    state = loaders[0].state_dict()
    while len(steps) != count:
        batches = [next(one, None) for one in passes]
        assert len({batch is None for batch in batches}) == 1  # none ends before the others
        if batches[0] is None:
            break
        steps.append([label for batch in batches for label in batch[1].tolist()])
        state = loaders[0].state_dict()
    return steps, json.loads(json.dumps(state))


def expected_steps(source: ImageSource, bad: Iterable[int], batch: int, epoch: int = 0) -> list[list[int]]:
    """What the documented rule gives: the first good image of the sequence of each place."""
    views, bad = TrainViews(source, RECIPE, 3), set(bad)

    def good(index: int) -> int:
        while index in bad:
            index = views.substitute(epoch, index)
        return index

    return [[good(i) for i in key.indices] for key in EpochSchedule(len(source), batch, 3).keys(epoch, 0)]


def listed(file: Path) -> dict[str, str]:
    """Reasons by file name."""
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    assert all(len(row) == 3 for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
    return {Path(row[0]).name: row[2] for row in rows}


# --- substitutes --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 12, 97, 360])
def test_substitutes_differ_and_reach_every_image(count):
    strides = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (-5, 7)):
        views = TrainViews(NumberedSource(count), RECIPE, seed)
        firsts = [views.substitute(epoch, index) for index in range(count)]
        assert sorted(firsts) == list(range(count))  # different bad images get different substitutes
        seen, index = [], 0
        for _ in range(count):
            seen.append(index)
            index = views.substitute(epoch, index)
        assert index == 0
        assert sorted(seen) == list(range(count))
        strides.add(firsts[0])
    assert len(strides) > 1 or count <= 2  # the seed and the epoch tell
    assert EvalViews(NumberedSource(count), 8).substitute(0, 0) is None


def test_unreadable_and_small_images_are_listed_and_replaced(tmp_path, backend, caplog):
    jpeg = bad_huffman(saved(picture(), "JPEG"))  # only decoding finds it out
    bad = {3, 9, 11, 29}
    source = numbered_folder(tmp_path / "images", 40, n3=b"no image at all", n11=broken_png(), n29=jpeg)
    Image.new("RGB", (40, 23)).save(source.describe(9))
    file = tmp_path / "run" / "bad_images.txt"
    options = {"num_workers": 1, **on(backend), "bad_images": file}
    loaders = loaders_of(source, 1, 8, **options)
    assert not file.parent.exists()  # a run that ends before its first bad image leaves nothing
    for epoch in range(2):
        assert steps_of(loaders)[0] == expected_steps(source, bad, 8, epoch)
    assert loaders[0].bad_images == sorted(bad)
    assert ("DALI failed" in caplog.text) == (backend in ("dali", "gpu"))
    before, reasons = file.read_text(), listed(file)
    # Of another size the crops would fit image 9, so neither the file nor a state keeps it.
    lasting = bad - {9}
    assert reasons.keys() == {f"{index:03d}.png" for index in lasting}
    assert [index for index, _ in loaders[0].state_dict()["bad"]] == sorted(lasting)
    assert reasons["003.png"] == "not an image"
    small = {"009.png": "40 x 23 px, the crops need a short side of 24 px"}
    for name, reason in (reasons | small).items():
        assert f"bad image {tmp_path}/images/{name}: {reason}" in caplog.text
    # Images in the file are not tried again, even where they are good now, and not written again.
    for index in bad:
        picture().save(source.describe(index))
    loaders = loaders_of(source, 1, 8, **options)
    assert steps_of(loaders)[0] == expected_steps(source, lasting, 8)
    assert file.read_text() == before
    # A state teaches a loader that has been in use.
    state = loaders[0].state_dict() | {"bad": [[index, "broken"] for index in (20, 21, 22)]}
    loaders[0].load_state_dict(state)
    assert steps_of(loaders)[0] == expected_steps(source, lasting | {20, 21, 22}, 8, 1)
    images = eval_loader(source, image_size=8, batch_size=40, **options, max_bad_fraction=0.2)
    assert [len(batch) for batch, _ in images] == [34]


def test_data_without_a_readable_image_end_the_run(tmp_path, backend):
    source = damaged_folder(tmp_path / "images", 4, range(4))
    (loader,) = loaders_of(source, 1, 2, **on(backend), max_bad_fraction=1.0)
    with pytest.raises(RunError, match=r"^no readable image is left in the data set"):
        list(loader)
    assert list(eval_loader(source, image_size=8, batch_size=3, **on(backend), max_bad_fraction=1.0)) == []


# --- ranks and resuming -------------------------------------------------------------------------


def test_any_number_of_ranks_takes_the_same_images(tmp_path, backend):
    """Also resumed on another number of ranks and backend, although no rank knows what the others met."""
    source = damaged_folder(tmp_path / "images")
    seen: list[list[int]] = []
    state = None
    for world, name, count in ((2, backend, 2), (1, "torchvision", 2), (3, backend, None)):
        loaders = loaders_of(source, world, 12 // world, **on(name))
        for loader in loaders if state else []:
            loader.load_state_dict(state)
        steps, state = steps_of(loaders, count)
        seen += steps
    assert seen == expected_steps(source, BAD, 12)
    assert (state["epoch"], state["images_seen"]) == (1, 0)


def test_another_global_batch_goes_on_at_the_next_whole_batch(tmp_path):
    source = damaged_folder(tmp_path / "images")
    _, state = steps_of(loaders_of(source, 2, 5, backend="torchvision"), 3)
    assert state["images_seen"] == 30
    # Of 60 the only batch is begun: the next epoch.
    for batch, (epoch, first) in ((7, (0, 5)), (15, (0, 2)), (31, (0, 1)), (60, (1, 0))):
        (loader,) = loaders_of(source, 1, batch, backend="torchvision")
        loader.load_state_dict(state)
        assert loader.position == (epoch, first)
        assert steps_of([loader])[0] == expected_steps(source, BAD, batch, epoch)[first:]


def test_a_state_of_other_images_hands_over_the_epoch_alone(tmp_path, caplog):
    def of(name: str, **options) -> MultiCropLoader:
        return loaders_of(FolderSource(tmp_path / name), 1, 4, backend="torchvision", **options)[0]

    for name in ("first", "moved", "other"):
        damaged_folder(tmp_path / name, 18, (5, 6))
    (tmp_path / "other" / "017.png").rename(tmp_path / "other" / "018.png")  # as many images
    made = of("first")
    states = [made.state_dict() for _ in made]
    moved, other = of("moved"), of("other")
    moved.load_state_dict(states[-1])
    assert (moved.bad_images, moved.epoch) == ([5, 6], 1)
    assert "other images" not in caplog.text
    other.load_state_dict(states[-1])
    assert (other.bad_images, other.epoch) == ([], 1)
    assert "of other images" in caplog.text
    with pytest.raises(UsageError, match=r"mid-epoch with names_sha256 .*from the end of an epoch"):
        other.load_state_dict(states[1])


def test_a_resumed_run_lists_what_it_knows_in_a_new_file(tmp_path):
    source = damaged_folder(tmp_path / "images")
    state = steps_of(loaders_of(source, 1, 79, backend="torchvision"))[1]
    assert [index for index, _ in state["bad"]] == list(BAD)
    file = tmp_path / "other" / "bad_images.txt"
    ranks = loaders_of(source, 2, 8, backend="torchvision", bad_images=file)
    for rank in ranks[::-1]:
        assert not file.exists()
        rank.load_state_dict(state)  # rank 0 alone writes
    assert listed(file) == {source.name_of(index): reason for index, reason in state["bad"]}


def test_ranks_read_what_others_met_when_an_epoch_begins(tmp_path, backend):
    source = damaged_folder(tmp_path / "images")
    file = tmp_path / "bad_images.txt"
    ranks = loaders_of(source, 2, 6, **on(backend), bad_images=file)
    steps_of(ranks)
    before = file.read_text()
    assert steps_of(ranks)[0] == expected_steps(source, BAD, 12, 1)
    assert file.read_text().startswith(before)
    met = {source.describe(index) for index in BAD}
    assert {line.partition("\t")[0] for line in before.splitlines()} <= met
    known = {line.split("\t")[1] for line in file.read_text().splitlines()}
    for rank in ranks:
        next(iter(rank))
        assert known <= set(map(str, rank.bad_images))


# --- too many -----------------------------------------------------------------------------------


def test_too_many_bad_images_stop_the_run(tmp_path, backend):
    source = damaged_folder(tmp_path / "images")
    # Threads may find more before they are told to stop.
    (loader,) = loaders_of(source, 1, 79, **on(backend), max_bad_fraction=0.05)
    last = rf"{tmp_path}/images/0\d\d\.png: .+; repair or remove them \(`lejepa-data verify` lists all\)"
    allowed = r"more than the allowed 5 % \(max_bad_fraction\)"
    message = rf"[4-7] of 79 images are bad, {allowed}; the last one: {last}"
    with pytest.raises(RunError, match=rf"^{message}, or raise max_bad_fraction$"):
        list(loader)
    (loader,) = loaders_of(source, 1, 79, **on(backend), max_bad_fraction=0.0)
    with pytest.raises(RunError, match=rf"^[1-7] of 79 images are bad, more than the allowed 0 % .* {last}$"):
        list(loader)
    # A single file never stops a run that allows for any.
    one = damaged_folder(tmp_path / "one", 8, [3])
    assert len(list(loaders_of(one, 1, 8, **on(backend), max_bad_fraction=0.01)[0])) == 1


@pytest.mark.parametrize("known_by", ["file", "state"])
def test_too_many_bad_images_of_before_are_told_as_such(tmp_path, known_by):
    source = damaged_folder(tmp_path / "images")
    file = tmp_path / "bad_images.txt"
    state = steps_of(loaders_of(source, 1, 79, backend="torchvision", bad_images=file))[1]
    options = {"bad_images": file if known_by == "file" else None, "max_bad_fraction": 0.05}
    (resumed,) = loaders_of(source, 1, 8, backend="torchvision", **options)
    if known_by == "state":
        resumed.load_state_dict(state)
    message = r"^7 of 79 images are bad \(7 of them listed before this start\).*begin with an empty"
    with pytest.raises(RunError, match=message):
        next(iter(resumed))


# --- odd files ----------------------------------------------------------------------------------


def shard_of(source: FolderSource, path: Path) -> ShardSource:
    """Its files in a shard."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index in range(len(source)):
            tar.add(source.describe(index), f"{index}.png")
    return ShardSource([path])


def test_huge_files_pipes_and_devices_are_not_read(tmp_path, backend):
    """Reading a pipe would wait for a writer forever, reading a device would never end."""
    root = tmp_path / "images" / "ant"
    numbered_folder(root, 9)
    (root / "huge.png").touch()
    os.truncate(root / "huge.png", 200 << 30)
    os.mkfifo(root / "pipe.png")
    (root / "zero.png").symlink_to("/dev/zero")
    source = FolderSource(root.parent)
    options = {**on(backend), "bad_images": tmp_path / "bad_images.txt", "max_bad_fraction": 0.3}
    assert [len(batch) for batch, _ in eval_loader(source, image_size=8, batch_size=12, **options)] == [9]
    reasons = dict.fromkeys(("pipe.png", "zero.png"), "a pipe or device, not a file")
    reasons["huge.png"] = "204,800 MiB, more than the 256 that an image file may have"
    assert listed(tmp_path / "bad_images.txt") == reasons


def test_only_regular_files_are_opened(tmp_path):
    """Also for writing: a pipe without a reader would wait for one, and a device would take everything."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket", "/dev/zero", "/dev/null"):
            for mode in ("rb", "ab", "ab+", "r"):
                with pytest.raises(OSError, match="a pipe or device, not a file") as caught:
                    open_regular(path, mode)
                assert caught.value.filename == str(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with open_regular(tmp_path / "file", "ab+", buffering=0) as file:
        assert (file.write(b"text"), file.seek(0), file.read()) == (4, 0, b"text")


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_a_shortage_of_open_files_is_not_blamed_on_an_image(tmp_path, kind):
    source: ImageSource = numbered_folder(tmp_path / "images", 3)
    if kind == "shard":
        source = shard_of(source, tmp_path / "a.tar")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_free = os.open(os.devnull, os.O_RDONLY)
    os.close(next_free)
    views = EvalViews(source, 8)
    calls = [lambda: source.load(1), lambda: source.image_size(1)]
    if choose_backend.dali_fault(False) is None:
        from lejepa_fast.data.backends.dali_backend import read_encoded

        calls += [lambda: read_encoded(views, 0, 1), lambda: read_encoded(views, 0, 1, careful=True)]
    if kind == "shard":
        calls.append(lambda: ShardSource([tmp_path / "a.tar"]))
    said: list[str] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_free, hard))
    try:
        for call in calls:
            try:
                said.append(str(call()))
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(re.match(r"RunError: .*raise the limit, 'ulimit -n'", text) for text in said), said


# --- data that are away -------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """What readers wait, in seconds; they do not really wait."""
    seconds: list[float] = []
    monkeypatch.setattr(outages, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


def refuse(number: int, place: Path, monkeypatch) -> None:
    """Opening this file or folder fails."""
    opened = os.open

    def refusing(path, *arguments, **options):
        if Path(path) == place:
            raise OSError(number, os.strerror(number), path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)


def linked(file: Path, target: str | Path) -> None:
    file.unlink()
    file.symlink_to(target)


# What happens to a file, and as what it is listed; None: what it lies on is away.
HARM: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str | None]] = {
    "deleted": (lambda file, _: file.unlink(), "No such file or directory"),
    "link to a deleted file": (lambda file, _: linked(file, file.with_name("none")), "No such file or dir"),
    "link to itself": (lambda file, _: linked(file, file), "Too many levels"),
    "a folder now": (lambda file, _: (file.unlink(), file.mkdir()), "Is a directory"),
    "no right to read": (lambda file, patch: refuse(errno.EACCES, file, patch), "Permission denied"),
    **{
        errno.errorcode[number]: (lambda file, patch, number=number: refuse(number, file, patch), None)
        for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)
    },
    "no right to enter": (
        lambda file, patch: [refuse(errno.EACCES, path, patch) for path in (file, file.parent)],
        None,
    ),
    "folder moved": (lambda file, _: file.parent.rename(file.parent.with_name("other")), None),
    "mount point": (lambda file, _: [entry.unlink() for entry in file.parent.iterdir()], None),
    "link to a disk": (lambda file, _: linked(file, "/nowhere/disk/1.png"), None),
}


@pytest.mark.parametrize("kind", ["folder", "shard"])
@pytest.mark.parametrize("how", HARM)
def test_data_that_are_away_are_waited_for_and_no_bad_image(tmp_path, how, kind, monkeypatch, waits):
    """A file is bad while its folder is there. Of a shard, no image is to blame in any case."""
    source: ImageSource = numbered_folder(tmp_path / "images", 3)
    file = Path(source.describe(1))
    if kind == "shard":
        file = tmp_path / "shards" / "1.tar"
        source = shard_of(source, file)
    harm, reason = HARM[how]
    harm(file, monkeypatch)
    with pytest.raises(RunError, match=rf"^cannot read image {file}") as caught:
        source.load(1)
    bad = reason is not None and kind == "folder"
    assert isinstance(caught.value, UnreadableImageError) == bad
    assert (reason if bad else "still after 4.5 s; check the disk") in str(caught.value)
    assert waits == ([] if bad else list(outages.RETRY_DELAYS))


def test_a_shard_is_waited_for_when_it_is_opened(tmp_path, monkeypatch, waits):
    images, tmp_path = tmp_path / "images", tmp_path / "shards"
    source = shard_of(numbered_folder(images, 3), tmp_path / "1.tar")
    with monkeypatch.context() as patch:
        refuse(errno.ESTALE, tmp_path / "1.tar", patch)
        with pytest.raises(RunError, match=r"^cannot read the shard .*/1\.tar: Stale file handle, still"):
            ShardSource([tmp_path / "1.tar"])
    assert waits == list(outages.RETRY_DELAYS)
    (tmp_path / "1.tar").unlink()
    os.mkfifo(tmp_path / "1.tar")  # at once, and not for ever
    with pytest.raises(RunError, match=r"1\.png: a pipe or device, not a file; put the file back"):
        source.load(1)
    for start in (lambda: ShardSource([tmp_path / "1.tar"]), lambda: open_source(str(tmp_path), "train")):
        with pytest.raises(UsageError, match=r"^cannot read the shard .*: a pipe or device, not a file"):
            start()
    assert waits == list(outages.RETRY_DELAYS)


class AwayArrays(list):
    """A torchvision data set that reads one file for all images, as PCAM does."""

    classes, targets = None, (0, 1, 2)

    def __getitem__(self, index: int) -> NoReturn:
        raise OSError("cannot open the file of all images")


def test_arrays_that_are_away_are_no_bad_images(waits):
    with pytest.raises(RunError, match=r"^cannot read image number 1 of .*: cannot open the file of all"):
        ArraySource(AwayArrays(range(3)), "PCAM").load(1)
    assert waits == list(outages.RETRY_DELAYS)


@pytest.mark.parametrize("back", [True, False])
def test_a_folder_that_is_moved_away_in_mid_epoch_costs_no_image(tmp_path, backend, back, monkeypatch):
    file = tmp_path / "bad_images.txt"
    source = AwayFolder(numbered_folder(tmp_path / "images", 12).root)
    (loader,) = loaders_of(source, 1, 4, **on(backend), num_workers=2, bad_images=file)
    # The loader has looked at some images. Other threads wait until it is back, however long that takes.
    source.back, source.armed = back, True
    monkeypatch.setattr(outages, "RETRY_DELAYS", (0.01,) * (100_000 if back else 2))
    if back:
        steps, state = steps_of([loader])
        assert steps == expected_steps(source, (), 4)
        assert state["bad"] == []
    else:
        with pytest.raises(RunError, match=r"^cannot read image .*: No such file or directory, still after"):
            list(loader)
        assert loader.state_dict()["bad"] == []
    assert (tmp_path / "gone").exists()
    assert not file.exists()


class FailingSource(NumberedSource):
    """Every image fails; all calls but the first wait for `go`."""

    def open_image(self, index: int) -> NoReturn:
        self.calls.append(index)
        assert len(self.calls) == 1 or self.go.wait(60)
        raise RunError("the data are away")


@pytest.mark.parametrize("name", ["cpu", "dali", "torchvision"])
def test_after_an_error_threads_do_not_go_on_to_wait_for_the_rest(tmp_path, name):
    skip_without(name)
    source = NumberedSource(128)
    (loader,) = loaders_of(source, 1, 64, **on(name), num_workers=1)
    source.__class__, source.calls, source.go = FailingSource, [], threading.Event()
    with pytest.raises(RunError, match="the data are away"):
        list(loader)
    source.go.set()
    loader._backend._pool.shutdown()
    assert len(source.calls) <= 3  # one failed, and two threads may have been reading another


# --- the file -----------------------------------------------------------------------------------


def bad_of(count: int, file: Path) -> BadImages:
    return BadImages(NumberedSource(count), file, max_bad_fraction=1.0)


def test_several_writers_keep_their_lines_apart(tmp_path):
    file = tmp_path / "bad_images.txt"
    ranks = [bad_of(4000, file) for _ in range(4)]

    def work(rank: int) -> None:
        for number in range(250):
            ranks[rank].add(rank * 1000 + number, f"reason {rank}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    everything = [(1000 * rank + number, f"reason {rank}") for rank in range(4) for number in range(250)]
    assert bad_of(4000, file).items() == everything
    for rank in ranks:
        rank.begin_epoch()
        assert rank.items() == everything


def test_a_file_that_cannot_be_written_shows_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").touch()
    for file in (tmp_path / "folder", tmp_path / "plain" / "bad_images.txt"):
        with pytest.raises(UsageError, match=rf"^bad_images: cannot write {file}; choose another file"):
            BadImages(NumberedSource(3), file)


def test_a_full_disk_stops_the_run_and_spoils_no_line(tmp_path):
    file = tmp_path / "bad_images.txt"
    one = bad_of(3, file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    logging.disable()  # their files have the same limit
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
        with pytest.raises(RunError, match=rf"^cannot write {file}: .*; free some space$"):
            one.add(1, "broken")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
        logging.disable(logging.NOTSET)
    assert 1 not in one
    assert len(file.read_bytes()) == 5  # half a line
    one.add(2, "broken")
    assert dict(bad_of(3, file).items())[2] == "broken"


def test_lines_that_fit_no_image_are_ignored(tmp_path):
    file = tmp_path / "bad_images.txt"
    lines = ["image-7.png\t7\tbroken", f"image-1.png\t{'1' * 5000}\tbroken", "image-8.png\t9\tother data"]
    lines += ["image-20.png\t20\tbroken", "text", "image-3.png\t"]
    file.write_text("\n".join(lines))  # the last line is not complete
    one = bad_of(20, file)
    assert one.items() == [(7, "broken")]
    one.add(9, "gone")
    one.begin_epoch()
    assert one.items() == [(7, "broken"), (9, "gone")]
    assert re.fullmatch(r"(?s).*\nimage-9.png\t9\tgone\n", file.read_text())


def test_a_file_that_cannot_be_read_for_a_while_is_no_error(tmp_path, monkeypatch, caplog):
    file = tmp_path / "bad_images.txt"
    one = bad_of(3, file)
    bad_of(3, file).add(1, "broken")

    def stale(path: Path) -> bytes:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(bad_images, "open_regular", stale)
        one.begin_epoch()
    assert one.items() == []
    assert f"cannot read {file}: Stale file handle; going on without it" in caplog.text
    one.begin_epoch()
    assert one.items() == [(1, "broken")]
