"""Where Triton kernels run: on a GPU, or in Triton's interpreter on a CPU."""

import os

import pytest
import torch

# Triton looks when a kernel is defined, so this has to be set before it is imported.
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if _IS_INTERPRETED or not torch.cuda.is_available() else "cuda")

needs_triton = pytest.mark.skipif(
    DEVICE.type == "cpu" and not _IS_INTERPRETED,
    reason="needs a GPU, or TRITON_INTERPRET=1 from the start",
)
