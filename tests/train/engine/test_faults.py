"""Processes killed under torchrun, ranks that come and go, no network: each really done."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults_worker
import pytest
import torch
from training import SCRIPT, arguments_of, rows_of, train_only, wait_until

from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.engine.metrics import Metrics
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.signals import Interrupted

WORKER = Path(__file__).parents[2] / "helpers" / "faults_worker.py"
STEPS, EVERY = 60, 10
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


class Job:
    """The command on two ranks under torchrun."""

    def __init__(self, cfg, seen):
        seen.mkdir(parents=True, exist_ok=True)
        self.cfg, self.log = cfg, seen / "log.txt"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
        command = [sys.executable, *launcher, str(WORKER), *arguments_of(cfg, seen)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULTS_SEEN": str(seen)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait_for(self, condition):
        wait_until(condition, alive=lambda: self.process.poll() is None, log=self.log.read_text)

    def wait_for_save(self, step):
        """Until the checkpoint of this step, or a later one, has its name."""
        folder = self.cfg.out / "checkpoints"
        self.wait_for(lambda: any(p.name >= f"step-{step:08d}" for p in checkpoint.list_checkpoints(folder)))

    def trainers(self):
        """Rank to process id, of the processes that torchrun started."""
        return {int(environment_of(pid)["RANK"]): pid for pid in children_of(self.process.pid)}

    def clear(self):
        """Leave no process behind, whatever happened."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # torchrun's workers are in sessions of their own
            try:
                self.process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


def children_of(pid):
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for found in lists for child in found]
    return [child for child in children if "tracker" not in Path(f"/proc/{child}/cmdline").read_text()]


def runs(pid):
    """Whether the process is there, and not dead with its exit code not yet read."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except OSError:
        return False


def environment_of(pid):
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def images_seen(folder):
    """For each step the images of a rank, once for each rank and each time that the step was made."""
    steps: dict[int, list[list[str]]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            step, digests = json.loads(line)
            steps.setdefault(step, []).append(digests)
    return steps


@linux
@pytest.mark.slow
def test_killed_and_signaled_and_on_other_numbers_of_ranks(tiny, tmp_path, monkeypatch):
    """On 2 ranks until SIGTERM, on 1 until SIGTERM, on 2; there rank 0 is killed, which writes metrics and
    checkpoints and holds the lock, then rank 1. torchrun starts both ranks again; then it is killed itself,
    and the run ends on 1.

    The whole course is that of an uninterrupted run of one process.
    """
    monkeypatch.setattr(Trainer, "train_step", faults_worker.noted_step)
    settings = {"epochs": 15, "optim": {"lr": 2e-4}, "checkpoint_every": EVERY, "data": {"workers": 1}}
    straight, cfg = (tiny(out=tmp_path / name, **settings) for name in ("straight", "run"))
    seen, seen_straight = tmp_path / "seen", tmp_path / "seen straight"
    seen_straight.mkdir()
    monkeypatch.setenv("FAULTS_SEEN", str(seen_straight))
    train_only(straight)

    job = Job(cfg, seen)
    try:
        job.wait_for_save(EVERY)
        for pid in job.trainers().values():
            os.kill(pid, signal.SIGTERM)
        assert job.process.wait(timeout=600) == 0, job.log.read_text()
    finally:
        job.clear()
    assert "stopped by SIGTERM after step" in job.log.read_text()
    monkeypatch.setenv("FAULTS_SEEN", str(seen))
    write = Metrics.write

    def write_and_stop(self, kind, step, **values):
        write(self, kind, step, **values)
        if step == 2 * EVERY + 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", write_and_stop)
        with pytest.raises(Interrupted, match="SIGTERM after step"):
            train_only(cfg)

    job = Job(cfg, seen)
    try:
        kill_and_see_it_back(job, 3 * EVERY, rank=0)
        kill_and_see_it_back(job, 4 * EVERY, rank=1)
        job.wait_for_save(5 * EVERY)
        left = job.trainers().values()
        job.process.kill()
        wait_until(lambda: not any(map(runs, left)), alive=lambda: True)
    finally:
        job.clear()
    train_only(cfg)  # at once: nothing holds the lock
    starts = rows_of(cfg, "run")
    assert [row["world_size"] for row in starts] == [2, 1, 2, 2, 2, 1]

    expected, found = rows_of(straight), rows_of(cfg)
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, STEPS + 1))
    for mine, other in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), mine["step"]
    losses = [row["loss"] for row in expected]
    assert max(losses) / min(losses) > 1.001  # they moved: the tolerance compares something
    check_same_images(images_seen(seen_straight), images_seen(seen))


def kill_and_see_it_back(job, step, rank):
    """SIGKILL of a rank once this step is saved: a step within 60 s, new steps, at most one interval lost."""
    job.wait_for_save(step)
    starts = len(rows_of(job.cfg, "run"))
    before = rows_of(job.cfg)
    os.kill(job.trainers()[rank], signal.SIGKILL)
    killed = time.monotonic()
    job.wait_for(lambda: len(rows_of(job.cfg, "run")) > starts)
    resumed = rows_of(job.cfg, "run")[-1]["step"]
    job.wait_for(lambda: rows_of(job.cfg)[-1]["step"] > resumed)
    assert time.monotonic() - killed < 60
    job.wait_for(lambda: rows_of(job.cfg)[-1]["step"] > before[-1]["step"])
    assert step <= resumed
    # A kill while a save is under way loses that one too, and the steps that went on during it.
    assert before[-1]["step"] - resumed <= EVERY + 2
    again = rows_of(job.cfg)[: len(before)]
    for row, other in zip(again, before, strict=True):
        assert (row["step"], row["loss"]) == (other["step"], other["loss"])  # bit for bit


def check_same_images(expected, found):
    """At each step the images of all ranks are those of one process, however often it was made."""
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    for step, (whole,) in expected.items():
        assert len(set(whole)) == 8
        assert {digest for part in found[step] for digest in part} == set(whole), step


# ---- no network --------------------------------------------------------------------------------------


def attempts_of(tmp_path, *command):
    """Hosts that a Python program asks for, also where it hides the refusal; in a network of its own if the
    system permits that."""
    log = tmp_path / "attempts"
    log.touch()
    apart = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
        apart = []
    result = subprocess.run(
        [*apart, sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "NETWORK_ATTEMPTS": str(log), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert result.returncode == 0, result.stderr
    return log.read_text().split()


HIDDEN_ATTEMPT = """
import contextlib, socket
with contextlib.suppress(OSError):
    socket.create_connection(("192.0.2.1", 80))
"""


@pytest.mark.slow
def test_a_whole_run_does_not_try_to_use_a_network(tiny, tmp_path):
    """Loader threads, TensorBoard, evaluation and report included: there is no telemetry."""
    assert set(attempts_of(tmp_path, "-c", HIDDEN_ATTEMPT)) == {"192.0.2.1"}
    (tmp_path / "attempts").unlink()
    cfg = tiny(max_steps=4, data={"workers": 1, "backend": "auto"}, tensorboard=True)
    assert attempts_of(tmp_path, str(SCRIPT), *arguments_of(cfg, tmp_path / "configs")) == []
    assert (cfg.out / "report" / "report.html").exists()
