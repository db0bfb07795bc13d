"""What `import lejepa_fast` and the kernels need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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


def imported(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions; relative ones start with a dot."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_torch_triton_and_each_other(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for name in imported(path):
        own = name.startswith(".") and not name.startswith("..")
        assert own or name.split(".")[0] in allowed, name
