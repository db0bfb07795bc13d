"""Multi-block masks: what each block is, which patches are reached, and what the masks depend on."""

import numpy as np
import pytest
import torch

from lejepa_fast.data.masks import MultiBlockMasks
from lejepa_fast.data.sampler import EpochSchedule

IMAGES = 10_000


@pytest.fixture(scope="module")
def drawn():
    """Context (B, S, S) and targets (B, 4, S, S) of 10,000 images, S = 14."""
    return MultiBlockMasks()(0, 3, range(IMAGES))


def sides(blocks):
    """Height and width of masks (..., h, w), each of which has to be one full rectangle."""
    height, width = blocks.any(-1).sum(-1), blocks.any(-2).sum(-1)
    torch.testing.assert_close(blocks.sum((-2, -1)), height * width)
    for line in (blocks.any(-1), blocks.any(-2)):  # its rows and columns have no gap
        assert (line[..., 1:] & ~line[..., :-1]).sum(-1).add(line[..., 0]).eq(1).all()
    return height, width


def test_each_target_has_the_area_and_the_aspect_asked_for_and_they_are_uncorrelated(drawn):
    """40,000 blocks: the standard deviation of a correlation is 0.005."""
    targets = drawn[1]
    assert targets.shape[:2] == (IMAGES, 4)
    height, width = (side.double().flatten() for side in sides(targets))
    area, aspect = height * width / targets[0, 0].numel(), height / width
    assert 0.15 <= area.min() < 0.165
    assert 0.18 < area.max() <= 0.2
    assert 0.75 <= aspect.min() < 0.85
    assert 1.3 < aspect.max() <= 1.5
    assert abs(torch.corrcoef(torch.stack([area, aspect]))[0, 1]) < 0.02
    # Blocks of one image are independent, in size and place.
    first, second = area.view(-1, 4)[:, 0], area.view(-1, 4)[:, 1]
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.04
    top = targets.any(-1).double().argmax(-1).double()
    assert abs(torch.corrcoef(top[:, :2].T)[0, 1]) < 0.04


def test_the_context_is_a_block_of_the_shape_of_the_grid_without_any_target(drawn):
    context, targets = drawn
    side = context.shape[-1]
    hidden = targets.any(1)
    assert not (context & hidden).any()
    assert context.sum((1, 2)).min() >= 10
    # A block of side S - 1 leaves a row and a column at the edge, of which some patches are in no target.
    outside = ~(context | hidden)
    assert not outside[:, 1:-1, 1:-1].any()
    edges = [line[:, end, 1:-1].any(-1) for line in (outside, outside.mT) for end in (0, -1)]
    smaller = torch.stack(edges).any(0).double().mean().item()
    # Areas from 0.85 to 1 are equally likely; the nearer of (S - 1)^2 and S^2 is taken.
    middle = ((side - 1) ** 2 / side**2 + 1) / 2
    assert smaller == pytest.approx((middle - 0.85) / 0.15, abs=0.02)
    assert [edge.double().mean().item() for edge in edges] == pytest.approx([smaller / 2] * 4, abs=0.02)


def test_every_patch_is_target_and_context_as_often_as_geometry_implies(drawn):
    """Exact probabilities of a target patch follow from the sizes; they are symmetric, edges included."""
    context, targets = drawn
    grid = torch.arange(targets.shape[-1])
    height, width = (side.flatten() for side in sides(targets))

    def cover(side):
        """Share of the places of a block of this side that cover each row."""
        places = len(grid) - side[:, None] + 1
        last = torch.minimum(grid, places - 1)
        first = (grid - side[:, None] + 1).clamp_min(0)
        return (last - first + 1) / places

    expected = (cover(height)[:, :, None] * cover(width)[:, None]).mean(0)
    frequency = targets.double().mean((0, 1))
    noise = 5 * (expected * (1 - expected) / (4 * IMAGES)).sqrt()
    assert ((frequency - expected).abs() < noise).all()
    assert frequency.min() > 0.5 / len(grid) ** 1.5
    for mean, count in ((frequency, 4 * IMAGES), (context.double().mean(0), IMAGES)):
        assert mean.min() > 0
        for mirrored in (mean.flip(0), mean.flip(1), mean.flip(0, 1)):
            assert ((mean - mirrored).abs() < 5 * (2 * mean * (1 - mean) / count).sqrt()).all()


def test_masks_are_a_function_of_seed_epoch_and_image_on_any_number_of_ranks_and_after_a_resume():
    masks, count = MultiBlockMasks(), 96

    def epoch_on(ranks, start=0):
        found = {}
        for rank in range(ranks):
            schedule = EpochSchedule(count, 32 // ranks, seed=5, rank=rank, world_size=ranks)
            for key in schedule.keys(2, start):
                context, targets = masks(5, key.epoch, key.indices)
                found |= {i: (context[n], targets[n]) for n, i in enumerate(key.indices)}
        return found

    alone = epoch_on(1)
    assert len(alone) == count
    for other in (epoch_on(2), epoch_on(4), epoch_on(2, start=1)):
        assert len(other) in (count, count - 32)
        assert all(torch.equal(a, b) for i in other for a, b in zip(other[i], alone[i], strict=True))
    everything = torch.stack([torch.cat([c[None], t]).flatten() for c, t in alone.values()])
    assert len(everything.unique(dim=0)) == count  # each image has its own
    for seed, epoch in ((6, 2), (5, 3)):
        changed = masks(seed, epoch, list(alone))[1]
        same = (changed == torch.stack([t for _, t in alone.values()])).flatten(1).all(1)
        assert not same.any()
    theirs = masks(np.int64(0), np.int32(0), np.array([7, 3], np.uint64))  # numbers of NumPy are numbers
    assert masks(0, 0, torch.tensor([7, 3]))[0].equal(theirs[0])
    assert masks(0, 0, [])[1].shape == (0, 4, 14, 14)
    with pytest.raises(ValueError, match=r"indices: expected shape \(B,\), got \(1, 2\)"):
        masks(0, 0, [[1, 2]])


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"grid": (6, 6)}, {(3, 2)}),
        ({"grid": (8, 8)}, {(3, 4), (4, 3)}),
        ({"grid": (4, 4), "target_area": (0.2, 0.25), "min_keep": 6}, {(2, 2)}),
        ({"grid": (7, 14)}, {(4, 4)}),
        ({"grid": (14, 7), "target_aspect": (0.5, 0.7)}, {(3, 5), (3, 6)}),
        ({"grid": (4, 5), "targets": 1}, {(2, 2)}),  # exactly the highest area
        ({"grid": (1, 20), "targets": 2, "target_aspect": (0.2, 0.4)}, {(1, 3), (1, 4)}),
    ],
    ids=str,
)
def test_small_and_oblong_grids(options, blocks):
    masks = MultiBlockMasks(**options)
    context, targets = masks(1, 0, range(2000))
    assert context.shape[1:] == masks.grid
    height, width = sides(targets)
    assert set(zip(height.flatten().tolist(), width.flatten().tolist(), strict=True)) == blocks
    assert not (context & targets.any(1)).any()
    assert context.sum((1, 2)).min() >= masks.min_keep
    assert targets.any(0).any(0).all()


def test_an_image_with_too_little_context_is_drawn_anew_alone():
    """About half of all draws leave fewer than 19 of 36 patches."""
    few, enough = (MultiBlockMasks(grid=(6, 6), min_keep=least)(0, 0, range(500)) for least in (1, 19))
    kept = few[0].sum((1, 2)) >= 19
    assert 100 < kept.sum() < 400
    for before, after in zip(few, enough, strict=True):
        assert before[kept].equal(after[kept])
    assert enough[0].sum((1, 2)).min() == 19
    alone = MultiBlockMasks(grid=(6, 6), min_keep=19)(0, 0, [int((~kept).nonzero()[-1])])
    assert alone[1][0].equal(enough[1][~kept][-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (4, 4)}, r"target_area, target_aspect: no block of a 4 x 4 grid .* nearest is 2 x 2"),
        ({"target_aspect": (5, 6)}, r"aspect of 5 to 6; the nearest is 14 x 3"),
        ({"context_area": (0.9, 0.95)}, r"context_area: no block .* 14 x 14 grid .* nearest is 13 x 13"),
        ({"grid": (6, 6), "min_keep": 30}, r"min_keep: 30 context patches stay in 0.0% of the draws"),
        ({"target_area": (0.2, 0.15)}, r"target_area: expected \(lowest, highest\) above 0, at most 1, got"),
        ({"context_area": (0.5, 1.5)}, r"context_area: expected .* got \(0.5, 1.5\)"),
        ({"target_aspect": (0, 1)}, r"target_aspect: expected \(lowest, highest\) above 0 and finite, got"),
        ({"target_aspect": (1, float("inf"))}, r"target_aspect: expected .* got \(1, inf\)"),
        ({"target_area": 0.2}, r"target_area: expected \(lowest, highest\) .* got 0.2"),
        ({"grid": 14}, r"grid: expected \(height, width\) in patches, got 14"),
        ({"grid": (14,)}, r"grid: expected \(height, width\) in patches, got \(14,\)"),
        ({"targets": 0}, r"targets: expected at least 1, got 0"),
        ({"target_area": ("a", "b")}, "target_area: expected a number, got 'a'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_the_name_of_the_argument(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MultiBlockMasks(**options)


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 1.0), ("epoch", None), ("indices", [0.5]), ("indices", torch.tensor([True]))]
)
def test_masks_are_of_whole_numbers_alone(name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected an integer, got"):
        MultiBlockMasks()(**{"seed": 0, "epoch": 0, "indices": [1], name: value})
