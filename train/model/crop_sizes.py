"""Sizes of crops for small images: all problems at once, and sizes that a forward pass was tried with."""

import contextlib
from collections.abc import Iterator

from lejepa_fast.data.sources.base import SmallImagesError
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config
from lejepa_fast.train.model.model import encoder_on_meta, sizes_near, takes

_LOCAL_SHARE = 98 / 224  # of the default recipe


@contextlib.contextmanager
def sizes_explained(cfg: Config) -> Iterator[None]:
    """Let errors about sizes, of the images or of the model, name all that is wrong and options that work."""
    crops, model = cfg.crops, cfg.model.name
    sizes = {"global": crops.global_size} | ({"local": crops.local_size} if crops.local_crops else {})

    def options(largest: int) -> list[str]:
        found = fitting_sizes(cfg, largest)
        return [f"--crops.{kind}-size {size}" for kind, size in found.items() if size != sizes[kind]]

    try:
        yield
    except SmallImagesError as error:
        largest = error.short_side
        if crops.min_image_size is not None:
            hint = f"use --crops.min-image-size {largest} or less"
            raise UsageError(f"{error.found} (crops.min_image_size); {hint}") from error
        wrong = [f"crops.{kind}_size is {size}" for kind, size in sizes.items() if size > largest]
        ways = [f"use {' '.join(fit)}, which {model} takes"] if (fit := options(largest)) else []
        encoder = encoder_on_meta(cfg, crops.global_size)
        if all(takes(encoder, size) for size in sizes.values()):
            ways.append("allow enlarging with --crops.min-image-size 1")
        hint = ", or ".join(ways) or f"no sizes that {model} takes were found: choose another model"
        raise UsageError(f"{error.found}, and {' and '.join(wrong)}; {hint}") from error
    except UsageError as error:  # of the model, which names one size
        if not str(error).startswith("crops.") or len(fit := options(crops.global_size)) < 2:
            raise
        raise UsageError(f"{error}; for both crops: {' '.join(fit)}") from error


def fitting_sizes(cfg: Config, largest: int) -> dict[str, int]:
    """Sizes of global and local crops, at most `largest`, that the model takes; {} if none was found."""
    crops = cfg.crops
    smallest = crops.blur_kernel // 2 + 1  # the blur mirrors so many pixels
    top = min(largest, crops.global_size)
    for side in sizes_near(encoder_on_meta(cfg, top), top):
        encoder = encoder_on_meta(cfg, side) if smallest <= side <= top else None
        if not (takes(encoder, side) and takes(encoder, cfg.eval.image_size or side)):
            continue
        if not crops.local_crops:
            return {"global": side}
        for local in sizes_near(encoder, min(crops.local_size, round(_LOCAL_SHARE * side)), side):
            if smallest <= local <= side and takes(encoder, local):
                return {"global": side, "local": local}
    return {}
