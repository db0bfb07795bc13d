"""Makes Triton's interpreter twice as fast, and lets that of Triton 3.6 run with NumPy 2.4.

For every call of a device function Triton replaces all operations of its language by interpreted ones, though
they have been replaced when the kernel began. Once for each kernel launch is enough.

Triton 3.6 converts the bounds of a loop, arrays of one element, by `int`. NumPy 2.4 refuses that.
"""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once() -> None:
    """Replaces `interpreter._patch_lang`, which both kernels and device functions call when they begin."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_numpy(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_for_numpy
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
