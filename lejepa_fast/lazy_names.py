"""Names that are imported at their first use: `--help` of the commands need not wait for PyTorch."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def lazy(
    package: str, names: Sequence[str], *modules: str, at_once: bool = True
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package; to be called at the end of its `__init__`.

    Args:
        package: its name.
        names: what it offers.
        modules: its modules that define the names; the first one that has a name counts.
        at_once: import them now where PyTorch is imported already: that registers their operators, which
            `torch.export.load` looks up.
    """
    module = sys.modules[package]

    def load() -> None:
        for home in modules[::-1]:
            found = vars(import_module(f"{package}.{home}"))
            vars(module).update({name: found[name] for name in names if name in found})

    def get(name: str) -> Any:
        path = f"{package}.{name}"
        if name in names:
            load()
            return vars(module)[name]
        try:
            if not name.startswith("_"):
                return import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    if at_once and sys.modules.get("torch"):
        load()
    return get, lambda: sorted({*vars(module), *names})
