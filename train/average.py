"""The average of the weights over the training steps: `--average ema` or `swa`.

It is kept beside the weights in training and changes nothing in them. Where it is on, it is what evaluations,
the report and the export take. The averaging functions are those of `torch.optim.swa_utils`; its
`AveragedModel` copies a module, which FSDP2 refuses (torch 2.11 to 2.15), so here they run over the tensors:
of sharded ones over the shards, each rank its own, without communication.

Running statistics of BatchNorm are averaged like weights. A step that was skipped enters with the weights,
which it left as they were, but without its running statistics, which may be NaN.
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
        if step < self._first:
            return
        names = [*self._weights, *self._statistics]
        mine = [_local(self._averaged[name]) for name in names]
        theirs = [_local(self._model[name]) for name in names]
        for index in range(len(self._weights), len(names)):
            theirs[index] = torch.where(skipped > 0, mine[index], theirs[index])
        if self.count:
            self._average(mine, theirs, self.count)
        else:
            torch._foreach_copy_(mine, theirs)
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


def _local(tensor: Tensor) -> Tensor:
    # Anew at each step: FSDP2 gives its parameters other memory at their first use.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
