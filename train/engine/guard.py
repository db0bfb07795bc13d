"""What all ranks must agree on at every step: is it finite, and has a signal asked to stop?

If the loss or gradient is not finite on ANY rank, or the gradient's norm is above a limit that the user may
set, the step is skipped on EVERY rank: parameters, optimizer state and running statistics stay as they were,
bit for bit. (The learning-rate schedule and the SIGReg step go on.) Three in a row end the run.

One all-reduce of 2 W + 1 floats a step carries the flags of W ranks. The skip happens on the device, where
the fused optimizer reads `found_inf`, as it does for a gradient scaler. On a GPU the host reads the flags of
step t after it has queued step t + 1, so that the GPU never idles; it learns of a bad step or a stop one step
late.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lejepa_fast.errors import RunError
from lejepa_fast.train.runtime.world import World, same_error_on_all_ranks

log = logging.getLogger("lejepa_fast.train")

MAX_BAD_STEPS = 3
"""Bad steps in a row that end the run."""

# A rank's flag. SIGReg is a global statistic, so one rank's NaN makes every rank's loss NaN; the prediction
# part is a rank's own and tells where the NaN came from.
_GOOD, _BAD, _SOURCE = 0.0, 1.0, 2.0


class StepGuard:
    """At each step: `before_forward`, forward and backward, `check`, the optimizer's step, `settle`.

    `record` is called on every rank for each bad step, with the arguments of `settle` and the loss of each
    rank that the bad values came from. A gradient norm above `max_norm` makes a step bad; 0: no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        record: Callable[[int, tuple[int, int], dict[int, float]], None],
        max_norm: float,
    ):
        self.skipped = 0  # steps so far
        self.stop = False  # whether a rank was told to stop
        self.bad = torch.zeros((), device=world.device)  # 1 if the step just checked is skipped
        self.lag = world.device.type == "cuda"  # whether the host looks at the flags one step late
        self._world, self._optimizer, self._record = world, optimizer, record
        self._max_norm = max_norm or torch.inf
        self._waiting: Callable[[], None] = lambda: None
        self._bad_in_a_row = 0
        # W flags, W losses, and the number of ranks that were told to stop.
        self._flags = torch.zeros(2 * world.size + 1, device=world.device)
        # A NaN would spoil running statistics for good. Two backups, used in turn, because with a lag the
        # host learns of a bad step after the next forward pass.
        self._buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
        self._backups = [[b.clone() for b in self._buffers] for _ in range(2)]

    def before_forward(self, step: int) -> None:
        """Back up the running statistics; `step` is the number that `settle` gets for this step."""
        if self._buffers:
            torch._foreach_copy_(self._backups[step % 2], self._buffers)

    @torch.no_grad()
    def check(self, loss: Tensor, own_part: Tensor, grad_norm: Tensor, *, stop: bool) -> None:
        """Reduce this step's flags over the ranks; the optimizer skips the step if one is bad.

        0-dim tensors: the loss, a value that depends on this rank's batch alone, and the gradient's norm over
        all ranks. `stop`: whether this process was told to stop.
        """
        size, rank = self._world.size, self._world.rank
        good = torch.isfinite(loss) & torch.isfinite(grad_norm) & (grad_norm <= self._max_norm)
        self._flags.zero_()
        bad = torch.where(torch.isfinite(own_part), _BAD, _SOURCE)
        self._flags[rank] = torch.where(good, _GOOD, bad)
        self._flags[size + rank] = loss
        self._flags[-1] = float(stop)
        if self._world.distributed:
            dist.all_reduce(self._flags)
        self.bad = (self._flags[:size] > 0).any().float()
        self._optimizer.found_inf = self.bad  # type: ignore[attr-defined]

    def settle(self, step: int, position: tuple[int, int]) -> None:
        """Copy this step's flags to the host and act on them; with a lag, on those of the step before.

        `step` counts finished steps, `position` is the epoch and the number of the batch in it.
        """
        on_gpu = self._flags.is_cuda
        host = torch.empty(self._flags.shape, pin_memory=on_gpu).copy_(self._flags, non_blocking=on_gpu)
        ready = torch.cuda.current_stream().record_event() if on_gpu else None
        if self.lag:
            self.flush()
        self._waiting = partial(self._act_on, step, position, host, ready)
        if not self.lag:
            self.flush()

    def flush(self) -> None:
        """Act on flags that are still waiting: before a checkpoint is taken."""
        act, self._waiting = self._waiting, lambda: None
        act()

    def _act_on(
        self, step: int, position: tuple[int, int], flags: Tensor, ready: torch.cuda.Event | None
    ) -> None:
        if ready is not None:
            ready.synchronize()
        values, size = flags.tolist(), self._world.size
        self.stop = self.stop or values[-1] > 0
        worst = max(values[:size])
        if worst == _GOOD:
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        self.skipped += 1
        if self._buffers:
            good, other = self._backups[step % 2], self._backups[(step + 1) % 2]
            torch._foreach_copy_(self._buffers, good)
            torch._foreach_copy_(other, good)  # with a lag, it already backs up the spoiled values
        ranks = [rank for rank in range(size) if values[rank] == worst]
        self._record(step, position, {rank: values[size + rank] for rank in ranks})
        where = f"rank {', '.join(map(str, ranks))}, step {step}, loss {values[size + ranks[0]]}"
        problem, advice = "loss or gradient not finite", "lower --lr or set --optim.clip-grad-norm 1"
        if self._max_norm < torch.inf:
            problem += f" or gradient norm above --optim.skip-grad-norm {self._max_norm:g}"
            advice += ", or raise --optim.skip-grad-norm"
        if self._bad_in_a_row < MAX_BAD_STEPS:
            log.warning("%s (%s): step skipped", problem, where)
            return
        with same_error_on_all_ranks():
            raise RunError(
                f"{problem} in {MAX_BAD_STEPS} steps in a row (last: {where}); they changed no parameter; "
                f"metrics.jsonl names their images; {advice}, and resume from a checkpoint"
            )
