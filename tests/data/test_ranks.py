"""Bad files where an epoch is shared by several ranks: who takes what, resuming on other numbers of ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_backends import on
from PIL import Image

from lejepa_fast.data import MultiCropLoader, MultiCropRecipe, multicrop_loader
from lejepa_fast.data.backends.choose_backend import dali_fault
from lejepa_fast.data.bad_images import Quarantine, Substitutes
from lejepa_fast.data.sampler import EpochSchedule, Part
from lejepa_fast.data.sources import FolderSource, ImageSource
from lejepa_fast.errors import RunError

RECIPE = MultiCropRecipe(
    global_size=16, local_crops=0, jitter_prob=0, grayscale_prob=0, blur_prob=0, solarize_prob=0
)


# --- who takes what, without pixels -------------------------------------------------------------


class Numbers(ImageSource):
    """Images that are nothing but numbers."""

    def __init__(self, count: int) -> None:
        super().__init__(name="numbers", kind="folder", classes=None, targets=None)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def describe(self, index: int) -> str:
        return str(index)

    def open_image(self, index: int) -> Image.Image:
        raise NotImplementedError


def images_of(
    schedule: EpochSchedule,
    bad: set[int],
    *,
    known: Iterable[int] = (),
    start: int = 0,
    stop: int | None = None,
    since: int = 0,
    earlier: tuple[Part, ...] = (),
) -> list[int]:
    """What one rank gets in batches `start` to `stop` - 1 of epoch 0, as any backend asks for it."""
    quarantine = Quarantine(Numbers(schedule.num_images), max_bad_fraction=1.0, log_each=False)
    quarantine.learn(known)
    substitutes = Substitutes(schedule, 0, start, quarantine, since=since, earlier=earlier)
    got = []
    for number, key in enumerate(schedule.keys(0, start), start):
        if number == stop:
            break
        for index in key.indices:
            image: int | None = index
            while image in bad:
                image = substitutes.replace(image, "bad")
            got.append(image)
    return got


def some_bad(random: np.random.Generator, total: int, own: np.ndarray) -> set[int]:
    """Anywhere, or all in the batches of one rank (`own`), or most of them there."""
    anywhere = random.choice(total, int(random.integers(0, 1 + total // 3)), replace=False)
    there = random.choice(own, int(random.integers(0, 1 + len(own) // 2)), replace=False)
    kind = random.integers(3)
    return set([anywhere, there, np.concatenate([there, anywhere[:3]])][kind].tolist())


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_no_image_is_taken_twice_while_another_is_left(world):
    random = np.random.default_rng(world)
    scarce = uneven = 0
    for seed in range(300):
        batch = int(random.integers(1, 9))
        total = int(random.integers(world * batch, 12 * world * batch))
        ranks = [EpochSchedule(total, batch, seed, rank, world) for rank in range(world)]
        bad = some_bad(random, total, ranks[int(random.integers(world))].places(0)[0])
        good = set(range(total)) - bad
        if not good:
            continue
        got = [images_of(rank, bad) for rank in ranks]
        together = list(chain(*got))
        assert {len(one) for one in got} == {len(ranks[0]) * batch}
        assert set(together) <= good
        places = [set(rank.places(0)[0].tolist()) for rank in ranks]
        assert good & set().union(*places) <= set(together)
        # What others have met already, or this rank before, changes nothing.
        known = random.choice(sorted(bad), len(bad) // 2, replace=False).tolist() if bad else []
        assert [images_of(rank, bad, known=known) for rank in ranks] == got
        lost = [len(own & bad) for own in places]
        spare = ranks[0].order(0)[len(ranks[0]) * world * batch :]
        shares = [len(set(spare[rank::world].tolist()) & good) for rank in range(world)]
        # For three ranks and more no order of the spare images can promise it whoever needs how many.
        promised = world <= 2 or sum(map(bool, lost)) == 1 or all(map(int.__le__, lost, shares))
        if promised:
            assert len(set(together)) == min(len(together), len(good))
        scarce += promised and len(good) < len(together)
        uneven += promised and any(map(int.__gt__, lost, shares)) and sum(lost) <= sum(shares)
    assert scarce > 5
    assert uneven > 5 or world == 1


def random_parts(random: np.random.Generator, worlds: list[int], images: int, batches: int) -> list[Part]:
    """An epoch cut into parts, each on another number of ranks with the same global batch."""
    cuts = [0, *sorted(random.integers(0, batches + 1, len(worlds) - 1).tolist()), batches]
    return [
        Part(world, images // world, first, last)
        for world, first, last in zip(worlds, cuts, cuts[1:], strict=False)
    ]


@pytest.mark.parametrize("worlds", [[2, 1], [1, 2], [2, 1, 2], [2, 3], [3, 2], [1, 3, 1]], ids=str)
def test_no_image_is_taken_twice_on_changing_numbers_of_ranks(worlds):
    random = np.random.default_rng(len(worlds))
    promised = 0
    for seed in range(200):
        images = 6 * int(random.integers(1, 5))
        total = int(random.integers(2 * images, 9 * images))
        whole = EpochSchedule(total, images, seed)
        order = whole.order(0)
        bad = set(random.choice(order, int(random.integers(0, total // 5)), replace=False).tolist())
        good = set(range(total)) - bad
        parts = random_parts(random, worlds, images, len(whole))
        got: list[int] = []
        for number, part in enumerate(parts):
            # All that was met so far is known, and nothing else, or everything else, too.
            met = set(order[: part.first * images].tolist()) | set(order[len(whole) * images :].tolist())
            known = bad if seed % 2 else bad & met
            stay = int(random.integers(part.first, part.last + 1))  # the same ranks resume there
            for start, stop in ((part.first, stay), (stay, part.last)):
                for rank in range(part.world_size):
                    schedule = EpochSchedule(total, part.batch_size, seed, rank, part.world_size)
                    got += images_of(
                        schedule,
                        bad,
                        known=known if start == part.first else bad,
                        start=start,
                        stop=stop,
                        since=part.first,
                        earlier=tuple(parts[:number]),
                    )
        assert len(got) == len(whole) * images
        assert good & set(order[: len(got)].tolist()) <= set(got) <= good
        spare = order[len(got) :]
        shares = [len(set(spare[r::w].tolist()) & good) for w in worlds for r in range(w)]
        if max(worlds) <= 2 or len(bad & set(order[: len(got)].tolist())) <= min(shares):
            assert len(set(got)) == min(len(got), len(good))
            promised += bool(bad)
    assert promised > 20


# --- the loaders --------------------------------------------------------------------------------


class NumberedFolder(FolderSource):
    """The label of a file is its number."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._targets = np.arange(len(self))


def damaged_folder(root: Path, count: int, bad: Iterable[int]) -> NumberedFolder:
    root.mkdir()
    for number in range(count):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(root / f"{number:03d}.png")
    for number in bad:
        file = root / f"{number:03d}.png"
        file.write_bytes(file.read_bytes()[:-30])  # the header is whole: nobody sees it before the run
    return NumberedFolder(root)


def loaders_of(source: ImageSource, world: int, batch: int, **options) -> list[MultiCropLoader]:
    options = {"dtype": torch.uint8, "max_bad_fraction": 0.5, "seed": 3, **options}
    return [
        multicrop_loader(source, RECIPE, batch_size=batch, rank=rank, world_size=world, **options)
        for rank in range(world)
    ]


def steps_of(loaders: list[MultiCropLoader], count: int | None = None) -> tuple[list[list[int]], dict]:
    """The images of so many steps (None: all) over all ranks, and the state of rank 0 after them."""
    steps = []
    state = loaders[0].state_dict()
    passes = [iter(loader) for loader in loaders]
    while len(steps) != count:
        batches = [next(one, None) for one in passes]
        assert len({batch is None for batch in batches}) == 1  # none ends before the others
        if batches[0] is None:
            break
        steps.append([label for batch in batches for label in batch[1].tolist()])
        assert all(view[0, 0, 8, 8] == labels[0] for (view, *_), labels in batches)
        state = loaders[0].state_dict()
    return steps, json.loads(json.dumps(state))


BAD = (1, 2, 5, 30, 31, 44, 60)  # of 79; an epoch of 12 in a step has 72 places


@pytest.mark.parametrize("worlds", [[2, 1], [1, 2], [2, 3, 2]], ids=str)
def test_resume_on_other_ranks_with_bad_files(tmp_path, backend, worlds):
    source = damaged_folder(tmp_path / "images", 79, BAD)
    file = tmp_path / "quarantine.txt"
    seen: list[list[int]] = []
    state = None
    for number, world in enumerate(worlds):
        # The last one has nothing but the state to tell it which files the other ranks have met.
        last = number == len(worlds) - 1
        loaders = loaders_of(source, world, 12 // world, **on(backend), quarantine=None if last else file)
        for loader in loaders if state else []:
            loader.load_state_dict(state)
        steps, state = steps_of(loaders, None if last else 2)
        seen += steps
    # 72 places, and as many good images.
    assert sorted(chain(*seen)) == sorted(set(range(79)) - set(BAD))
    places = list(EpochSchedule(79, 12, 3).keys(0))
    for key, step in zip(places, seen, strict=True):
        assert all(a == b for a, b in zip(key.indices, step, strict=True) if a not in BAD)
    assert (state["epoch"], state["batch"], state["earlier"]) == (1, 0, [])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("bad", [(), BAD], ids=["clean", "damaged"])
def test_resume_on_other_ranks_with_the_batch_size_of_a_rank(tmp_path, before, after, bad):
    source = damaged_folder(tmp_path / "images", 79, bad)
    batch, taken = 5, 3
    options = {"backend": "torchvision", "quarantine": tmp_path / "quarantine.txt"}
    first, state = steps_of(loaders_of(source, before, batch, **options), taken)
    loaders = loaders_of(source, after, batch, **options)
    for loader in loaders:
        loader.load_state_dict(state)
    second, _ = steps_of(loaders)
    assert len(second) == 79 // (after * batch) - taken * before // after
    times = Counter(chain(*first, *second))
    repeated = sum(times.values()) - len(times)
    assert repeated <= after * batch + len(bad)
    if not bad:
        assert repeated == taken * before * batch % (after * batch)
    # Nothing between the place where it was broken off and the end is left out.
    order = EpochSchedule(79, batch, 3).order(0)[: 79 // (after * batch) * after * batch]
    assert set(order.tolist()) - set(bad) <= set(times)


# --- one file for all ranks ---------------------------------------------------------------------


def test_ranks_share_one_file_line_by_line(tmp_path):
    source = Numbers(4000)
    file = tmp_path / "quarantine.txt"
    ranks = [Quarantine(source, file, max_bad_fraction=1.0, log_each=False) for _ in range(4)]

    def work(rank: int) -> None:
        for number in range(250):
            ranks[rank].add(rank * 1000 + number, f"reason {rank}")
            ranks[rank].add(number, "met by all")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = file.read_text().splitlines()
    numbers = [int(line.split("\t")[1]) for line in lines]
    everything = {rank * 1000 + number for rank in range(4) for number in range(250)}
    assert len(numbers) == len(set(numbers)) == 1000
    assert set(numbers) == everything
    for rank in ranks:
        rank.refresh()
        assert rank.known == everything


def test_half_a_line_spoils_no_other(tmp_path):
    file = tmp_path / "quarantine.txt"
    file.write_text("7\t7\tbroken\n8\t")  # a process was killed while it wrote, or still writes
    one, other = (Quarantine(Numbers(20), file, max_bad_fraction=1.0) for _ in range(2))
    assert one.known == {7}
    other.add(9, "gone")
    one.refresh()
    assert one.known == {7, 9}
    with open(file, "a") as tail:
        tail.write("11\t1")
        tail.flush()
        one.refresh()
        tail.write("1\tlater\n")
    one.refresh()
    assert one.known == {7, 9, 11}


def test_too_many_bad_files_stop_a_rank_that_meets_none(tmp_path, backend):
    order = EpochSchedule(40, 2, 3).order(0)[:40].reshape(10, 2, 2)
    bad = order[:, 0].reshape(-1)[4:12].tolist()  # eight, all in the batches of rank 0
    source = damaged_folder(tmp_path / "images", 40, bad)
    file = tmp_path / "quarantine.txt"
    options = {**on(backend), "max_bad_fraction": 0.15, "quarantine": file}
    passes = dict(enumerate(map(iter, loaders_of(source, 2, 2, **options))))
    said = []
    while passes:
        for rank, batches in list(passes.items()):
            try:
                next(batches)
            except RunError as error:
                said.append(str(error))
                del passes[rank]
    assert re.search(r"[78] of 40 images are bad, more than the allowed 15 %", said[0])
    assert re.search(r"[78] of 40 images are bad, more than the allowed 15 %", said[1])


# Two processes over one damaged folder, in step by a collective, as in training.
RANK = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from pathlib import Path
import torch
from loader_backends import on
import torch.distributed as dist
from test_ranks import NumberedFolder, loaders_of
from lejepa_fast.errors import RunError

rank, backends = int(sys.argv[2]), sys.argv[3].split(",")
root, work, seed = Path(sys.argv[4]), Path(sys.argv[5]), int(sys.argv[6])
dist.init_process_group("gloo", init_method=f"file://{work}/meeting", rank=rank, world_size=2)
source = NumberedFolder(root)

def steps(backend, allowed, file):
    options = {"seed": seed, "max_bad_fraction": allowed, "quarantine": work / file, "num_workers": 1}
    loader = loaders_of(source, 2, 8, backend=backend, **options)[rank]
    for views, labels in loader:
        count = torch.ones(1)
        dist.all_reduce(count)
        assert count == 2 and len(labels) == 8
        yield labels.tolist()

for backend in backends:
    print(json.dumps(sum(steps(backend, 0.5, f"{backend}.txt"), [])), flush=True)
dist.barrier()
try:
    for _ in steps(backends[-1], 0.05, "too_many.txt"):
        pass
    print("not stopped")
except RunError as error:
    print("stopped:", error)
    sys.exit(1)
except RuntimeError as error:
    print("lost:", str(error).splitlines()[0])
    sys.exit(1)
"""


def uneven_seed(bad: set[int]) -> int:
    """A seed with which one rank needs more spare images than its half, and both together have enough."""
    for seed in range(1000):
        ranks = [EpochSchedule(108, 8, seed, rank, 2) for rank in range(2)]
        lost = [len(set(rank.places(0)[0].tolist()) & bad) for rank in ranks]
        spare = ranks[0].order(0)[96:]
        shares = [len(set(spare[rank::2].tolist()) - bad) for rank in range(2)]
        if max(lost[0] - shares[0], lost[1] - shares[1]) >= 2:
            return seed
    raise AssertionError("no such seed")


def test_two_processes_over_one_damaged_folder(tmp_path):
    backends = ["torchvision"] + ["dali"] * (dali_fault(False) is None)
    bad = set(range(4, 108, 9))  # 12 of 108; the 96 good ones are exactly the places of an epoch
    damaged_folder(tmp_path / "images", 108, bad)
    seed = uneven_seed(bad)
    arguments = [",".join(backends), str(tmp_path / "images"), str(tmp_path), str(seed)]
    path = [str(Path(__file__).parent), *sys.path]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(path), str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 1], said
    lines = [out.splitlines() for out, _ in said]
    places = set(EpochSchedule(108, 16, seed).order(0)[:96].tolist())
    for number, backend in enumerate(backends):
        seen = [json.loads(out[number]) for out in lines]
        assert [len(one) for one in seen] == [48, 48]
        assert sorted(chain(*seen)) == sorted(set(range(108)) - bad)
        rows = [line.split("\t") for line in (tmp_path / f"{backend}.txt").read_text().splitlines()]
        numbers = [int(number) for _, number, _ in rows]
        assert len(numbers) == len(set(numbers))
        assert bad & places <= set(numbers) <= bad
    # With too many bad files, both end: the one by its own count, or both.
    ends = sorted(out[-1].partition(":")[0] for out in lines)
    assert ends in (["lost", "stopped"], ["stopped", "stopped"]), said
    stopped = next(out[-1] for out in lines if out[-1].startswith("stopped"))
    assert "of 108 images are bad, more than the allowed 5 % (max_bad_fraction)" in stopped
