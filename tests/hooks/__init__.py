"""The hooks: what they expect of vLLM, and what they do to it."""
