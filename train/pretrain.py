"""Pretrain an encoder: `python train/pretrain.py`, or `torchrun --nproc-per-node N train/pretrain.py`.

Exit codes: 0 done (also after SIGTERM, with the state saved), 1 the run failed, 2 wrong usage,
130 Ctrl-C. The failures that a user can act on are one line on stderr, `error: ...`.
"""

from __future__ import annotations

import os

# Before anything loads OpenMP: by default its threads spin at barriers, and take the CPU from the loader's
# workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import logging
import signal
import sys
from collections.abc import Sequence

from tqdm import tqdm

from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train import config
from lejepa_fast.train.interruption import Interrupted
from lejepa_fast.train.loop import Trainer
from lejepa_fast.train.parallelize import close_world, setup_world


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    who = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    _log_to_stderr(main_process=os.environ.get("RANK", "0") == "0", who=who)
    try:
        cfg = config.parse(sys.argv[1:] if argv is None else argv)
        world = setup_world(cfg.device)
        report = Trainer(cfg, world).run()
        if world.is_main:
            print(f"report: {report}")
        return 0
    except UsageError as error:
        print(f"error{who}: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error{who}: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        print(f"{interruption}", file=sys.stderr)
        return 0 if interruption.signum == signal.SIGTERM else 128 + interruption.signum
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is untouched", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        close_world()


class _BarSafeHandler(logging.Handler):
    """Writes log lines above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_stderr(*, main_process: bool, who: str) -> None:
    logger = logging.getLogger("lejepa_fast")
    if not logger.handlers:
        handler = _BarSafeHandler()
        handler.setFormatter(logging.Formatter("%(message)s" if main_process else f"%(message)s{who}"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if main_process else logging.WARNING)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
