"""In place of train/pretrain.py in tests of sweeps: writes the run folder of a finished training.

SETTINGS in the environment names a config.json to start from; CALLS a file that gets lambda and GPU of each
start. Lambda 0.03 fails; 0.04 runs until it is told to stop.
"""

import json
import os
import pathlib
import signal
import sys
import time

arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
out, lambd = pathlib.Path(value("--out")), float(value("--loss.lambd"))
with open(os.environ["CALLS"], "a") as file:
    file.write(f"{lambd} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
out.mkdir(exist_ok=True)
settings = json.loads(pathlib.Path(os.environ["SETTINGS"]).read_text())
settings["loss"]["lambd"] = lambd
(out / "config.json").write_text(json.dumps(settings))
if lambd == 0.03:
    print("starting", file=sys.stderr)
    sys.exit("error: the disk is full")
if lambd == 0.04:
    signal.signal(signal.SIGTERM, lambda *_: ((out / "saved").touch(), sys.exit(0)))
    (out / "ready").touch()
    time.sleep(60)
losses = {"loss": lambd, "prediction": lambd, "sigreg": 1.0}
(out / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 5, **losses}) + "\n")
(out / "report").mkdir(exist_ok=True)
summary = {"steps": 5, "state": "healthy", "knn_trained": 100 * lambd}
(out / "report" / "summary.json").write_text(json.dumps(summary))
