"""Which images were in a batch whose step was skipped: to look at them, and to leave them out."""

from __future__ import annotations

from collections.abc import Mapping

from lejepa_fast.data import ImageSource
from lejepa_fast.data.sampler import EpochSchedule
from lejepa_fast.train.config import Config
from lejepa_fast.train.engine.metrics import Metrics


def write_skipped(
    metrics: Metrics,
    source: ImageSource,
    cfg: Config,
    world_size: int,
    step: int,
    position: tuple[int, int],
    losses: Mapping[int, float],
) -> None:
    """One row of kind `skipped` for each rank that the values which are not finite came from.

    `losses` maps these ranks to their losses; `position` is the epoch and the number of the batch in it. Any
    rank can tell any other's images: they are a function of the seed and the position. An image in
    quarantine.txt stands here although another one took its place.
    """
    epoch, batch = position
    for rank, loss in losses.items():
        images = cfg.data.batch_size // world_size
        schedule = EpochSchedule(len(source), images, cfg.seed, rank, world_size)
        ids = next(schedule.keys(epoch, batch)).indices
        names = [source.describe(index) for index in ids]
        metrics.write("skipped", step, epoch=epoch, rank=rank, loss=loss, ids=list(ids), images=names)
