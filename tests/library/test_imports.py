"""What `import lejepa_fast` and parts of it need, and when names and modules are found."""

import subprocess
import sys


def run(script: str) -> str:
    """What the script prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


NAMES = """
assert {"SIGReg", "sigreg", "__version__"} <= set(dir(lejepa_fast))
# As `torch.export.load` needs it.
assert hasattr(torch.ops.lejepa_fast, "ecf_sums") == TORCH_FIRST
assert lejepa_fast.loss.LeJEPALoss is lejepa_fast.LeJEPALoss
assert lejepa_fast.functional.sigreg is lejepa_fast.sigreg
assert lejepa_fast.reference and lejepa_fast.errors.UsageError
assert not hasattr(lejepa_fast, "nothing")
"""

ALONE = f"""
import sys
for name in ("numpy", "torchvision", "timm", "PIL", "tyro"):
    sys.modules[name] = None  # importing it fails
import warnings
warnings.simplefilter("ignore")
import torch
before = set(sys.modules)
import lejepa_fast
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("lejepa_fast")))
TORCH_FIRST = True
{NAMES}
x = torch.randn(2, 20, 4, requires_grad=True)
lejepa_fast.LeJEPALoss()(x[:1], x).total.backward()
"""


def test_the_loss_needs_torch_alone_and_imports_nothing_heavy():
    """torch._dynamo or triton would take seconds."""
    assert run(ALONE).split() == []


PARTS = f"""
import sys
missing = ("torchvision", "annotated_types", "pydantic", "PIL", "tqdm", "timm", "numba", "tyro")
sys.modules |= dict.fromkeys(missing)  # importing one fails
import lejepa_fast, torch
TORCH_FIRST = False
{NAMES}
from lejepa_fast.data.masks import MultiBlockMasks
assert MultiBlockMasks()(0, 0, [1])[0].shape == (1, 14, 14)
for name in missing:
    del sys.modules[name]
import lejepa_fast.data
assert "open_source" in dir(lejepa_fast.data)
assert lejepa_fast.data.sources.open_source is lejepa_fast.data.open_source
assert all(hasattr(p, name) for p in (lejepa_fast, lejepa_fast.data) for name in p.__all__)
"""


def test_names_and_modules_are_found_at_their_first_use_and_masks_need_numpy_alone():
    assert run(PARTS) == ""
