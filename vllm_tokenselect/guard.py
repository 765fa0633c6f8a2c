"""Close what no client needs: `vllm serve --middleware vllm_tokenselect.guard.ClientsOnly`.

vLLM's API key guards the paths under `/v1`, `/v2`, `/inference` and `/cohere` alone. Others answer without
it, `/invocations`, which generates text, and `/scale_elastic_ep` among them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

CLIENTS = "/v1/"
# Of probes and of Prometheus, which have no key.
OPEN = ("/health", "/metrics", "/metrics/")
_ANSWER = b'{"error": "This server answers under /v1 only."}'


class ClientsOnly:
    """An ASGI application that knows `/v1`, `/health` and `/metrics`; anything else is not found.

    Args:
        app: what answers these paths.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": _ANSWER})


def _is_open(scope: Message) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path in OPEN or path.startswith(CLIENTS)
