"""Worker processes: signals to the whole group, a trainer that is killed, threads, and the way out."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from loader_backends import NumberedSource
from PIL import Image

from lejepa_fast.data import MultiCropRecipe, eval_loader, multicrop_loader
from lejepa_fast.errors import RunError

RECIPE = MultiCropRecipe(global_size=16, local_crops=0)

# A small trainer. Image 40 and the following ones keep a worker busy for ever.
TRAINER = """
import multiprocessing, signal, sys, time
from torch.utils.data import _utils
from lejepa_fast.data import MultiCropRecipe, multicrop_loader
from loader_backends import NumberedSource

class Source(NumberedSource):
    def image_size(self, index):
        return self.size
    def open_image(self, index):
        if index >= 40:
            time.sleep(3600)
        return super().open_image(index)

def begin():
    recipe = MultiCropRecipe(global_size=16, local_crops=0)
    options = {"batch_size": 2, "num_workers": 1, "shuffle": False, "backend": "torchvision"}
    batches = iter(multicrop_loader(Source(80), recipe, **options))
    for _ in range(20):  # the next batches, already asked for, never come
        next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    return batches

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    _utils.MP_STATUS_CHECK_INTERVAL = 0.5  # so long torch waits for a busy worker, and then it ends it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    print("ready", flush=True)
    batches = begin()
    if sys.argv[2] == "wait":
        time.sleep(3600)
    batches.close()
    del batches
    batches = begin()
"""


def start_trainer(tmp_path: Path, method: str, task: str) -> subprocess.Popen[str]:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    path = os.pathsep.join([os.environ["PYTHONPATH"], *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    arguments = [sys.executable, str(script), method, task]
    trainer = subprocess.Popen(arguments, start_new_session=True, text=True, env=environment, **pipes)
    assert trainer.stdout.readline() == "ready\n"
    return trainer


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], patience: float = 60.0) -> bool:
    end = time.monotonic() + patience
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, pids))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_outlive_signals_to_the_group_and_die_with_the_trainer(tmp_path, method):
    trainer = start_trainer(tmp_path, method, "wait")
    stop = threading.Event()

    def bombard() -> None:  # also while the workers start
        while not stop.wait(0.01):
            for number in (signal.SIGTERM, signal.SIGINT):
                os.killpg(trainer.pid, number)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(bombard)
        try:
            workers = [int(pid) for pid in trainer.stdout.readline().split()]  # it has 20 batches
        finally:
            stop.set()
    assert len(workers) == 1
    assert all(map(is_running, workers))
    trainer.kill()
    try:
        assert gone(workers)  # although they are busy
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)
    assert "Traceback" not in trainer.communicate()[1]


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # whose workers are the trainer's grandchildren
def test_busy_workers_hold_up_neither_a_dropped_loader_nor_the_exit(tmp_path, method):
    trainer = start_trainer(tmp_path, method, "leave")
    try:
        printed, errors = trainer.communicate(timeout=120)
        assert (trainer.returncode, errors) == (0, "")
        workers = [int(pid) for pid in printed.split()]
        assert len(workers) == 2
        assert gone(workers)
    finally:
        if trainer.poll() is None:
            os.killpg(trainer.pid, signal.SIGKILL)


ONE_WORKER = {"num_workers": 1, "backend": "torchvision"}


def test_workers_survive_the_thread_that_started_them():
    loader = multicrop_loader(NumberedSource(12), RECIPE, batch_size=4, **ONE_WORKER)

    def one_pass() -> list[int]:
        return sorted(label for _, targets in loader for label in targets.tolist())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(one_pass).result() == list(range(12))
    assert one_pass() == list(range(12))
    # And the signals of this process are as before.
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGINT}


class DyingSource(NumberedSource):
    """Kills the first worker that reads image 0, as the kernel does when memory runs out."""

    def __init__(self, marker: Path) -> None:
        super().__init__(12)
        self.marker = marker

    def open_image(self, index: int) -> Image.Image:
        if index == 0 and torch.utils.data.get_worker_info() is not None and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open_image(index)


def test_a_dead_worker_is_explained(tmp_path):
    # PyTorch's handler, if a DataLoader of another test has installed it, would raise in mid-test. PyTorch
    # installs it once for each process, so it stays away.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    made = multicrop_loader(DyingSource(tmp_path / "already"), RECIPE, batch_size=4, **ONE_WORKER)
    with pytest.raises(RunError, match=r"a data-loading worker died .* use fewer workers") as caught:
        list(made)
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL  # no exceptions out of the blue
    # The next pass starts new workers.
    made.set_epoch(0)
    expected = multicrop_loader(NumberedSource(12), RECIPE, batch_size=4, backend="torchvision")
    for (views, targets), (whole, labels) in zip(made, expected, strict=True):
        assert torch.equal(targets, labels)
        assert all(map(torch.equal, views, whole))


class ThreadCountSource(NumberedSource):
    """Encodes the number of threads of the process in the pixels."""

    def open_image(self, index: int) -> Image.Image:
        return Image.new("RGB", (20, 20), (torch.get_num_threads(),) * 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_thread_while_making_batches(workers):
    threads = torch.get_num_threads()
    options = {"mean": (0, 0, 0), "std": (1, 1, 1), "backend": "torchvision"}
    torch.set_num_threads(2)
    try:
        made = eval_loader(ThreadCountSource(12), image_size=8, batch_size=4, num_workers=workers, **options)
        images, _ = next(iter(made))
        assert torch.allclose(images, torch.full_like(images, 1 / 255))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
