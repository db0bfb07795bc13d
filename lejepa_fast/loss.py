"""The LeJEPA loss: prediction between views plus SIGReg (LeJEPA, arXiv 2511.08544, Algorithm 2)."""

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import check_choice, check_embeddings, check_number
from .collectives import all_reduce_sums, check_batch, sum_gradient_over_ranks
from .reference import full_precision
from .regularizer import SIGReg


class LeJEPAOutput(NamedTuple):
    """Parts of the loss, float32 scalars on the device of the embeddings."""

    total: Tensor
    """Call `backward()` on it."""
    prediction: Tensor
    """Mean squared distance of the views' embeddings to the center, unweighted."""
    sigreg: Tensor
    """SIGReg averaged over views, unweighted."""


class LeJEPALoss(nn.Module):
    """Views predict their common center while SIGReg keeps every view isotropic Gaussian.

        prediction = mean over v, n, k of (mu[n, k] - z[v, n, k])^2
        total      = (1 - lambda) * prediction + lambda * sigreg        form="convex"
        total      = prediction + lambda * sigreg                       form="additive"

    `mu` is the mean of the global views' embeddings (`center="global"`) or of all views'
    (`center="all"`). Gradient flows through `mu`; there is no stop-gradient and no teacher.

    Value and DDP-averaged gradient equal those of one process on the concatenated batch, also when
    ranks hold different numbers of samples; both parts use the process group of `sigreg`.

    Args:
        lambd: weight lambda of SIGReg, >= 0 (at most 1 for the convex form). The paper's default is 0.05.
        sigreg: the regularizer; default `SIGReg()`.
        center: "global" (paper) or "all" (authors' minimal example, timm).
        form: "convex" (paper) or "additive" (stable-pretraining, eb_jepa).

    The arguments are attributes that may be changed at any time.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what was given.
    """

    def __init__(
        self,
        lambd: float = 0.05,
        sigreg: SIGReg | None = None,
        center: Literal["global", "all"] = "global",
        form: Literal["convex", "additive"] = "convex",
    ):
        super().__init__()
        self.sigreg = SIGReg() if sigreg is None else sigreg
        self.center = center
        self.form = form
        self.lambd = lambd

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "center":
            check_choice("center", value, "global", "all")
        elif name == "form":
            check_choice("form", value, "convex", "additive")
            if hasattr(self, "lambd"):
                _check_lambd(self.lambd, value)
        elif name == "lambd":
            _check_lambd(value, self.form)
        elif name == "sigreg":
            _check_sigreg(value)
        super().__setattr__(name, value)

    def forward(
        self, global_views: Tensor, all_views: Tensor, step: int | Tensor | None = None
    ) -> LeJEPAOutput:
        """The loss of one batch.

        Args:
            global_views: embeddings of the global views, shape (Vg, N, K). Those of another model, without
                a gradient, give a fixed center.
            all_views: embeddings of all views, the global ones included, shape (V, N, K).
            step: directions to use, see `SIGReg.forward`; None counts by itself.

        Returns:
            `LeJEPAOutput(total, prediction, sigreg)`.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what was given.
            RuntimeError: as `SIGReg.forward`.
        """
        check_embeddings("global_views", global_views)
        reg = self.sigreg
        _check_sigreg(reg)  # its attributes may have changed
        group = check_batch(
            "all_views", all_views, reg.process_group, reg.sync, unbiased=reg.unbiased, pool=reg.pool_views
        )
        for name, value in (("global_views", global_views), ("all_views", all_views)):
            if value.dim() != 3:
                raise ValueError(f"{name}: expected shape (views, N, K), got {tuple(value.shape)}")
        if global_views.shape[1:] != all_views.shape[1:]:
            expected, got = tuple(all_views.shape[1:]), tuple(global_views.shape[1:])
            raise ValueError(f"global_views: expected (N, K) = {expected} as in all_views, got {got}")
        if len(global_views) > len(all_views):
            most, count = len(all_views), len(global_views)
            raise ValueError(f"global_views: expected at most the {most} of all_views, got {count}")
        prediction = self._prediction(global_views, all_views, group)
        sigreg = reg(all_views, step)
        weight = 1 - self.lambd if self.form == "convex" else 1.0
        return LeJEPAOutput(weight * prediction + self.lambd * sigreg, prediction, sigreg)

    def _prediction(self, global_views: Tensor, all_views: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        with full_precision(all_views.device):
            dtype = torch.float64 if all_views.dtype == torch.float64 else torch.float32
            z = all_views.to(dtype)
            mu = (global_views.to(dtype) if self.center == "global" else z).mean(0)
            views, n, dim = z.shape
            squares, count = all_reduce_sums((mu - z).square().sum(), n, group)
            return sum_gradient_over_ranks(squares / (views * dim * count), group).float()


def _check_sigreg(value: Any) -> None:
    if not isinstance(value, SIGReg):
        raise TypeError(f"sigreg: expected a SIGReg module, got {value!r}")
    if value.reduction is None:
        raise ValueError("sigreg: expected reduction='mean' or 'sum', got None; the loss needs a scalar")


def _check_lambd(lambd: Any, form: str) -> None:
    check_number("lambd", lambd)
    if not (0 <= lambd < float("inf")) or (form == "convex" and lambd > 1):
        limits = "in [0, 1] for the convex form" if form == "convex" else "finite and >= 0"
        raise ValueError(f"lambd: expected a number {limits}, got {lambd}")
