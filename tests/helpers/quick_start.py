"""What lets vLLM start faster, and take less memory, where a test is about something else."""

from __future__ import annotations

QUICK_START = {
    # Models run eagerly; vLLM compiles the gathering of log-probs all the same.
    "TORCHDYNAMO_DISABLE": "1",
    # The engine's process runs the worker, too, as it does for one GPU. On CPUs a third process
    # would import vLLM, then keep a core busy for a second after each request.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Environment of `vllm serve`, and of scripts that run it."""

KV_BLOCKS = 256
"""`num_gpu_blocks_override`: of 128 tokens each. vLLM would take, and touch, all of its GiB."""
