"""What is DALI's own: the choice of it, sorting files for it, its failures and threads; torchvision alike."""

from __future__ import annotations

import gc
import io
import logging
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loader_backends import on, skip_without
from odd_files import DANGLING, ORIENTATION_6, damaged_exif, exif_entry, exif_inserted
from PIL import Image

from lejepa_fast.data import MultiCropRecipe, choice, eval_loader, multicrop_loader, reading
from lejepa_fast.data import dali as dali_backend
from lejepa_fast.data.decode import open_encoded, to_rgb
from lejepa_fast.data.draws import COLUMNS
from lejepa_fast.data.headers import plain_header
from lejepa_fast.data.reading import Encoded
from lejepa_fast.data.sources import FolderSource
from lejepa_fast.errors import UsageError

RECIPE = MultiCropRecipe(global_crops=1, global_size=24, local_crops=1, local_size=16, blur_kernel=3)
ENGINES = ("compiled", "graph", "gpu")
needs_dali = pytest.mark.skipif(choice.dali_fault(False) is not None, reason=str(choice.dali_fault(False)))


def use_engine(name: str, monkeypatch) -> torch.device | None:
    """Have DALI make views by compiled code, or by its graph; the device to ask for."""
    if fault := choice.dali_fault(name == "gpu"):
        pytest.skip(fault)
    if name == "compiled":
        pytest.importorskip("numba", reason="the compiled CPU kernels need numba")
    monkeypatch.setattr(dali_backend, "numba_fault", lambda: None if name == "compiled" else "unused")
    return torch.device("cuda") if name == "gpu" else None


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BILINEAR)


class Numbered(FolderSource):
    """The label of an image is its number."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._targets = np.arange(len(self))


def folder(root: Path, count: int, **replaced: bytes) -> Numbered:
    """`count` PNG files; keywords n0, n7, ... give the contents of single ones."""
    root.mkdir(parents=True)
    for number in range(count):
        data = replaced.get(f"n{number}") or saved(picture(number), "PNG")
        (root / f"{number:03d}.png").write_bytes(data)
    return Numbered(root)


def broken_png() -> bytes:
    """Its header and its end are fine; what lies between is not."""
    data = bytearray(saved(picture(), "PNG"))
    start = data.index(b"IDAT") + 10
    data[start : start + 8] = b"\xff" * 8
    return bytes(data)


# --- the choice ---------------------------------------------------------------------------------


def test_auto_takes_what_is_there(monkeypatch):
    cpu, gpu = None, torch.device("cuda", 0)
    monkeypatch.setattr(choice, "dali_fault", lambda on_gpu: None)
    monkeypatch.setattr(choice, "numba_fault", lambda: None)
    assert choice.choose_backend("auto", cpu).name == choice.choose_backend("auto", gpu).name == "dali"
    monkeypatch.setattr(choice, "numba_fault", lambda: "numba is not installed: pip install numba")
    chosen = choice.choose_backend("auto", cpu)
    assert chosen.name == "torchvision"
    assert "pip install numba" in chosen.reason
    assert choice.choose_backend("auto", gpu).name == "dali"
    monkeypatch.setattr(choice, "dali_fault", lambda on_gpu: "it is broken" if on_gpu else None)
    assert choice.choose_backend("auto", gpu) == ("torchvision", "it is broken")
    assert choice.choose_backend("dali", cpu).name == "dali"
    with pytest.raises(UsageError, match=r"backend 'dali': it is broken, or use backend='torchvision'"):
        choice.choose_backend("dali", gpu)


@needs_dali
@pytest.mark.parametrize(
    "text", ["Numba needs NumPy 2.3 or less. Got 2.4", "cannot cache function 'x': no locator"]
)
def test_a_broken_numba_is_said_once_and_done_without(text, tmp_path, monkeypatch, caplog):
    real = choice.importlib.import_module

    def refuse(name):
        if name == "lejepa_fast.data.cpu_kernels":
            raise ImportError(text + "\nmore")
        return real(name)

    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(choice.importlib, "import_module", refuse)
    choice.numba_fault.cache_clear()
    try:
        chosen = choice.choose_backend("auto", None)
        assert chosen.name == "torchvision"
        assert text in chosen.reason
        loader = multicrop_loader(folder(tmp_path / "images", 4), RECIPE, batch_size=4, backend="dali")
        assert len(list(loader)) == 1  # by the operator graph
        assert caplog.text.count(text) == 1
        assert "DALI failed" not in caplog.text
    finally:
        choice.numba_fault.cache_clear()


def test_dali_that_is_missing_or_broken_is_explained(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(choice, "_is_installed", lambda: False)
    assert choice.dali_fault(False) == "DALI is not installed: pip install nvidia-dali-cuda120"
    monkeypatch.setattr(choice, "_is_installed", lambda: True)

    def refuse(name):
        raise OSError("libcudart.so.11: cannot open shared object file\nmore")

    monkeypatch.setattr(choice.importlib, "import_module", refuse)
    fault = choice.dali_fault(False)
    assert fault.startswith(
        "DALI cannot be loaded (libcudart.so.11: cannot open shared object file): pip inst"
    )


@pytest.mark.parametrize(
    ("built", "available", "driver", "text"),
    [
        ("13.0", True, 13010, None),
        ("12.9", True, 13000, None),
        ("12986", True, 12040, None),
        ("124131", True, 12040, None),
        ("13.4.92", True, 12080, "the driver supports CUDA 12.8: pip install nvidia-dali-cuda120"),
        ("13492", True, 12080, "built for CUDA 13, the driver supports CUDA 12.8"),
        ("13000", True, 12040, "built for CUDA 13"),
        ("13.0", False, 13000, "no CUDA device"),
        ("", True, 13000, None),
        ("13492", True, 0, None),
    ],
)
def test_builds_for_another_cuda_are_named(built, available, driver, text, monkeypatch, caplog):
    choice._say_unchecked.cache_clear()
    monkeypatch.setattr(choice, "_is_installed", lambda: True)
    monkeypatch.setattr(
        choice.importlib, "import_module", lambda name: SimpleNamespace(__cuda_version__=built)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)

    class Driver:
        def cuDriverGetVersion(self, place):  # noqa: N802, its name in the library
            place._obj.value = driver
            return 0 if driver else 3

    monkeypatch.setattr(choice.ctypes, "CDLL", lambda name: Driver())
    fault = choice.dali_fault(True)
    assert fault is None if text is None else text in fault
    # What cannot be checked is said, and once.
    choice.dali_fault(True)
    assert caplog.text.count("cannot tell whether this build of DALI suits") == (not built or not driver)
    assert choice.wanted_package("13.2") == choice.wanted_package(None) == "nvidia-dali-cuda130"


def test_a_machine_without_a_driver_is_no_error(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(choice.ctypes, "CDLL", missing)
    assert choice._driver_version() == 0


@needs_dali
def test_the_choice_is_logged_with_its_reason(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lejepa_fast.data"):
        made = multicrop_loader(folder(tmp_path / "a", 8), RECIPE, batch_size=4)
    assert f"{made.backend} backend (" in caplog.text


# --- sorting files ------------------------------------------------------------------------------


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
    from lejepa_fast.data.dali_graph import decode_pipeline

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


# --- equality with torchvision ------------------------------------------------------------------


def labels(loader) -> list[list[int]]:
    return [targets.tolist() for _, targets in loader]


@pytest.mark.parametrize("dali", ["dali", "gpu"])
def test_bad_files_are_replaced_alike_and_positions_are_exchangeable(dali, tmp_path, caplog):
    skip_without(dali)
    bad = {"n3": b"no image", "n11": broken_png(), "n17": UNUSUAL["half png"], "n29": broken_png()}
    source = folder(tmp_path / "images", 42, **bad)

    def made(backend):
        where = on(dali if backend == "dali" else backend)
        return multicrop_loader(source, RECIPE, batch_size=4, max_bad_fraction=0.5, seed=1, **where)

    whole = made("torchvision")
    whole.set_epoch(5)
    expected = labels(whole)
    assert all(len(batch) == 4 for batch in expected)
    by_dali = made("dali")
    by_dali.set_epoch(5)
    assert labels(by_dali) == expected
    assert by_dali.quarantined == whole.quarantined
    assert "DALI failed" in caplog.text  # it did meet the files that only decoding finds out
    flat = [label for batch in expected for label in batch]
    assert not {3, 11, 17, 29} & set(flat)
    repeated = 40 - len(set(flat))
    assert repeated <= 2  # 38 good images fill 40 places
    for first, second in (("dali", "torchvision"), ("torchvision", "dali")):
        begun = made(first)
        begun.set_epoch(5)
        for taken, _ in enumerate(begun, start=1):
            state = begun.state_dict()
            if taken == 6:
                break
        other = made(second)
        caplog.clear()
        other.load_state_dict(state | {"backend": second})
        assert "may differ" not in caplog.text
        other.load_state_dict(state)
        assert f"the loader state is of the {first} backend in mid-epoch, and this is {second}" in caplog.text
        assert labels(other) == expected[6:]


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


@needs_dali
def test_a_batch_that_dali_did_not_take_is_not_paired_with_another(tmp_path, monkeypatch, caplog):
    source = folder(tmp_path / "images", 12)
    right = list(multicrop_loader(source, RECIPE, batch_size=4, backend="torchvision"))
    loader = multicrop_loader(source, RECIPE, batch_size=4, backend="dali")
    feed, fed = loader._backend._feed, []

    def refusing(batch):
        fed.append(batch)
        if len(fed) == 2:
            raise RuntimeError("no place for a batch")
        feed(batch)

    monkeypatch.setattr(loader._backend, "_feed", refusing)
    for (views, targets), (others, expected) in zip(loader, right, strict=True):
        assert targets.tolist() == expected.tolist()
        for ours, theirs in zip(views, others, strict=True):
            assert (ours - theirs).abs().mean() < 0.05
    assert caplog.text.count("DALI failed (no place for a batch)") == 1


def test_compiled_kernels_never_read_beyond_the_image():
    kernels = pytest.importorskip("lejepa_fast.data.cpu_kernels", reason="needs numba")
    around = np.full((3, 20, 30, 3), 255, np.uint8)
    image = around[1]
    image[:] = 0
    parameters = np.zeros(COLUMNS, np.float32)
    for top, left, height, width in ((10, 0, 20, 30), (0, 20, 20, 25), (-9, 0, 20, 30), (30, 40, 5, 5)):
        parameters[:4] = top, left, height, width
        out = np.full((3, 8, 8), 7, np.uint8)
        kernels.render_view(image, parameters, 1, 256, out)
        assert not out.any()


@needs_dali
@pytest.mark.parametrize("size", [(61, 47), (47, 61), (300, 20), (20, 333), (16, 16), (5, 7)])
def test_evaluation_views_equal_torchvisions(tmp_path, size):
    root = tmp_path / "images"
    root.mkdir()
    for number in range(3):
        picture(number, size).save(root / f"{number}.png")
    (root / "2.png").write_bytes(b"no image")
    batches = {}
    for backend in ("dali", "torchvision"):
        options = {"mean": (0, 0, 0), "std": (1, 1, 1), "backend": backend, "max_bad_fraction": 1.0}
        batches[backend] = list(eval_loader(Numbered(root), image_size=16, batch_size=2, **options))
    assert (
        [t.tolist() for _, t in batches["dali"]]
        == [t.tolist() for _, t in batches["torchvision"]]
        == [[0, 1]]
    )
    gap = (batches["dali"][0][0] - batches["torchvision"][0][0]).abs() * 255
    assert gap.max() <= 2
    assert gap.mean() <= 0.6


# --- threads and processes ----------------------------------------------------------------------


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("lejepa")}


@needs_dali
def test_a_loader_that_is_left_early_frees_its_threads(tmp_path):
    source = folder(tmp_path / "images", 40)
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    loader = multicrop_loader(source, RECIPE, batch_size=2, num_workers=2, backend="dali")
    batches = iter(loader)
    next(batches)
    assert "lejepa-dali" in threads()
    second = iter(loader)  # ends the first pass
    next(second)
    with pytest.raises(RuntimeError, match="another pass"):
        list(batches)
    second.close()
    assert "lejepa-dali" not in threads()
    del batches, second, loader
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("lejepa"):
            thread.join(10)
    assert threading.active_count() == before[0]
    assert len(os.listdir("/proc/self/task")) <= before[1] + 1


@needs_dali
def test_forked_processes_do_not_wait_for_dalis_threads(tmp_path):
    """Not even when the child collects garbage before anything else: some other hook may set that off."""
    folder(tmp_path / "images", 8)
    script = (
        "import gc, multiprocessing, os, sys\n"
        "os.register_at_fork(after_in_child=gc.collect)\n"
        "from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source\n"
        "recipe = MultiCropRecipe(global_crops=1, global_size=24, local_crops=0)\n"
        "source = open_source(sys.argv[1], 'train')\n"
        "holder = {'loader': multicrop_loader(source, recipe, batch_size=2, backend='dali')}\n"
        "list(holder['loader'])\n"
        "holder['itself'] = holder\n"
        "gc.disable()\n"
        "del holder\n"
        "for again in range(2):\n"
        "    child = multiprocessing.get_context('fork').Process(target=gc.collect)\n"
        "    child.start()\n"
        "    child.join(30)\n"
        "    print(child.exitcode)\n"
        "    child.kill()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "images")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "0\n0\n"), done.stderr


@needs_dali
@pytest.mark.parametrize("text", ["after shutdown", "after interpreter shutdown"])
def test_the_end_of_the_interpreter_is_no_failure_of_dali(text, tmp_path, monkeypatch, caplog):
    """In the program's last moments executors refuse work, as this does."""

    def refused(batch):
        raise RuntimeError(f"cannot schedule new futures {text}")

    loader = multicrop_loader(folder(tmp_path / "images", 8), RECIPE, batch_size=4, backend="dali")
    monkeypatch.setattr(loader._backend, "_collect", refused)
    with pytest.raises(RuntimeError, match=text):
        next(iter(loader))
    assert "DALI failed" not in caplog.text


@needs_dali
def test_the_interpreter_ends_with_a_pass_under_way(tmp_path):
    folder(tmp_path / "images", 40)
    script = (
        "import sys\n"
        "from lejepa_fast.data import MultiCropRecipe, multicrop_loader, open_source\n"
        "recipe = MultiCropRecipe(global_crops=1, global_size=24, local_crops=0)\n"
        "source = open_source(sys.argv[1], 'train')\n"
        "batches = iter(multicrop_loader(source, recipe, batch_size=2, backend='dali'))\n"
        "print(len(next(batches)[0]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "images")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
