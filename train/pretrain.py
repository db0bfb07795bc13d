"""Pretrain an encoder: `python train/pretrain.py`, or `torchrun --nproc-per-node N train/pretrain.py`.

Exit codes: 0 done (also after SIGTERM, with the state saved), 1 the run failed, 2 wrong usage,
130 Ctrl-C. The failures that a user can act on are one line on stderr, `error: ...`.
"""

from __future__ import annotations

import os

# Before anything loads OpenMP: by default its threads spin at barriers, and take the CPU from the loader's
# workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from collections.abc import Sequence

from lejepa_fast.train import config
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.command import log_to_stderr, run_command
from lejepa_fast.train.runtime.world import (
    close_world,
    is_said_by_rank_0,
    one_line_for_a_lost_peer,
    setup_world,
    the_same_on_every_rank,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    rank = os.environ.get("RANK", "0")
    who = f" (rank {rank})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    log_to_stderr(main_process=rank == "0", who=who)

    def work() -> None:
        with the_same_on_every_rank():
            cfg = config.parse(sys.argv[1:] if argv is None else argv)
        world = setup_world(cfg.device)
        with one_line_for_a_lost_peer():
            report = Trainer(cfg, world).run()
        if world.is_main:
            print(f"report: {report}")

    code = 1  # of what is not caught
    try:
        code = run_command(work, who=who, quiet=lambda error: rank != "0" and is_said_by_rank_0(error))
        return code
    finally:
        close_world(code)


if __name__ == "__main__":
    sys.exit(main())
