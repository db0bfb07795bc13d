"""The benchmark of masks: what each scheme never masks, and what it drops."""

import masks_bench
import pytest
from benchlib import read_rows


def test_rows_say_what_each_scheme_never_masks_and_drops(tmp_path, capsys):
    masks_bench.main(["--sides", "14", "--batch", "16", "--batches", "20", "--out", str(tmp_path)])
    ours, public = read_rows(tmp_path / "masks.jsonl")
    assert [row["scheme"] for row in (ours, public)] == ["MultiBlockMasks", "public collator"]
    for row in (ours, public):
        assert (row["grid"], row["batch"], row["images"]) == ([14, 14], 16, 320)
    assert [ours[key] for key in ("never_target", "never_context", "context_dropped")] == [0, 0, 0]
    # The last row and the last column: 27 of 196 patches.
    assert [public[key] for key in ("never_target", "never_context")] == pytest.approx([27 / 196] * 2)
    assert abs(ours["area_aspect_correlation"]) < 0.15
    assert "13.8%" in capsys.readouterr().out


def test_the_public_scheme_cuts_all_contexts_to_the_shortest_from_below():
    masks = masks_bench.public_collator(16, 8, 0)
    kept = masks.context.sum((1, 2))
    assert (kept == kept[0]).all()
    block = ~masks.targets.any(1)
    block[:, 15:], block[:, :, 15:] = False, False  # 15 x 15 at the origin
    assert masks.dropped == block.sum() - kept.sum() > 0
    for before, after in zip(block.reshape(8, -1), masks.context.reshape(8, -1), strict=True):
        last = after.nonzero()[0][-1]
        assert (before[: last + 1] == after[: last + 1]).all()
    areas = masks.targets.sum((2, 3))
    assert (areas == areas[0, 0]).all()  # one size in a batch
