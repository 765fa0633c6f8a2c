"""Each row of the table of options names the tests that serve it, and says what no server has tried."""

import re
from dataclasses import dataclass

import pytest

from tests.docs.pages import REPOSITORY, rows

PAGE = "docs/serve-options.md"
OPTION, WORKS = 0, 1


@dataclass(frozen=True)
class Served:
    """What shows that a row is true.

    Attributes:
        servers: tests that start real servers, or real engines where those are the tests of models.
        untried: why no server has tried some of it, and the words of the row that say so.
        elsewhere: tests of what no server can try.
    """

    servers: tuple[str, ...]
    untried: tuple[str, str] | None = None
    elsewhere: tuple[str, ...] = ()


FLAGS = "tests/server/test_flags.py"
COMBINED = f"{FLAGS}::test_combined_options_change_nothing_that_is_said"
REFUSED = f"{FLAGS}::test_what_is_not_served_on_a_cpu_stops_the_server_by_name"
ORACLE = "tests/server/test_sparse_equals_oracle.py"
DRAFTS = "tests/server/test_drafts.py"
OFFLOAD = "tests/server/test_offloading.py"
RANKS = "tests/server/test_tensor_parallel.py"
ENGINE = "tests/gpu/test_engine.py"
IMAGES = "tests/models/test_images.py"
NO_GPU = "vLLM has it on GPUs only, and the tests have none"

TABLE = {
    "--[no-]enable-prefix-caching": Served((COMBINED, f"{ORACLE}::test_with_prefix_hits")),
    "--max-num-batched-tokens (chunked prefill)": Served(
        (
            f"{ORACLE}::test_when_requests_are_preempted_and_prefill_is_cut_into_the_smallest_steps",
            "tests/server/test_start.py::"
            "test_a_step_too_small_for_a_chunk_stops_the_server_and_it_says_what_fits",
        )
    ),
    "--scheduling-policy priority": Served((COMBINED,)),
    "--enable-lora": Served((COMBINED,)),
    "--speculative-config": Served(
        (
            COMBINED,
            f"{DRAFTS}::test_a_draft_model_changes_nothing_that_is_said_beside_others_preempted_and_with_hits",
            f"{DRAFTS}::test_layers_that_draft_change_nothing_that_is_said_beside_others_preempted_and_with_hits",
            "tests/models/test_drafted_hybrids.py::test_drafts_are_accepted_and_change_nothing_but_ties",
        ),
        untried=("it needs a package that is compiled first", "the tests leave out suffix"),
        elsewhere=(
            f"{ENGINE}::test_an_eagle_head_changes_nothing_that_is_said",
            f"{ENGINE}::test_layers_that_predict_several_tokens_change_nothing_that_is_said",
        ),
    ),
    "structured output": Served((COMBINED,)),
    "prompts with images": Served(
        (
            f"{IMAGES}::test_prompts_with_images_are_answered_as_with_full_attention",
            f"{IMAGES}::test_images_that_are_attended_in_both_directions_are_refused_by_name",
            f"{IMAGES}::test_the_text_of_such_models_is_served",
        )
    ),
    "compiled, or --enforce-eager": Served(
        (COMBINED, "tests/server/test_pipeline.py::test_two_stages_say_what_one_process_says")
    ),
    "--tensor-parallel-size, --pipeline-parallel-size, Ray": Served(
        (
            f"{RANKS}::test_ranks_that_vote_together_say_what_one_process_says",
            "tests/server/test_pipeline.py::test_two_stages_say_what_one_process_says",
        )
    ),
    "--kv-cache-dtype": Served((REFUSED,), untried=(NO_GPU, "not tried on one yet")),
    "--kv-offloading-size": Served((REFUSED,), untried=(NO_GPU, "not tried on one yet")),
    "--kv-transfer-config": Served(
        (
            REFUSED,
            f"{OFFLOAD}::test_an_answer_is_the_same_from_the_cache_from_host_memory_and_from_files",
            "tests/server/test_prefill_and_decoding_apart.py::test_two_servers_answer_as_one",
            "tests/server/test_nixl.py::test_two_servers_answer_as_one",
            "tests/server/test_several_connectors.py::"
            "test_prompts_come_from_the_first_connector_that_has_them",
        )
    ),
    "--scheduler-cls": Served((REFUSED,)),
    "--decode-context-parallel-size": Served(
        (),
        untried=("vLLM itself wants more ranks than KV heads first", "more ranks than KV heads"),
        elsewhere=(
            "tests/hooks/test_engine_config.py::test_an_engine_feature_that_is_not_served_is_refused_by_name",
        ),
    ),
}
ROWS = {cells[OPTION]: cells[WORKS] for cells in rows(PAGE, "option of vllm serve")}


def source(test: str) -> str:
    """The text of a test's file, in which the test is."""
    path, name = test.split("::")
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    assert f"\ndef {name}(" in text, f"{path} has no {name}"
    return text


def test_every_row_has_its_tests_and_every_test_its_row():
    assert {*TABLE} == {*ROWS}


@pytest.mark.parametrize("row", TABLE)
def test_what_a_row_promises_is_served_by_tests(row):
    served = TABLE[row]
    texts = [source(test) for test in served.servers]
    assert all("pytest.mark.server" in text for text in texts)
    assert texts or served.elsewhere
    for test in served.elsewhere:
        source(test)
    if texts:
        for option in re.findall(r"--[a-z][a-z-]+", row.replace("[no-]", "no-")):
            name = option[2:].replace("-", "_")
            assert any(option in text or name in text for text in texts), option


@pytest.mark.parametrize("row", [row for row in TABLE if TABLE[row].untried])
def test_what_no_server_has_tried_is_said(row):
    _, words = TABLE[row].untried
    assert words in ROWS[row]
