"""SIGReg as a module: holds the knots and the step, draws directions and calls `functional.py`."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import check_choice, check_flag, check_integer
from .collectives import check_batch
from .directions import sample_unit_directions
from .dispatch import IMPLEMENTATIONS, Implementation, Precision, choose, resolve_implementation
from .functional import Options, Reduction, after_trial, resolve_spacing, sigreg_unchecked
from .reference import Knots, standard_normal_knots, transforming
from .triton_operators import PRECISIONS

_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "num_slices": partial(check_integer, at_least=1),
    "seed": check_integer,
    "reduction": lambda name, value: check_choice(name, value, "mean", "sum", None),
    "impl": lambda name, value: check_choice(name, value, *IMPLEMENTATIONS),
    "precision": lambda name, value: check_choice(name, value, *PRECISIONS, None),
    **dict.fromkeys(("unbiased", "sync", "scale_by_n", "pool_views"), check_flag),
}
"""Attributes that may be changed at any time, and the checks of their values."""


class _Calls:
    """Counts calls since a backward pass began or recomputed one, to find those that checkpointing repeats.
    And remembers whether the last one had to do without the kernels.

    Not attributes of the module, which are slow to set.
    """

    count = 0
    backward_began = False
    fell_back = False  # from the kernels, which failed their trial

    def repeated(self) -> bool:
        """Whether activation checkpointing repeats an earlier call; counts the other calls."""
        if torch.compiler.is_compiling():
            return False
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            self.count = 1 if self.backward_began else self.count + 1
            self.backward_began = False
            return False
        if self.count != 1:
            raise RuntimeError(
                "step: expected an explicit step where activation checkpointing recomputes one of "
                f"{self.count} calls of SIGReg, got None; give a step to each call, or keep the loss "
                "outside the checkpointed region"
            )
        self.backward_began = True
        return True

    def note_backward(self, grad: Tensor) -> None:
        self.backward_began = True


class SIGReg(nn.Module):
    """Sketched isotropic Gaussian regularization of embeddings (LeJEPA, arXiv 2511.08544, section 4).

    Projects embeddings on random directions and returns the mean Epps-Pulley statistic of the
    projections. Under N(0, I) its expectation is about 1.05 for the default knots (0 with
    `unbiased=True`), and it grows like N when embeddings deviate or collapse.

    Knots. The default is the authors' code: `t_max=3, n_points=17` on the half line. The paper's
    Algorithm 1, `linspace(-5, 5, 17)` on the whole line, is `t_max=5, n_points=9`.

    Directions are fresh at every call in training mode: a function of (seed, step) alone, the same on
    all ranks and for all views. `step` is a persistent buffer, advanced on the device, saved in the
    state dict. Evaluation mode does not advance it.

    Activation checkpointing calls the module a second time. In eager mode the directions of the last
    call are used again and the step stays; several calls before one backward are ambiguous and raise.
    Give `step` to `forward` then, and wherever checkpointing is combined with `torch.compile`. Better still,
    keep the loss outside the checkpointed region: it stores no large activations.

    Args:
        num_slices: number of directions M.
        t_max: right end of the half line of knots.
        n_points: number of knots J on the half line, both ends included.
        unbiased: remove the O(1/N) minibatch bias; needs two samples.
        reduction: "mean" or "sum" over views and slices, or None for a statistic of each.
        process_group: ranks that share a batch; None is the default group, looked up at every call.
        sync: take the statistic of the batch of all ranks, in evaluation mode too: every rank must call the
            module then. False keeps it local, for example while rank 0 evaluates alone.
        impl: "triton", "torch", "reference" or "auto", see `lejepa_fast.sigreg`; `chosen_impl` is what "auto"
            takes.
        seed: selects the sequence of directions.
        scale_by_n: multiply by the number of samples, as the paper does.
        pool_views: treat all leading dimensions as one sample of V * N embeddings (stable-pretraining)
            instead of a statistic for each view.
        knots: quadrature to use instead of `t_max` and `n_points`, for other targets or windows; phi and
            weights may have shape (J, M).
        precision: of float32 products with the Triton kernels, see `lejepa_fast.sigreg`.

    All but `t_max`, `n_points` and `knots` are attributes that may be changed at any time.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.
    """

    step: Tensor

    def __init__(
        self,
        num_slices: int = 1024,
        t_max: float = 3.0,
        n_points: int = 17,
        unbiased: bool = False,
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
        sync: bool = True,
        impl: Implementation = "auto",
        *,
        seed: int = 0,
        scale_by_n: bool = True,
        pool_views: bool = False,
        knots: Knots | None = None,
        precision: Precision | None = None,
    ):
        super().__init__()
        self.num_slices = num_slices
        self.unbiased = unbiased
        self.reduction: Reduction = reduction
        self.process_group = process_group
        self.sync = sync
        self.impl: Implementation = impl
        self.precision: Precision | None = precision
        self.seed = seed
        self.scale_by_n = scale_by_n
        self.pool_views = pool_views
        self._knots = standard_normal_knots(t_max, n_points) if knots is None else _checked(knots)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._place_knots()
        self._calls = _Calls()

    @property
    def chosen_impl(self) -> str:
        """The implementation in use on the module's device: what "auto" means there for float32, or "torch"
        if the kernels failed the trial of the last call."""
        chosen = resolve_implementation(self.impl, self.step.device)
        return "torch" if chosen == "triton" and self.impl == "auto" and self._calls.fell_back else chosen

    def forward(self, z: Tensor, step: int | Tensor | None = None) -> Tensor:
        """SIGReg of embeddings z (..., N, K).

        Args:
            z: embeddings, shape (..., N, K).
            step: directions to use instead of those of the module's counter, which then stays as it is.

        Returns:
            float32 scalar, or for `reduction=None` shape (..., M), (M,) with `pool_views`. NaN if z holds NaN
            or infinity.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what was given.
            RuntimeError: `step` is None where checkpointing recomputes several calls or `torch.func`
                transforms the module; or the implementation cannot be transformed, see `lejepa_fast.sigreg`.
        """
        group = check_batch(
            "z", z, self.process_group, self.sync, unbiased=self.unbiased, pool=self.pool_views
        )
        if self.pool_views:
            z = z.flatten(0, -2)
        chosen = choose(self.impl, z, self.precision, several_ranks=group is not None)
        if transforming() and self.training and step is None:
            raise RuntimeError(
                "step: expected an explicit step in training mode under torch.func transforms, which cannot "
                "advance the module's counter, got None; call it with step=..., or after eval()"
            )
        moved = z.device != self._placed_knots.t.device and z.device.type != "meta"
        if moved and not torch.compiler.is_compiling():
            with torch.inference_mode(False):  # step and knots must serve a later training step
                self.to(z.device)  # once, instead of copying the knots at every call
        knots = self._placed_knots if z.dtype != torch.float64 else self._exact_knots
        options = Options(self.unbiased, self.reduction, self.scale_by_n, self.precision)
        if self.impl == "auto" and chosen == "triton":
            chosen = after_trial(z, self.num_slices, knots, options, group)
            if not torch.compiler.is_compiling():
                self._calls.fell_back = chosen == "torch"
        buffer = self.step
        advances = step is None and self.training
        recomputed = advances and self._calls.repeated()
        if step is None:
            step = buffer - 1 if recomputed else buffer
        with torch.no_grad():
            # In the dtype of z, for its tensor cores; in half precision the scale undoes the rounding.
            A, scale = sample_unit_directions(
                z.shape[-1],
                self.num_slices,
                step=step,
                seed=self.seed,
                device=z.device,
                dtype=z.dtype,
                impl=chosen,
            )
            if advances and not recomputed:
                buffer.add_(1)  # after its use: a copy would be one more launch
        loss = sigreg_unchecked(z, A, scale if z.dtype.itemsize <= 2 else None, knots, options, group, chosen)
        if loss.requires_grad and not (transforming() or torch.compiler.is_compiling()):
            loss.register_hook(self._calls.note_backward)
        return loss.float()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            _CHECKS[name](name, value)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SIGReg":
        memo[id(self.process_group)] = self.process_group  # a group cannot be copied, and need not be
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def _place_knots(self) -> None:
        """Put the knots on the device of the module, in float32 and for float64 embeddings as they are.

        They are no buffers: `.bfloat16()` must not round them, nor `to_empty` leave them without values.
        """
        device = self.step.device
        t, phi, weights = (a.to(device, torch.float32) for a in self._knots[:3])
        self._placed_knots = self._exact_knots = Knots(t, phi, weights, self._knots.spacing)
        if device.type != "mps":  # which has no float64
            t, phi, weights = (a.to(device) for a in self._knots[:3])
            self._exact_knots = Knots(t, phi, weights, self._knots.spacing)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SIGReg":
        step = self.step
        super()._apply(fn, recurse)
        if step.is_meta and not self.step.is_meta:
            self.step.zero_()
        if self._placed_knots.t.device != self.step.device:
            self._place_knots()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._placed_knots.t.device != self.step.device:  # the step came with assign=True
            self._place_knots()

    def extra_repr(self) -> str:
        J = self._knots.t.shape[0]
        impl = f"{self.impl!r} -> {self.chosen_impl!r}" if self.impl == "auto" else repr(self.impl)
        return (
            f"num_slices={self.num_slices}, n_points={J}, t_max={self._knots.t[-1].item():g}, "
            f"unbiased={self.unbiased}, reduction={self.reduction!r}, impl={impl}"
        )


def _checked(knots: Knots) -> Knots:
    """float64 knots on the CPU, with a spacing that fits them."""
    t, phi, weights = (a.detach().to("cpu", torch.float64) for a in knots[:3])
    return Knots(t, phi, weights, resolve_spacing(knots.spacing, t))
