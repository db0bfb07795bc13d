"""Kernels compiled beforehand are found by another process, in another folder."""

import shutil

import bake_cache
import gpu_check
import pytest
import tiles_bench
import torch
from sigreg_variants import Case, Size

from lejepa_fast.kernels.runtime import interpreting


@pytest.mark.slow
@pytest.mark.skipif(interpreting(), reason="the interpreter replaces the compiler")
def test_a_fresh_process_finds_all_kernels_but_the_one_that_is_missing(tmp_path):
    jobs = [(bake_cache.step, (Case("tiny", Size(1, 32, 16, 16, 3), torch.bfloat16, ()),))]
    folder = tmp_path / "baked"
    size = bake_cache.bake(folder, jobs, processes=1)
    kernels = sorted(folder.glob("*/*.cubin"))
    assert len(kernels) >= 4
    assert sum(kernel.stat().st_size for kernel in kernels) < size < bake_cache.MOST_BYTES
    moved = folder.rename(tmp_path / "moved")
    shutil.rmtree((moved / kernels[0].relative_to(folder)).parent)
    assert bake_cache.check(moved, jobs) == 1  # all others are found


def test_what_is_baked_covers_the_tiles_and_the_steps_of_the_check():
    jobs = bake_cache.jobs_of_check()
    tiles = {(args[0].key, *args[2:]) for do, args in jobs if do is tiles_bench.compile_share}
    assert {(key, fused) for key, fused, *_ in tiles} == {
        ("reference-bfloat16", False),
        ("reference-bfloat16", True),
        ("giant-bfloat16", False),
    }
    assert tiles == {(key, fused, i, count) for key, fused, _, count in tiles for i in range(count)}
    steps = {case.key for do, (case, *_) in jobs if do is bake_cache.step}
    assert {stage.case for stage in gpu_check.STAGES if stage.name.startswith("sigreg ")} - {""} <= steps
