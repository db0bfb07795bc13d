"""Color jitter in its drawn order, grayscale, Gaussian blur and solarize, for finished crops.

The arithmetic is torchvision's on uint8: values are whole numbers from 0 to 255 between any two operations.
Each picture has a row of parameters (columns below). Programs read it as scalars and branch, so what was not
drawn is not computed.

    view --[sums]--> gray sums      view, sums --[color]--> middle --[blur]--> between --[blur]--> out

Contrast needs the mean of the gray picture at its place in the order. The first kernel applies what comes
before and adds whole numbers, whose sum does not depend on the order. Between two kernels pixels are 8 bits,
or float32 between the two passes of the blur; pictures without blur go straight to `out`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import OPTIONS, empty, kernel_device

# Columns of a row of parameters: four operations in their order (0: none), their factors, then what follows.
_CODES = tl.constexpr(0)
_FACTORS = tl.constexpr(4)
_GRAY = tl.constexpr(8)  # > 0: grayscale
_SIGMA = tl.constexpr(9)  # of the blur in pixels; 0: none
_SOLARIZE = tl.constexpr(10)  # > 0: solarize
COLUMNS = 11
_BRIGHTNESS = tl.constexpr(1)
_CONTRAST = tl.constexpr(2)
_SATURATION = tl.constexpr(3)
_HUE = tl.constexpr(4)
_STEPS = tl.constexpr(4)
# torchvision turns [0, 1] into 8 bits by truncating x * 255.999; here the values are on 0-255 already.
_TO_BYTE = tl.constexpr(255.999 / 255)

_BLOCK = 1024  # pixels of a program


@triton.jit
def _truncated(x):
    """Clamped to [0, 255] and truncated to a whole number."""
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0))


@triton.jit
def _scaled(r, g, b, factor, shift):
    return _truncated(r * factor + shift), _truncated(g * factor + shift), _truncated(b * factor + shift)


@triton.jit
def _gray(r, g, b):
    return tl.floor(0.2989 * r + 0.587 * g + 0.114 * b)


@triton.jit
def _sector(position, largest, chroma):
    """Channel value of the hue hexagon at `position`, in sixths of a turn from the channel's zero."""
    position -= 6.0 * tl.floor(position * (1.0 / 6.0))
    share = tl.minimum(tl.maximum(tl.minimum(position, 4.0 - position), 0.0), 1.0)
    return tl.floor((largest - chroma * share) * _TO_BYTE)


@triton.jit
def _shift_hue(r, g, b, turns):
    """Rotate the hue by `turns` of the color circle; value and chroma stay, as in HSV."""
    largest = tl.maximum(r, tl.maximum(g, b))
    chroma = largest - tl.minimum(r, tl.minimum(g, b))
    inverse = 1.0 / tl.maximum(chroma, 1.0)  # the smallest difference other than 0 is 1
    # Of equally large channels the first decides, as in torchvision.
    hue = (r - g) * inverse + 4.0
    hue = tl.where(largest == g, (b - r) * inverse + 2.0, hue)
    hue = tl.where(largest == r, (g - b) * inverse, hue) + turns * 6.0
    red = _sector(hue + 5.0, largest, chroma)
    return red, _sector(hue + 3.0, largest, chroma), _sector(hue + 1.0, largest, chroma)


@triton.jit
def _jitter(r, g, b, row_ptr, steps, mean):
    """The first `steps` operations of a picture's jitter; mean: of the gray picture, for contrast."""
    for step in range(steps):
        code = tl.load(row_ptr + _CODES + step).to(tl.int32)
        factor = tl.load(row_ptr + _FACTORS + step)
        if code == _HUE:
            r, g, b = _shift_hue(r, g, b, factor)
        elif code == _SATURATION:
            r, g, b = _scaled(r, g, b, factor, (1.0 - factor) * _gray(r, g, b))
        elif (code == _BRIGHTNESS) | (code == _CONTRAST):
            shift = tl.where(code == _CONTRAST, (1.0 - factor) * mean, 0.0)
            r, g, b = _scaled(r, g, b, factor, shift)
    return r, g, b


@triton.jit
def _load(view_ptr, pixel, mask):
    r = tl.load(view_ptr + 3 * pixel, mask=mask, other=0).to(tl.float32)
    g = tl.load(view_ptr + 3 * pixel + 1, mask=mask, other=0).to(tl.float32)
    b = tl.load(view_ptr + 3 * pixel + 2, mask=mask, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _store(out_ptr, pixel, mask, r, g, b):
    tl.store(out_ptr + 3 * pixel, r.to(tl.uint8), mask=mask)
    tl.store(out_ptr + 3 * pixel + 1, g.to(tl.uint8), mask=mask)
    tl.store(out_ptr + 3 * pixel + 2, b.to(tl.uint8), mask=mask)


@triton.jit
def _solarized(value, row_ptr, threshold):
    limit = tl.where(tl.load(row_ptr + _SOLARIZE) > 0, threshold, 256)
    return tl.where(value >= limit, 255.0 - value, value)


@triton.jit
def _gray_sums_kernel(
    view_ptr,  # (B, pixels, 3) uint8
    table_ptr,  # (B, COLUMNS) float32, rows stride_row apart
    sums_ptr,  # (B,) int64, zeros
    stride_row,
    pixels,
    BLOCK: tl.constexpr,
):
    """Sum of the gray values of each picture at the step that changes its contrast, if one does."""
    sample = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + sample * stride_row
    steps = _STEPS + 0
    for step in range(_STEPS):
        steps = tl.where(tl.load(row_ptr + _CODES + step) == _CONTRAST, step, steps)
    if steps < _STEPS:
        pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = pixel < pixels
        r, g, b = _load(view_ptr + sample * pixels * 3, pixel, mask)
        r, g, b = _jitter(r, g, b, row_ptr, steps, 0.0)
        total = tl.sum(tl.where(mask, _gray(r, g, b), 0.0).to(tl.int32))
        tl.atomic_add(sums_ptr + sample, total.to(tl.int64), sem="relaxed")


@triton.jit
def _color_kernel(
    view_ptr,  # (B, pixels, 3) uint8
    table_ptr,  # (B, COLUMNS) float32, rows stride_row apart
    sums_ptr,  # (B,) int64
    middle_ptr,  # (B, pixels, 3) uint8: pictures to blur
    out_ptr,  # (B, pixels, 3) uint8: the others
    stride_row,
    pixels,
    threshold,
    BLOCK: tl.constexpr,
):
    """Jitter, grayscale, and solarize of the pictures without blur."""
    sample = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + sample * stride_row
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < pixels
    r, g, b = _load(view_ptr + sample * pixels * 3, pixel, mask)
    mean = tl.load(sums_ptr + sample).to(tl.float32) / pixels
    r, g, b = _jitter(r, g, b, row_ptr, _STEPS, mean)
    if tl.load(row_ptr + _GRAY) > 0:
        gray = _gray(r, g, b)
        r, g, b = gray, gray, gray
    if tl.load(row_ptr + _SIGMA) > 0:
        _store(middle_ptr + sample * pixels * 3, pixel, mask, r, g, b)
    else:
        r = _solarized(r, row_ptr, threshold)
        g = _solarized(g, row_ptr, threshold)
        b = _solarized(b, row_ptr, threshold)
        _store(out_ptr + sample * pixels * 3, pixel, mask, r, g, b)


@triton.jit
def _blur_kernel(
    source_ptr,  # (B, size, size, 3) uint8 or float32
    table_ptr,  # (B, COLUMNS) float32, rows stride_row apart
    out_ptr,  # (B, size, size, 3) float32, or uint8 after the last pass
    stride_row,
    size,
    stride,  # from one value to the next along the pass: 3 in rows, 3 * size in columns
    threshold,
    KERNEL: tl.constexpr,  # side of the blur's window in pixels
    LAST: tl.constexpr,  # round and solarize
    BLOCK: tl.constexpr,
):
    """One pass of the Gaussian blur, with mirrored borders, over the pictures to blur."""
    sample = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + sample * stride_row
    sigma = tl.load(row_ptr + _SIGMA)
    if sigma > 0:
        values = size * size * 3
        value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = value < values
        place = (value // stride) % size
        base_ptr = source_ptr + sample * values + value
        total = tl.zeros((BLOCK,), tl.float32)
        weights = 0.0
        for step in range(KERNEL):
            offset = step - KERNEL // 2
            distance = offset / sigma
            weight = tl.exp(-0.5 * distance * distance)
            other = tl.abs(place + offset)
            other = tl.where(other < size, other, 2 * (size - 1) - other)
            total += weight * tl.load(base_ptr + (other - place) * stride, mask=mask, other=0).to(tl.float32)
            weights += weight
        total = total / weights
        if LAST:
            total = _solarized(tl.floor(total + 0.5), row_ptr, threshold)
        tl.store(out_ptr + sample * values + value, total.to(out_ptr.dtype.element_ty), mask=mask)


def change_colors(view: Tensor, rows: Tensor, *, kernel_size: int, threshold: int, blurred: bool) -> Tensor:
    """Pictures with the colors that were drawn for them, in new memory.

    Args:
        view: pictures (B, S, S, 3), uint8, contiguous.
        rows: parameters (B, COLUMNS), float32, on the same device; columns contiguous.
        kernel_size: side of the blur's window in pixels, odd.
        threshold: of solarize, 0-255.
        blurred: whether any picture is blurred; False saves two kernels.

    Returns:
        (B, S, S, 3), uint8.
    """
    count, size = view.shape[:2]
    pixels = size * size
    stride = rows.stride(0)
    out = empty(view, view.shape, torch.uint8)
    if not view.numel():
        return out
    middle = empty(view, view.shape, torch.uint8) if blurred else out
    sums = torch.zeros(count, dtype=torch.int64, device=view.device)
    grid = (count, triton.cdiv(pixels, _BLOCK))
    with kernel_device(view):
        _gray_sums_kernel[grid](view, rows, sums, stride, pixels, BLOCK=_BLOCK, **OPTIONS)
        _color_kernel[grid](view, rows, sums, middle, out, stride, pixels, threshold, BLOCK=_BLOCK, **OPTIONS)
        if blurred:
            between = empty(view, view.shape, torch.float32)
            grid = (count, triton.cdiv(3 * pixels, _BLOCK))
            for source, target, step in ((middle, between, 3), (between, out, 3 * size)):
                _blur_kernel[grid](
                    source, rows, target, stride, size, step, threshold,
                    KERNEL=kernel_size, LAST=target is out, BLOCK=_BLOCK, **OPTIONS,
                )  # fmt: skip
    return out
