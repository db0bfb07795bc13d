"""Work of hours on rank 0, which the other ranks outwait: evaluations.

A collective that they waited in would end with the timeout of all collectives, and the run with it. So rank
0 says every half a minute that it is still there, over gloo between CPUs, and each of these words is a
collective of its own. When rank 0 dies its connections close, and the others fail at once, as they do in any.

And what ended the run in spite of that (no memory, no time) would do so after every restart: an evaluation
that was begun twice, and not finished, is left out.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lejepa_fast.train.runtime.signals import Interrupted
from lejepa_fast.train.runtime.world import World, on_main

T = TypeVar("T")

SECONDS_BETWEEN_WORDS = 30.0

TRIES = 2
IN_VAIN = (
    f"the evaluation after epoch %d ended the run {TRIES} times and is left out; --eval.train-images makes "
    "the next ones shorter, --eval.every 0 leaves out all but that at the end"
)


def tried_in_vain(rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """Steps whose evaluation is not to be tried again, by the rows of metrics.jsonl."""
    begun = Counter(row["step"] for row in rows if row["kind"] == "evaluating")
    return {step for step, times in begun.items() if times >= TRIES}


def on_main_for_long(world: World, work: Callable[[], T]) -> T | None:
    """As `world.on_main`, for as long as it takes. `work` must not communicate."""
    if not world.distributed:
        return work()
    error: BaseException | None = None
    result: T | None = None
    if world.is_main:
        with _saying_that_it_goes_on():
            try:
                result = work()
            except (Exception, Interrupted) as caught:
                error = caught
        try:
            _say(going_on=False)
        except RuntimeError as gone:  # another rank, which the work's own error may explain
            raise (error or gone) from (gone if error else None)
    else:
        while _hear():
            pass

    def over() -> T | None:
        if error is not None:
            raise error
        return result

    return on_main(world, over)


@contextlib.contextmanager
def _saying_that_it_goes_on() -> Iterator[None]:
    done = threading.Event()

    def say() -> None:
        # Where another rank is gone this fails, and so does what rank 0 says at the end.
        with contextlib.suppress(RuntimeError):
            while not done.wait(SECONDS_BETWEEN_WORDS):
                _say(going_on=True)

    thread = threading.Thread(target=say, name="long work", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _say(*, going_on: bool) -> None:
    dist.broadcast(torch.tensor([going_on], dtype=torch.uint8), src=0)


def _hear() -> bool:
    word = torch.zeros(1, dtype=torch.uint8)
    dist.broadcast(word, src=0)
    return bool(word)
