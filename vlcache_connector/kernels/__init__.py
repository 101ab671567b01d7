"""Writing reused KV into the paged cache: a Triton kernel, and what it has to agree with."""
