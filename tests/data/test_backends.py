"""What the backends do of their own: the choice, agreement with torchvision, failures of DALI, threads."""

import gc
import logging
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from loader_backends import (
    NumberedFolder,
    NumberedSource,
    numbered_folder,
    picture,
    skip_without,
    without_gpu,
)
from PIL import Image

from lejepa_fast.data import MultiCropRecipe, eval_loader, multicrop_loader
from lejepa_fast.data.backends import choose_backend as choice
from lejepa_fast.errors import UsageError

RECIPE = MultiCropRecipe(global_crops=1, global_size=24, local_crops=1, local_size=16, blur_kernel=3)


# --- the choice ---------------------------------------------------------------------------------


def test_auto_takes_what_is_there(monkeypatch):
    cpu, gpu = None, torch.device("cuda", 0)
    monkeypatch.setattr(choice, "dali_fault", lambda on_gpu: None)
    monkeypatch.setattr(choice, "numba_fault", lambda: None)
    assert choice.choose_backend("auto", cpu) == ("cpu", "Numba is there")
    assert choice.choose_backend("auto", gpu)[0] == "dali"
    monkeypatch.setattr(choice, "dali_fault", lambda on_gpu: "it is broken" if on_gpu else None)
    assert choice.choose_backend("auto", gpu) == ("cpu", "it is broken; Numba is there")
    assert choice.choose_backend("dali", cpu) == ("dali", "as asked for")
    with pytest.raises(UsageError, match=r"^backend 'dali': it is broken, or use backend='torchvision'"):
        choice.choose_backend("dali", gpu)
    monkeypatch.setattr(choice, "numba_fault", lambda: "Numba is not installed: pip install numba")
    for device in (cpu, gpu):
        name, reason = choice.choose_backend("auto", device)
        assert name == "torchvision"
        assert reason.endswith("Numba is not installed: pip install numba")
    with pytest.raises(UsageError, match=r"^backend 'cpu': Numba is not installed: pip install numba, or"):
        choice.choose_backend("cpu", cpu)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ImportError, "Numba needs NumPy 2.3 or less. Got 2.4"),
        (partial(ModuleNotFoundError, name="llvmlite"), "No module named 'llvmlite'"),
    ],
)
def test_a_broken_numba_is_logged_once_and_done_without(error, text, monkeypatch, caplog):
    def refuse(name):
        raise error(text + "\nmore")

    monkeypatch.setattr(choice.importlib, "import_module", refuse)
    choice.numba_fault.cache_clear()
    try:
        for _ in range(2):
            name, reason = choice.choose_backend("auto", None)
            assert name == "torchvision"
            assert text in reason
        assert caplog.text.count(text) == 1
    finally:
        choice.numba_fault.cache_clear()


def test_dali_that_is_missing_or_broken_is_explained(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nvidia.dali", None)
        assert choice.dali_fault(False) == "DALI is not installed: pip install nvidia-dali-cuda120"

    def refuse(name):
        raise OSError("libcudart.so.11: cannot open shared object file\nmore")

    monkeypatch.setattr(choice.importlib, "import_module", refuse)
    reason = "DALI cannot be loaded (libcudart.so.11: cannot open shared object file): pip install"
    assert choice.dali_fault(False).startswith(reason)


@pytest.mark.parametrize(
    ("built", "available", "driver", "text"),
    [
        ("12.9", True, 13000, None),
        ("12986", True, 12040, None),
        ("13.4.92", True, 12080, "the driver supports CUDA 12.8: pip install nvidia-dali-cuda120"),
        ("13492", True, 12080, "built for CUDA 13, the driver supports CUDA 12.8"),
        ("13.0", False, 13000, "no CUDA device"),
        ("", True, 13000, None),
        ("13.0", True, 13010, r"the GPU cannot run the Triton kernels for colors \(too old\)"),
    ],
)
def test_dali_that_cannot_use_the_gpu_is_explained(built, available, driver, text, monkeypatch):
    dali = SimpleNamespace(__cuda_version__=built)
    monkeypatch.setattr(choice.importlib, "import_module", lambda name: dali)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(choice, "why_not", lambda *_: "too old" if driver == 13010 else None)
    fault = choice.dali_fault(True)
    assert fault is None if text is None else re.search(text, fault)
    assert choice.wanted_package("13.2") == choice.wanted_package(None) == "nvidia-dali-cuda130"


def test_the_choice_is_logged_with_its_reason_by_rank_0(tmp_path, caplog):
    source = numbered_folder(tmp_path / "a", 8)
    with caplog.at_level(logging.INFO, logger="lejepa_fast.data"):
        for rank in range(2):
            multicrop_loader(source, RECIPE, batch_size=4, backend="torchvision", rank=rank, world_size=2)
    message = f"multi-crop loader: torchvision backend (as asked for), 0 workers, {source.name}"
    assert [record.message for record in caplog.records] == [message]


# --- agreement with torchvision -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "dali"])
def test_evaluation_views_equal_torchvisions(tmp_path, name):
    skip_without(name)
    sizes = [(61, 47), (47, 61), (300, 20), (20, 333), (16, 16), (5, 7)]
    for number, size in enumerate(sizes):
        picture(number, size).save(tmp_path / f"{number}.png")
    options = {"mean": (0, 0, 0), "std": (1, 1, 1), "image_size": 16, "batch_size": len(sizes)}
    made, right = (
        next(iter(eval_loader(NumberedFolder(tmp_path), backend=backend, **options)))[0]
        for backend in (name, "torchvision")
    )
    gaps = (made - right).abs() * 255
    assert gaps.max() <= (2 if name == "dali" else 0)
    assert gaps.mean((1, 2, 3)).max() <= 0.6


# --- threads and processes ----------------------------------------------------------------------


class ThreadCountSource(NumberedSource):
    """Encodes the number of threads that torch's operators would use in the pixels."""

    def open_image(self, index: int) -> Image.Image:
        return Image.new("RGB", (20, 20), (torch.get_num_threads(),) * 3)


@pytest.mark.parametrize(("name", "workers"), [("torchvision", 0), ("torchvision", 2), ("cpu", 2)])
def test_each_image_is_made_by_one_thread(name, workers):
    skip_without(name)
    before = torch.get_num_threads()
    options = {"mean": (0, 0, 0), "std": (1, 1, 1), "backend": name, "num_workers": workers}
    torch.set_num_threads(2)
    try:
        images, _ = next(iter(eval_loader(ThreadCountSource(24), image_size=8, batch_size=12, **options)))
        assert torch.allclose(images, torch.full_like(images, 1 / 255))
        # All other threads keep their number: this one, and those that start later.
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_without_workers_torchvision_needs_no_thread():
    made_by: set[threading.Thread] = set()

    class Source(NumberedSource):
        def open_image(self, index: int) -> Image.Image:
            made_by.add(threading.current_thread())
            return super().open_image(index)

    list(multicrop_loader(Source(6), RECIPE, batch_size=2, backend="torchvision"))
    assert made_by == {threading.current_thread()}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lejepa")]


@pytest.mark.parametrize("name", ["cpu", "dali", "torchvision"])
def test_a_loader_that_is_left_early_frees_its_threads(name, tmp_path):
    skip_without(name)
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    source = numbered_folder(tmp_path / "images", 40)
    loader = multicrop_loader(source, RECIPE, batch_size=2, backend=name, num_workers=1)
    batches = iter(loader)
    next(batches)
    assert threads()
    del batches, loader
    gc.collect()
    for thread in threads():
        thread.join(10)
    assert not threads()
    assert len(os.listdir("/proc/self/task")) <= before + 1


PROGRAM = """
import gc, multiprocessing, os, sys
from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source
source = open_source(sys.argv[1], "train")
recipe = MultiCropRecipe(global_crops=1, global_size=24, local_crops=0)
os.register_at_fork(after_in_child=gc.collect)
gc.disable()
others = []
for backend in sys.argv[2:]:
    options = {"batch_size": 2, "backend": backend, "num_workers": 1}
    loader, other = (multicrop_loader(source, recipe, **options) for _ in range(2))
    list(loader)
    holder = {"loader": loader}
    holder["itself"] = holder
    del holder, loader
    for again in range(2):
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join(30)
        print(backend, child.exitcode)
        child.kill()
    others.append(iter(other))
print(*[len(next(batches)[0]) for batches in others])
"""


def test_neither_forked_processes_nor_the_end_of_the_interpreter_wait_for_threads(tmp_path):
    """Not even when the child collects garbage before anything else: some other hook may set that off."""
    names = without_gpu()
    numbered_folder(tmp_path / "images", 40)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "images"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    expected = [f"{name} 0" for name in names for _ in range(2)] + [" ".join("1" for _ in names)]
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, expected, "")


AT_THE_END = """
import atexit, multiprocessing, sys
import torch
from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source
source = open_source("trashnet96", "train")
recipe = MultiCropRecipe(global_crops=1, global_size=24, local_crops=0)
loaded, load = [], source.load
source.load = lambda *arguments: (loaded.append(0), load(*arguments))[1]
options = {"batch_size": 256, "backend": sys.argv[1], "num_workers": 1, "prefetch": 3}
batches = iter(loader := multicrop_loader(source, recipe, **options))
next(batches)

def pass_in_child():
    torch.set_num_threads(1)  # as PyTorch's own workers do: OpenMP's threads do not follow either
    print(len(loader) == len(list(loader)))

child = multiprocessing.get_context("fork").Process(target=pass_in_child)
child.start()
child.join(100)
print(child.exitcode)
child.kill()
del loaded[:]
more = next(batches)
atexit.register(lambda: print(len(loaded) < 256))
"""


@pytest.mark.parametrize("backend", ["cpu", "torchvision"])
def test_a_pass_under_way_hinders_neither_a_forked_process_nor_the_end(backend):
    """The child has no threads of its parent; batches ahead of a program that ends are not made."""
    if backend not in without_gpu():
        pytest.skip("Numba is not installed")
    command = [sys.executable, "-c", AT_THE_END, backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["True", "0", "True"], "")
