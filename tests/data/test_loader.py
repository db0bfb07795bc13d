"""The loader's promises: what a batch holds, determinism, ranks, resume, workers, error messages."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from loader_backends import NumberedSource, numbered_folder, on, picture
from odd_files import saved
from PIL import Image
from torchvision.transforms.v2 import functional as F

from lejepa_fast.data import MultiCropRecipe, eval_loader, multicrop_loader, open_source
from lejepa_fast.data.backends import threaded
from lejepa_fast.data.sampler import EpochSchedule
from lejepa_fast.errors import RunError, UsageError

RECIPE = MultiCropRecipe(global_size=24, local_crops=2, local_size=16)


def loader(count: int = 37, **options):
    options = {"batch_size": 4, "recipe": RECIPE, "backend": "torchvision", **options}
    return multicrop_loader(NumberedSource(count), **options)


@pytest.fixture
def make(backend):
    """`loader` for each backend: what the contract promises holds for all."""
    return partial(loader, **on(backend))


def same(one, other) -> bool:
    """Bit-for-bit equality of two lists of batches."""
    return len(one) == len(other) and all(
        torch.equal(t, u) and all(torch.equal(a, b) for a, b in zip(v, w, strict=True))
        for (v, t), (w, u) in zip(one, other, strict=True)
    )


# --- what a batch is ----------------------------------------------------------------------------


def test_batch_contents(make):
    made = make()
    assert len(made) == 9
    assert made.backend == make.keywords["backend"]
    batches = list(made)
    assert len(batches) == 9
    seen = []
    for views, targets in batches:
        assert [tuple(v.shape) for v in views] == [(4, 3, 24, 24)] * 2 + [(4, 3, 16, 16)] * 2
        assert all(v.dtype == torch.float32 and v.is_contiguous() for v in views)
        assert targets.dtype == torch.int64
        assert not any(torch.equal(a, b) for a, b in [(views[0], views[1]), (views[2], views[3])])
        seen += targets.tolist()
    assert len(set(seen)) == 36  # every image at most once
    low, high = (0 - 0.485) / 0.229 - 1e-4, (1 - 0.406) / 0.225 + 1e-4
    values = torch.cat([v.flatten() for views, _ in batches for v in views])
    assert low <= values.min() < -1 < 1 < values.max() <= high


def test_dtype_layout_and_labels(make):
    raw = next(iter(make(dtype=torch.uint8)))[0]
    plain = next(iter(make()))[0]
    device = make.keywords.get("device", "cpu")
    half = next(iter(make(dtype=torch.bfloat16, channels_last=True, device=device)))[0]
    mean, std = torch.tensor(RECIPE.mean).view(3, 1, 1), torch.tensor(RECIPE.std).view(3, 1, 1)
    for r, p, h in zip(raw, plain, half, strict=True):
        assert r.dtype == torch.uint8
        mean, std = mean.to(device), std.to(device)
        torch.testing.assert_close(p, (r / 255 - mean) / std)
        assert torch.equal(h, p.bfloat16())
        assert h.is_contiguous(memory_format=torch.channels_last)
    unlabeled = multicrop_loader(
        NumberedSource(8, labeled=False), RECIPE, batch_size=4, backend=make.keywords["backend"]
    )
    assert next(iter(unlabeled))[1] is None
    # The views can enter autograd: inference-mode tensors could not be saved for backward.
    weight = torch.ones(1, requires_grad=True, device=raw[0].device)
    (raw[0].float() * weight).sum().backward()
    assert weight.grad is not None
    raw[0].add_(1)


def test_unshuffled_order_and_epochs(make):
    assert torch.cat([t for _, t in make(shuffle=False)]).tolist() == list(range(36))
    made = make()
    first, second = ([t.tolist() for _, t in made] for _ in range(2))
    assert first != second  # the loader moves on by itself
    made.set_epoch(0)
    assert [t.tolist() for _, t in made] == first
    assert [t.tolist() for _, t in make(seed=1)] != first


def test_seeds_epochs_and_sizes_may_be_numpys_integers():
    expected = loader(seed=3)
    expected.set_epoch(2)
    right = list(expected)
    for number in (np.int64, np.uint8):
        made = loader(seed=number(3), batch_size=number(4))
        made.set_epoch(number(2))
        assert same(list(made), right)
        assert json.loads(json.dumps(made.state_dict()))["epoch"] == 3
        large = loader(370, batch_size=number(120))  # the third batch ends beyond 255
        assert sum(len(targets) for _, targets in large) == 360
        split = open_source("trashnet96", "val", seed=number(3))
        assert split.describe(0) == open_source("trashnet96", "val", seed=3).describe(0)


# --- determinism --------------------------------------------------------------------------------


def per_image(batches) -> dict[int, list[torch.Tensor]]:
    return {int(t): [v[row] for v in views] for views, ts in batches for row, t in enumerate(ts)}


def test_augmentation_ignores_batch_size_order_and_ranks(make):
    reference = per_image(make())
    for options in ({"batch_size": 7}, {"shuffle": False}, {"world_size": 3, "rank": 2}):
        other = per_image(make(**options))
        common = reference.keys() & other.keys()
        assert len(common) >= 10
        for index in common:
            assert all(torch.equal(a, b) for a, b in zip(reference[index], other[index], strict=True))
    assert not torch.equal(per_image(make(seed=1))[5][0], reference[5][0])


def test_workers_change_nothing(backend):
    source = open_source("trashnet96", "val").subset(range(37))  # shards, which they read at the same time
    made, expected = (
        multicrop_loader(source, RECIPE, batch_size=4, num_workers=workers, **on(backend))
        for workers in (3, 0)
    )
    for _ in range(2):
        assert same(list(made), list(expected))


def test_of_two_passes_the_first_ends_with_an_error(make):
    made = make(num_workers=1)
    first = iter(made)
    next(first)
    second = iter(made)
    begun = [next(second)]
    with pytest.raises(RunError, match="another pass over the same loader has begun or the loader is closed"):
        next(first)
    assert made.position == (0, 1)
    made_once = make(num_workers=1)
    closed = iter(made_once)
    next(closed)
    made_once.close()
    with pytest.raises(RunError, match="the loader is closed"):
        next(closed)
    assert made_once.position == (0, 1), "no complete pass"
    # The batches that the first one had in stock do not show up.
    assert same([*begun, *second], list(make()))


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_untouched(make, workers):
    made = make(num_workers=workers)

    def states() -> list:
        legacy = np.random.get_state()[1].tolist()  # noqa: NPY002, which is what is tested
        return [torch.get_rng_state().tolist(), legacy, random.getstate(), torch.get_num_threads()]

    before = states()
    list(made)
    assert states() == before


# --- resume -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch_is_exact(make, workers):
    full = make()
    full.set_epoch(3)
    expected = list(full)
    made = make(num_workers=workers)
    made.set_epoch(3)
    for taken, _ in enumerate(made, start=1):
        state = made.state_dict()
        # Batches handed out, whatever the workers have made in advance.
        assert made.position == (3, taken)
        assert (state["epoch"], state["images_seen"]) == (3, 4 * taken)
        if taken == 4:
            break
    resumed = make(num_workers=workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(3)  # what a training loop does; it must not rewind
    assert same(list(resumed), expected[4:])
    assert resumed.state_dict()["epoch"] == 4
    assert same(list(resumed), list(full))  # the next epoch is whole


def test_resume_at_the_end_of_an_epoch(make):
    made = make()
    for _ in made:
        inside = made.state_dict()
    assert (inside["epoch"], inside["images_seen"]) == (1, 0)  # also within the loop body
    assert made.state_dict() == inside
    other, expected = make(batch_size=5), make(batch_size=5)
    other.load_state_dict(inside)  # between epochs other settings are fine
    expected.set_epoch(1)
    assert same(list(other), list(expected))
    again = make(seed=8, count=36)
    again.load_state_dict({"epoch": 1, "images_seen": 0, "seed": 0, "num_images": 37})
    assert again.position == (1, 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 9}, "saved in mid-epoch with seed 9, now it is 0"),
        ({"num_images": 36}, "saved in mid-epoch with num_images 36, now it is 37"),
        ({"names_sha256": "0"}, "saved in mid-epoch with names_sha256 0, now it is "),
        ({"images_seen": 38}, "names image 37 of only 37 images"),
        ({"images_seen": -1}, "images_seen: expected at least 0, got -1"),
        ({"epoch": True}, "epoch: expected a valid integer, got True"),
        ({"bad": [[-1, "text"]]}, r"bad\[0\]\[0\]: expected at least 0, got -1"),
        ({"bad": [[number, "text"] for number in range(38)]}, "names image 37 of only 37 images"),
    ],
    ids=str,
)
def test_a_wrong_state_is_refused_and_changes_nothing(change, text):
    made = loader()
    state = made.state_dict() | {"epoch": 1, "images_seen": 37}
    with pytest.raises(UsageError, match=text) as caught:
        made.load_state_dict(state | change)
    assert len(one_line(caught)) < 280
    assert (made.epoch, made.bad_images) == (0, [])
    made.load_state_dict(state)  # as it was, it is fine
    with pytest.raises(UsageError, match="images_seen: expected a value, got none"):
        made.load_state_dict({"epoch": 1})


# --- schedule -----------------------------------------------------------------------------------


def test_schedule_covers_all_images_over_epochs():
    schedule = EpochSchedule(10, batch_size=4)
    epochs = [[i for key in schedule.keys(e, 0) for i in key.indices] for e in range(12)]
    assert all(len(set(e)) == 8 for e in epochs)
    assert set().union(*epochs) == set(range(10))  # the dropped remainder differs between epochs
    assert len({tuple(e) for e in epochs}) == 12
    # Another order would change what older checkpoints resume to.
    assert [list(key.indices) for key in EpochSchedule(10, batch_size=4, seed=3).keys(2, 0)] == [
        [9, 4, 5, 2],
        [8, 6, 1, 3],
    ]


# --- evaluation loader --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader(workers):
    source = NumberedSource(10, size=(30, 20))
    made = eval_loader(source, image_size=20, batch_size=4, num_workers=workers)
    assert len(made) == 3
    for _ in range(2):
        batches = list(made)
        assert [len(t) for _, t in batches] == [4, 4, 2]
        assert torch.cat([t for _, t in batches]).tolist() == list(range(10))
    # 30 x 20 at 20 px: no resizing, the center 20 columns.
    pixels = torch.from_numpy(np.array(source[9][0]))[:, 5:25].permute(2, 0, 1) / 255
    mean, std = torch.tensor(RECIPE.mean).view(3, 1, 1), torch.tensor(RECIPE.std).view(3, 1, 1)
    torch.testing.assert_close(batches[-1][0][-1], (pixels - mean) / std)
    bigger, labels = next(iter(eval_loader(NumberedSource(2, labeled=False), image_size=64, batch_size=4)))
    assert bigger.shape == (2, 3, 64, 64)
    assert labels.tolist() == [-1, -1]


def test_very_long_images_are_cut_before_they_are_resized(monkeypatch):
    source = NumberedSource(1, size=(400, 1))
    whole = F.resize(threaded.to_tensor(source[0][0]), [16], antialias=True)
    made = []
    resize = F.resize
    monkeypatch.setattr(threaded.F, "resize", lambda *a, **o: made.append(resize(*a, **o)) or made[-1])
    view = threaded.center_view(source[0][0], 16)
    assert [tuple(image.shape) for image in made] == [(3, 16, 64)]
    assert torch.equal(view, F.center_crop(whole, [16, 16]))


# --- errors -------------------------------------------------------------------------------------


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number, got 2.5"),
        ({"seed": "x"}, "seed: expected a whole number, got 'x'"),
        ({"device": "gpu"}, "device: expected such as 'cpu', 'cuda' or 'cuda:1', got 'gpu'"),
        ({"device": "cuda:77"}, "device 'cuda:77': there are "),
        ({"batch_size": 38}, "37 images, fewer than one batch of 38; use a batch size of at most 37"),
        ({"batch_size": 10, "world_size": 4}, "on each of 4 ranks; use a batch size of at most 9"),
        ({"batch_size": 1, "world_size": 40}, "use fewer ranks"),
        (
            {"rank": 2, "world_size": 2},
            "rank, world_size: expected a rank from 0 to world_size - 1, got 2 and 2",
        ),
        ({"num_workers": -1}, "num_workers: expected at least 0, got -1"),
        ({"prefetch": 0}, "prefetch: expected at least 1, got 0"),
        ({"backend": "opencv"}, "unknown backend 'opencv'; expected one of 'auto', 'dali', 'cpu', "),
        ({"hw_decoder_load": 1.5}, "hw_decoder_load: expected a number in [0, 1]"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction: expected a number in [0, 1]"),
        ({"dtype": torch.float64}, "dtype: expected one of"),
        ({"recipe": MultiCropRecipe(flip_prob=2)}, "flip_prob: expected at most 1, got 2"),
    ],
)
def test_bad_settings(options, text):
    with pytest.raises(UsageError) as caught:
        loader(**options)
    assert text in one_line(caught)


def test_small_images_are_refused_with_a_way_out():
    recipe = MultiCropRecipe(global_size=33, local_size=16)
    with pytest.raises(UsageError) as caught:
        loader(recipe=recipe)
    text = one_line(caught)
    assert "image-0.png is 40 x 32 px, the crops need a short side of 33 px" in text
    assert "use crops of at most 32 px, or allow enlarging with min_image_size=1" in text
    enlarged = loader(recipe=MultiCropRecipe(global_size=48, local_size=40, min_image_size=1))
    assert [v.shape[-1] for v in next(iter(enlarged))[0]] == [48] * 2 + [40] * 6
    loader(recipe=MultiCropRecipe(global_size=32, local_crops=0))  # exactly the short side


@pytest.mark.parametrize(
    ("small", "unreadable", "message"),
    [
        (1, 9, r"^cannot read image .*/001\.png: not an image"),
        (6, 5, r"^image smaller than the crop: .*/000\.png is 9 x 9 px.*; use crops of at most 9 px"),
    ],
)
def test_the_fault_of_most_images_is_told(tmp_path, small, unreadable, message):
    files = [saved(picture(0, (9, 9)), "PNG")] * small + [b"text"] * unreadable
    source = numbered_folder(tmp_path / "images", 64, **{f"n{i}": file for i, file in enumerate(files)})
    with pytest.raises((UsageError, RunError), match=message):
        multicrop_loader(source, RECIPE, batch_size=4)


class BuggySource(NumberedSource):
    def open_image(self, index: int) -> Image.Image:
        raise MemoryError("cannot hold it")


def test_bugs_of_a_source_are_not_disguised(make):
    source = NumberedSource(8)
    options = {**make.keywords, "num_workers": 1}
    made = multicrop_loader(source, RECIPE, batch_size=4, **options)
    source.__class__ = BuggySource  # after the loader has looked at some images
    with pytest.raises(MemoryError, match="cannot hold it"):
        list(made)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_the_gpu():
    cpu = next(iter(loader()))
    for workers in (0, 1):
        views, targets = next(iter(loader(device="cuda", num_workers=workers)))
        assert all(v.is_cuda for v in views)
        assert torch.equal(targets.cpu(), cpu[1])
        for view, expected in zip(views, cpu[0], strict=True):
            torch.testing.assert_close(view.cpu(), expected, rtol=1e-6, atol=1e-6)
