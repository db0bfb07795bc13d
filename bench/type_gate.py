"""Type gate of `make lint`: mypy sees the real types of all rooms from outside of them.

Where mypy cannot follow an import it takes the names for `Any`, and `assert_type` is an error.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import assert_type

    from lejepa_fast import LeJEPAOutput
    from lejepa_fast.data import MultiCropRecipe
    from lejepa_fast.kernels.runtime import interpreting
    from lejepa_fast.train.config import Config

    def check(output: LeJEPAOutput, recipe: MultiCropRecipe, config: Config) -> None:
        assert_type(output.total, Tensor)
        assert_type(recipe.global_size, int)
        assert_type(interpreting(), bool)
        assert_type(config.epochs, int)
