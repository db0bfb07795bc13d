"""The network is closed for every test. Fixtures: an image folder and a configuration that trains in seconds;
reports whose figures take no time; poisoned memory for the kernels.
"""

import logging
import os
import runpy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from loader_backends import BACKENDS, skip_without
from PIL import Image

from lejepa_fast.kernels.runtime import interpreting

if TYPE_CHECKING:
    from lejepa_fast.train.config import Config

OFFLINE = Path(__file__).parent / "offline"
if str(OFFLINE) not in (paths := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), *filter(None, paths)])
    runpy.run_path(str(OFFLINE / "sitecustomize.py"))

TRAIN_IMAGES, VAL_IMAGES = 32, 12
# Without a GPU, test_kernels.py runs these in the interpreter.
collect_ignore_glob = [] if torch.cuda.is_available() or interpreting() else ["kernels/kernel_*.py"]
if interpreting():
    from interpreter_speed import speed_up

    speed_up()


@pytest.fixture(autouse=True)
def _logs_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ran before: commands and benchmarks add a handler, switch propagation off and set levels."""
    monkeypatch.setattr(logging.getLogger("lejepa_fast"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("lejepa_fast"), "propagate", True)
    logging.disable(logging.NOTSET)
    for name in ("lejepa_fast", "lejepa_fast.data", "lejepa_fast.train"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend, for `loader_backends.on`."""
    skip_without(request.param)
    return request.param


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with two class folders: smooth noise of two colors, 40 x 40 px."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for label, tint in (("blue", (60, 80, 190)), ("red", (190, 80, 60))):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count // 2):
                noise = random.normal(0, 50, (8, 8, 3)) + np.array(tint)
                pixels = np.clip(noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


@pytest.fixture
def tiny(configure: "Callable[..., Config]", tmp_path: Path) -> "Callable[..., Config]":
    """Makes a configuration of 12 steps in 3 epochs; keywords replace fields, dicts those of a section."""
    return partial(configure, out=tmp_path / "run")


@pytest.fixture(scope="session")
def configure(image_folder: Path) -> "Callable[..., Config]":
    """As `tiny`, for fixtures that several tests share, which give `out`."""
    # Not above: the tests of the kernels run without the trainer's command line.
    from training import tiny_config

    return partial(tiny_config, str(image_folder))


@pytest.fixture
def white_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports take no time; the tests of the report look at real ones."""
    white = Image.new("RGB", (8, 8), "white")
    monkeypatch.setattr(
        "matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", lambda self, path: white.save(path)
    )


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN: an output that no program wrote shows. Also seeds the generator."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
