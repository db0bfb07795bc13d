"""The multi-crop recipe: every number of the augmentation, independent of the backend that applies it.

The defaults are those of the LeJEPA authors' README (github.com/rbalestr-lab/lejepa), which lists
everything but the blur's kernel size; that comes from their minimal example (kernel 7 for 128-px crops).
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from lejepa_fast.data.validation import validated
from lejepa_fast.errors import UsageError

AtLeast1 = Annotated[int, Ge(1), Lt(2**31)]
Pixels = Annotated[int, Ge(1), Le(16384)]
Share = Annotated[float, Ge(0), Le(1)]
Nonnegative = Annotated[float, Ge(0), Lt(math.inf)]
Positive = Annotated[float, Gt(0), Lt(math.inf)]
Area = Annotated[float, Gt(0), Le(1)]
Finite = Annotated[float, Gt(-math.inf), Lt(math.inf)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MultiCropRecipe:
    """How one image becomes `global_crops + local_crops` views.

    Each view goes through, in this order: random resized crop, horizontal flip, color jitter (its
    four operations in random order), grayscale, Gaussian blur, solarize, normalize. Global and local
    views differ in crop area and output size only. Sizes are in pixels, `*_scale` are shares of the
    image's area, `*_prob` are probabilities per view.
    """

    global_crops: Annotated[int, Ge(1), Le(1000)] = 2
    """Number of global views per image (at least 1)."""
    global_size: Pixels = 224
    """Side of a global view in pixels."""
    global_scale: tuple[Area, Area] = (0.3, 1.0)
    """Smallest and largest share of the image's area that a global view covers."""
    local_crops: Annotated[int, Ge(0), Le(1000)] = 6
    """Number of local views per image (0 for none)."""
    local_size: Pixels = 98
    """Side of a local view in pixels."""
    local_scale: tuple[Area, Area] = (0.05, 0.3)
    """Smallest and largest share of the image's area that a local view covers."""
    aspect_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the region that is cut out, drawn log-uniformly."""
    flip_prob: Share = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: Share = 0.8
    """Probability of color jitter."""
    brightness: Nonnegative = 0.4
    """Brightness factor is uniform in [1 - x, 1 + x], not below 0."""
    contrast: Nonnegative = 0.4
    """Contrast factor is uniform in [1 - x, 1 + x], not below 0."""
    saturation: Nonnegative = 0.2
    """Saturation factor is uniform in [1 - x, 1 + x], not below 0."""
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.1
    """Hue shift is uniform in [-x, x], in turns of the color circle (at most 0.5)."""
    grayscale_prob: Share = 0.2
    """Probability of losing all color."""
    blur_prob: Share = 0.5
    """Probability of a Gaussian blur."""
    blur_kernel: AtLeast1 = 7
    """Side of the blur's kernel in pixels, odd. 7 is the authors' choice in their minimal example."""
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Standard deviation of the blur in pixels, uniform in this range."""
    solarize_prob: Share = 0.2
    """Probability of inverting all values at or above the threshold."""
    solarize_threshold: Annotated[int, Ge(0), Le(255)] = 128
    """Solarize threshold on the scale 0-255."""
    mean: tuple[Finite, ...] = IMAGENET_MEAN
    """Mean per channel that normalization subtracts (scale 0-1)."""
    std: tuple[Positive, ...] = IMAGENET_STD
    """Standard deviation per channel that normalization divides by (scale 0-1)."""
    min_image_size: AtLeast1 | None = None
    """Images whose short side is below this are an error. None: the larger of the crop sizes in use.
    A random resized crop can enlarge any image; set 1 to allow that."""

    @property
    def num_views(self) -> int:
        """Views per image, V = V_g + V_l."""
        return self.global_crops + self.local_crops

    @property
    def smallest_image(self) -> int:
        """Short side in pixels below which an image is refused."""
        if self.min_image_size is not None:
            return self.min_image_size
        return max(self.global_size, self.local_size if self.local_crops else 0)

    def view_sizes(self) -> list[int]:
        """Side in pixels of each view, globals first."""
        return [self.global_size] * self.global_crops + [self.local_size] * self.local_crops

    def for_channels(self, channels: int) -> "MultiCropRecipe":
        """The recipe for images of so many channels.

        Unless there are 3, it leaves out what needs colors, and has 0.5 and 0.25 for ImageNet's mean and std.
        """
        if channels == 3:
            return self
        given = self.mean != IMAGENET_MEAN or self.std != IMAGENET_STD
        mean, std = (self.mean, self.std) if given else ((0.5,) * channels, (0.25,) * channels)
        return replace(self, saturation=0.0, hue=0.0, grayscale_prob=0.0, mean=mean, std=std)

    def check_channels(self, channels: int) -> None:
        """Raise `UsageError` unless the recipe fits images of so many channels."""
        for name in ("mean", "std"):
            value = getattr(self, name)
            _require(len(value) == channels, name, f"{channels} numbers, one for each channel", value)
        if channels != 3:
            for name in ("saturation", "hue", "grayscale_prob"):
                value = getattr(self, name)
                _require(value == 0, name, f"0 for images of {channels} channels", value)

    def validate(self) -> None:
        """Raise `UsageError` naming the first setting that makes no sense."""
        for field in fields(self):
            value = getattr(self, field.name)
            _require(not isinstance(value, list), field.name, "a tuple", value)
        validated(type(self), asdict(self), "multi-crop recipe: ", strict=True)
        for name in ("global_scale", "local_scale", "aspect_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            _require(low <= high, name, "a pair (a, b) with a <= b", (low, high))
        smallest = min(self.view_sizes())
        _require(self.blur_kernel % 2 == 1, "blur_kernel", "odd", self.blur_kernel)
        # Reflection padding needs more pixels than it mirrors.
        fits = self.blur_prob == 0 or self.blur_kernel // 2 < smallest
        expected = f"at most {2 * smallest - 1} for crops of {smallest} px"
        _require(fits, "blur_kernel", expected, self.blur_kernel)


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UsageError(f"multi-crop recipe: {name}: expected {expected}, got {got!r}")
