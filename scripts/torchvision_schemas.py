"""Lets torchvision's Python part be imported when its C++ library does not load.

vLLM's Qwen-VL code imports torchvision, but only for its Python part (resize, interpolation
modes). A torchvision built for CUDA cannot load its C++ library next to a CPU build of torch, and
the import then stops with "operator torchvision::nms does not exist": `_meta_registrations`
attaches fake kernels to `nms` and `qnms` without asking whether these operators were registered.
Declaring the two schemas first is all that is missing; the operators themselves stay without
a kernel, so a call to one of them still fails.

`scripts/setup.sh` copies this file into the virtual environment's site-packages, with a `.pth`
file that calls `install()` at the start of every Python process. Nothing is imported there: the
hook waits until torchvision itself is imported. It does nothing where the C++ library loads.
"""

import sys

_TARGET = "torchvision._meta_registrations"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []  # a torch.library.Library takes its definitions along when it is collected


def declare_schemas() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` unless the C++ library did so."""
    extension = sys.modules.get("torchvision.extension")
    if extension is None or extension._has_ops() or _libraries:
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _libraries.append(library)
    for schema in _SCHEMAS:
        library.define(schema)


class _Finder:
    """A finder that finds nothing: it only notices that the target is about to be imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == _TARGET:
            declare_schemas()
        return None


def install() -> None:
    """Put the import hook first in `sys.meta_path` (once)."""
    if not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
