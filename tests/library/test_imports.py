"""What `import lejepa_fast` needs."""

import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("first", ["import torch, lejepa_fast", "import lejepa_fast, torch"])
def test_names_and_modules_are_found_at_their_first_use(first):
    lines = [
        "import sys",
        first,
        "assert {'SIGReg', 'sigreg', '__version__'} <= set(dir(lejepa_fast))",
        # As `torch.export.load` needs it.
        "assert hasattr(torch.ops.lejepa_fast, 'ecf_sums') == (sys.argv[1] == 'True')",
        "assert lejepa_fast.loss.LeJEPALoss is lejepa_fast.LeJEPALoss",
        "assert lejepa_fast.functional.sigreg is lejepa_fast.sigreg",
        "assert lejepa_fast.reference and lejepa_fast.errors.UsageError",
        "assert not hasattr(lejepa_fast, 'nothing')",
        "import lejepa_fast.data",
        "assert 'open_source' in dir(lejepa_fast.data)",
        "assert lejepa_fast.data.sources.open_source is lejepa_fast.data.open_source",
        "assert all(hasattr(p, name) for p in (lejepa_fast, lejepa_fast.data) for name in p.__all__)",
    ]
    registered = str(first.startswith("import torch"))
    command = [sys.executable, "-c", "\n".join(lines), registered]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
