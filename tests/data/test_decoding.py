"""Image files: what is made of them, the limits on what may be tried, and which ones DALI decodes itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_backends import on
from odd_files import (
    BOMBS,
    DANGLING,
    ODD,
    ORIENTATION_6,
    exif_block,
    exif_entry,
    saved,
    with_segment,
)
from PIL import EpsImagePlugin, Image

from lejepa_fast.data import MultiCropRecipe, multicrop_loader
from lejepa_fast.data.sources import FolderSource, UnreadableImageError
from lejepa_fast.data.sources.decoding import open_encoded, plain_header, to_rgb
from lejepa_fast.errors import RunError

RECIPE = MultiCropRecipe(
    global_size=24,
    local_crops=0,
    flip_prob=0.5,
    jitter_prob=0,
    grayscale_prob=0,
    blur_prob=0,
    blur_kernel=3,
    solarize_prob=0,
)


def picture(number: int = 0) -> Image.Image:
    small = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((48, 32), Image.Resampling.BILINEAR)


def decoded(image: Image.Image, kind: str, **options) -> list:
    """The pixels after a round trip through a file."""
    return np.asarray(to_rgb(open_encoded(saved(image, kind, **options)))).tolist()


# --- to RGB -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_show_the_right_pixels(kind):
    data, right = ODD[kind](picture())
    limit = 0 if data[:4] == b"\x89PNG" or data[:3] == b"GIF" else 4
    if kind == "alpha.png":  # Pillow rounds while it composes
        limit = 1
    gap = np.abs(np.asarray(to_rgb(open_encoded(data))).astype(int) - right)
    assert gap.mean() <= limit


def test_cmyk_and_black_and_white():
    cmyk = decoded(Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(np.array(cmyk) - (200, 30, 60)).max() <= 4
    assert decoded(Image.new("1", (1, 1), 1), "PNG") == [[[255] * 3]]


def test_16_bit_and_floating_point_are_scaled_not_clipped():
    sixteen = np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)
    assert decoded(Image.fromarray(sixteen), "PNG") == [[[v] * 3 for v in (0, 1, 100, 255)]]
    unit = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert decoded(Image.fromarray(unit), "TIFF") == [[[v] * 3 for v in (0, 128, 255)]]
    wide = np.array([[0, 7, 300]], dtype=np.int32)
    assert decoded(Image.fromarray(wide), "TIFF") == [[[v] * 3 for v in (0, 0, 1)]]


def test_gray_transparency_is_composed_over_white():
    gray = np.array([[(80, 255), (80, 0)]], dtype=np.uint8)
    assert decoded(Image.fromarray(gray, "LA"), "PNG") == [[[80] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind):
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))  # black on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = np.array(decoded(image, kind, exif=exif))
    assert upright.shape == (16, 8, 3)
    assert upright[:7].max() < 30 < 220 < upright[9:].min()  # black on top


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "bomb"])
def test_unreadable_files_are_named(tmp_path, how, monkeypatch):
    file = tmp_path / "0.jpg"
    good = saved(Image.effect_noise((64, 64), 50), "JPEG")
    file.write_bytes({"empty": b"", "text": b"hello", "truncated": good[:600], "bomb": good}[how])
    if how == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError) as caught:
        FolderSource(tmp_path)[0]
    text = str(caught.value)
    assert text.startswith(f"cannot read image {file}: ")
    assert text.endswith("repair it, or remove it from the data set")
    assert "BytesIO" not in text
    assert "\n" not in text


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


# Prints by how many MiB the largest resident memory has grown over the files; ends after 60 s of work.
USES = r"""
import re, resource, sys
from pathlib import Path
from lejepa_fast.data.sources import FolderSource, UnreadableImageError

resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
peaks = []
for folder in sys.argv[1:]:
    source = FolderSource(folder)
    for index in range(len(source)):
        try:
            source[index]
        except UnreadableImageError:
            pass
    status = Path("/proc/self/status").read_text()
    peaks.append(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) >> 10)
print(peaks[1] - peaks[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_take_little_memory_and_time(tmp_path):
    large = saved(Image.new("RGB", (4000, 3000)), "JPEG")
    for folder, files in (
        ("good", {"0": large}),
        ("bombs", {k: m(picture()) for k, (m, _) in BOMBS.items()}),
    ):
        (tmp_path / folder).mkdir()
        for name, data in files.items():
            (tmp_path / folder / f"{name}.jpg").write_bytes(data)
    command = [sys.executable, "-W", "ignore", "-c", USES, str(tmp_path / "good"), str(tmp_path / "bombs")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # the largest file has 36 MB


def test_long_headers_of_real_files_are_read():
    """Cameras store depth maps and second pictures in hundreds of segments."""
    exif = exif_block(ORIENTATION_6, rest=bytes(60_000))
    data = with_segment(with_segment(saved(picture(), "JPEG"), bytes(60_000), 400), exif)
    assert to_rgb(open_encoded(data)).size == (32, 48)


def test_a_pipe_in_the_place_of_a_file_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "0.jpg").symlink_to("/dev/zero")
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "2.jpg").write_bytes(b"")
    source = FolderSource(tmp_path)
    (tmp_path / "1.jpg").unlink()
    os.mkfifo(tmp_path / "1.jpg")
    os.truncate(tmp_path / "2.jpg", 200 << 30)  # sparse
    reasons = ["a pipe or device, not a file", "204,800 MiB, more than the 256 that an image file may have"]
    for index, reason in zip(range(len(source)), reasons, strict=True):
        with pytest.raises(UnreadableImageError, match=reason):
            source[index]


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A Ghostscript that leaves a file behind when it runs; returns that file's path."""
    ran, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return ran


def test_no_image_runs_ghostscript(tmp_path, ghostscript):
    file = tmp_path / "images" / "5.jpg"
    file.parent.mkdir()
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(RunError, match=r"5\.jpg: not an image"):
        FolderSource(file.parent)[0]
    assert not ghostscript.exists()
    with pytest.raises(OSError), Image.open(file) as image:
        image.load()
    assert ghostscript.exists()  # the trap does work


# --- which files DALI decodes -------------------------------------------------------------------


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x010F] = "maker"
    made[0x0112] = orientation
    return made


def with_exif(*entries: bytes, magic: int = 42) -> bytes:
    return with_segment(saved(picture(), "JPEG"), exif_block(*entries, magic=magic))


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
    "entry of many": with_exif(exif_entry(0x010F, 2, 0x7FFFFFFF, 60), ORIENTATION_6),
    "entry of no kind": with_exif(exif_entry(0x010F, 99, 1, 6), ORIENTATION_6),
    "cut": with_exif(ORIENTATION_6).replace(b"\1\0\x12\1\3", b"\2\2\x12\1\3", 1),
    "no orientation": with_exif(exif_entry(0x0112, 3, 0, 6)),
    "two orientations": with_exif(exif_entry(0x0112, 3, 2, 6)),
    "impossible orientation": with_exif(exif_entry(0x0112, 3, 1, 9)),
    "twice": with_exif(ORIENTATION_6, exif_entry(0x0112, 3, 1, 3)),
    "big tiff": with_exif(ORIENTATION_6, magic=43),
    "two segments": with_segment(with_exif(ORIENTATION_6), exif_block(exif_entry(0x0112, 3, 1, 1))),
    "xmp": with_segment(
        saved(picture(), "JPEG"),
        b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='8' tiff:Orientation=\"8\"/>",
    ),
}
UNUSUAL = {
    "cmyk": saved(picture().convert("CMYK"), "JPEG"),
    "rgb": saved(picture(), "JPEG", keep_rgb=True),
    "palette": saved(picture().quantize(8), "PNG"),
    "16 bit": saved(Image.fromarray(np.full((9, 9), 700, np.uint16)), "PNG"),
    "alpha": saved(picture().convert("RGBA"), "PNG"),
    "clear color": saved(picture(), "PNG", transparency=(1, 2, 3)),
    "turned png": saved(picture(), "PNG", exif=exif(6)),
    "webp": saved(picture(), "WEBP"),
    "empty": b"",
    "text": b"no image",
    "start": b"\xff\xd8\xff",
    "half": PLAIN["jpeg"][: len(PLAIN["jpeg"]) // 2],
    "no end": PLAIN["jpeg"][:-2],
    "half png": PLAIN["png"][: len(PLAIN["png"]) // 2],
}


@pytest.mark.parametrize("kind", PLAIN | ODD_EXIF)
def test_plain_files_are_decoded_as_they_are(kind):
    data = (PLAIN | ODD_EXIF)[kind]
    assert plain_header(data)[:2] == to_rgb(open_encoded(data)).size


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_files_go_through_pillow(kind):
    assert plain_header(UNUSUAL[kind]) is None


def test_every_orientation_is_seen_as_torchvision_sees_it(backend, tmp_path, caplog):
    files = [data for kind, data in PLAIN.items() if "orientation" in kind] + list(ODD_EXIF.values())
    for number, data in enumerate(files):
        (tmp_path / f"{number:02d}.jpg").write_bytes(data)
    options = {"batch_size": len(files), "dtype": torch.uint8, "shuffle": False}
    made = {}
    for name in (backend, "torchvision"):
        [batch] = multicrop_loader(FolderSource(tmp_path), RECIPE, **on(name), **options)
        made[name] = batch[0]
    for ours, right in zip(made[backend], made["torchvision"], strict=True):
        gaps = (ours.cpu().int() - right.int()).abs().float().mean((1, 2, 3))
        assert gaps.max() < 3, gaps
    assert "DALI failed" not in caplog.text
