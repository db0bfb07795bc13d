"""What a run minimises, from its configuration."""

from __future__ import annotations

import torch

from lejepa_fast import LeJEPALoss, SIGReg
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config


def build_loss(cfg: Config, device: torch.device) -> LeJEPALoss:
    """The loss of a run on its device; UsageError for values that it refuses, or an `impl` not to be had."""
    options = cfg.loss
    try:
        sigreg = SIGReg(
            num_slices=options.num_slices,
            t_max=options.t_max,
            n_points=options.n_points,
            unbiased=options.unbiased,
            impl=options.impl,
            seed=cfg.seed,
        )
        loss_fn = LeJEPALoss(lambd=options.lambd, sigreg=sigreg, center=options.center, form=options.form)
        loss_fn.to(device)
        _ = sigreg.chosen_impl  # raises where the implementation cannot run, before the run folder is made
    except (ValueError, TypeError) as error:
        raise UsageError(f"loss: {error}") from error
    return loss_fn
