"""The trainer's command for test_faults.py, without the evaluation; run by torchrun and by itself.

For each step, each rank adds a line (step, digest of each image's views) to FAULTS_SEEN/RANK-PID.jsonl.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from lejepa_fast.train import pretrain
from lejepa_fast.train.engine.trainer import Trainer

train_step = Trainer.train_step


def noted_step(self: Trainer, views: list[Tensor], epoch: int) -> None:
    images = torch.cat([view.flatten(1) for view in views], dim=1)
    digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]
    with (Path(os.environ["FAULTS_SEEN"]) / f"{self.world.rank}-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps([self.step + 1, digests]) + "\n")
    train_step(self, views, epoch)
    time.sleep(0.03)  # else a save takes longer than the steps to the next one


if __name__ == "__main__":
    Trainer.train_step = noted_step  # type: ignore[method-assign]
    pretrain.pretrain = lambda cfg, world: Trainer(cfg, world).run()  # type: ignore[assignment]
    sys.exit(pretrain.main())
