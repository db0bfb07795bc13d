import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["pretrain", "evaluate", "segment"])
def test_idle_threads_sleep_unless_the_user_says_otherwise(command, tmp_path):
    """OpenMP reads the variables when PyTorch is loaded."""
    code = f"""
import os, sys
from lejepa_fast.train import {command}

class Noted:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)  # the rest takes seconds

sys.meta_path.insert(0, Noted())
{command}.main(sys.argv[1:])
"""
    arguments = {
        "pretrain": ["--data", str(tmp_path / "none")],
        "evaluate": ["--checkpoint", str(tmp_path / "none")],
        "segment": ["--checkpoint", str(tmp_path / "none"), "--images", str(tmp_path)],
    }
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    for given, expected in (({}, "PASSIVE 10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None")):
        line = [sys.executable, "-c", code, *arguments[command]]
        ran = subprocess.run(line, env=plain | given, capture_output=True, text=True)
        assert ran.stdout.splitlines()[0] == expected, ran.stderr
