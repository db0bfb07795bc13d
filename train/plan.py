"""Estimate what a run needs, without a GPU: python train/plan.py --model vit_gigantic --gpus 256 --batch 4096

Prints parameters, operations per image, peak memory per GPU, traffic against compute time, steps and days,
the same for other numbers of GPUs, and the smallest number that fits. Takes all options of train/pretrain.py.
Exit code 2 for options that cannot work.
"""

import sys
from collections.abc import Sequence

from lejepa_fast.train.config.cli import parse_as
from lejepa_fast.train.planning.options import PlanOptions
from lejepa_fast.train.runtime.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def work() -> None:
        what = "Estimate what a training run needs, without a GPU. Takes the options of train/pretrain.py."
        options = parse_as(PlanOptions, argv, what=what, laptop=False)
        from lejepa_fast.train.planning.estimate import Plan  # after --help, which does not need PyTorch

        print(Plan(options).report())

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
