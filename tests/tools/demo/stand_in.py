"""Runs `tokenselect demo` with a stand-in for `vllm serve`, which knows the answers that it is told to.

    python -m tests.tools.demo.stand_in '{"ours": 8, "full": 8, "figures": true}' demo [OPTIONS]

Answers as many of the questions rightly on TOKENSELECT ("ours") and with full attention ("full"), writes
each request's figures or not, and hangs in the middle of an answer if "hangs".
"""

import http.server
import json
import sys
import time
from collections import Counter
from functools import partial
from typing import ClassVar

from vllm_tokenselect.method.requests import Activity
from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.common.server import VllmServer
from vllm_tokenselect.tools.demo import asking
from vllm_tokenselect.tools.demo import command as demo
from vllm_tokenselect.tools.demo.document import FACTS


class StandIn(VllmServer):
    """A server whose command is this file."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        serve = self.command[self.command.index("serve") :]
        self.command = [sys.executable, "-m", __spec__.name, sys.argv[1], str(self.port), *serve]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /health, and /v1/completions as a stream."""

    told: ClassVar[dict] = {}
    asked: ClassVar[Counter] = Counter()
    read: ClassVar[set] = set()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        off = body.get("vllm_xargs") == {"tokenselect": "off"}
        way = "full" if off else "ours"
        fact = next(fact for fact in FACTS if body["prompt"].endswith(fact.begun))
        self.asked[way] += 1
        says = fact.answer if self.asked[way] <= self.told[way] else f"{fact.answer}0"
        name = f"cmpl-{way}{self.asked[way]}"
        self.send_response(200)
        self.end_headers()
        for piece in (" ", says):
            self._send(json.dumps({"id": name, "choices": [{"text": piece}]}))
            time.sleep(600 if self.told.get("hangs") else 0)
        if self.told["figures"]:
            attended = 1000 if off else 400
            cached = (way, body["cache_salt"]) in self.read
            self.read.add((way, body["cache_salt"]))
            figures = Activity(attended, 1000, 1 if cached else 10, attended, 1000, 2)
            print(f"TOKENSELECT request {name}-0: {figures}", flush=True)
        self._send("[DONE]")

    def _send(self, event: str) -> None:
        self.wfile.write(f"data: {event}\n\n".encode())
        self.wfile.flush()


if __name__ == "__main__":
    Handler.told = json.loads(sys.argv[1])
    if sys.argv[2] == "demo":
        demo.VllmServer = StandIn
        if not Handler.told["figures"]:
            asking.wait_for_figures = partial(asking.wait_for_figures, timeout=0.5)
        app(sys.argv[2:])
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
