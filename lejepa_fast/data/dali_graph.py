"""The DALI pipeline: decode each image once, cut and change all its views. One definition for GPU and CPU.

Nothing in it is random. The host draws every parameter (`draws.view_table`) and feeds it beside the
encoded bytes, so both backends make the same choices and resuming needs no random state of DALI's.
Branches are conditional execution: a blur that was not drawn is not computed. All colour operations
have torchvision's meaning and work on 8-bit values, truncated after each as torchvision does; DALI's own
`fn.hue` is a linear rotation and not the shift in HSV that torchvision applies, so hue is spelled out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types

from lejepa_fast.data.draws import (
    COLUMN_CODES,
    COLUMN_FACTORS,
    COLUMN_FLIP,
    COLUMN_GRAY,
    COLUMN_HEIGHT,
    COLUMN_LEFT,
    COLUMN_SIGMA,
    COLUMN_SOLARIZE,
    COLUMN_TOP,
    COLUMN_WIDTH,
    CONTRAST,
    HUE,
    SATURATION,
    SKIP,
)
from lejepa_fast.data.headers import Turn

_LUMA = np.array([0.2989, 0.587, 0.114])
# Casting rounds; torchvision truncates. Not a whole half, so that whole numbers stay what they are.
_TRUNCATE = -0.4999

# Linear colour operations come before or after the hue shift, in up to three places each.
PLACES = 3
_NONE, _MATRIX, _CONTRAST = range(3)
# Columns of `colour_table`: kind and factor of each place, then the switches.
_KINDS, _AMOUNTS = 0, 2 * PLACES
_HUE, _GRAY, _SIGMA, _SOLARIZE = range(4 * PLACES, 4 * PLACES + 4)
_COLOUR_COLUMNS = 4 * PLACES + 4


def window_table(table: np.ndarray, sizes: Sequence[tuple[int, int]], turns: Sequence[Turn]) -> np.ndarray:
    """(B, V, 2, 2) float32: (y, x), in the stored pixels, where the window starts and ends.

    sizes: (width, height) of the images, upright; turns: how their stored pixels become that. A view that is
    mirrored, or of an image stored so, ends where it starts; of a transposed image, it comes out transposed.
    """
    width, height = np.asarray(sizes, dtype=np.float64).T[..., None]
    transposed, mirrored, inverted = np.asarray(turns).T[..., None]
    top, left = table[..., COLUMN_TOP], table[..., COLUMN_LEFT]
    bottom, right = top + table[..., COLUMN_HEIGHT], left + table[..., COLUMN_WIDTH]
    top, bottom = (np.where(inverted, height - y, y) for y in (top, bottom))
    left, right = (np.where(mirrored, width - x, x) for x in (left, right))
    flip = table[..., COLUMN_FLIP] > 0
    start = np.stack([top, np.where(flip, right, left)], axis=-1)
    end = np.stack([bottom, np.where(flip, left, right)], axis=-1)
    window = np.stack([start, end], axis=-2)
    return np.where(transposed[..., None, None], window[..., ::-1], window).astype(np.float32)


def colour_tables(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the graph needs beside the windows: switches (B, V, 16) and colour matrices (B, V, 6, 3, 3)."""
    codes = table[..., COLUMN_CODES : COLUMN_CODES + 4]
    factors = table[..., COLUMN_FACTORS : COLUMN_FACTORS + 4]
    colour = np.zeros((*table.shape[:-1], _COLOUR_COLUMNS), np.float32)
    matrices = np.zeros((*table.shape[:-1], 2 * PLACES, 3, 3), np.float32)
    behind = np.zeros(table.shape[:-1], np.int64)  # 1 once the hue shift is past
    used = np.zeros((*table.shape[:-1], 2), np.int64)  # places taken before and after it
    for step in range(4):
        code, factor = codes[..., step], factors[..., step].astype(np.float32)
        rows = np.nonzero((code != SKIP) & (code != HUE))
        code, factor, side = code[rows], factor[rows], behind[rows]
        at_side = (*rows, side)
        place = side * PLACES + used[at_side]
        used[at_side] += 1
        kind, amount, matrix = (*rows, _KINDS + place), (*rows, _AMOUNTS + place), (*rows, place)
        colour[kind] = np.where(code == CONTRAST, _CONTRAST, _MATRIX)
        colour[amount] = factor
        gray_share = np.where(code == SATURATION, 1.0 - factor, 0.0)[:, None, None]
        matrices[matrix] = factor[:, None, None] * np.eye(3) + gray_share * _LUMA
        is_hue = codes[..., step] == HUE
        colour[..., _HUE] += np.where(is_hue, factors[..., step], 0.0)
        behind |= is_hue
    colour[..., _GRAY] = table[..., COLUMN_GRAY]
    colour[..., _SIGMA] = table[..., COLUMN_SIGMA]
    colour[..., _SOLARIZE] = table[..., COLUMN_SOLARIZE]
    return colour, matrices


@pipeline_def(enable_conditionals=True)
def decode_pipeline(*, device: str, hw_decoder_load: float) -> Any:
    """Encoded bytes to RGB images (H, W, 3) uint8, turned as they are stored; `device` is "cpu" or "gpu"."""
    return _decode(device, hw_decoder_load)


@pipeline_def(enable_conditionals=True)
def view_pipeline(
    *, device: str, hw_decoder_load: float, sizes: list[int], kernel_size: int, threshold: int, augment: bool
) -> Any:
    """Encoded bytes and parameters to V outputs (S, S, 3) uint8, one per entry of `sizes`.

    Those of images that are stored transposed are transposed, too.

    augment: whether there are colours to change at all (not in evaluation).
    """
    images = _decode(device, hw_decoder_load)
    windows = fn.external_source(name="windows", dtype=types.FLOAT, ndim=3)
    colour = fn.external_source(name="colour", dtype=types.FLOAT, ndim=2) if augment else None
    matrices = fn.external_source(name="matrices", dtype=types.FLOAT, ndim=4) if augment else None
    views = []
    for v in range(len(sizes)):
        view = fn.resize(
            images,
            size=[sizes[v], sizes[v]],
            roi_start=windows[v, 0],
            roi_end=windows[v, 1],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        if augment:
            view = _change(view, colour, matrices, v, kernel_size, threshold)
        views.append(view)
    return tuple(views)


def _decode(device: str, hw_decoder_load: float) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    options: dict[str, Any] = {"hw_decoder_load": hw_decoder_load} if device == "gpu" else {}
    return fn.decoders.image(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # as Pillow
        adjust_orientation=False,  # see `headers`
        **options,
    )


def _change(view: Any, colour: Any, matrices: Any, v: int, kernel_size: int, threshold: int) -> Any:
    """Colour jitter in its drawn order, grayscale, blur, solarize."""
    for place in range(PLACES):
        view = _linear(view, colour, matrices, v, place)
    turn = colour[v, _HUE]
    if turn != 0:
        view = _shift_hue(view, turn)
    for place in range(PLACES, 2 * PLACES):
        view = _linear(view, colour, matrices, v, place)
    if colour[v, _GRAY] > 0:
        view = fn.coord_transform(view, M=np.tile(_LUMA, 3).tolist(), T=_TRUNCATE, dtype=types.UINT8)
    sigma = colour[v, _SIGMA]
    if sigma > 0:
        view = fn.gaussian_blur(view, window_size=kernel_size, sigma=sigma)
    if colour[v, _SOLARIZE] > 0:
        inverted = [255 - value if value >= threshold else value for value in range(256)]
        view = fn.lookup_table(view, keys=list(range(256)), values=inverted, dtype=types.UINT8)
    return view


def _linear(view: Any, colour: Any, matrices: Any, v: int, place: int) -> Any:
    """One of brightness, saturation (matrices) and contrast, or nothing."""
    kind = colour[v, _KINDS + place]
    if kind == _MATRIX:
        view = fn.coord_transform(view, M=matrices[v, place], T=_TRUNCATE, dtype=types.UINT8)
    elif kind == _CONTRAST:
        factor = colour[v, _AMOUNTS + place]
        gray = fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
        # The conversion rounds each gray value and torchvision truncates: half a level between the means.
        shift = (1.0 - factor) * (fn.reductions.mean(gray) - 0.5) + _TRUNCATE
        view = fn.cast(view * factor + shift, dtype=types.UINT8)
    return view


def _shift_hue(view: Any, turn: Any) -> Any:
    """Turn the hue by `turn` of the colour circle; value and chroma stay, as in HSV."""
    pixels = fn.cast(view, dtype=types.FLOAT)
    r, g, b = pixels[:, :, 0:1], pixels[:, :, 1:2], pixels[:, :, 2:3]
    largest = math.max(r, math.max(g, b))
    chroma = largest - math.min(r, math.min(g, b))
    inverse = 1.0 / math.max(chroma, 1.0)  # the smallest difference other than 0 is 1
    # In sixths of a turn. Of several largest channels the first decides, as in torchvision.
    is_red = fn.cast(r == largest, dtype=types.FLOAT)
    is_green = fn.cast(g == largest, dtype=types.FLOAT) * (1.0 - is_red)
    is_blue = 1.0 - is_red - is_green
    hue = inverse * (is_red * (g - b) + is_green * (b - r) + is_blue * (r - g))
    hue = hue + (2.0 * is_green + 4.0 * is_blue) + turn * 6.0
    position = hue + types.Constant(np.array([[[5.0, 3.0, 1.0]]], dtype=np.float32))
    position = position - 6.0 * math.floor(position * (1.0 / 6.0))
    share = math.clamp(math.min(position, 4.0 - position), 0.0, 1.0)
    return fn.cast((largest - chroma * share) * (255.999 / 255.0) + _TRUNCATE, dtype=types.UINT8)
