"""In place of train/pretrain.py in tests of sweeps: writes the run folder of a finished training.

Its loss is lambda and its accuracies are 100 lambda. CALLS in the environment names a file that gets lambda
and GPU of each start. Lambda 0.03 fails; 0.04 runs until it is told to stop; 0.06 was told to stop.
"""

import os
import signal
import sys
import time

from run_folders import write_run

from lejepa_fast.train import config

cfg = config.resolve(config.parse(sys.argv[1:]))
out, lambd = cfg.out, cfg.loss.lambd
assert out is not None
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{lambd} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
config.write(cfg, out)
if lambd == 0.03:
    print("starting", file=sys.stderr)
    sys.exit("error: the disk is full")
if lambd == 0.06:
    print("error: of an earlier start", "stopped by SIGTERM after step 3", sep="\n", file=sys.stderr)
    sys.exit(0)
if lambd == 0.04:
    signal.signal(signal.SIGTERM, lambda *_: ((out / "saved").touch(), sys.exit(0)))
    (out / "ready").touch()
    time.sleep(60)
summary = {"val_images": 100, "effective_rank": 3.0, "rankme": 4.0, "machine": {"torch_threads": 7}}
for probe in ("knn", "linear"):
    summary |= {f"{probe}_trained": 100 * lambd, f"{probe}_untrained": 1.0}
write_run(out, cfg, [lambd], steps=5, **summary)
