"""What is read and sent follows from the step's own plan and from who votes."""

from dataclasses import asdict

import pytest

from tests.tools.plan.sized import server, tiny_model
from vllm_tokenselect.tools.plan.layouts import Layout, cut_stages
from vllm_tokenselect.tools.plan.memory import RankShape, gpu_memory, step_limits
from vllm_tokenselect.tools.plan.traffic import AttendedTokens, traffic

SELECTING = {"top_k": 256, "n_init": 16, "n_local": 64, "query_chunk": 128}
TP = 4
ALONE = Layout(tp=1, pp=1, replicas=1)


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path)


def traffic_of(model, asked, layout, stage=0):
    stages = cut_stages(model.layers, layout.pp, asked.config.dense_layers)
    memory = gpu_memory(model, asked, layout, stages[stage])
    return traffic(model, asked, layout, stages[stage], memory, AttendedTokens.of(asked))


def test_a_generated_token_attends_to_sink_selection_local_window_and_itself():
    attended = AttendedTokens.of(server(settings=SELECTING))
    assert attended.decoding == 16 + 256 + 64 + 1
    assert attended.reusing == attended.decoding + 64
    assert attended.candidates == 4095 - 64 - 16
    assert 0 < attended.prompt < 1


def test_a_context_below_the_budget_is_attended_in_full():
    attended = AttendedTokens.of(server(context=300, settings=SELECTING))
    assert (attended.decoding, attended.reusing, attended.candidates) == (300, 300, 0)
    assert attended.prompt == 1
    assert attended.prompt_rows == ()


def test_full_attention_reads_the_whole_cache_and_a_selection_all_keys_and_itself(model):
    asked = server(settings=SELECTING)
    reads, attended = traffic_of(model, asked, Layout(1, 1, 1)).reads, AttendedTokens.of(asked)
    token = 6 * 2 * 2 * 16 * 2  # layers, keys and values, KV heads, head size, bf16
    assert reads.full == 4096 * token
    scores = 6 * 2 * 4 * (8 + 1) * attended.candidates  # written and read; 8 heads and the votes
    assert reads.selecting == attended.candidates * token // 2 + scores + 337 * token
    assert reads.reusing == (337 + 64) * token


def test_a_dense_layer_reads_what_full_attention_does_and_votes_for_nothing(model):
    for layout, stage, dense in (
        (Layout(1, 1, 1), 0, 2),
        (Layout(1, 2, 1), 0, 2),
        (Layout(1, 2, 1), 1, 0),
    ):
        without = traffic_of(model, server(settings=SELECTING), layout, stage).reads
        asked = server(settings={**SELECTING, "dense_layers": 2})
        reads = traffic_of(model, asked, layout, stage).reads
        layers = 6 // layout.pp
        assert reads.full == without.full
        for sparse, found in (
            (without.selecting, reads.selecting),
            (without.reusing, reads.reusing),
        ):
            assert found == (sparse * (layers - dense) + without.full * dense) // layers
    tp = Layout(TP, 1, 1)
    together = server(settings={**SELECTING, "vote": "global"})
    votes = traffic_of(model, together, tp).decoding.votes
    fewer = traffic_of(model, together.with_settings(dense_layers=2), tp).decoding.votes
    assert fewer == votes * 4 // 6


def test_gathering_reads_writes_and_reads_again(model):
    here = traffic_of(model, server(settings=SELECTING), Layout(1, 1, 1)).reads
    gathered = server(settings={**SELECTING, "attention": "sdpa"})
    there = traffic_of(model, gathered, Layout(1, 1, 1)).reads
    assert there.reusing == 3 * here.reusing


def test_one_gpu_sends_nothing(model):
    for vote in ("local", "global"):
        moved = traffic_of(model, server(settings={"vote": vote}), Layout(1, 1, 8))
        for sent in (moved.decoding, moved.chunk, moved.prompt):
            assert set(asdict(sent).values()) == {0}


def test_local_votes_cost_no_network(model):
    moved = traffic_of(model, server(settings=SELECTING), Layout(TP, 1, 1))
    for sent in (moved.decoding, moved.chunk, moved.prompt):
        assert (sent.votes, sent.queries) == (0, 0)
        assert sent.total == sent.activations + sent.logits


def test_global_votes_are_as_wide_as_the_longest_context_in_every_layer(model):
    local = server(settings=SELECTING)
    asked = local.with_settings(vote="global")
    moved = traffic_of(model, asked, Layout(TP, 1, 1))
    width = step_limits(asked, RankShape.of(model, TP)).max_width
    assert moved.decoding.votes == int(6 * 2 * (TP - 1) / TP * 4 * width)
    assert moved.decoding.queries == int(6 * (TP - 1) / TP * 8 * 16 * 2)
    assert moved.chunk.votes < moved.decoding.votes
    assert (moved.chunk.queries, moved.prompt.queries) == (0, 0)
    assert moved.prompt.votes > 20 * moved.chunk.votes
    without = traffic_of(model, local, Layout(TP, 1, 1)).decoding
    assert moved.decoding.total - without.total == moved.decoding.votes + moved.decoding.queries
    assert moved.decoding.collectives == without.collectives + 2 * 6


def test_without_a_selection_cache_no_queries_are_gathered(model):
    settings = {**SELECTING, "similarity_threshold": 1}
    moved = traffic_of(model, server(settings={**settings, "vote": "global"}), Layout(TP, 1, 1))
    assert moved.decoding.queries == 0
    assert moved.decoding.votes > 0


def test_two_gpus_send_each_activation_once_at_every_all_reduce(model):
    moved = traffic_of(model, server(), Layout(2, 1, 1))
    hidden = 128 * 2
    assert moved.decoding.activations == (2 * 6 + 1) * hidden
    assert moved.chunk.activations == 512 * moved.decoding.activations
    assert moved.prompt.activations == 4096 * moved.decoding.activations
    assert moved.decoding.logits == moved.prompt.logits == 256 * 2 // 2
    assert moved.decoding.collectives == 2 * 6 + 1 + 1


def test_stages_hand_on_hidden_states_and_residual(model):
    hidden = 128 * 2
    sent = [traffic_of(model, server(), Layout(1, 3, 1), stage).decoding for stage in range(3)]
    assert [one.pipeline for one in sent] == [2 * hidden, 2 * hidden, 0]
    assert [one.activations for one in sent] == [0, 0, 0]
    wide = [traffic_of(model, server(), Layout(2, 3, 1), stage).decoding for stage in range(3)]
    # Half of it to the next stage, and half of what came to the other GPU of the stage.
    assert [one.pipeline for one in wide] == [hidden, 2 * hidden, hidden]
    assert [one.activations for one in wide] == [5 * hidden, 4 * hidden, 4 * hidden]
    assert [one.logits > 0 for one in wide] == [False, False, True]


def test_generated_tokens_score_keys_in_anchors_alone(model):
    first, second = cut_stages(model.layers, 2, dense_layers=1, anchor_layers=3)
    assert (first.selecting, second.selecting) == (2, 3)
    assert (first.anchors, second.anchors) == (1, 2)  # 1; 4, and 3 since no anchor is below it
    asked = server(8192, SELECTING)
    attended = AttendedTokens.of(asked)
    reads, caches = [], []
    for anchors in ("all", (0,)):
        (stage,) = cut_stages(model.layers, 1, anchor_layers=anchors)
        memory = gpu_memory(model, asked, ALONE, stage)
        caches.append(memory.buffers.selection_cache)
        reads.append(traffic(model, asked, ALONE, stage, memory, attended).reads)
    assert caches[0] == 6 * caches[1] > 0
    assert reads[0].reusing == reads[1].reusing
    keys = attended.candidates * model.num_kv_heads * model.head_size * 2
    assert reads[0].selecting - reads[1].selecting > 5 * keys
