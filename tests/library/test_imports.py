"""What `import lejepa_fast` needs."""

import subprocess
import sys

SCRIPT = """
import sys
for name in ("numpy", "torchvision", "timm", "PIL", "tyro"):
    sys.modules[name] = None  # importing it fails
import warnings
warnings.simplefilter("ignore")
import torch
before = set(sys.modules)
import lejepa_fast
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("lejepa_fast")))
x = torch.randn(2, 20, 4, requires_grad=True)
lejepa_fast.LeJEPALoss()(x[:1], x).total.backward()
"""


def test_the_loss_needs_torch_alone_and_imports_nothing_heavy():
    """torch._dynamo or triton would take seconds."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
