"""Start a training run on a Slurm cluster: python train/submit.py --nodes 4 -- --model vit_giant --data PATH

What follows `--` goes to train/pretrain.py as it is; give it an `--out` that all nodes see. submitit
(https://github.com/facebookincubator/submitit; `pip install 'lejepa_fast[slurm]'`) writes the batch script
and submits it. On each node one task runs torchrun, with a c10d rendezvous on the first node. Shortly before
the time is up, or when the job is preempted, the trainer is sent SIGTERM, saves, and the job is queued again;
`--resume auto`, the trainer's default, continues. `--dry-run` prints the batch script and submits nothing: it
needs no Slurm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train import config
from lejepa_fast.train.runtime.command import parse_options, run_command

PRETRAIN = Path(__file__).resolve().with_name("pretrain.py")


@dataclass(frozen=True)
class SubmitOptions:
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_gpu: int = 12
    """CPU cores for each GPU, loader workers included."""
    hours: float = 24.0
    """Longest time of one start of the job; a longer run is queued again with its checkpoint."""
    requeues: int = 100
    """How often a job that ran out of time is queued again."""
    save_seconds: int = 180
    """How long before the end of its time the job is told to save."""
    partition: str | None = None
    account: str | None = None
    job_name: str = "lejepa"
    folder: Path = Path("slurm")
    """Batch script and logs; on a file system that all nodes see."""
    port: int = 29500
    """Of the rendezvous, on the first node."""
    dry_run: bool = False
    """Print the batch script and submit nothing."""


@dataclass
class TorchrunJob:
    """What each node runs; pickled by submitit, called there, and called again after a requeue."""

    arguments: list[str]
    nodes: int
    gpus_per_node: int
    port: int
    save_seconds: int

    def __call__(self) -> None:
        """Run torchrun to its end; RunError with its exit code if it fails."""
        self._process = subprocess.Popen(self.command(_first_host(), os.environ.get("SLURM_JOB_ID", "0")))
        code = self._process.wait()
        if code:
            raise RunError(f"torchrun ended with exit code {code}; see its messages above")

    def command(self, host: str, job: str) -> list[str]:
        """The torchrun line of one node; the same on all of them."""
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(self.nodes), "--nproc-per-node", str(self.gpus_per_node)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{self.port}", "--rdzv-id", job),
            *(str(PRETRAIN), *self.arguments),
        ]

    def checkpoint(self) -> Any:
        """submitit calls it on the first node when the time is nearly up: save, then run again.

        The trainers get the signal, and not torchrun: that would give them 30 seconds. One that is told to
        stop stops all, on every node.
        """
        from submitit.helpers import DelayedSubmission

        for child in _children(self._process.pid):
            os.kill(child, signal.SIGTERM)
        ends = time.monotonic() + self.save_seconds
        while not _has_ended(self._process.pid) and time.monotonic() < ends:
            time.sleep(0.2)
        job = TorchrunJob(self.arguments, self.nodes, self.gpus_per_node, self.port, self.save_seconds)
        return DelayedSubmission(job)


def _first_host() -> str:
    """The node that the others meet at: the first of the job's list."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if not listed:
        return "localhost"
    shown = subprocess.run(
        ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True
    )
    return shown.stdout.split()[0]


def _has_ended(pid: int) -> bool:
    """Whether this child has. `Popen.poll` cannot tell while `Popen.wait` stands below in the same thread, as
    it does when a signal's handler asks."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # and its exit code was fetched
        return True


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def executor(options: SubmitOptions) -> Any:
    """submitit's executor with these options; UsageError without submitit, or without Slurm unless dry."""
    try:
        from submitit import SlurmExecutor
    except ImportError as error:
        raise UsageError("submit: submitit is not installed; pip install 'lejepa_fast[slurm]'") from error

    class AnywhereExecutor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # as if there were Slurm: for the text of the script

    kind = AnywhereExecutor if options.dry_run else SlurmExecutor
    try:
        made = kind(folder=options.folder, max_num_timeout=options.requeues)
    except RuntimeError as error:
        raise UsageError(
            f"submit: {error}; run it on a login node, or see the script with --dry-run"
        ) from error
    extra = {"account": options.account} if options.account else {}
    made.update_parameters(
        job_name=options.job_name,
        nodes=options.nodes,
        ntasks_per_node=1,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.gpus_per_node * options.cpus_per_gpu,
        time=round(60 * options.hours),
        signal_delay_s=options.save_seconds,
        exclusive=True,
        additional_parameters={"requeue": True, **extra},
        **({"partition": options.partition} if options.partition else {}),
    )
    return made


def submit(options: SubmitOptions, arguments: Sequence[str]) -> str:
    """Submit the run, or with `dry_run` only write it down; returns what to print."""
    for name in ("nodes", "gpus_per_node", "cpus_per_gpu", "save_seconds"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name}: expected at least 1, got {getattr(options, name)}")
    if not 0 < 3600 * options.hours > options.save_seconds:
        raise UsageError(
            f"hours: expected more than the {options.save_seconds} s to save, got {options.hours}"
        )
    # Here, and not when the job has waited for a night.
    config.validate(config.parse(arguments), options.nodes * options.gpus_per_node)
    job = TorchrunJob(
        list(arguments), options.nodes, options.gpus_per_node, options.port, options.save_seconds
    )
    made = executor(options)
    if options.dry_run:
        script = made._make_submission_file_text(made._submitit_command_str, "JOB")
        line = " ".join(job.command("FIRST_NODE", "$SLURM_JOB_ID"))
        return f"{script}\n# which runs on each node:\n# {line}"
    submitted = made.submit(job)
    return f"job {submitted.job_id}; logs in {options.folder}"


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)

    def work() -> None:
        options = parse_options(
            SubmitOptions,
            given[:cut],
            description="Submit a training run to Slurm: OPTIONS -- PRETRAIN_OPTIONS",
        )
        print(submit(options, given[cut + 1 :]))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
