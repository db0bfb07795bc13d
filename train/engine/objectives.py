"""What a step of each objective needs beside model and loss: the model's inputs, metrics, the target encoder.

The trainer calls `inputs` before the forward pass, `finish` after the optimizer's step, and on log steps
`figures` of what `kept` left. All three objectives train with the same trainer.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lejepa_fast.data.sampler import BatchKey, EpochSchedule
from lejepa_fast.train.config import Config
from lejepa_fast.train.evaluation.collapse import effective_rank
from lejepa_fast.train.model.masked import MaskedBatch, MaskedModel, MaskedOutputs

_IMAGES, _PATCHES = 64, 512
"""Images and patches of a batch at most that log rows are about."""


class Objective:
    """One run's objective on one rank. This one is LeJEPA's: the views of an image predict their mean."""

    def inputs(self, views: list[Tensor], epoch: int, batch: int) -> tuple[Any, ...]:
        """Return the model's inputs: views, (B, C, S, S) each, of batch number `batch` of an epoch, and what
        goes with them."""
        return (views,)

    def kept(self, outputs: Any) -> Tensor:
        """Return what log rows need of the model's outputs: embeddings (V, N, K), or targets (B, P, K)."""
        return outputs[1].detach()

    def spread(self, kept: Tensor) -> Tensor:
        """Return the standard deviation over images, averaged over dimensions: a 0-dim tensor."""
        return kept.float().std(dim=1).mean()

    def figures(self, kept: Tensor) -> dict[str, float]:
        """Return further figures for a row of kind "train", of this rank alone."""
        return {}

    def finish(self, step: int, skipped: Tensor) -> None:
        """Follow step number `step`, from 1; `skipped` is a 0-dim tensor, above 0 if it was skipped."""
        return


class Masked(Objective):
    """Masked prediction, with a target encoder (I-JEPA) or without.

    Args:
        cfg: the configuration.
        model: the model of the run, not the wrapper that is called.
        schedule: which images make up a batch of this rank.
        device: of the model.
        total_steps: over which the momentum changes.
    """

    def __init__(
        self, cfg: Config, model: MaskedModel, schedule: EpochSchedule, device: torch.device, total_steps: int
    ):
        self._cfg, self._model, self._schedule = cfg, model, schedule
        self._device, self._total_steps = device, total_steps
        self._keys: Iterator[BatchKey] = iter(())  # the images of the coming batches, from `_next` on
        self._next = (-1, -1)
        self._padding = 0.0
        self._momentum = cfg.masked.momentum

    def inputs(self, views: list[Tensor], epoch: int, batch: int) -> tuple[Any, ...]:
        masked = self._model.batch(self._cfg.seed, epoch, self._images(epoch, batch), self._device)
        self._padding = padding_of(masked)
        return views, masked

    def _images(self, epoch: int, batch: int) -> tuple[int, ...]:
        if self._next != (epoch, batch):
            self._keys = self._schedule.keys(epoch, batch)
        self._next = epoch, batch + 1
        return next(self._keys).indices

    def kept(self, outputs: MaskedOutputs) -> Tensor:
        return outputs.tokens[:_IMAGES].detach().clone()  # targets, (B, P, K)

    def spread(self, kept: Tensor) -> Tensor:
        return kept.float().mean(dim=1).std(dim=0).mean()

    def figures(self, kept: Tensor) -> dict[str, float]:
        """`target_std`: standard deviation of the targets over images and patches, averaged over dimensions.
        `within_std`: the same of what patches differ from the mean of their image; near 0 if all patches of
        an image are alike. `between_rank`, `within_rank`: effective rank of the images' means, and of these
        differences, over 64 images and 512 random patches at most. `padding`: share of the batch that padding
        to its longest sequence would be. `momentum`: of the target encoder."""
        tokens = kept.float()
        means = tokens.mean(dim=1)
        patches = (tokens - means[:, None]).flatten(0, 1)
        # Random: every n-th patch would be one column of the grid where n is a multiple of its width.
        some = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:_PATCHES]
        samples = means, patches[some.to(patches.device)]
        finite = bool(tokens.isfinite().all())  # or the step was skipped
        between, within = (effective_rank(each) if finite else math.nan for each in samples)
        figures = {
            "target_std": tokens.flatten(0, 1).std(dim=0).mean().item(),
            "within_std": patches.std(dim=0).mean().item(),
            "between_rank": between,
            "within_rank": within,
            "padding": self._padding,
        }
        return figures | ({"momentum": self._momentum} if self._model.target is not None else {})

    def finish(self, step: int, skipped: Tensor) -> None:
        first, last = self._cfg.masked.momentum, self._cfg.masked.final_momentum
        self._momentum = first + (last - first) * min(1.0, (step - 1) / self._total_steps)
        self._model.follow(self._momentum, skipped)


def padding_of(batch: MaskedBatch) -> float:
    """Share of the context encoder's and the predictor's tokens that padding would be."""
    packings = batch.context, batch.blocks
    padded = sum(packing.size[0] * packing.size[1] for packing in packings)
    return 1 - sum(packing.rows for packing in packings) / padded
