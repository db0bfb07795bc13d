import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["pretrain", "evaluate", "segment"])
def test_idle_threads_sleep_unless_the_user_says_otherwise(command):
    code = f"""
import os, sys
from lejepa_fast.train import {command}
assert "torch" not in sys.modules  # which loads OpenMP
code = {command}.main(["--no-such-option"])
print(code, os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT"))
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    for given, expected in (({}, "2 PASSIVE 10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "2 ACTIVE None")):
        ran = subprocess.run([sys.executable, "-c", code], env=plain | given, capture_output=True, text=True)
        assert ran.stdout.strip() == expected, ran.stderr
