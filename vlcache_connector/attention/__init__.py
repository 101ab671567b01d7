"""The attention seam: seeing every KV write, writing reused KV, metadata for the sparse prefill."""
