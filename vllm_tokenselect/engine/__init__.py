"""What an engine's configuration says: vLLM's `VllmConfig` read, checked and refused by name.

`hooks` and `backend` both import this room; it imports neither. Through `step_requests` the hooks of the
model runners tell the metadata builder whose rows a step has.
"""
