"""Scientific images: values of more than 8 bits, stacks of slices, channels; the same from every backend."""

import dataclasses
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from loader_backends import CROPS_ONLY, on
from odd_files import png_chunk
from PIL import Image

from lejepa_fast.data import MultiCropRecipe, eval_loader, multicrop_loader
from lejepa_fast.data.backends import choose_backend
from lejepa_fast.data.sources import FolderSource, UnreadableImageError, decoding
from lejepa_fast.data.sources.scientific import as_trained, choose_value_range
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
        ("percentile", [ramp("float32", -7, -3), np.full((SIDE, SIDE), np.nan, "float32")], (-7, -3)),
        ("percentile", [ramp("uint8", 0, 255)], None),
    ],
)
def test_one_range_of_values_for_all_images(folder, bit_depth, images, expected):
    assert choose_value_range(folder(*images), bit_depth) == expected


@pytest.mark.parametrize(
    "values", [ramp("float32", 0, 1.1), ramp("int32", -1000, 2000), ramp("int32", 0, 70000)]
)
def test_values_that_fit_no_depth_need_percentiles(values, folder):
    source = folder(ramp("uint8", 0, 9), values)
    with pytest.raises(UsageError, match=r"^bit_depth auto: .* got .*; set --data\.bit-depth percentile"):
        choose_value_range(source, "auto")
    assert choose_value_range(source, "percentile") == (values.min(), values.max())


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
    source = as_trained(base, "all")
    found, targets = pixels_of(source, backend)
    assert found[:, 0, 0, 0].tolist() == [10, 11, 12, 50, 90, 91]
    assert targets.tolist() == [0, 0, 0, 1, 2, 2]
    assert source.describe(5) == f"{base.describe(2)}, slice 1"
    assert as_trained(base, "first") is base


def test_a_random_slice_is_drawn_anew_in_each_epoch(folder, backend):
    """By seed, epoch and image: the same for every backend and batch size; the middle one in evaluation."""
    source = as_trained(folder(*[stack(5, 10 * i) for i in range(8)]), "random")

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
    part = source.subset([3, 4])
    assert [np.asarray(part.load(i, draw=1))[0, 0, 0] for i in range(2)] == [31, 41]
    assert epoch(1, seed=1) != epoch(1)
    assert pixels_of(source, backend)[0][:, 0, 0, 0].tolist() == [10 * i + 2 for i in range(8)]


# ---- channels ----------------------------------------------------------------------------------------


def planes(count, dtype="uint8"):
    """(C, H, W), each channel another noise."""
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE)).astype(dtype)


def tiff(pixels, **options):
    return lambda path: tifffile.imwrite(path, pixels, **options)


GRAY = {"photometric": "minisblack"}
CHANNELS = {
    "pages": (5, tiff(planes(5), **GRAY)),
    "samples": (4, tiff(planes(4).transpose(1, 2, 0), planarconfig="contig", **GRAY)),
    "separate planes": (2, tiff(planes(2), planarconfig="separate", **GRAY)),
    "OME axes": (6, tiff(planes(6).reshape(3, 2, SIDE, SIDE), ome=True, metadata={"axes": "ZCYX"})),
    "16 bits": (2, tiff(257 * planes(2, "uint16"), **GRAY)),
    "RGBA": (4, lambda path: Image.fromarray(planes(4).transpose(1, 2, 0), "RGBA").save(path, "PNG")),
    "gray": (1, lambda path: Image.fromarray(planes(1)[0]).save(path, "TIFF")),
}


def with_channels(folder, channels):
    return as_trained(FolderSource(folder), "first", channels)


def channels_of(source):
    half = {"mean": (0.5,) * source.channels, "std": (0.25,) * source.channels}
    ((images, _),) = eval_loader(source, image_size=SIDE, batch_size=2, num_workers=1, **half)
    return ((images / 4 + 0.5) * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("kind", CHANNELS)
def test_channels_of_all_kinds_of_files(kind, tmp_path):
    count, write = CHANNELS[kind]
    write(tmp_path / "a.tif")
    source = with_channels(tmp_path, count)
    assert source.image_size(0) == (SIDE, SIDE)
    assert np.array_equal(channels_of(source)[0], planes(count))
    assert np.array_equal(channels_of(source.subset([0, 0]))[1], planes(count))


def test_values_of_channels_are_scaled_by_one_range(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.stack([ramp("float32", -1, 0), ramp("float32", 0, 3)]))
    source = with_channels(tmp_path, 2)
    with pytest.raises(
        UnreadableImageError, match=r"without a range; set --data\.bit-depth percentile"
    ) as caught:
        source.load(0)
    assert not caught.value.lasting
    source.value_range = low, high = choose_value_range(source, "percentile")
    assert (low, high) == pytest.approx((-1, 3), abs=0.01)
    first = np.asarray(source.load(0))[0]
    assert first[[0, -1]].tolist() == [[0, 64], [64, 255]]


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (planes(2), {}, "2 channels, not 5"),
        (planes(5, "complex64"), {}, "pixels of type complex64"),
        (planes(5), {"tile": (512, 512), **GRAY}, "more than 0 MiB of pixels"),
    ],
)
def test_files_that_are_not_read_are_bad(pixels, options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_MAX_CHUNK_BYTES", 512 * 512 - 1)
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(UnreadableImageError, match=message) as caught:
        with_channels(tmp_path, 5).load(0)
    assert caught.value.lasting == ("channels" not in message)


def test_a_strip_that_inflates_beyond_its_pixels_is_refused(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", planes(2), compression="zlib", **GRAY)
    with_channels(tmp_path, 2).load(0)
    content = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tag = file.pages[0].tags["StripByteCounts"]
        offsets = file.pages[0].tags["StripOffsets"]
    bomb = zlib.compress(bytes(1 << 20))
    patched = bytearray(content + bomb)
    struct.pack_into("<I", patched, tag.valueoffset, len(bomb))
    struct.pack_into("<I", patched, offsets.valueoffset, len(content))
    (tmp_path / "a.tif").write_bytes(patched)
    monkeypatch.setattr(decoding, "_MAX_CHUNK_BYTES", (1 << 20) - 1)
    with pytest.raises(UnreadableImageError, match="more than 0 MiB of pixels"):
        with_channels(tmp_path, 2).load(0)


def png_of_16_bits(planes):
    """A PNG file of 3 channels (C, H, W), which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in planes.transpose(1, 2, 0))
    header = struct.pack(">IIBBBBB", planes.shape[2], planes.shape[1], 16, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def save_turned_tiff(path, values):
    tifffile.imwrite(path, values, photometric="rgb", extratags=[(274, "H", 1, 6, True)])


def save_turned_png(path, values):
    turned = torch.from_numpy(np.rot90(values, -1).copy()).permute(2, 0, 1)
    path.with_suffix(".png").write_bytes(png_of_16_bits(turned.numpy()))


@pytest.mark.parametrize("save", [save_turned_tiff, save_turned_png])
@pytest.mark.parametrize("channels", [3, 1])
def test_colors_of_more_than_8_bits(save, channels, tmp_path):
    """Pillow reads the upper 8 of 16 bits, so images of 12 bits would be nearly black."""
    save(tmp_path / "a.tif", np.stack([ramp("uint16", 0, 4095)] * 3, -1))
    source = with_channels(tmp_path, channels)
    source.value_range = choose_value_range(source, "auto")
    assert source.value_range == (0, 4095)
    pixels = np.asarray(source.load(0))
    assert pixels.shape == (SIDE, SIDE, channels)
    assert np.array_equal(pixels[:, 0, 0], np.rint(np.linspace(0, 4095, SIDE).astype(int) / 4095 * 255))


def test_colors_of_the_first_page_and_not_of_print(tmp_path):
    pages = np.stack([np.stack([ramp("uint16", 0, 65535)] * 3, -1), np.zeros((SIDE, SIDE, 3), "uint16")])
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="rgb")
    ink = np.zeros((SIDE, SIDE, 4), "uint16")  # CMYK: no ink is white
    tifffile.imwrite(tmp_path / "b.tif", ink, photometric="separated")
    source = FolderSource(tmp_path)
    assert np.array_equal(
        np.asarray(source.load(0))[0, :, 0], np.rint(np.linspace(0, 65535, SIDE) // 1 / 257)
    )
    assert np.asarray(source.load(1)).min() == 255


def test_settings_go_with_the_files(folder):
    base = as_trained(folder(stack(3, 10), stack(3, 50)), "first", 1)
    base.value_range = 0, 4095
    for slices in ("all", "random"):
        source = as_trained(base, slices, 1).subset([1])
        assert (source.channels, source.value_range) == (1, (0, 4095))
        assert np.asarray(source.load(0)).shape == (SIDE, SIDE, 1)


def test_views_of_more_channels_are_those_of_three(tmp_path):
    """Every operation works channel by channel; the contrast, which does not, is left out."""
    rgb = planes(3)
    tifffile.imwrite(tmp_path / "a.tif", rgb[[0, 1, 2, 0]], photometric="minisblack")
    Image.fromarray(rgb.transpose(1, 2, 0)).save(tmp_path / "a.png")
    probabilities = {"jitter_prob": 1, "blur_prob": 1, "solarize_prob": 0.5, "contrast": 0}
    recipe = MultiCropRecipe(global_size=20, local_crops=0, min_image_size=1, **probabilities).for_channels(4)
    three = dataclasses.replace(recipe, mean=(0,) * 3, std=(1,) * 3)
    source = FolderSource(tmp_path)
    sources = as_trained(source.subset([1, 1]), "first", 4), source.subset([0, 0])
    options = {"batch_size": 2, "dtype": torch.uint8, "shuffle": False, "backend": "cpu"}
    loaders = (multicrop_loader(s, r, **options) for s, r in zip(sources, (recipe, three), strict=True))
    four, rgb_views = (next(iter(loader))[0] for loader in loaders)
    for view, expected in zip(four, rgb_views, strict=True):
        assert torch.equal(view[:, :3], expected)
        assert torch.equal(view[:, 3], expected[:, 0])


def test_what_does_not_fit_other_channels_is_named(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", planes(2))
    source, options = with_channels(tmp_path, 2), {"batch_size": 1}
    recipe = CROPS_ONLY.for_channels(2)
    for backend in ("torchvision", "dali"):
        with pytest.raises(UsageError, match=r"3 channels, not 2; use backend='cpu'$"):
            multicrop_loader(source, recipe, backend=backend, **options)
    with monkeypatch.context() as patch:
        patch.setattr(choose_backend, "numba_fault", lambda: "Numba is not installed: pip install numba")
        for backend in ("auto", "cpu"):  # the hint must not be another backend
            with pytest.raises(UsageError, match=r"^backend 'cpu': Numba .*; no other .* of 2 channels$"):
                multicrop_loader(source, recipe, backend=backend, **options)
    with pytest.raises(UsageError, match="mean: expected 2 numbers, one for each channel"):
        multicrop_loader(source, CROPS_ONLY, **options)
    with pytest.raises(UsageError, match="hue: expected 0 for images of 2 channels"):
        multicrop_loader(source, dataclasses.replace(recipe, hue=0.1), **options)
    with pytest.raises(UsageError, match=r"^slices: expected 'first' for 2 channels, got 'all'"):
        as_trained(FolderSource(tmp_path), "all", 2)
    with pytest.raises(UsageError, match=r"^channels: expected 1 to 16, got 17"):
        as_trained(FolderSource(tmp_path), "first", 17)
