"""The figures of a request are read from the log line that the backend writes."""

from pathlib import Path

from vllm_tokenselect.method.requests import Activity
from vllm_tokenselect.tools.demo.figures import Attended, parse_figures, wait_for_figures

ACTIVITY = Activity(
    prefill_attended=1000,
    prefill_context=4000,
    prefill_queries=40,
    decode_attended=30,
    decode_context=90,
    decode_queries=3,
)
LOG = (
    "(Worker pid=7) INFO 11-21 06:39:54 [activity.py:12] TOKENSELECT request chatcmpl-1-8c54: "
    f"{ACTIVITY}\n"
    "(APIServer pid=6) INFO:     127.0.0.1:5 - GET /health\n"
    f"(Worker pid=7) INFO 11-21 06:39:55 [activity.py:12] TOKENSELECT request cmpl-2: {Activity()}\n"
)


def test_what_the_backend_writes_is_what_is_read():
    first, second = parse_figures(LOG)
    assert first.request_id == "chatcmpl-1-8c54"
    assert first.prefill == Attended(attended=1000, context=4000, queries=40)
    assert first.decode == Attended(attended=30, context=90, queries=3)
    assert second.request_id == "cmpl-2"


def test_shares_and_means_are_per_query():
    figures = parse_figures(LOG)[0]
    assert figures.prefill.share == 0.25
    assert (figures.prefill.mean_attended, figures.prefill.mean_context) == (25, 100)


def test_no_query_at_all_divides_by_nothing():
    decode = parse_figures(LOG)[1].decode
    assert (decode.share, decode.mean_attended, decode.mean_context) == (1.0, 0.0, 0.0)


def test_a_request_is_found_by_the_id_that_the_api_gave_it(tmp_path: Path):
    log = tmp_path / "server.log"
    log.write_text(LOG)
    found = wait_for_figures(log, "chatcmpl-1", timeout=0)
    assert found is not None
    assert found.request_id == "chatcmpl-1-8c54"


def test_figures_that_never_come_are_none(tmp_path: Path):
    log = tmp_path / "server.log"
    log.write_text(LOG)
    assert wait_for_figures(log, "chatcmpl-9", timeout=0) is None
