"""Which files DALI decodes itself, by their headers."""

from __future__ import annotations

import random

import numpy as np
import pytest
from loader_backends import picture
from odd_files import DANGLING, ORIENTATION_6, damaged_exif, exif_entry, exif_inserted, saved
from PIL import Image

from lejepa_fast.data.backends.choose_backend import dali_fault
from lejepa_fast.data.backends.reading import TURNS
from lejepa_fast.data.sources.decoding import open_encoded, to_rgb
from lejepa_fast.data.sources.headers import plain_header


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


@pytest.mark.skipif(dali_fault(False) is not None, reason=str(dali_fault(False)))
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
            assert min(found.width, found.height) >= 1
            stored = (found.height, found.width, 3)
            if TURNS[found.orientation].transposed:
                stored = (found.width, found.height, 3)
            try:
                assert decoded_shape(pipeline, bytes(changed)) == stored, kind
                agreed += 1
            except RuntimeError:  # DALI refuses it, as Pillow may: the backend sees to that
                pipeline = built()
    assert agreed > 200
