"""Host time of one SIGReg step, forward and backward: what a GPU waits for at small sizes.

    python bench/host_bench.py

It needs no GPU. Our kernels are launched into a stand-in driver (`standin_driver.py`), so the driver's own
time is missing: a few microseconds a launch. The authors' formulation runs on a CPU at sizes of 2, where
computing takes next to no time.
"""

from collections.abc import Sequence

import torch
from benchlib import Rows, command_line, print_rows
from sigreg_variants import BASELINE, MINIMAL, TRITON, VARIANTS, Case, Size
from standin_driver import standing_in
from timing import interleave, summary, wall_clock_of_many

from lejepa_fast import triton_operators

REGISTERED = f"{TRITON}, registered operators"
SIZES = {BASELINE: Size(4, 2, 2, 2, MINIMAL.J), TRITON: MINIMAL, REGISTERED: MINIMAL}


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="of all variants in turn (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    plain = triton_operators.tracing

    def step_of(name: str, size: Size):
        variant = BASELINE if name == BASELINE else TRITON
        loss = VARIANTS[variant](Case("host", size, torch.float32, [name]), torch.device("cpu"))
        x = torch.randn(size.V, size.N, size.K, requires_grad=True)
        tracing = (lambda *tensors: True) if name == REGISTERED else plain

        def step() -> None:
            triton_operators.tracing = tracing
            loss.step(x)

        return step

    with standing_in():
        try:
            steps = {name: step_of(name, size) for name, size in SIZES.items()}
            seconds = interleave(steps, args.rounds, wall_clock_of_many, warm_up=2)
        finally:
            triton_operators.tracing = plain
    writer = Rows(args.out / "host.jsonl", "host_bench", torch.device("cpu"))
    rows = writer.write(
        *(
            {"variant": name, **SIZES[name]._asdict(), "host": summary(taken)}
            for name, taken in seconds.items()
        )
    )
    columns = {"host time of a step": "{variant}", "median ms": "{host[median_ms]:.3f}"}
    print_rows(rows, columns | {"p20": "{host[p20_ms]:.3f}", "p80": "{host[p80_ms]:.3f}"})


if __name__ == "__main__":
    main()
