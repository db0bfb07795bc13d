"""Kernels compiled beforehand are found by another process, in another folder."""

import bake_cache
import pytest
import torch
from sigreg_variants import TRITON, Case, Size

from lejepa_fast.kernels.runtime import interpreting


@pytest.mark.slow
@pytest.mark.skipif(interpreting(), reason="the interpreter replaces the compiler")
def test_a_fresh_process_finds_all_kernels_until_one_is_missing(tmp_path):
    jobs = [bake_cache.Job(Case("tiny", Size(1, 32, 16, 16, 3), torch.bfloat16, (TRITON,)))]
    folder = tmp_path / "baked"
    size = bake_cache.bake(folder, jobs, processes=1)
    kernels = sorted(folder.glob("*/*.cubin"))
    assert len(kernels) >= 4
    assert sum(map(len, map(bytes, (k.read_bytes() for k in kernels)))) < size < bake_cache.MOST_BYTES
    moved = folder.rename(tmp_path / "moved")
    assert bake_cache.check(moved, jobs) == 0
    (moved / kernels[0].relative_to(folder)).with_suffix(".json").unlink()
    assert bake_cache.check(moved, jobs) == 1


def test_a_cache_of_another_triton_is_named(tmp_path, monkeypatch):
    here = {"python": "3.12.3", "triton": "3.6.0", "triton_key": "abc"}
    monkeypatch.setattr(bake_cache, "versions", lambda: here)
    for baked, expected in (
        (here, None),
        ({**here, "python": "3.11.7", "triton_key": "def"}, "python 3.11.7, here 3.12.3, triton 3.6.0"),
    ):
        (tmp_path / bake_cache.MANIFEST).write_text(bake_cache.json.dumps(baked))
        problem = bake_cache.mismatch(tmp_path)
        assert (problem is None) if expected is None else (expected in problem)


def test_what_is_baked_covers_the_tiles_and_the_steps_of_the_check():
    jobs = bake_cache.jobs_of_check()
    tiles = {(job.case.key, job.fused, job.share) for job in jobs if job.fused is not None}
    assert {(key, fused) for key, fused, _ in tiles} == {
        ("reference-bfloat16", False),
        ("reference-bfloat16", True),
        ("giant-bfloat16", False),
    }
    for key, fused, (_, count) in tiles:
        assert {(key, fused, (index, count)) for index in range(count)} <= tiles
    steps = {job.case.key for job in jobs if job.fused is None}
    assert {"reference-bfloat16", "reference-float32", "minimal-float32", "giant-bfloat16"} <= steps
