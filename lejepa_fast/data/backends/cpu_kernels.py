"""All views of one decoded image in one compiled pass: the CPU's counterpart of `dali_graph` and `colour`.

DALI's own CPU operators for resampling, colour and blur are scalar code that streams whole batches
through memory. Here one view is made start to finish while it lies in the cache, in planes of float32
that Numba vectorises. The arithmetic is that of torchvision's tensor kernels, including where they
truncate: values are whole numbers from 0 to 255 between any two operations.

`parameters` rows are those of `draws.view_table`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from lejepa_fast.data.draws import (
    BRIGHTNESS,
    COLUMN_CODES,
    COLUMN_FACTORS,
    COLUMN_FLIP,
    COLUMN_GRAY,
    COLUMN_HEIGHT,
    COLUMN_LEFT,
    COLUMN_SIGMA,
    COLUMN_SOLARIZE,
    COLUMN_TOP,
    COLUMN_WHOLE,
    COLUMN_WIDTH,
    CONTRAST,
    HUE,
    SATURATION,
)

_JIT: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
# Sums may be reordered so that they vectorise. NaN and infinities cannot occur: pixels are integers.
_FAST: dict[str, Any] = {**_JIT, "fastmath": True}

_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
_ZERO, _ONE, _FULL = np.float32(0), np.float32(1), np.float32(255)
# torchvision turns [0, 1] into 8 bits by truncating x * 255.999; here the values are on 0-255 already.
_TO_BYTE = np.float32(255.999 / 255)


@njit(**_JIT)
def render_view(image, p, kernel_size, threshold, out):
    """Make one view `out` (3, S, S) uint8 of `image` (H, W, 3) uint8; `p`: its parameters, float32."""
    size = out.shape[1]
    planes = np.empty((3, size, size), np.float32)
    resample(image, p, planes)
    for step in range(4):
        code, factor = int(p[COLUMN_CODES + step]), p[COLUMN_FACTORS + step]
        if code == BRIGHTNESS:
            scale_and_shift(planes, factor, _ZERO)
        elif code == CONTRAST:
            scale_and_shift(planes, factor, (_ONE - factor) * gray_mean(planes))
        elif code == SATURATION:
            saturate(planes, factor)
        elif code == HUE:
            shift_hue(planes[0], planes[1], planes[2], factor)
    if p[COLUMN_GRAY] > 0:
        to_gray(planes)
    if p[COLUMN_SIGMA] > 0:
        blur(planes, kernel_size, p[COLUMN_SIGMA])
    store(planes, p[COLUMN_FLIP] > 0, threshold if p[COLUMN_SOLARIZE] > 0 else 256, out)


@njit(**_JIT)
def axis_weights(start, extent, low, high, size):
    """Antialiased bilinear weights of one axis: (first source index (size,), weights (taps, size)).

    Output pixel i covers [start + i * extent / size, ...) of the source; only source pixels in
    [low, high) are used. The triangle is as wide as an output pixel where that is larger than a source
    pixel, as in torchvision with antialias=True.
    """
    scale = extent / size
    support = max(scale, 1.0)
    taps = math.ceil(support) * 2 + 1
    first = np.empty(size, np.int32)
    weights = np.zeros((taps, size), np.float32)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        begin = max(int(centre - support + 0.5), low)
        end = min(int(centre + support + 0.5), high)
        begin = min(begin, high - 1)
        end = max(end, begin + 1)
        total = 0.0
        for k in range(end - begin):
            weight = max(0.0, 1.0 - abs((begin + k + 0.5 - centre) / support))
            weights[k, i] = weight
            total += weight
        if total == 0.0:
            weights[0, i] = total = 1.0
        for k in range(end - begin):
            weights[k, i] /= total
        first[i] = begin
    return first, weights


@njit(**_FAST)
def _blend_rows(image, row, left, weights, sums):
    """sums[j] = weighted sum of source rows from `row` on, over the interleaved values of the window."""
    width = sums.shape[0] // 3
    sums[:] = _ZERO
    for k in range(weights.shape[0]):
        weight = weights[k]
        if weight != _ZERO:
            values = image[row + k, left : left + width].reshape(3 * width)
            for j in range(3 * width):
                sums[j] += weight * values[j]


@njit(**_FAST)
def resample(image, p, planes):
    """Cut the window of `p` out and resize it to `planes` (3, S, S), rounded to whole numbers."""
    size = planes.shape[1]
    top, left, height, width = p[COLUMN_TOP], p[COLUMN_LEFT], p[COLUMN_HEIGHT], p[COLUMN_WIDTH]
    # Nothing else checks bounds: a window that is not the image's must not read what lies beyond.
    low_y, low_x = max(int(top), 0), max(int(left), 0)
    high_y = min(max(math.ceil(top + height), 1), image.shape[0])
    high_x = min(max(math.ceil(left + width), 1), image.shape[1])
    if p[COLUMN_WHOLE] > 0:  # the window is cut after resizing: the filter sees beyond its border
        low_y, low_x, high_y, high_x = 0, 0, image.shape[0], image.shape[1]
    first_y, weights_y = axis_weights(float(top), float(height), low_y, high_y, size)
    first_x, weights_x = axis_weights(float(left), float(width), low_x, high_x, size)
    base = first_x[0]
    taps = weights_x.shape[0]
    columns = first_x[size - 1] + taps - base
    places = first_x - base
    used = min(columns, image.shape[1] - base)
    sums = np.zeros(3 * columns, np.float32)
    plane = np.zeros((3, columns), np.float32)
    for i in range(size):
        _blend_rows(image, first_y[i], base, weights_y[:, i], sums[: 3 * used])
        for j in range(used):
            plane[0, j], plane[1, j], plane[2, j] = sums[3 * j], sums[3 * j + 1], sums[3 * j + 2]
        for c in range(3):
            target = planes[c, i]
            target[:] = np.float32(0.5)
            for k in range(taps):
                values, weights = plane[c, k:], weights_x[k]
                for x in range(size):
                    target[x] += weights[x] * values[places[x]]
            for x in range(size):
                target[x] = np.floor(min(target[x], _FULL))


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
def to_gray(planes):
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(r.size):
        gray = np.floor(_RED * r[i] + _GREEN * g[i] + _BLUE * b[i])
        r[i] = gray
        g[i] = gray
        b[i] = gray


@njit(**_FAST)
def _sector(position, largest, chroma):
    """Channel value of the hue hexagon at `position`, in sixths of a turn from the channel's zero."""
    position -= np.float32(6) * np.floor(position * np.float32(1 / 6))
    share = min(max(min(position, np.float32(4) - position), _ZERO), _ONE)
    return np.floor((largest - chroma * share) * _TO_BYTE)


@njit(**_FAST)
def shift_hue(red, green, blue, turns):
    """Turn the hue by `turns` of the colour circle: value and chroma stay, as in HSV."""
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
    """Gaussian blur with mirrored borders, in place."""
    size, half = planes.shape[1], kernel_size // 2
    between = np.empty((size, size), np.float32)
    weights = np.empty(kernel_size, np.float32)
    for k in range(kernel_size):
        weights[k] = math.exp(-0.5 * ((k - half) / sigma) ** 2)
    weights /= weights.sum()
    row = np.empty(size + 2 * half, np.float32)
    for c in range(3):
        source = planes[c]
        for i in range(size):
            target = between[i]
            target[:] = _ZERO
            for k in range(kernel_size):
                line, weight = source[_mirrored(i + k - half, size)], weights[k]
                for j in range(size):
                    target[j] += weight * line[j]
        for i in range(size):
            row[half : half + size] = between[i]
            for k in range(half):
                row[k] = between[i, half - k]
                row[half + size + k] = between[i, size - 2 - k]
            target = source[i]
            target[:] = _ZERO
            for k in range(kernel_size):
                line, weight = row[k : k + size], weights[k]
                for j in range(size):
                    target[j] += weight * line[j]
            for j in range(size):
                target[j] = np.rint(target[j])


@njit(**_JIT)
def _mirrored(i, size):
    if i < 0:
        return -i
    return i if i < size else 2 * (size - 1) - i


@njit(**_FAST)
def store(planes, flip, threshold, out):
    """Write `planes` to `out` (3, S, S) uint8, mirrored left to right, values >= threshold inverted."""
    size = planes.shape[1]
    limit = np.float32(threshold)
    for c in range(3):
        for i in range(size):
            values, row = planes[c, i], out[c, i]
            if flip:
                values = values[::-1]
            for j in range(size):
                value = values[j]
                row[j] = np.uint8(_FULL - value if value >= limit else value)
