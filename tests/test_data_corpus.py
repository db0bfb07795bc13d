"""What breaks loaders: a folder with damaged and odd files, and a process that is killed in mid-epoch."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_files import BAD_KINDS, ODD_KINDS, damage
from PIL import Image
from torch import Tensor

from lejepa_fast.data import MultiCropLoader, MultiCropRecipe, multicrop_loader
from lejepa_fast.data.choice import dali_fault
from lejepa_fast.data.draws import sample_views
from lejepa_fast.data.sampler import EpochSchedule
from lejepa_fast.data.sources import FolderSource
from lejepa_fast.data.torchvision import apply_view, to_tensor

RECIPE = MultiCropRecipe(
    global_crops=1, global_size=24, local_crops=1, local_size=16, blur_kernel=3, min_image_size=1
)
GOOD = 1000


@pytest.fixture(params=["dali", "torchvision"])
def backend(request) -> str:
    fault = dali_fault(False)
    if request.param == "dali" and fault:
        pytest.skip(fault)
    return request.param


class NumberedFolder(FolderSource):
    """The label of a file is its number, so that batches tell which files they hold."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._targets = np.arange(len(self))

    def name_of(self, index: int) -> str:
        return Path(self.describe(index)).name


def write_photographs(root: Path, count: int) -> None:
    root.mkdir()
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    for number, pixels in enumerate(colours):
        image = Image.fromarray(pixels).resize((40, 32), Image.Resampling.BILINEAR)
        image.save(root / f"{number:05d}.jpg", quality=90)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> NumberedFolder:
    root = tmp_path_factory.mktemp("corpus") / "images"
    write_photographs(root, GOOD)
    damage(root)
    return NumberedFolder(root)


def is_bad(name: str) -> bool:
    return name.startswith(tuple(BAD_KINDS))


def telling_seed(corpus: NumberedFolder, batch_size: int) -> int:
    """A seed whose first epoch has to try every bad file: none is left over among the spare images."""
    for seed in range(1000):
        _, spare = EpochSchedule(len(corpus), batch_size, seed).places(0)
        if not is_bad(corpus.name_of(int(spare[-1]))):
            return seed
    raise AssertionError("no such seed")


@pytest.mark.slow
def test_an_epoch_over_damaged_and_odd_files(corpus, backend, tmp_path):
    bad = {i for i in range(len(corpus)) if is_bad(corpus.name_of(i))}
    assert len(bad) == 15
    assert len(corpus) == GOOD + 15 + len(ODD_KINDS)
    batch_size = 67  # 15 batches of it are exactly the good files
    file = tmp_path / "quarantine.txt"
    loader = multicrop_loader(
        corpus,
        RECIPE,
        batch_size=batch_size,
        num_workers=2,
        backend=backend,
        seed=telling_seed(corpus, batch_size),
        quarantine=file,
        dtype=torch.uint8,
    )
    seen: dict[int, list[Tensor]] = {}
    for views, labels in loader:
        assert all(len(view) == batch_size for view in views)
        for row, label in enumerate(labels.tolist()):
            assert label not in seen
            seen[label] = [view[row] for view in views]
    assert seen.keys() == set(range(len(corpus))) - bad
    lines = [line.split("\t") for line in file.read_text().splitlines()]
    assert sorted(int(index) for _, index, _ in lines) == sorted(bad)
    for path, index, reason in lines:
        assert path == corpus.describe(int(index))
        text = Path(path).name.startswith("text")
        assert reason == "not an image" if text else "truncated" in reason.lower()
    odd = [index for index in seen if corpus.name_of(index) in ODD_KINDS]
    assert len(odd) == len(ODD_KINDS)
    for index in odd:
        limit = 0 if backend == "torchvision" else 4
        for made, right in zip(seen[index], expected_views(corpus, index, loader), strict=True):
            gap = (made.int() - right.int()).abs().float().mean()
            assert gap <= limit, corpus.name_of(index)


def expected_views(corpus: NumberedFolder, index: int, loader: MultiCropLoader) -> list[Tensor]:
    """The views of one image in epoch 0, from its upright pixels as Pillow decodes them."""
    image = corpus[index][0]
    draws = sample_views(
        RECIPE,
        seed=loader.state_dict()["seed"],
        epoch=0,
        index=index,
        width=image.width,
        height=image.height,
    )
    pixels = to_tensor(image)
    return [
        apply_view(pixels, params, size, RECIPE)
        for params, size in zip(draws, RECIPE.view_sizes(), strict=True)
    ]


# --- a process that is killed -------------------------------------------------------------------

# Saves its position after each batch, as a trainer would, until it is killed.
TRAINER = """
import json, os, sys, time
sys.path[:0] = json.loads(sys.argv[1])
from test_data_corpus import digest, loader_of
from pathlib import Path

loader = loader_of(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
state = Path(sys.argv[4]) / "state.json"
loader.set_epoch(2)
for batch in loader:
    line = digest(batch)
    state.with_suffix(".new").write_text(json.dumps(loader.state_dict()))
    os.replace(state.with_suffix(".new"), state)
    print(line, flush=True)
    time.sleep(0.02)
"""


def loader_of(root: Path, backend: str, out: Path) -> MultiCropLoader:
    """40 good images, 3 bad ones; 10 batches an epoch."""
    options = {"quarantine": out / "quarantine.txt", "max_bad_fraction": 0.5, "num_workers": 2}
    return multicrop_loader(NumberedFolder(root), RECIPE, batch_size=4, backend=backend, **options)


def digest(batch: tuple[list[Tensor], Tensor | None]) -> str:
    views, labels = batch
    found = hashlib.sha256()
    for tensor in (labels, *views):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def test_killed_in_mid_epoch_and_resumed(backend, tmp_path):
    root = tmp_path / "images"
    write_photographs(root, 40)
    for number in (5, 15, 25):
        (root / f"{number:05d}-bad.jpg").write_bytes((root / f"{number:05d}.jpg").read_bytes()[:200])
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = loader_of(root, backend, tmp_path / "whole")
    whole.set_epoch(2)
    expected = [digest(batch) for batch in whole]
    assert len(set(expected)) == 10
    arguments = [json.dumps(sys.path), str(root), backend, str(tmp_path / "killed")]
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, *arguments], stdout=subprocess.PIPE, text=True)
    lines = [trainer.stdout.readline().strip() for _ in range(4)]
    trainer.kill()
    lines += [line.strip() for line in trainer.stdout]
    assert trainer.wait(60) == -signal.SIGKILL
    assert lines == expected[: len(lines)]
    state = json.loads((tmp_path / "killed" / "state.json").read_text())
    taken = state["batch"]
    assert 4 <= len(lines) <= taken <= len(lines) + 1 < 10
    resumed = loader_of(root, backend, tmp_path / "killed")
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    assert [digest(batch) for batch in resumed] == expected[taken:]
    # The files that both have met are written down once.
    quarantine = (tmp_path / "killed" / "quarantine.txt").read_text().splitlines()
    assert sorted(quarantine) == sorted((tmp_path / "whole" / "quarantine.txt").read_text().splitlines())
