"""The benchmark of packed, padded and truncated contexts: what each row counts."""

import ijepa_bench
import pytest
import timing
import torch
from benchlib import read_rows

from lejepa_fast.data.masks import MultiBlockMasks


def test_rows_count_what_each_way_keeps_and_pads(tmp_path, monkeypatch, capsys):
    def bytes_of(call, device):
        call()
        return 3 << 20

    monkeypatch.setattr(timing, "peak_extra_bytes", bytes_of)
    monkeypatch.setattr(timing, "in_fresh_process", lambda function, *arguments: function(*arguments))
    small = "--model test_vit --kwargs {} --size 160 --batch 3 --predictor 32 1 2 --rounds 2"
    ijepa_bench.main([*small.split(), "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "ijepa.jsonl")
    wanted = [(masks, way) for masks in ("I-JEPA", "narrow") for way in ("packed", "padded", "truncated")]
    assert [(row["masks"], row["way"]) for row in rows] == wanted
    for masks, area in ijepa_bench.CONTEXT_AREAS.items():
        context, targets = MultiBlockMasks((10, 10), context_area=area)(0, 0, range(3))
        kept, blocks = context.sum((1, 2)), targets.sum((2, 3))
        pairs = kept[:, None] + blocks
        tokens, longest = kept.sum() + pairs.sum(), 3 * kept.max() + pairs.numel() * pairs.max()
        packed, padded, truncated = (row for row in rows if row["masks"] == masks)
        for row in (packed, padded):
            assert (row["context_patches"], row["target_patches"]) == (kept.sum(), blocks.sum())
            assert row["tokens"] == tokens
            assert row["padding"] == pytest.approx(1 - tokens.item() / longest.item())
        assert (truncated["context_patches"], truncated["padding"]) == (3 * kept.min(), 0)
        assert truncated["target_patches"] == 12 * blocks.min()
        assert truncated["tokens"] == 15 * kept.min() + 12 * blocks.min()
        assert packed["time_over_packed"] == 1
        assert [row["peak_mib"] for row in (packed, padded, truncated)] == [3, 3, 3]
    assert "narrow, truncated" in capsys.readouterr().out


def test_truncation_drops_the_last_patches_of_the_longer_masks():
    masks = torch.tensor([[[1, 0], [1, 1]], [[0, 1], [0, 1]]], dtype=torch.bool)
    expected = torch.tensor([[[1, 0], [1, 0]], [[0, 1], [0, 1]]], dtype=torch.bool)
    assert torch.equal(ijepa_bench.shortened(masks), expected)
