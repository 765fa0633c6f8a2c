"""`python -m vllm_tokenselect` is the command `tokenselect`."""

from vllm_tokenselect.cli import main

if __name__ == "__main__":
    main()
