"""What is DALI's own: the choice of it, its failures and threads; torchvision alike."""

from __future__ import annotations

import gc
import io
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loader_backends import on, skip_without
from PIL import Image

from lejepa_fast.data import MultiCropRecipe, eval_loader, multicrop_loader
from lejepa_fast.data.backends import choose_backend as choice
from lejepa_fast.data.backends import dali_backend as dali
from lejepa_fast.data.sources import FolderSource
from lejepa_fast.errors import UsageError

RECIPE = MultiCropRecipe(global_crops=1, global_size=24, local_crops=1, local_size=16, blur_kernel=3)
needs_dali = pytest.mark.skipif(choice.dali_fault(False) is not None, reason=str(choice.dali_fault(False)))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BILINEAR)


class Numbered(FolderSource):
    """The label of an image is its number."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._targets = np.arange(len(self))


def folder(root: Path, count: int, **replaced: bytes) -> Numbered:
    """`count` PNG files; keywords n0, n7, ... give the contents of single ones."""
    root.mkdir(parents=True)
    for number in range(count):
        data = replaced.get(f"n{number}") or saved(picture(number), "PNG")
        (root / f"{number:03d}.png").write_bytes(data)
    return Numbered(root)


def broken_png() -> bytes:
    """Its header and its end are fine; what lies between is not."""
    data = bytearray(saved(picture(), "PNG"))
    start = data.index(b"IDAT") + 10
    data[start : start + 8] = b"\xff" * 8
    return bytes(data)


# --- the choice ---------------------------------------------------------------------------------


def test_auto_takes_what_is_there(monkeypatch):
    cpu, gpu = None, torch.device("cuda", 0)
    monkeypatch.setattr(choice, "dali_fault", lambda on_gpu: None)
    monkeypatch.setattr(choice, "numba_fault", lambda: None)
    assert choice.choose_backend("auto", cpu).name == choice.choose_backend("auto", gpu).name == "dali"
    monkeypatch.setattr(choice, "numba_fault", lambda: "numba is not installed: pip install numba")
    chosen = choice.choose_backend("auto", cpu)
    assert chosen.name == "torchvision"
    assert "pip install numba" in chosen.reason
    assert choice.choose_backend("auto", gpu).name == "dali"
    monkeypatch.setattr(choice, "dali_fault", lambda on_gpu: "it is broken" if on_gpu else None)
    assert choice.choose_backend("auto", gpu) == ("torchvision", "it is broken")
    assert choice.choose_backend("dali", cpu).name == "dali"
    with pytest.raises(UsageError, match=r"backend 'dali': it is broken, or use backend='torchvision'"):
        choice.choose_backend("dali", gpu)


@needs_dali
@pytest.mark.parametrize(
    "text", ["Numba needs NumPy 2.3 or less. Got 2.4", "cannot cache function 'x': no locator"]
)
def test_a_broken_numba_is_said_once_and_done_without(text, tmp_path, monkeypatch, caplog):
    real = choice.importlib.import_module

    def refuse(name):
        if name == "lejepa_fast.data.backends.cpu_kernels":
            raise ImportError(text + "\nmore")
        return real(name)

    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(choice.importlib, "import_module", refuse)
    choice.numba_fault.cache_clear()
    try:
        chosen = choice.choose_backend("auto", None)
        assert chosen.name == "torchvision"
        assert text in chosen.reason
        loader = multicrop_loader(folder(tmp_path / "images", 4), RECIPE, batch_size=4, backend="dali")
        assert len(list(loader)) == 1  # by the operator graph
        assert caplog.text.count(text) == 1
        assert "DALI failed" not in caplog.text
    finally:
        choice.numba_fault.cache_clear()


def test_dali_that_is_missing_or_broken_is_explained(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(choice, "_is_installed", lambda: False)
    assert choice.dali_fault(False) == "DALI is not installed: pip install nvidia-dali-cuda120"
    monkeypatch.setattr(choice, "_is_installed", lambda: True)

    def refuse(name):
        raise OSError("libcudart.so.11: cannot open shared object file\nmore")

    monkeypatch.setattr(choice.importlib, "import_module", refuse)
    fault = choice.dali_fault(False)
    assert fault.startswith(
        "DALI cannot be loaded (libcudart.so.11: cannot open shared object file): pip inst"
    )


@pytest.mark.parametrize(
    ("built", "available", "driver", "text"),
    [
        ("13.0", True, 13010, None),
        ("12.9", True, 13000, None),
        ("12986", True, 12040, None),
        ("124131", True, 12040, None),
        ("13.4.92", True, 12080, "the driver supports CUDA 12.8: pip install nvidia-dali-cuda120"),
        ("13492", True, 12080, "built for CUDA 13, the driver supports CUDA 12.8"),
        ("13000", True, 12040, "built for CUDA 13"),
        ("13.0", False, 13000, "no CUDA device"),
        ("", True, 13000, None),
        ("13492", True, 0, None),
    ],
)
def test_builds_for_another_cuda_are_named(built, available, driver, text, monkeypatch, caplog):
    choice._say_unchecked.cache_clear()
    monkeypatch.setattr(choice, "_is_installed", lambda: True)
    monkeypatch.setattr(
        choice.importlib, "import_module", lambda name: SimpleNamespace(__cuda_version__=built)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)

    class Driver:
        def cuDriverGetVersion(self, place):  # noqa: N802, its name in the library
            place._obj.value = driver
            return 0 if driver else 3

    monkeypatch.setattr(choice.ctypes, "CDLL", lambda name: Driver())
    fault = choice.dali_fault(True)
    assert fault is None if text is None else text in fault
    # What cannot be checked is said, and once.
    choice.dali_fault(True)
    assert caplog.text.count("cannot tell whether this build of DALI suits") == (not built or not driver)
    assert choice.wanted_package("13.2") == choice.wanted_package(None) == "nvidia-dali-cuda130"


def test_a_machine_without_a_driver_is_no_error(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(choice.ctypes, "CDLL", missing)
    assert choice._driver_version() == 0


@needs_dali
def test_what_makes_the_views_can_be_chosen(monkeypatch):
    for views, on_gpu, fault, compiled in (
        ("auto", False, None, True),
        ("auto", False, "broken", False),
        ("auto", True, None, False),
        ("operators", False, None, False),
        ("numba", False, None, True),
    ):
        monkeypatch.setattr(dali, "numba_fault", lambda fault=fault: fault)
        assert dali._compiled(views, on_gpu=on_gpu) == compiled
    with pytest.raises(UsageError, match="dali_views 'numba': it works on the CPU only; or use 'operators'"):
        dali._compiled("numba", on_gpu=True)
    monkeypatch.setattr(dali, "numba_fault", lambda: "numba is not installed: pip install numba")
    with pytest.raises(UsageError, match="numba is not installed: pip install numba; or use 'operators'"):
        dali._compiled("numba", on_gpu=False)


@needs_dali
def test_the_choice_is_logged_with_its_reason(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lejepa_fast.data"):
        made = multicrop_loader(folder(tmp_path / "a", 8), RECIPE, batch_size=4)
    assert f"{made.backend} backend (" in caplog.text
    with caplog.at_level(logging.INFO, logger="lejepa_fast.data"):
        multicrop_loader(
            made._quarantine._source, RECIPE, batch_size=4, backend="dali", dali_views="operators"
        )
    assert "dali backend (as asked for; views by operators)" in caplog.text


# --- equality with torchvision ------------------------------------------------------------------


def labels(loader) -> list[list[int]]:
    return [targets.tolist() for _, targets in loader]


@pytest.mark.parametrize("dali", ["dali", "gpu"])
def test_bad_files_are_replaced_alike_and_positions_are_exchangeable(dali, tmp_path, caplog):
    skip_without(dali)
    bad = {"n3": b"no image", "n11": broken_png(), "n17": saved(picture(), "PNG")[:150], "n29": broken_png()}
    source = folder(tmp_path / "images", 42, **bad)

    def made(backend):
        where = on(dali if backend == "dali" else backend)
        return multicrop_loader(source, RECIPE, batch_size=4, max_bad_fraction=0.5, seed=1, **where)

    whole = made("torchvision")
    whole.set_epoch(5)
    expected = labels(whole)
    assert all(len(batch) == 4 for batch in expected)
    by_dali = made("dali")
    by_dali.set_epoch(5)
    assert labels(by_dali) == expected
    assert by_dali.quarantined == whole.quarantined
    assert "DALI failed" in caplog.text  # it did meet the files that only decoding finds out
    flat = [label for batch in expected for label in batch]
    assert not {3, 11, 17, 29} & set(flat)
    repeated = 40 - len(set(flat))
    assert repeated <= 2  # 38 good images fill 40 places
    for first, second in (("dali", "torchvision"), ("torchvision", "dali")):
        begun = made(first)
        begun.set_epoch(5)
        for taken, _ in enumerate(begun, start=1):
            state = begun.state_dict()
            if taken == 6:
                break
        other = made(second)
        caplog.clear()
        other.load_state_dict(state | {"backend": second})
        assert "may differ" not in caplog.text
        other.load_state_dict(state)
        assert f"the loader state is of the {first} backend in mid-epoch, and this is {second}" in caplog.text
        assert labels(other) == expected[6:]


@needs_dali
def test_a_batch_that_dali_did_not_take_is_not_paired_with_another(tmp_path, monkeypatch, caplog):
    source = folder(tmp_path / "images", 12)
    right = list(multicrop_loader(source, RECIPE, batch_size=4, backend="torchvision"))
    loader = multicrop_loader(source, RECIPE, batch_size=4, backend="dali")
    feed, fed = loader._backend._feed, []

    def refusing(batch):
        fed.append(batch)
        if len(fed) == 2:
            raise RuntimeError("no place for a batch")
        feed(batch)

    monkeypatch.setattr(loader._backend, "_feed", refusing)
    for (views, targets), (others, expected) in zip(loader, right, strict=True):
        assert targets.tolist() == expected.tolist()
        for ours, theirs in zip(views, others, strict=True):
            assert (ours - theirs).abs().mean() < 0.05
    assert caplog.text.count("DALI failed (no place for a batch)") == 1


@needs_dali
@pytest.mark.parametrize("size", [(61, 47), (47, 61), (300, 20), (20, 333), (16, 16), (5, 7)])
def test_evaluation_views_equal_torchvisions(tmp_path, size):
    root = tmp_path / "images"
    root.mkdir()
    for number in range(3):
        picture(number, size).save(root / f"{number}.png")
    (root / "2.png").write_bytes(b"no image")
    batches = {}
    for backend in ("dali", "torchvision"):
        options = {"mean": (0, 0, 0), "std": (1, 1, 1), "backend": backend, "max_bad_fraction": 1.0}
        batches[backend] = list(eval_loader(Numbered(root), image_size=16, batch_size=2, **options))
    assert (
        [t.tolist() for _, t in batches["dali"]]
        == [t.tolist() for _, t in batches["torchvision"]]
        == [[0, 1]]
    )
    gap = (batches["dali"][0][0] - batches["torchvision"][0][0]).abs() * 255
    assert gap.max() <= 2
    assert gap.mean() <= 0.6


# --- threads and processes ----------------------------------------------------------------------


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("lejepa")}


@needs_dali
def test_a_loader_that_is_left_early_frees_its_threads(tmp_path):
    source = folder(tmp_path / "images", 40)
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    loader = multicrop_loader(source, RECIPE, batch_size=2, num_workers=2, backend="dali")
    batches = iter(loader)
    next(batches)
    assert "lejepa-dali" in threads()
    second = iter(loader)  # ends the first pass
    next(second)
    with pytest.raises(RuntimeError, match="another pass"):
        list(batches)
    second.close()
    assert "lejepa-dali" not in threads()
    del batches, second, loader
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("lejepa"):
            thread.join(10)
    assert threading.active_count() == before[0]
    assert len(os.listdir("/proc/self/task")) <= before[1] + 1


@needs_dali
def test_forked_processes_do_not_wait_for_dalis_threads(tmp_path):
    """Not even when the child collects garbage before anything else: some other hook may set that off."""
    folder(tmp_path / "images", 8)
    script = (
        "import gc, multiprocessing, os, sys\n"
        "os.register_at_fork(after_in_child=gc.collect)\n"
        "from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source\n"
        "recipe = MultiCropRecipe(global_crops=1, global_size=24, local_crops=0)\n"
        "source = open_source(sys.argv[1], 'train')\n"
        "holder = {'loader': multicrop_loader(source, recipe, batch_size=2, backend='dali')}\n"
        "list(holder['loader'])\n"
        "holder['itself'] = holder\n"
        "gc.disable()\n"
        "del holder\n"
        "for again in range(2):\n"
        "    child = multiprocessing.get_context('fork').Process(target=gc.collect)\n"
        "    child.start()\n"
        "    child.join(30)\n"
        "    print(child.exitcode)\n"
        "    child.kill()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "images")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "0\n0\n"), done.stderr


@needs_dali
@pytest.mark.parametrize("text", ["after shutdown", "after interpreter shutdown"])
def test_the_end_of_the_interpreter_is_no_failure_of_dali(text, tmp_path, monkeypatch, caplog):
    """In the program's last moments executors refuse work, as this does."""

    def refused(batch):
        raise RuntimeError(f"cannot schedule new futures {text}")

    loader = multicrop_loader(folder(tmp_path / "images", 8), RECIPE, batch_size=4, backend="dali")
    monkeypatch.setattr(loader._backend, "_collect", refused)
    with pytest.raises(RuntimeError, match=text):
        next(iter(loader))
    assert "DALI failed" not in caplog.text


@needs_dali
def test_the_interpreter_ends_with_a_pass_under_way(tmp_path):
    folder(tmp_path / "images", 40)
    script = (
        "import sys\n"
        "from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source\n"
        "recipe = MultiCropRecipe(global_crops=1, global_size=24, local_crops=0)\n"
        "source = open_source(sys.argv[1], 'train')\n"
        "batches = iter(multicrop_loader(source, recipe, batch_size=2, backend='dali'))\n"
        "print(len(next(batches)[0]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "images")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
