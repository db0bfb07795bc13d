"""The average of the weights over the training steps: `--average ema` or `swa`.

It is kept beside the weights in training and changes nothing in them. Where it is on, it is what evaluations,
the report and the export take. The averaging functions are those of `torch.optim.swa_utils`; its
`AveragedModel` copies a module, which FSDP2 refuses (torch 2.11 to 2.15), so here they run over the tensors:
of sharded ones over the shards, each rank its own, without communication.

Running statistics of BatchNorm are averaged like weights. A step that was skipped enters with the weights,
which it left as they were, but without its running statistics, which may be NaN. So the average has running
statistics from before its first step: those after the last step that was not skipped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from lejepa_fast.train.config import AverageConfig


class WeightAverage:
    """The averaged model of a run, encoder and projector.

    Attributes:
        kind: "ema" or "swa".
        count: steps that it holds so far; 0 before the first.
    """

    def __init__(self, model: nn.Module, cfg: AverageConfig, total_steps: int):
        """`cfg.start` is a number here (config.resolve)."""
        assert cfg.kind != "none"
        assert not isinstance(cfg.start, str)
        self.kind = cfg.kind
        self.count = 0
        self._average = get_ema_multi_avg_fn(cfg.decay) if cfg.kind == "ema" else get_swa_multi_avg_fn()
        self._first = math.floor(cfg.start * total_steps) + 1
        self._model = model.state_dict(keep_vars=True)
        with torch.no_grad():
            self._averaged = {name: tensor.detach().clone() for name, tensor in self._model.items()}
        floats = [name for name, tensor in self._model.items() if tensor.is_floating_point()]
        self._weights = [name for name in floats if isinstance(self._model[name], nn.Parameter)]
        self._statistics = [name for name in floats if not isinstance(self._model[name], nn.Parameter)]
        self._counts = sorted(self._model.keys() - set(floats))

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor) -> None:
        """Take up the model as it is after finished step `step`; `skipped`: 0-dim, above 0 if that was."""
        mine, theirs = self._pairs(self._statistics)
        theirs = [torch.where(skipped > 0, old, new) for old, new in zip(mine, theirs, strict=True)]
        if step < self._first:  # its first step may be one that is skipped
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
        """The average by the names of the model's state dict, sharded like it; {} before the first step."""
        return self._averaged if self.count else {}

    def state(self) -> dict[str, int | str]:
        """What a checkpoint holds of it beside the tensors, as JSON has it."""
        return {"kind": self.kind, "count": self.count}

    def restore(self, state: dict[str, int | str] | None) -> None:
        """Continue from `state`, with `tensors()` to be filled; anew where it is that of another kind."""
        self.count = int(state["count"]) if state and state["kind"] == self.kind else 0

    @torch.no_grad()
    def follow(self) -> None:
        """Before its first step: take the running statistics that were loaded into the model."""
        if not self.count:
            _copy(*self._pairs(self._statistics))

    def _pairs(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors of the average and of the model: this rank's shards of sharded ones."""
        return [_local(self._averaged[name]) for name in names], [_local(self._model[name]) for name in names]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _local(tensor: Tensor) -> Tensor:
    # Anew at each step: FSDP2 gives its parameters other memory at their first use.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
