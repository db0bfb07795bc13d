"""Makes Triton's interpreter twice as fast.

For every call of a device function Triton replaces all operations of its language by interpreted ones, though
they have been replaced when the kernel began. Once for each kernel launch is enough.
"""

from typing import Any

import benchlib  # noqa: F401  # lets the interpreter of Triton 3.6 take NumPy 2.4
import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """Replaces `interpreter._patch_lang`, which both kernels and device functions call when they begin."""
    patch_lang = interpreter._patch_lang
    patched: set[int] = set()  # the language's modules that are patched, during a launch

    class KernelScope:
        def __init__(self, scope: Any):
            self.scope = scope

        def restore(self) -> None:  # called when a kernel ends, never for device functions
            patched.clear()
            self.scope.restore()

    def patch_lang_once(fn: Any) -> KernelScope | None:
        languages = {id(module) for module in fn.__globals__.values() if module is tl or module is tl.core}
        if patched and languages <= patched:
            return None
        patched.update(languages)
        return KernelScope(patch_lang(fn))

    interpreter._patch_lang = patch_lang_once
