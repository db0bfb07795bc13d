"""The multi-crop recipe: every number of the augmentation, independent of the backend that applies it.

The defaults are those of the LeJEPA authors' README (github.com/rbalestr-lab/lejepa), which lists
everything but the blur's kernel size; that comes from their minimal example (kernel 7 for 128-px crops).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

from lejepa_fast.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MultiCropRecipe:
    """How one image becomes `global_crops + local_crops` views.

    Each view goes through, in this order: random resized crop, horizontal flip, color jitter (its
    four operations in random order), grayscale, Gaussian blur, solarize, normalise. Global and local
    views differ in crop area and output size only. Sizes are in pixels, `*_scale` are shares of the
    image's area, `*_prob` are probabilities per view.
    """

    global_crops: int = 2
    """Number of global views per image (at least 1)."""
    global_size: int = 224
    """Side of a global view in pixels."""
    global_scale: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest share of the image's area that a global view covers."""
    local_crops: int = 6
    """Number of local views per image (0 for none)."""
    local_size: int = 98
    """Side of a local view in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.3)
    """Smallest and largest share of the image's area that a local view covers."""
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of the region that is cut out, drawn log-uniformly."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip."""
    jitter_prob: float = 0.8
    """Probability of color jitter."""
    brightness: float = 0.4
    """Brightness factor is uniform in [1 - x, 1 + x], not below 0."""
    contrast: float = 0.4
    """Contrast factor is uniform in [1 - x, 1 + x], not below 0."""
    saturation: float = 0.2
    """Saturation factor is uniform in [1 - x, 1 + x], not below 0."""
    hue: float = 0.1
    """Hue shift is uniform in [-x, x], in turns of the color circle (at most 0.5)."""
    grayscale_prob: float = 0.2
    """Probability of losing all color."""
    blur_prob: float = 0.5
    """Probability of a Gaussian blur."""
    blur_kernel: int = 7
    """Side of the blur's kernel in pixels, odd. 7 is the authors' choice in their minimal example."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels, uniform in this range."""
    solarize_prob: float = 0.2
    """Probability of inverting all values at or above the threshold."""
    solarize_threshold: int = 128
    """Solarize threshold on the scale 0-255."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean per channel that normalisation subtracts (scale 0-1)."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation per channel that normalisation divides by (scale 0-1)."""
    min_image_size: int | None = None
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

    def validate(self) -> None:
        """Raise `UsageError` naming the first setting that makes no sense."""
        for field in fields(self):
            _check_type(field.name, str(field.type), getattr(self, field.name))
        self._check_crops()
        for name in ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, "a probability in [0, 1]", getattr(self, name))
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, "a number >= 0", value)
        _require(0.0 <= self.hue <= 0.5, "hue", "a number in [0, 0.5]", self.hue)
        _require(self.blur_kernel > 0 and self.blur_kernel % 2 == 1, "blur_kernel", "odd", self.blur_kernel)
        smallest = min(self.view_sizes())
        # Reflection padding needs more pixels than it mirrors.
        _require(
            self.blur_prob == 0 or self.blur_kernel // 2 < smallest,
            "blur_kernel",
            f"at most {2 * smallest - 1} for crops of {smallest} px",
            self.blur_kernel,
        )
        _check_range("blur_sigma", self.blur_sigma, low=0.0, high=math.inf)
        _require(
            0 <= self.solarize_threshold <= 255, "solarize_threshold", "in 0-255", self.solarize_threshold
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            _require(all(math.isfinite(v) for v in value), name, "three finite numbers", value)
        _require(all(v > 0 for v in self.std), "std", "three positive numbers", self.std)

    def _check_crops(self) -> None:
        _require(self.global_crops >= 1, "global_crops", "at least 1", self.global_crops)
        _require(self.local_crops >= 0, "local_crops", "0 or more", self.local_crops)
        for name in ("global_size", "local_size"):
            _require(getattr(self, name) >= 1, name, "a positive number of pixels", getattr(self, name))
        _check_range("global_scale", self.global_scale, low=0.0, high=1.0)
        _check_range("local_scale", self.local_scale, low=0.0, high=1.0)
        _check_range("aspect_ratio", self.aspect_ratio, low=0.0, high=math.inf)
        if self.min_image_size is not None:
            _require(self.min_image_size >= 1, "min_image_size", "1 or more, or None", self.min_image_size)


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UsageError(f"multi-crop recipe: {name} must be {expected}; got {got!r}")


def _check_type(name: str, kind: str, value: object) -> None:
    """Require a value of the type that the field is annotated with."""
    if kind.startswith("tuple"):
        count = kind.count("float")
        good = isinstance(value, tuple) and len(value) == count and all(isinstance(v, Real) for v in value)
        _require(good, name, f"a tuple of {count} numbers", value)
    elif kind == "float":
        _require(isinstance(value, Real), name, "a number", value)
    elif value is not None or kind == "int":
        _require(isinstance(value, Integral), name, "a whole number", value)


def _check_range(name: str, value: tuple[float, float], *, low: float, high: float) -> None:
    """Require low < value[0] <= value[1] <= high, both finite."""
    limit = "" if math.isinf(high) else f" <= {high:g}"
    expected = f"a pair (a, b) with {low:g} < a <= b{limit}"
    good = all(math.isfinite(v) for v in value) and low < value[0] <= value[1] <= high
    _require(good, name, expected, value)
