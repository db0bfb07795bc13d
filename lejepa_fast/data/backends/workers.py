"""Worker processes: which signals reach them, and what ends them.

SIGTERM and Ctrl-C often go to a whole process group (torchrun, a job scheduler, a terminal). The trainer then
still needs batches to finish its step and save. So a worker ends only when
- the trainer ends it, by its queue or by a SIGTERM from torch or multiprocessing at the end (a SIGTERM of any
  other sender is ignored);
- the trainer has died;
- somebody kills it, which the trainer then reports.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

import torch

_SIGNALS = {signal.SIGTERM, signal.SIGINT}


@contextmanager
def starting() -> Iterator[None]:
    """Start workers with SIGTERM and SIGINT blocked, and keep torch from installing a handler for SIGCHLD.

    A signal for the trainer itself arrives at the end of the context. torch's handler would raise in the
    middle of whatever the main thread does (a step, a checkpoint) when any child process ends. Without it,
    fetching the next batch reports the death of a worker within 5 s.
    """
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # starting it later would unblock both
    before, handler = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS), signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # in others torch installs none
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker: int) -> None:
    """The `worker_init_fn`: runs first in each worker."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A thread waits for SIGTERM, because only `sigwaitinfo` tells the sender. Threads that start from now on
    # inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for wait in (_await_parents_sigterm, _await_trainers_death):
        threading.Thread(target=wait, daemon=True).start()


def _await_trainers_death() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def _await_parents_sigterm() -> None:
    # Under a fork server the trainer is the grandparent.
    trainer = multiprocessing.parent_process()
    allowed = {os.getppid(), trainer.pid if trainer else None}
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in allowed:
        pass
    os._exit(0)  # as torch's own handler


def is_death(error: Exception) -> bool:
    """Whether a worker died, as opposed to an exception that it raised and passed on."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    # It died after it announced a batch and before the trainer fetched the memory of the batch.
    return not str(error).startswith("Caught ")
