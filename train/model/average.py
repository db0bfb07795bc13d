"""The average of the weights over the training steps: `--average ema` or `swa`.

Evaluations, report and export use it in place of the weights. It acts on the training only if it gives the
center of the views (`center.py`). The averaging functions are those of `torch.optim.swa_utils`. Its
`AveragedModel` copies a module, which FSDP2 refuses (torch 2.11 to 2.15), so here they run over tensors: each
rank averages its own shards, without communication.

Running statistics of BatchNorm are averaged like weights. A skipped step leaves the weights unchanged, but
its running statistics may be NaN and are left out.
"""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from lejepa_fast.train.config import AverageConfig


class WeightAverage:
    """The averaged model of a run, encoder and projector; `count` steps are in it so far.

    Args:
        model: the model to average.
        cfg: kind, decay and start.
        total_steps: of the run, for the start.
        into: a model with the same values, sharded alike, whose tensors become the average; None: copies.
    """

    def __init__(self, model: nn.Module, cfg: AverageConfig, total_steps: int, into: nn.Module | None = None):
        assert not isinstance(cfg.start, str)  # see config.resolve
        self.kind = cfg.kind
        self.count = 0
        self._average = get_ema_multi_avg_fn(cfg.decay) if cfg.kind == "ema" else get_swa_multi_avg_fn()
        self._first = math.floor(cfg.start * total_steps) + 1
        self._model = model.state_dict(keep_vars=True)
        if into is None:
            self._averaged = {name: tensor.detach().clone() for name, tensor in self._model.items()}
        else:
            self._averaged = into.state_dict(keep_vars=True)
        # Of a tensor that the averaged model has under several names, only one: it is averaged once a step.
        single = {id(tensor): name for name, tensor in self._averaged.items()}.values()
        self._weights = [name for name in single if isinstance(self._model[name], nn.Parameter)]
        others = set(single) - set(self._weights)
        self._counts = sorted(name for name in others if not self._model[name].is_floating_point())
        self._statistics = sorted(others - set(self._counts))

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Add the model after step `step`; `skipped` is a 0-dim tensor, above 0 if the step was skipped."""
        mine, theirs = self._pairs(self._statistics)
        theirs = [torch.where(skipped > 0, old, new) for old, new in zip(mine, theirs, strict=True)]
        if step < self._first:  # kept up to date, as the first averaged step may be a skipped one
            _copy(mine, theirs)
            return
        my_weights, their_weights = self._pairs(self._weights)
        mine, theirs = my_weights + mine, their_weights + theirs
        if self.count:
            self._average(mine, theirs, self.count)
        else:
            _copy(mine, theirs)
        for name in self._counts:
            self._averaged[name].copy_(self._model[name])
        self.count += 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the average by the names of the state dict, sharded like it; {} before the first step."""
        return {name: tensor.detach() for name, tensor in self._averaged.items()} if self.count else {}

    def state(self) -> dict[str, int | str]:
        """Return what a checkpoint holds of it beside the tensors."""
        return {"kind": self.kind, "count": self.count}

    def restore(self, state: dict[str, int | str] | None) -> None:
        """Continue from `state`, if it is of the same kind; the caller then loads `tensors()`."""
        self.count = int(state["count"]) if state and state["kind"] == self.kind else 0

    @torch.no_grad()
    def follow(self) -> None:
        """Before the first averaged step, copy the running statistics that were loaded into the model."""
        if not self.count:
            _copy(*self._pairs(self._statistics))

    def _pairs(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's shards of the average and of the model."""
        return [local_shard(self._averaged[name]) for name in names], [
            local_shard(self._model[name]) for name in names
        ]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a parameter that this rank holds, as a plain tensor without a gradient."""
    # Not cached: FSDP2 moves its parameters at their first use.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
