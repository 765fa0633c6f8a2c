"""Ask a running server about a long document, and print each answer as it is generated.

python client.py http://localhost:8000 DOCUMENT QUESTION --top-k 1024
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI


def ask(
    client: OpenAI, model: str, message: str, max_tokens: int, settings: dict[str, str | int]
) -> Iterator[str]:
    """Stream an answer; `settings` hold for this request alone."""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": message}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        extra_body={"vllm_xargs": settings},
    )
    for piece in stream:
        if piece.choices and piece.choices[0].delta.content:
            yield piece.choices[0].delta.content


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a server a question about a document.")
    parser.add_argument("server", help="its URL, without /v1; a key is read from VLLM_API_KEY")
    parser.add_argument("document", type=Path, help="text file")
    parser.add_argument("question")
    parser.add_argument("--top-k", type=int, default=1024, help="no more than the server's top_k")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    asked = parser.parse_args()
    client = OpenAI(base_url=f"{asked.server}/v1", api_key=os.environ.get("VLLM_API_KEY", "none"))
    model = client.models.list().data[0].id
    message = f"{asked.document.read_text()}\n\n{asked.question}"
    for settings in ({}, {"tokenselect_top_k": asked.top_k}, {"tokenselect": "off"}):
        started, first = time.perf_counter(), None
        print(f"{settings or 'the settings of the server'}: ", end="", flush=True)
        for text in ask(client, model, message, asked.max_tokens, settings):
            first = first or time.perf_counter() - started
            print(text, end="", flush=True)
        print(f" ({first or 0:.2f} s to the first token)")


if __name__ == "__main__":
    main()
