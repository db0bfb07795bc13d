"""Values of more than 8 bits, scaled alike in a data set, and stacks of slices, from every backend."""

import numpy as np
import pytest
import torch
from loader_backends import CROPS_ONLY, on
from PIL import Image

from lejepa_fast.data import eval_loader, multicrop_loader
from lejepa_fast.data.sources import FolderSource
from lejepa_fast.data.sources.stacks import choose_value_range, open_stacks
from lejepa_fast.errors import UsageError

SIDE = 24


@pytest.fixture
def folder(tmp_path):
    """Saves arrays as TIFF files of one folder, those of more dimensions as stacks."""

    def save(*arrays):
        for number, array in enumerate(arrays):
            pages = [Image.fromarray(page) for page in (array if array.ndim == 3 else [array])]
            pages[0].save(tmp_path / f"{number}.tif", save_all=True, append_images=pages[1:])
        return FolderSource(tmp_path)

    return save


def ramp(dtype, *ends):
    """An image of a value for each column."""
    return np.repeat(np.linspace(*ends, SIDE).astype(dtype)[None], SIDE, 0)


@pytest.mark.parametrize(
    ("bit_depth", "images", "expected"),
    [
        ("auto", [ramp("uint16", 0, 200), ramp("uint16", 0, 255)], (0, 255)),
        ("auto", [ramp("uint16", 0, 200), ramp("uint16", 0, 4000)], (0, 4095)),
        ("auto", [ramp("uint16", 0, 200), ramp("uint16", 0, 4096)], (0, 65535)),
        ("12", [ramp("uint16", 0, 65535)], (0, 4095)),
        ("8", [ramp("int32", 0, 65535)], (0, 255)),
        ("auto", [ramp("float32", 0, 0.5), ramp("float32", 0, 1)], (0, 1)),
        ("auto", [ramp("float32", 0, 0.5), ramp("float32", 0, 1.1)], None),
        ("percentile", [ramp("float32", -7, -3), np.full((SIDE, SIDE), np.nan, "float32")], (-7, -3)),
        ("percentile", [ramp("uint8", 0, 255)], None),
    ],
)
def test_one_range_of_values_for_all_images(folder, bit_depth, images, expected):
    assert choose_value_range(folder(*images), bit_depth) == expected


def test_percentiles_leave_out_a_few_hot_pixels(folder):
    pixels = ramp("uint16", 100, 2000)
    pixels[0, 0] = 65535
    low, high = choose_value_range(folder(*[ramp("uint16", 100, 2000)] * 3, pixels), "percentile")
    assert low == 100
    assert high == pytest.approx(2000, rel=1e-3)
    with pytest.raises(UsageError, match=r"^bit_depth percentile: expected images of .* got only 7"):
        choose_value_range(folder(*[np.full((SIDE, SIDE), 7, "uint16")] * 4), "percentile")


def pixels_of(source, backend):
    loader = eval_loader(
        source, image_size=SIDE, batch_size=8, num_workers=1, mean=(0,) * 3, std=(1 / 255,) * 3, **on(backend)
    )
    ((images, targets),) = loader
    return images.cpu().round().to(torch.uint8).numpy(), targets


def test_every_backend_scales_alike(folder, backend):
    images = (
        ramp("uint16", 0, 4095),
        ramp("uint16", 1000, 2000),
        ramp("uint16", 0, 60000),
        ramp("uint8", 0, 255),
    )
    source = folder(*images)
    source.value_range = (0, 4095)
    found, _ = pixels_of(source, backend)
    for got, image in zip(found[:3], images, strict=False):
        expected = np.clip(np.rint(image / 4095 * 255), 0, 255)
        assert np.abs(got - expected).max() <= (2 if backend == "gpu" else 0)
    assert np.abs(found[3].astype(int) - images[3]).max() <= (2 if backend == "gpu" else 0)


def stack(count, first):
    """Slice i has the value first + i."""
    return np.stack([np.full((SIDE, SIDE), first + i, "uint8") for i in range(count)])


def test_all_slices_are_images_of_their_own(folder, backend):
    base = folder(stack(3, 10), stack(1, 50)[0], stack(2, 90))
    base._targets = np.array([0, 1, 2])
    source = open_stacks(base, "all")
    found, targets = pixels_of(source, backend)
    assert found[:, 0, 0, 0].tolist() == [10, 11, 12, 50, 90, 91]
    assert targets.tolist() == [0, 0, 0, 1, 2, 2]
    assert source.describe(5) == f"{base.describe(2)}, slice 1"
    assert open_stacks(base, "first") is base


def test_a_random_slice_is_drawn_anew_in_each_epoch(folder, backend):
    """By seed, epoch and image: the same for every backend and batch size; the middle one in evaluation."""
    source = open_stacks(folder(*[stack(5, 10 * i) for i in range(8)]), "random")

    def epoch(number, seed=0, batch_size=8):
        recipe = CROPS_ONLY
        loader = multicrop_loader(
            source, recipe, batch_size=batch_size, seed=seed, num_workers=1, dtype=torch.uint8, shuffle=False,
            **on(backend)
        )  # fmt: skip
        loader.set_epoch(number)
        return torch.cat([views[0][:, 0, 0, 0].cpu() for views, _ in loader]).tolist()

    drawn = [[value - 10 * i for i, value in enumerate(epoch(number))] for number in range(2)]
    assert drawn == [[1, 2, 1, 1, 2, 0, 0, 4], [2, 2, 4, 4, 2, 3, 0, 2]]
    assert epoch(1, batch_size=4) == epoch(1)
    assert epoch(1, seed=1) != epoch(1)
    assert pixels_of(source, backend)[0][:, 0, 0, 0].tolist() == [10 * i + 2 for i in range(8)]
