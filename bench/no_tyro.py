"""Imported before the trainer: where tyro is not installed, the trainer can be imported all the same.

`train/config.py` annotates its fields for tyro, which parses command lines. Benchmarks that parse none of the
trainer's are content with notes that say nothing.
"""

from __future__ import annotations

import importlib.util
import sys
import types

# A module that stands there without a spec, such as another stub, would be an error to find_spec.
if not sys.modules.get("tyro") and not importlib.util.find_spec("tyro"):
    notes = types.ModuleType("tyro")
    notes.conf = types.SimpleNamespace(arg=lambda **_: None)  # type: ignore[attr-defined]
    sys.modules["tyro"] = notes
