"""The loss of a run, from its configuration."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lejepa_fast import LeJEPALoss, SIGReg
from lejepa_fast.collectives import all_reduce_sums, resolve_group, sum_gradient_over_ranks
from lejepa_fast.errors import UsageError
from lejepa_fast.loss import LeJEPAOutput
from lejepa_fast.reference import full_precision
from lejepa_fast.train.config import Config


class MaskedLoss(nn.Module):
    """Distance of predictions to targets, and SIGReg where there is no teacher.

        prediction = mean over target patches and dimensions of distance(prediction, target)
        total      = prediction                                         without SIGReg
        total      = (1 - lambda) * prediction + lambda * sigreg        form="convex"
        total      = prediction + lambda * sigreg                       form="additive"

    Each patch of each block counts the same. Value and DDP-averaged gradient equal those of one process on
    the whole batch, though ranks hold different numbers of target patches.

    Args:
        distance: "smooth_l1" or "l2".
        sigreg: the regularizer; None: I-JEPA.
        over: its samples, see `LossConfig.sigreg_over`.
        lambd, form: as of `LeJEPALoss`.
    """

    def __init__(
        self,
        distance: Literal["smooth_l1", "l2"],
        sigreg: SIGReg | None = None,
        over: Literal["image", "position", "token"] = "position",
        lambd: float = 0.05,
        form: Literal["convex", "additive"] = "convex",
    ):
        super().__init__()
        self.distance = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}[distance]
        self.sigreg: Any = sigreg
        self.over = over
        self.lambd = lambd
        self.weight = 1 - lambd if form == "convex" else 1.0

    def forward(self, tokens: Tensor, wanted: Tensor, predictions: Tensor) -> LeJEPAOutput:
        """The loss of one batch.

        Args:
            tokens: targets of all patches, (B, P, K).
            wanted, predictions: targets of the target patches, and what was predicted, (R, K).

        Returns:
            total, prediction and SIGReg, 0-dim; SIGReg is 0 for I-JEPA.
        """
        group = resolve_group(None, sync=True)
        with full_precision(tokens.device):
            dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
            distances = self.distance(predictions.to(dtype), wanted.to(dtype), reduction="sum")
            total, count = all_reduce_sums(distances, len(wanted), group)
            prediction = sum_gradient_over_ranks(total / (count * wanted.shape[1]), group)
        if self.sigreg is None:
            return LeJEPAOutput(prediction, prediction, torch.zeros_like(prediction))
        samples = {
            "image": lambda: tokens.mean(1),
            "position": lambda: tokens.transpose(0, 1),
            "token": lambda: tokens.flatten(0, 1),
        }[self.over]()
        sigreg = self.sigreg(samples)
        return LeJEPAOutput(self.weight * prediction + self.lambd * sigreg, prediction, sigreg)


def build_loss(cfg: Config, device: torch.device) -> LeJEPALoss | MaskedLoss:
    """Build the loss on `device`; UsageError for a value that it refuses, or if it cannot run there."""
    options = cfg.loss
    if cfg.objective == "ijepa":
        return MaskedLoss(options.distance)
    try:
        sigreg = SIGReg(
            num_slices=options.num_slices,
            t_max=options.t_max,
            n_points=options.n_points,
            unbiased=options.unbiased,
            impl=options.impl,
            seed=cfg.seed,
        )
        if cfg.objective == "lejepa":
            # From the average, the first argument of the loss is all that the center is the mean of.
            center = "global" if options.center_from == "average" else options.center
            loss_fn: LeJEPALoss | MaskedLoss = LeJEPALoss(
                lambd=options.lambd, sigreg=sigreg, center=center, form=options.form
            )
        else:
            loss_fn = MaskedLoss(options.distance, sigreg, options.sigreg_over, options.lambd, options.form)
        loss_fn.to(device)
        _ = sigreg.chosen_impl  # raises here, before the run folder is made, if the implementation cannot run
    except (ValueError, TypeError) as error:
        raise UsageError(f"loss: {error}") from error
    return loss_fn
