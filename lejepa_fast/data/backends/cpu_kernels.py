"""Colors of one crop in one compiled pass: the CPU's counterpart of the Triton kernels.

A view is made start to finish while it lies in the cache, in planes of float32 that Numba vectorizes. The
arithmetic is that of torchvision's tensor kernels, including where they truncate: values are whole numbers
from 0 to 255 between any two operations.
"""

import math
from typing import Any

import numpy as np
from numba import njit

from lejepa_fast.data import draws

_JIT: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
# Sums may be reordered so that they vectorize. NaN and infinities cannot occur: pixels are integers.
_FAST: dict[str, Any] = {**_JIT, "fastmath": True}

_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_ZERO, _ONE, _FULL = np.float32(0), np.float32(1), np.float32(255)
# torchvision converts [0, 1] to 8 bits by truncating x * 255.999; here values are on 0-255 already.
_TO_BYTE = np.float32(255.999 / 255)


@njit(**_JIT)
def render_view(view, p, kernel_size, threshold, out):
    """Change the colors of a crop and mirror it, as drawn.

    Args:
        view: the crop, (S, S, C) uint8, contiguous. Saturation, hue and gray need 3 channels.
        p: its row of `draws.view_table`, float32.
        kernel_size: side of the blur's kernel in pixels, odd.
        threshold: solarize inverts values from here on.
        out: (C, S, S) uint8, written.
    """
    size = out.shape[1]
    planes = np.empty((view.shape[2], size, size), np.float32)
    if view.shape[2] == 3:
        load(view, planes)
    else:
        planes[:] = view.transpose(2, 0, 1)
    for step in range(4):
        code, factor = int(p[draws.CODES + step]), p[draws.FACTORS + step]
        if code == draws.BRIGHTNESS:
            scale_and_shift(planes, factor, _ZERO)
        elif code == draws.CONTRAST:
            gray = gray_mean(planes) if view.shape[2] == 3 else np.float32(planes.astype(np.float64).mean())
            scale_and_shift(planes, factor, (_ONE - factor) * gray)
        elif code == draws.SATURATION:
            saturate(planes, factor)
        elif code == draws.HUE:
            shift_hue(planes[0], planes[1], planes[2], factor)
    if p[draws.GRAY] > 0:
        saturate(planes, _ZERO)
    if p[draws.SIGMA] > 0:
        blur(planes, kernel_size, p[draws.SIGMA])
    store(planes, p[draws.FLIP] > 0, threshold if p[draws.SOLARIZE] > 0 else 256, out)


@njit(**_FAST)
def load(view, planes):
    """Read `view` (S, S, 3) uint8 into `planes` (3, S, S)."""
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    flat = view.reshape(planes.size)
    for i in range(red.size):
        red[i], green[i], blue[i] = flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]


@njit(**_FAST)
def scale_and_shift(planes, factor, shift):
    flat = planes.reshape(planes.size)
    for i in range(flat.size):
        flat[i] = np.floor(min(max(flat[i] * factor + shift, _ZERO), _FULL))


@njit(**_FAST)
def gray_mean(planes):
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    total = 0.0
    for i in range(r.size):
        total += np.floor(_RED * r[i] + _GREEN * g[i] + _BLUE * b[i])
    return np.float32(total / r.size)


@njit(**_FAST)
def saturate(planes, factor):
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(r.size):
        gray = (_ONE - factor) * np.floor(_RED * r[i] + _GREEN * g[i] + _BLUE * b[i])
        r[i] = np.floor(min(max(r[i] * factor + gray, _ZERO), _FULL))
        g[i] = np.floor(min(max(g[i] * factor + gray, _ZERO), _FULL))
        b[i] = np.floor(min(max(b[i] * factor + gray, _ZERO), _FULL))


@njit(**_FAST)
def _sector(position, largest, chroma):
    """Value of a channel at `position` of the hue hexagon, in sixths of a turn from the channel's zero."""
    position -= np.float32(6) * np.floor(position * np.float32(1 / 6))
    share = min(max(min(position, np.float32(4) - position), _ZERO), _ONE)
    return np.floor((largest - chroma * share) * _TO_BYTE)


@njit(**_FAST)
def shift_hue(red, green, blue, turns):
    """Shift the hue by `turns` of the color circle; value and chroma stay, as in HSV."""
    r, g, b = red.reshape(-1), green.reshape(-1), blue.reshape(-1)
    turn = turns * np.float32(6)
    for i in range(r.size):
        largest = max(r[i], max(g[i], b[i]))
        chroma = largest - min(r[i], min(g[i], b[i]))
        # The smallest difference other than 0 is 1.
        inverse = _ONE / max(chroma, _ONE)
        hue = (r[i] - g[i]) * inverse + np.float32(4)
        hue = (b[i] - r[i]) * inverse + np.float32(2) if largest == g[i] else hue
        hue = (g[i] - b[i]) * inverse if largest == r[i] else hue
        hue += turn
        r[i] = _sector(hue + np.float32(5), largest, chroma)
        g[i] = _sector(hue + np.float32(3), largest, chroma)
        b[i] = _sector(hue + np.float32(1), largest, chroma)


@njit(**_FAST)
def blur(planes, kernel_size, sigma):
    """Gaussian blur with mirrored borders, in place. Both sides of the kernel have the same weights."""
    size, half = planes.shape[1], kernel_size // 2
    between = np.empty((size, size + 2 * half), np.float32)  # with the borders left and right
    weights = np.empty(half + 1, np.float32)
    for k in range(half + 1):
        weights[k] = math.exp(-0.5 * (k / sigma) ** 2)
    weights /= 2 * weights.sum() - weights[0]
    for c in range(planes.shape[0]):
        source = planes[c]
        for i in range(size):
            row, line = between[i, half : half + size], source[i]
            for j in range(size):
                row[j] = weights[0] * line[j]
            for k in range(1, half + 1):
                above, below = source[abs(i - k)], source[size - 1 - abs(size - 1 - i - k)]
                for j in range(size):
                    row[j] += weights[k] * (above[j] + below[j])
            for k in range(half):
                between[i, k], between[i, half + size + k] = row[half - k], row[size - 2 - k]
        for i in range(size):
            row, line = between[i], source[i]
            middle = row[half : half + size]
            for j in range(size):
                line[j] = weights[0] * middle[j]
            for k in range(1, half + 1):
                left, right = row[half - k : half - k + size], row[half + k : half + k + size]
                for j in range(size):
                    line[j] += weights[k] * (left[j] + right[j])
            for j in range(size):
                line[j] = np.rint(line[j])


@njit(**_JIT)
def normalize(pixels, mean, std, out):
    """Write (pixels - mean) / std per channel to `out` (B, C, S, S) float32, in one pass over memory."""
    for b in range(out.shape[0]):
        for c in range(out.shape[1]):
            source, target = pixels[b, c].reshape(-1), out[b, c].reshape(-1)
            for i in range(target.size):
                target[i] = (np.float32(source[i]) - mean[c]) / std[c]


@njit(**_FAST)
def store(planes, flip, threshold, out):
    """Write `planes` to `out` (C, S, S) uint8, mirrored left to right, values >= threshold inverted."""
    size = planes.shape[1]
    limit = np.float32(threshold)
    for c in range(planes.shape[0]):
        for i in range(size):
            values, row = planes[c, i], out[c, i]
            for j in range(size):
                value = values[size - 1 - j] if flip else values[j]
                row[j] = np.uint8(_FULL - value if value >= limit else value)
