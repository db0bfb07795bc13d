"""The DALI pipeline: decode each image once, cut all its views. One definition for GPU and CPU.

Nothing in it is random. The host draws every parameter (`draws.view_table`) and feeds the windows with the
encoded bytes, so all backends make the same choices, and a resumed run needs no random state of DALI.

Colors are changed behind the pipeline (`gpu_color`). DALI runs its operators one after the other, each for a
whole batch and even where there is nothing to do, and color jitter as torchvision defines it, in a random
order and with the hue shifted in HSV, takes about 200 of them for each view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from lejepa_fast.data.backends.reading import Turn
from lejepa_fast.data.draws import COLUMN_FLIP, COLUMN_HEIGHT, COLUMN_LEFT, COLUMN_TOP, COLUMN_WIDTH


def window_table(table: np.ndarray, sizes: Sequence[tuple[int, int]], turns: Sequence[Turn]) -> np.ndarray:
    """Start and end of each window in stored pixels, (B, V, 2, 2) float32 with (y, x) last.

    A mirrored view ends before it starts. Of a transposed image the view comes out transposed.

    Args:
        table: (B, V, COLUMNS) of `draws.view_table`.
        sizes: (width, height) of the upright images.
        turns: How their stored pixels become upright.
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


@pipeline_def
def decode_pipeline(*, device: str, hw_decoder_load: float) -> Any:
    """Encoded bytes to RGB images (H, W, 3) uint8 as stored: what decoding alone costs."""
    return _decode(device, hw_decoder_load)


@pipeline_def
def view_pipeline(*, device: str, hw_decoder_load: float, sizes: list[int]) -> Any:
    """Encoded bytes and windows (see `window_table`) to V outputs (S, S, 3) uint8, of these sizes."""
    images = _decode(device, hw_decoder_load)
    windows = fn.external_source(name="windows", dtype=types.FLOAT, ndim=3)
    return tuple(
        fn.resize(
            images,
            size=[size, size],
            roi_start=windows[v, 0],
            roi_end=windows[v, 1],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        for v, size in enumerate(sizes)
    )


def _decode(device: str, hw_decoder_load: float) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    options: dict[str, Any] = {"hw_decoder_load": hw_decoder_load} if device == "gpu" else {}
    return fn.decoders.image(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # as Pillow
        adjust_orientation=False,  # DALI takes other EXIF entries for valid than Pillow; `window_table` turns
        **options,
    )
