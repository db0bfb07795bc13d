"""Multi-crop data loading, usable in any trainer.

source = open_source("trashnet96", "train")
loader = multicrop_loader(source, MultiCropRecipe(global_size=64, local_size=32), batch_size=128)
for views, targets in loader: ...
"""

from typing import TYPE_CHECKING

from lejepa_fast.lazy_names import lazy

if TYPE_CHECKING:
    from lejepa_fast.data.loader import EvalLoader, MultiCropLoader, eval_loader, multicrop_loader
    from lejepa_fast.data.masks import MultiBlockMasks
    from lejepa_fast.data.recipe import IMAGENET_MEAN, IMAGENET_STD, MultiCropRecipe
    from lejepa_fast.data.sources import EncodedSource, ImageSource, open_source

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "EncodedSource",
    "EvalLoader",
    "ImageSource",
    "MultiBlockMasks",
    "MultiCropLoader",
    "MultiCropRecipe",
    "eval_loader",
    "multicrop_loader",
    "open_source",
]

# Not at once: masks and draws need less than the loader, and are found without the extra.
if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, __all__, "masks", "recipe", "loader", "sources", at_once=False)
