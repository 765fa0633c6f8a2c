"""`python -m vllm_tokenselect` is the command `tokenselect`."""

from vllm_tokenselect.tools.cli import main

if __name__ == "__main__":
    main()
