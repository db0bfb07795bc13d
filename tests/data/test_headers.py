"""Which files DALI decodes itself, by their headers; orientation, sizes and bounds of what it decodes."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from odd_files import DANGLING, ORIENTATION_6, damaged_exif, exif_entry, exif_inserted, saved
from PIL import Image
from test_dali import RECIPE, Numbered, folder, needs_dali, picture

from lejepa_fast.data import multicrop_loader
from lejepa_fast.data.backends import choose_backend as choice
from lejepa_fast.data.backends import dali_backend, reading
from lejepa_fast.data.backends.reading import Encoded
from lejepa_fast.data.draws import COLUMNS
from lejepa_fast.data.sources.decoding import open_encoded, to_rgb
from lejepa_fast.data.sources.headers import plain_header

ENGINES = ("compiled", "graph", "gpu")


def use_engine(name: str, monkeypatch) -> torch.device | None:
    """Have DALI make views by compiled code, or by its graph; the device to ask for."""
    if fault := choice.dali_fault(name == "gpu"):
        pytest.skip(fault)
    if name == "compiled":
        pytest.importorskip("numba", reason="the compiled CPU kernels need numba")
    monkeypatch.setattr(dali_backend, "numba_fault", lambda: None if name == "compiled" else "unused")
    return torch.device("cuda") if name == "gpu" else None


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x010F] = "maker"
    made[0x0112] = orientation
    return made


def with_exif(*entries: bytes, magic: int = 42) -> bytes:
    return exif_inserted(saved(picture(), "JPEG"), *entries, magic=magic)


PLAIN = {
    "jpeg": saved(picture(), "JPEG"),
    "gray jpeg": saved(picture().convert("L"), "JPEG"),
    "progressive": saved(picture(), "JPEG", progressive=True, subsampling=2),
    **{f"orientation {n}": saved(picture(), "JPEG", exif=exif(n)) for n in range(1, 9)},
    "exif of one entry": with_exif(ORIENTATION_6),
    "png": saved(picture(), "PNG"),
    "gray png": saved(picture().convert("L"), "PNG"),
    "padded": saved(picture(), "JPEG") + bytes(100),
}
UNUSUAL = {
    "cmyk": saved(picture().convert("CMYK"), "JPEG"),
    "palette": saved(picture().quantize(8), "PNG"),
    "16 bit": saved(Image.fromarray(np.full((9, 9), 700, np.uint16)), "PNG"),
    "alpha": saved(picture().convert("RGBA"), "PNG"),
    "animation": saved(picture().quantize(8), "GIF", save_all=True, append_images=[picture(1).quantize(8)]),
    "turned png": saved(picture(), "PNG", exif=exif(6)),
    "webp": saved(picture(), "WEBP"),
    "tiff": saved(picture(), "TIFF"),
    "empty": b"",
    "text": b"no image",
    "start": b"\xff\xd8\xff",
    "half": PLAIN["jpeg"][: len(PLAIN["jpeg"]) // 2],
    "no end": PLAIN["jpeg"][:-2],
    "half png": PLAIN["png"][: len(PLAIN["png"]) // 2],
    "exif entry outside": with_exif(DANGLING, ORIENTATION_6),
    "exif entry of many": with_exif(exif_entry(0x010F, 2, 0x7FFFFFFF, 60), ORIENTATION_6),
    "exif entry of no kind": with_exif(exif_entry(0x010F, 99, 1, 6), ORIENTATION_6),
    "exif cut": with_exif(ORIENTATION_6)[:2]
    + with_exif(ORIENTATION_6)[2:].replace(b"\1\0\x12", b"\2\2\x12", 1),
    "exif of no orientation": with_exif(exif_entry(0x0112, 3, 0, 6)),
    "exif of two orientations": with_exif(exif_entry(0x0112, 3, 2, 6)),
    "exif twice the same": with_exif(ORIENTATION_6, ORIENTATION_6),
    "exif of big tiff": with_exif(ORIENTATION_6, magic=43),
    "exif twice": exif_inserted(with_exif(ORIENTATION_6), exif_entry(0x0112, 3, 1, 1)),
    "exif without, and with": exif_inserted(with_exif(ORIENTATION_6), exif_entry(0x0100, 3, 1, 6)),
    "unparsable exif": damaged_exif(picture()),
    "bad table": PLAIN["jpeg"].replace(
        PLAIN["jpeg"][PLAIN["jpeg"].index(b"\xff\xc4") :][:21], b"\xff\xc4\0\x1f\0" + b"\xff" * 16
    ),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_files_go_the_short_way(kind):
    assert plain_header(PLAIN[kind])[:2] == to_rgb(open_encoded(PLAIN[kind])).size


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_files_do_not(kind):
    assert plain_header(UNUSUAL[kind]) is None


def test_bombs_do_not(monkeypatch):
    assert plain_header(PLAIN["jpeg"]) == (48, 32, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    assert plain_header(PLAIN["jpeg"]) is None


def decoded_shape(pipeline, data: bytes) -> tuple[int, ...]:
    pipeline.feed_input("encoded", [np.frombuffer(data, dtype=np.uint8)])
    pipeline.schedule_run()
    shape = tuple(pipeline.share_outputs()[0].as_array().shape[1:])
    pipeline.release_outputs()
    return shape


@needs_dali
def test_sorting_survives_any_bytes_and_foretells_what_dali_decodes():
    from lejepa_fast.data.backends.dali_graph import decode_pipeline

    def built():
        options = {"batch_size": 1, "num_threads": 1, "device_id": None, "prefetch_queue_depth": 1}
        pipeline = decode_pipeline(device="cpu", hw_decoder_load=0.0, **options)
        pipeline.build()
        return pipeline

    pipeline, rng, agreed = built(), random.Random(0), 0
    for kind, data in (PLAIN | UNUSUAL).items():
        for _ in range(60):
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 6)):
                if changed:
                    changed[rng.randrange(min(len(changed), 400))] = rng.randrange(256)
            if rng.random() < 0.3:
                del changed[rng.randrange(len(changed) + 1) :]
            found = plain_header(bytes(changed))
            if found is None:
                continue
            image = Encoded(0, bytes(changed), found.width, found.height, True, found.orientation)
            assert min(found.width, found.height) >= 1
            try:
                assert decoded_shape(pipeline, image.data) == image.stored_shape, kind
                agreed += 1
            except RuntimeError:  # DALI refuses it, as Pillow may: `_finish` sees to that
                pipeline = built()
    assert agreed > 200


# --- what is decoded ----------------------------------------------------------------------------


@needs_dali
@pytest.mark.parametrize("engine", ENGINES)
def test_every_orientation_and_damaged_exif_are_seen_as_pillow_sees_them(
    engine, tmp_path, monkeypatch, caplog
):
    device = use_engine(engine, monkeypatch)
    root = tmp_path / "images"
    root.mkdir()
    recipe = replace(RECIPE, flip_prob=0.5, jitter_prob=0, grayscale_prob=0, blur_prob=0, solarize_prob=0)
    files = [
        data
        for kind, data in (PLAIN | UNUSUAL).items()
        if "orientation" in kind or ("exif" in kind and kind != "unparsable exif")
    ]
    for number, data in enumerate(files):
        (root / f"{number:02d}.jpg").write_bytes(data)
    options = {"batch_size": len(files), "dtype": torch.uint8, "shuffle": False, "max_bad_fraction": 0.5}
    made = {}
    for backend in ("dali", "torchvision"):
        where = device if backend == "dali" else None
        loader = multicrop_loader(Numbered(root), recipe, backend=backend, device=where, **options)
        made[backend] = next(iter(loader))[0]
        assert loader.quarantined == []
    for ours, right in zip(made["dali"], made["torchvision"], strict=True):
        gaps = (ours.cpu().int() - right.int()).abs().float().mean((1, 2, 3))
        assert gaps.max() < 3, gaps
    assert "DALI failed" not in caplog.text


@needs_dali
def test_an_image_of_another_size_than_its_header_says_goes_to_pillow(tmp_path, monkeypatch, caplog):
    use_engine("compiled", monkeypatch)
    source = folder(tmp_path / "images", 8)
    right = next(iter(multicrop_loader(source, RECIPE, batch_size=8, backend="torchvision")))
    header = reading.plain_header
    monkeypatch.setattr(reading, "plain_header", lambda data: header(data)._replace(width=47))
    views, targets = next(iter(multicrop_loader(source, RECIPE, batch_size=8, backend="dali")))
    assert (
        "of shape (32, 48, 3), its header says (32, 47, 3)); decoding this batch with Pillow" in caplog.text
    )
    assert targets.tolist() == right[1].tolist()
    for ours, theirs in zip(views, right[0], strict=True):
        assert (ours - theirs).abs().mean() < 0.05


def test_compiled_kernels_never_read_beyond_the_image():
    kernels = pytest.importorskip("lejepa_fast.data.backends.cpu_kernels", reason="needs numba")
    around = np.full((3, 20, 30, 3), 255, np.uint8)
    image = around[1]
    image[:] = 0
    parameters = np.zeros(COLUMNS, np.float32)
    for top, left, height, width in ((10, 0, 20, 30), (0, 20, 20, 25), (-9, 0, 20, 30), (30, 40, 5, 5)):
        parameters[:4] = top, left, height, width
        out = np.full((3, 8, 8), 7, np.uint8)
        kernels.render_view(image, parameters, 1, 256, out)
        assert not out.any()
