"""Image files: what is made of them, limits on what may be tried, DALI's share, and very large ones."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from loader_backends import CROPS_ONLY, NumberedSource, on, picture
from odd_files import BOMBS, DANGLING, ORIENTATION_6, exif, exif_block, exif_entry, saved, tiff, with_segment
from PIL import EpsImagePlugin, Image, ImageFilter
from view_parity import sample_views

from lejepa_fast.data import MultiCropRecipe, draws, eval_loader, multicrop_loader, open_source
from lejepa_fast.data import views as views_module
from lejepa_fast.data.backends.threaded import to_tensor
from lejepa_fast.data.backends.torchvision_backend import apply_view
from lejepa_fast.data.sources import FolderSource, UnreadableImageError
from lejepa_fast.data.sources.decoding import open_encoded, plain_header, to_rgb
from lejepa_fast.data.views import EvalViews, TrainViews
from lejepa_fast.errors import RunError

# --- to RGB -------------------------------------------------------------------------------------


def pixels_of(file: bytes) -> np.ndarray:
    return np.asarray(to_rgb(open_encoded(file)))


def png(*values: int | tuple[int, int], dtype: type) -> bytes:
    return saved(Image.fromarray(np.array([values], dtype)), "PNG")


def floats(**tags: int) -> bytes:
    values = np.array([0.0, 0.5, 1.0, 3.0, np.nan], "<f4").tobytes()
    return tiff(values, ImageWidth=5, ImageLength=1, BitsPerSample=32, SampleFormat=3, **tags)


@pytest.mark.parametrize(
    ("file", "right"),
    [
        (png(0, 257, 25_700, 65_535, dtype=np.uint16), [0, 1, 100, 255]),
        (saved(Image.fromarray(np.array([[0, 7, 300]], np.int32)), "TIFF"), [0, 0, 1]),
        (png(True, False, dtype=bool), [255, 0]),
        (png((80, 255), (80, 0), dtype=np.uint8), [80, 255]),  # transparent gray, over white
        # Two values in three bytes: 0, 2,048, 4,095, 16.
        (tiff(b"\0\x08\0\xff\xf0\x10", ImageWidth=4, ImageLength=1, BitsPerSample=12), [0, 128, 255, 1]),
        # 12 bits in 16: the file does not say so.
        (tiff(b"\xff\x0f\0\0", ImageWidth=2, ImageLength=1, BitsPerSample=16), [16, 0]),
        (b"P5 2 1 4095\n\x0f\xff\0\x64", [255, 6]),
        (b"P5 2 1 65535\n\0\xff\0\0", [1, 0]),  # dark, as its neighbors may not be
        (floats(SMinSampleValue=0, SMaxSampleValue=4), [0, 32, 64, 191, 0]),
        (floats(SMinSampleValue=1, SMaxSampleValue=3), [0, 0, 0, 255, 0]),
    ],
)
def test_black_and_white_are_what_a_file_declares(file, right):
    """A guess from the pixels would change from one image of a data set to the next."""
    assert pixels_of(file).tolist() == [[[value] * 3 for value in right]]


@pytest.mark.parametrize("tags", [{}, {"SMinSampleValue": 1, "SMaxSampleValue": 1}])
def test_floating_point_images_without_a_range_are_bad(tags):
    message = r"without a range .* declare it, save 8 or 16 bits, or set --data"
    with pytest.raises(ValueError, match=message):
        pixels_of(floats(**tags))


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(kind, tmp_path, monkeypatch):
    make, reason = BOMBS[kind]
    (tmp_path / "0.jpg").write_bytes(make(picture()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some programs do
    source = FolderSource(tmp_path)
    for use in (source.load, source.image_size):
        with pytest.raises(UnreadableImageError) as caught:
            use(0)
        assert reason in caught.value.reason
    assert plain_header(source.encoded(0)) is None


def test_long_headers_of_real_files_are_read():
    """Cameras store depth maps and second pictures in hundreds of segments."""
    exif = exif_block(ORIENTATION_6, rest=bytes(60_000))
    data = with_segment(with_segment(saved(picture(), "JPEG"), bytes(60_000), 400), exif)
    assert to_rgb(open_encoded(data)).size == (32, 48)


def test_no_image_runs_ghostscript(tmp_path, monkeypatch):
    ran, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    file = tmp_path / "images" / "5.jpg"
    file.parent.mkdir()
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(RunError, match=r"5\.jpg: not an image"):
        FolderSource(file.parent)[0]
    assert not ran.exists()
    with pytest.raises(OSError), Image.open(file) as image:
        image.load()
    assert ran.exists()  # the trap does work


# --- which files DALI decodes -------------------------------------------------------------------


def with_exif(*entries: bytes) -> bytes:
    return with_segment(saved(picture(), "JPEG"), exif_block(*entries))


PLAIN = {
    "jpeg": saved(picture(), "JPEG"),
    "gray jpeg": saved(picture().convert("L"), "JPEG"),
    "progressive": saved(picture(), "JPEG", progressive=True, subsampling=2),
    **{f"orientation {n}": saved(picture(), "JPEG", exif=exif(n)) for n in range(1, 9)},
    "several": saved(picture(), "MPO", save_all=True, append_images=[picture(1)]),
    "png": saved(picture(), "PNG"),
    "gray png": saved(picture().convert("L"), "PNG"),
    "padded": saved(picture(), "JPEG") + bytes(100),
}
# Pillow decides what their orientation is.
ODD_EXIF = {
    "entry outside": with_exif(DANGLING, ORIENTATION_6),
    "cut": with_exif(ORIENTATION_6).replace(b"\1\0\x12\1\3", b"\2\2\x12\1\3", 1),
    "no orientation": with_exif(exif_entry(0x0112, 3, 0, 6)),
    "two orientations": with_exif(exif_entry(0x0112, 3, 2, 6)),
    "impossible orientation": with_exif(exif_entry(0x0112, 3, 1, 9)),
    "two segments": with_segment(with_exif(ORIENTATION_6), exif_block(exif_entry(0x0112, 3, 1, 1))),
    "xmp": with_segment(
        saved(picture(), "JPEG"),
        b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='8' tiff:Orientation=\"8\"/>",
    ),
}


@pytest.mark.parametrize("kind", PLAIN | ODD_EXIF)
def test_plain_files_are_decoded_by_dali(kind):
    """Others take Pillow's way: test_corpus.py shows that they come out right."""
    data = (PLAIN | ODD_EXIF)[kind]
    assert plain_header(data)[:2] == to_rgb(open_encoded(data)).size


def test_every_orientation_is_seen_as_torchvision_sees_it(backend, tmp_path, caplog):
    files = [data for kind, data in PLAIN.items() if "orientation" in kind] + list(ODD_EXIF.values())
    for number, data in enumerate(files):
        (tmp_path / f"{number:02d}.jpg").write_bytes(data)
    options = {"batch_size": len(files), "dtype": torch.uint8, "shuffle": False}
    made = {}
    for name in (backend, "torchvision"):
        [batch] = multicrop_loader(FolderSource(tmp_path), CROPS_ONLY, **on(name), **options)
        made[name] = batch[0]
    for ours, right in zip(made[backend], made["torchvision"], strict=True):
        gaps = (ours.cpu().int() - right.int()).abs().float().mean((1, 2, 3))
        assert gaps.max() < 3, gaps
    assert "DALI failed" not in caplog.text


# --- very large images --------------------------------------------------------------------------


RECIPE = replace(CROPS_ONLY, global_size=48, local_size=24, local_crops=2)
SIZE = 1600, 1200  # for these crops the counterpart of 48 megapixels


@pytest.fixture
def low_limit(monkeypatch) -> None:
    monkeypatch.setattr(views_module, "LARGE_IMAGE", SIZE[0] * SIZE[1] - 1)


def photograph(size: tuple[int, int] = SIZE) -> Image.Image:
    """A mosaic of the embedded photographs, with the grain of a camera."""
    source = open_source("trashnet96", "train")
    mosaic = Image.new("RGB", (400, 300))
    for number in range(20):
        mosaic.paste(source[97 * number][0], (number % 5 * 80, number // 5 * 75))
    pixels = np.asarray(mosaic.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    pixels += np.random.default_rng(0).normal(0, 8, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.SHARPEN)


def reduction(recipe: MultiCropRecipe, width: int, height: int) -> int:
    return TrainViews(NumberedSource(1), recipe, 0).reduction(width, height)


@pytest.mark.parametrize(
    ("size", "changes", "factor"),
    [
        ((8000, 6000), {}, 4),
        ((6000, 8000), {}, 4),
        ((4096, 4096), {}, 1),  # not large
        ((4097, 4096), {}, 4),
        ((13000, 13000), {}, 8),
        ((8000, 6000), {"local_crops": 0}, 4),
        ((8000, 6000), {"local_crops": 0, "global_scale": (0.9, 1.0)}, 8),
        ((8000, 6000), {"global_size": 900}, 1),
        ((8000, 6000), {"min_image_size": 3000}, 2),  # it is not to become too small
        ((8000, 6000), {"aspect_ratio": (1 / 30, 30.0)}, 1),
        ((100_000, 480), {"global_size": 96, "local_size": 32}, 1),
        ((100_000, 1000), {"global_size": 96, "local_size": 32}, 2),
    ],
)
def test_reduction_for_crops(size, changes, factor):
    assert reduction(replace(MultiCropRecipe(), **changes), *size) == factor


@pytest.mark.parametrize(
    ("size", "ratio"), [((8000, 6000), 4 / 3), ((40_000, 900), 4 / 3), ((4100, 4100), 4)]
)
def test_every_crop_keeps_two_pixels_for_one(size, ratio):
    recipe = replace(MultiCropRecipe(), aspect_ratio=(1 / ratio, ratio))
    factor = reduction(recipe, *size)
    width, height = size[0] // factor, size[1] // factor
    drawn = draws.view_table(recipe, seed=0, epoch=0, indices=range(300), sizes=[(width, height)] * 300)
    smallest = (drawn[..., [draws.HEIGHT, draws.WIDTH]].min(-1) / recipe.view_sizes()).min()
    assert factor == 1 or smallest >= 2 - 1 / 49  # windows are rounded to whole pixels


@pytest.mark.parametrize(("size", "factor"), [((8000, 6000), 8), ((30_000, 900), 2), ((30_000, 895), 1)])
def test_reduction_for_the_center(size, factor):
    views = EvalViews(NumberedSource(1), 224)
    assert views.reduction(*size) == views.reduction(*size[::-1]) == factor


def test_reduced_images_stay_upright_and_keep_their_colors():
    picture = photograph((204, 152))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "jpeg": saved(picture, "JPEG", quality=95),
        "progressive": saved(picture, "JPEG", quality=95, progressive=True),
        "turned": saved(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=turned),
        "cmyk": saved(picture.convert("CMYK"), "JPEG", quality=95),
        "several": saved(picture, "MPO", quality=95, save_all=True, append_images=[picture.rotate(180)]),
        "png": saved(picture, "PNG"),
        "palette": saved(picture.quantize(255), "PNG"),
        "alpha": saved(picture.convert("RGBA"), "PNG"),
    }
    right = np.asarray(picture.reduce(4)).astype(int)
    for kind, data in files.items():
        made = to_rgb(open_encoded(data), lambda width, height: 4)
        assert made.size == (51, 38), kind
        assert np.abs(np.asarray(made) - right).mean() < 4, kind


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """Two large images and one that is not."""
    root = tmp_path_factory.mktemp("large")
    picture = photograph()
    picture.save(root / "0.jpg", quality=92)
    picture.save(root / "1.png", compress_level=1)
    picture.resize((800, 600)).save(root / "2.jpg", quality=92)
    return FolderSource(root)


@pytest.mark.usefixtures("low_limit")
def test_views_are_those_of_the_whole_image(large, backend):
    factor = reduction(RECIPE, *SIZE)
    assert factor == 4
    loader = multicrop_loader(large, RECIPE, batch_size=3, shuffle=False, **on(backend), dtype=torch.uint8)
    views, _ = next(iter(loader))
    for index in range(3):
        image = large[index][0]
        scale = factor if index < 2 else 1
        drawn = sample_views(RECIPE, index, (image.width // scale, image.height // scale))
        at_full_size = sample_views(RECIPE, index, image.size)
        drawn[:, : draws.FLIP] *= scale
        # The same crops, up to the rounding of place and sides to pixels.
        assert np.abs(drawn - at_full_size)[:, : draws.FLIP].max() <= scale
        for view, row, size in zip(views, drawn, RECIPE.view_sizes(), strict=True):
            right = apply_view(to_tensor(image), row, size, RECIPE)
            gap = (view[index].cpu().int() - right.int()).abs().float().mean()
            assert gap <= (2 if index < 2 or backend != "torchvision" else 0), (index, gap)


@pytest.mark.usefixtures("low_limit")
def test_evaluation_views_are_those_of_the_whole_image(large, backend, monkeypatch):
    options = {"image_size": 64, "batch_size": 3, "mean": (0, 0, 0), "std": (1, 1, 1), **on(backend)}
    reduced = next(iter(eval_loader(large, **options)))[0]
    monkeypatch.setattr(views_module, "LARGE_IMAGE", 1 << 24)
    whole = next(iter(eval_loader(large, **options)))[0]
    gaps = (reduced - whole).abs().mean((1, 2, 3)) * 255
    assert gaps[:2].min() > 0  # it was reduced
    assert gaps[:2].max() <= 2
    assert gaps[2] == 0
