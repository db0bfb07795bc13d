"""Lets the trainer be imported where tyro, which parses its command line, is not installed."""

from __future__ import annotations

import importlib.util
import sys
import types

if not sys.modules.get("tyro") and not importlib.util.find_spec("tyro"):
    stub = types.ModuleType("tyro")
    stub.conf = types.SimpleNamespace(arg=lambda **_: None)  # type: ignore[attr-defined]
    sys.modules["tyro"] = stub
