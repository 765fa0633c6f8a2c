"""Runs `tokenselect demo` with a stand-in for `vllm serve`, which knows the answers that it is told to.

    python -m tests.tools.demo.stand_in '{"ours": 8, "full": 8, "figures": true}' demo [OPTIONS]

Answers as many of the questions rightly on TOKENSELECT ("ours") and with full attention ("full"), counts
in /metrics what each request attended to or not, and hangs in the middle of an answer if "hangs".
"""

import http.server
import json
import signal
import sys
import time
from collections import Counter
from functools import partial
from typing import ClassVar

from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.common.server import VllmServer
from vllm_tokenselect.tools.demo import asking
from vllm_tokenselect.tools.demo import command as demo
from vllm_tokenselect.tools.demo.document import FACTS

LAYERS = 30  # of SmolLM2


class StandIn(VllmServer):
    """A server whose command is this file."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        serve = self.command[self.command.index("serve") :]
        self.command = [sys.executable, "-m", __spec__.name, sys.argv[1], str(self.port), *serve]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /health, /metrics, and /v1/completions as a stream."""

    told: ClassVar[dict] = {}
    asked: ClassVar[Counter] = Counter()
    read: ClassVar[set] = set()
    counted: ClassVar[Counter] = Counter()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        if self.path == "/metrics":
            for name, count in self.counted.items():
                self.wfile.write(f"vllm:tokenselect_tokens_{name}_total {count}\n".encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        off = body.get("vllm_xargs") == {"tokenselect": "off"}
        way = "full" if off else "ours"
        fact = next(fact for fact in FACTS if body["prompt"].endswith(fact.begun))
        self.asked[way] += 1
        says = fact.answer if self.asked[way] <= self.told[way] else f"{fact.answer}0"
        self.send_response(200)
        self.end_headers()
        for piece in (" ", says):
            self._send(json.dumps({"choices": [{"text": piece}]}))
            time.sleep(600 if self.told.get("hangs") else 0)
        cached = 990 if (way, body["cache_salt"]) in self.read else 0
        self.read.add((way, body["cache_salt"]))
        if self.told["figures"]:
            context = LAYERS * sum(range(cached + 1, 1000 + 2))
            self.counted["in_context"] += context
            self.counted["attended"] += context if off else context * 2 // 5
        usage = {"prompt_tokens": 1000, "completion_tokens": 2}
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
        self._send(json.dumps({"choices": [], "usage": usage}))
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
    # A shell has what it starts with "&" ignore an interrupt, by which this one is to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
