"""The figures of a request are what it added to the counters in `/metrics`."""

import http.server
import threading

import pytest

from vllm_tokenselect.tools.common.server_facts import selection_counts
from vllm_tokenselect.tools.demo.figures import Attended, wait_for_figures

LAYERS = 30
CONTEXTS = range(5, 8)  # three queries


def page(attended: int, context: int) -> str:
    """As a server with an engine writes it; other metrics do not matter."""
    labels = '{engine="0",model_name="m",tp_rank="0"}'
    return (
        f"vllm:tokenselect_tokens_attended_total{labels} {LAYERS * attended}.0\n"
        f"vllm:tokenselect_tokens_in_context_total{labels} {LAYERS * context}.0\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 0.0\n'
    )


@pytest.fixture
def serve():
    """Serve pages one after the other, the last again and again; returns the URL."""
    servers = []

    def start(*pages: str) -> str:
        left = list(pages)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write((left.pop(0) if len(left) > 1 else left[0]).encode())

            def log_message(self, *args) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_request_has_what_it_added_once_all_of_its_context_is_counted(serve):
    url = serve(page(100, 200), page(100, 200), page(103, 205), page(109, 218))
    before = selection_counts(url)
    assert wait_for_figures(url, before, CONTEXTS, LAYERS) == Attended(9, 18, 3)


def test_before_the_first_request_there_need_not_be_any_counters(serve):
    url = serve("", "", page(18, 18))
    before = selection_counts(url)
    assert before is None
    assert wait_for_figures(url, before, CONTEXTS, LAYERS) == Attended(18, 18, 3)


@pytest.mark.parametrize("last", ["", page(100, 217)], ids=["no counters", "not all of it"])
def test_figures_that_never_come_are_none(serve, last):
    url = serve(page(100, 200), last)
    assert wait_for_figures(url, selection_counts(url), CONTEXTS, LAYERS, timeout=0.3) is None


def test_shares_and_means_are_per_query():
    attended = Attended(1000, 4000, 40)
    assert attended.share == 0.25
    assert (attended.mean_attended, attended.mean_context) == (25, 100)


def test_no_query_at_all_divides_by_nothing():
    nothing = Attended(0, 0, 0)
    assert (nothing.share, nothing.mean_attended, nothing.mean_context) == (1.0, 0.0, 0.0)
