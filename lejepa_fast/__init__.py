"""lejepa_fast: LeJEPA pretraining with a fast SIGReg.

from lejepa_fast import LeJEPALoss, SIGReg

loss_fn = LeJEPALoss(lambd=0.05, sigreg=SIGReg(num_slices=1024))
loss = loss_fn(global_z, all_z).total       # (Vg, N, K), (V, N, K)
"""

from typing import TYPE_CHECKING

from .lazy_names import lazy

if TYPE_CHECKING:
    from .directions import sample_directions, sample_unit_directions
    from .functional import sigreg
    from .loss import LeJEPALoss, LeJEPAOutput
    from .reference import Knots, standard_normal_knots, symmetric_knots
    from .regularizer import SIGReg

__version__ = "0.1.0"

__all__ = [
    "Knots",
    "LeJEPALoss",
    "LeJEPAOutput",
    "SIGReg",
    "sample_directions",
    "sample_unit_directions",
    "sigreg",
    "standard_normal_knots",
    "symmetric_knots",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(
        __name__, __all__, "loss", "regularizer", "functional", "directions", "reference"
    )
