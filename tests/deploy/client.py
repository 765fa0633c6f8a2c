"""A client of a server at port 8000 of this network: `python -m tests.deploy.client KEY COMMAND ...`.

status METHOD PATH    prints the status of an empty request without the key
question [SCHEMA]     prints the answer to a question, as JSON of a schema
long TOKENS           prints a line as soon as an answer begins, and then the answer's end
"""

from __future__ import annotations

import json
import sys
import urllib.error

import openai

from tests.server.open_paths import status

URL = "http://127.0.0.1:8000"
ASKED = "Which city is the capital of France? Answer with the name of the city."
QUESTION = [{"role": "user", "content": ASKED}]


def main(key: str, command: str, *arguments: str) -> None:
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key=key, max_retries=0, timeout=600)
    if command == "status":
        try:
            print(status(URL, *arguments))
        except urllib.error.URLError as error:
            print(error.reason)
    elif command == "question":
        print(question(client, *arguments))
    elif command == "long":
        long(client, int(*arguments))


def question(client: openai.OpenAI, schema: str | None = None) -> str:
    more = {}
    if schema is not None:
        named = {"name": "answer", "schema": json.loads(schema)}
        more = {"response_format": {"type": "json_schema", "json_schema": named}}
    [model] = client.models.list().data
    completion = client.chat.completions.create(
        model=model.id, messages=QUESTION, temperature=0, max_tokens=64, **more
    )
    return completion.choices[0].message.content


def long(client: openai.OpenAI, tokens: int) -> None:
    [model] = client.models.list().data
    stream = client.completions.create(
        model=model.id,
        prompt="Once upon a time",
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    reason, generated = None, 0
    for number, piece in enumerate(stream):
        if number == 0:
            print("begun", flush=True)
        if piece.choices:
            reason = piece.choices[0].finish_reason or reason
        if piece.usage:
            generated = piece.usage.completion_tokens
    print(reason, generated)


if __name__ == "__main__":
    main(*sys.argv[1:])
