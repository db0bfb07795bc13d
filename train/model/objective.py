"""The loss of a run, from its configuration."""

import torch

from lejepa_fast import LeJEPALoss, SIGReg
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config


def build_loss(cfg: Config, device: torch.device) -> LeJEPALoss:
    """Build the loss on `device`; UsageError for a value that it refuses, or if it cannot run there."""
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
        _ = sigreg.chosen_impl  # raises here, before the run folder is made, if the implementation cannot run
    except (ValueError, TypeError) as error:
        raise UsageError(f"loss: {error}") from error
    return loss_fn
