"""What all ranks must agree on at every step: is it finite, and has someone asked to stop?

A step whose loss or gradient is not finite on ANY rank, or whose gradient has a norm above a limit that
the user may set, is skipped on EVERY rank: parameters, optimiser state and running statistics stay as they
were, bit for bit. (The learning-rate schedule and the SIGReg step go on: a skipped step counts.) Three in
a row end the run.

One all-reduce of 2 W + 1 floats a step carries the flags. The skip itself happens on the device: the
fused optimiser reads `found_inf` there, as it does for a gradient scaler. On a GPU the host looks at the
flags of step t after it has queued step t + 1, so it never leaves the GPU idle, and learns of a stop or
of the third bad step one step late. On the CPU it reads them at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lejepa_fast.errors import RunError
from lejepa_fast.train.runtime.world import World, the_same_on_every_rank

log = logging.getLogger("lejepa_fast.train")

BAD_STEPS_THAT_STOP = 3

# Values of a rank's flag. SIGReg is a global statistic, so one rank's NaN makes every rank's loss NaN;
# the prediction part is a rank's own, and tells where it came from.
_FINE, _BAD, _BAD_AND_MINE = 0.0, 1.0, 2.0


@dataclass
class _Flags:
    """The reduced flags of one step, on the host once `ready` has passed."""

    step: int
    position: tuple[int, int]
    values: Tensor
    ready: torch.cuda.Event | None


class StepGuard:
    """At each step: `before_forward`, forward and backward, `check`, the optimiser's step, `settle`.

    For each bad step every rank calls `record(step, position, losses)`: what `settle` got for it, and the
    loss of each rank that the bad values came from. `largest_norm` of the gradient: 0 for any.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        record: Callable[[int, tuple[int, int], dict[int, float]], None] = lambda *bad: None,
        largest_norm: float = 0.0,
    ):
        self.skipped = 0
        self.stop = False
        self.bad = torch.zeros((), device=world.device)  # 1 where the step just checked is skipped
        self._record = record
        self._largest_norm = largest_norm or torch.inf
        self._fault, self._way_out = "loss or gradient not finite", ""
        if largest_norm:
            self._fault += f", or a gradient above --optim.skip-grad-norm {largest_norm:g},"
            self._way_out = ", or raise --optim.skip-grad-norm"
        self._world = world
        self._optimizer = optimizer
        self._streak = 0
        self._lags = world.device.type == "cuda"
        self._waiting: _Flags | None = None
        # W flags, W losses, and the number of ranks that were told to stop.
        self._flags = torch.zeros(2 * world.size + 1, device=world.device)
        # A batch with a NaN would poison running statistics for good. Two copies, taken in turn, because
        # on a GPU the host learns of a bad step after the next forward.
        self._buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
        self._backups = [[b.clone() for b in self._buffers] for _ in range(2)]

    @torch.no_grad()
    def before_forward(self, step: int) -> None:
        """Put the running statistics aside; `step` is the number that `settle` gets for the same step."""
        if self._buffers:
            torch._foreach_copy_(self._backups[step % 2], self._buffers)

    @torch.no_grad()
    def check(self, loss: Tensor, own_part: Tensor, grad_norm: Tensor, *, stop: bool) -> None:
        """Reduce this step's flags over the ranks; the optimiser then skips the step if one is bad.

        `loss`, `own_part` (the part of it that no other rank enters) and `grad_norm` are 0-dim tensors;
        `stop` says that this process was told to end.
        """
        size, rank = self._world.size, self._world.rank
        good = torch.isfinite(loss) & torch.isfinite(grad_norm) & (grad_norm <= self._largest_norm)
        self._flags.zero_()
        bad = torch.where(torch.isfinite(own_part), _BAD, _BAD_AND_MINE)
        self._flags[rank] = torch.where(good, _FINE, bad)
        self._flags[size + rank] = loss
        self._flags[-1] = float(stop)
        if self._world.distributed:
            dist.all_reduce(self._flags)
        self.bad = (self._flags[:size] > 0).any().float()
        self._optimizer.found_inf = self.bad  # type: ignore[attr-defined]

    def settle(self, step: int, position: tuple[int, int] = (0, 0)) -> None:
        """Bring this step's flags to the host and act on them, on a GPU on those of the step before.

        `position` (epoch, number of the batch in it) is for the record.
        """
        flags = self._on_the_way(step, position)
        if self._lags:
            self._waiting, flags = flags, self._waiting
        self._act_on(flags)

    def flush(self) -> None:
        """Act on everything still under way: before a checkpoint is taken and at the end."""
        waiting, self._waiting = self._waiting, None
        self._act_on(waiting)

    def _on_the_way(self, step: int, position: tuple[int, int]) -> _Flags:
        if self._world.device.type != "cuda":
            return _Flags(step, position, self._flags.clone(), None)
        host = torch.empty(self._flags.shape, pin_memory=True)
        host.copy_(self._flags, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return _Flags(step, position, host, ready)

    def _act_on(self, flags: _Flags | None) -> None:
        if flags is None:
            return
        if flags.ready is not None:
            flags.ready.synchronize()
        values, size = flags.values.tolist(), self._world.size
        self.stop = self.stop or values[-1] > 0
        worst = max(values[:size])
        if worst == _FINE:
            self._streak = 0
            return
        self._streak += 1
        self.skipped += 1
        self._restore_buffers(flags.step)
        ranks = [rank for rank in range(size) if values[rank] == worst]
        self._record(flags.step, flags.position, {rank: values[size + rank] for rank in ranks})
        where = f"rank {', '.join(map(str, ranks))}, step {flags.step}, loss {values[size + ranks[0]]}"
        if self._streak >= BAD_STEPS_THAT_STOP:
            with the_same_on_every_rank():
                raise RunError(
                    f"{self._fault} in {self._streak} steps in a row (last: {where}); they changed "
                    "no parameter, and metrics.jsonl names their images; lower --lr or set "
                    f"--optim.clip-grad-norm 1{self._way_out}, and resume from a checkpoint"
                )
        log.warning("%s (%s): step skipped", self._fault.rstrip(","), where)

    @torch.no_grad()
    def _restore_buffers(self, step: int) -> None:
        if self._buffers:
            good, other = self._backups[step % 2], self._backups[(step + 1) % 2]
            torch._foreach_copy_(self._buffers, good)
            # Where the host lags, the next step has already put the poisoned values aside as its backup.
            torch._foreach_copy_(other, good)
