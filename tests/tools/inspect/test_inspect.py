"""What `tokenselect inspect` and `tune` say of a model is what selection would do to it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from typer.testing import CliRunner

from tests.method.definition import CONFIG, HEAD_SIZE, SCALE, best, defined_attention
from tests.oracle.model import query_chunks
from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.inspect.layers import (
    CHUNKS,
    TOKENS,
    LayerReport,
    NothingSelects,
    compare_layers,
    diffuse_layers,
)
from vllm_tokenselect.tools.inspect.model import DiagnosedModel, UnsupportedModel
from vllm_tokenselect.tools.inspect.selections import (
    ORACLE,
    RANDOM,
    SINK_LOCAL,
    TOKENSELECT,
    WAYS,
    Chunk,
    by_vote,
    chunks_of,
)
from vllm_tokenselect.tools.inspect.selective import SelectiveAttention, share_reused

METHOD = CONFIG
LENGTH = 150
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> DiagnosedModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for layer in model.model.layers:  # attention that looks at something
        layer.self_attn.q_proj.weight.data *= 30
    return DiagnosedModel(saved(model, tmp_path_factory.mktemp("llama")), dtype="float32")


@pytest.fixture
def tokens() -> list[int]:
    return torch.randint(64, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


def random_layer(length: int = LENGTH) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(6, length, HEAD_SIZE, generator=generator)
    key, value = torch.randn(2, 2, length, HEAD_SIZE, generator=generator)
    return query, key, value


def selective(method: Method, num_generated: int = 0, select=by_vote) -> SelectiveAttention:
    return SelectiveAttention(method, chunks_of(method, LENGTH, LENGTH - num_generated), select)


def test_a_budget_that_covers_everything_predicts_what_full_attention_does(llama, tokens):
    covering = replace(METHOD, top_k=LENGTH)
    full = llama.losses(tokens, 20)
    assert torch.allclose(llama.losses(tokens, 20, selective(covering, 20)), full, atol=1e-4)
    sparse = llama.losses(tokens, 20, selective(METHOD, 20))
    assert not torch.allclose(sparse, full, atol=1e-3), "a small budget should show"


@pytest.mark.parametrize("generated", [0, 40])
def test_selective_attention_is_what_the_method_defines(generated: int):
    query, key, value = random_layer()
    out = selective(METHOD, generated)(0, query, key, value, SCALE)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    for chunk in query_chunks(0, LENGTH, LENGTH - generated, METHOD):
        queries = q[chunk.start : chunk.stop]
        for position in chunk:
            expected = defined_attention(queries, k, v, position, chunk)
            torch.testing.assert_close(out[:, position], expected, rtol=1e-4, atol=1e-5)


def test_dense_layers_attend_to_everything_and_the_others_select(llama, tokens):
    layers = SIZES["num_hidden_layers"]
    full, sparse = llama.losses(tokens, 20), llama.losses(tokens, 20, selective(METHOD, 20))
    by_number = [
        llama.losses(tokens, 20, selective(replace(METHOD, dense_layers=number), 20))
        for number in range(layers + 1)
    ]
    assert torch.equal(by_number[0], sparse)
    assert torch.equal(by_number[layers], full)
    assert not any(torch.equal(x, y) for x, y in pairwise(by_number))
    method = replace(METHOD, dense_layers=1)
    assert [report.layer for report in compare_layers(llama, tokens, method)] == [*range(1, layers)]


def test_only_the_first_layers_can_be_left_dense_however_diffuse_others_are():
    def report(kept: float, of_chunks: float = 0.95) -> LayerReport:
        return LayerReport(
            0, {CHUNKS: {TOKENSELECT: of_chunks}, TOKENS: {TOKENSELECT: kept}}, {}, None
        )

    assert diffuse_layers([report(0.7), report(0.95, 0.8), report(0.95), report(0.5)]) == 2
    assert diffuse_layers([report(0.95), report(0.5)]) == 0


@pytest.mark.parametrize("way", WAYS)
def test_what_begins_alike_is_read_once(llama, tokens, way: str):
    attention = selective(METHOD, 20, WAYS[way])
    whole = llama.logits(tokens, 20, attention)
    shared = 3 * METHOD.query_chunk
    beginning = llama.read(tokens[:shared], attention)
    with pytest.raises(ValueError, match="not whole chunks"):
        llama.read(tokens[: shared + 1], attention)
    for _ in range(2):  # and it stays what it was
        torch.testing.assert_close(llama.logits(tokens, 20, attention, beginning), whole)


def test_what_attends_to_everything_may_be_read_in_two_parts(llama, tokens):
    method = replace(METHOD, top_k=3 * METHOD.query_chunk)  # the first chunks are dense, and joined
    attention = selective(method, 20)
    beginning = llama.read(tokens[: METHOD.query_chunk + 1], attention)
    whole = llama.logits(tokens, 20, attention)
    torch.testing.assert_close(llama.logits(tokens, 20, attention, beginning), whole)


def test_no_selection_keeps_more_attention_than_the_oracle_and_all_keep_less_than_all(
    llama, tokens
):
    layers = compare_layers(llama, tokens, METHOD)
    assert [report.layer for report in layers] == [0, 1]
    for report in layers:
        for kind in (CHUNKS, TOKENS):
            assert set(report.mass[kind]) == set(WAYS)
            assert 0 < max(report.mass[kind].values()) < 1
            assert max(report.mass[kind].values()) == report.mass[kind][ORACLE]


def test_a_token_that_all_queries_look_at_is_kept_by_the_vote_and_lost_by_distance(llama, tokens):
    far = 20
    loud = torch.ones(2, HEAD_SIZE)

    class OneLoudKey:
        """In place of the model's own layers: all queries look at one token far away."""

        def losses(self, tokens, count, attention):
            query, key, value = random_layer()
            key[:, far] = 8 * loud
            attention(0, query + 2, key, value, SCALE)

    (report,) = compare_layers(OneLoudKey(), tokens, METHOD)
    for kind in (CHUNKS, TOKENS):
        assert report.mass[kind][TOKENSELECT] > 0.9
        assert report.error[kind][TOKENSELECT] < 0.1
        assert report.mass[kind][SINK_LOCAL] < 0.5
        assert report.error[kind][SINK_LOCAL] > 0.5


@pytest.mark.parametrize("way", WAYS)
def test_every_way_selects_as_many_candidates_in_order(way: str):
    query, key, _ = random_layer()
    chunk = next(c for c in chunks_of(METHOD, LENGTH, LENGTH) if c.candidates is not None)
    selected = WAYS[way](chunk, query[:, chunk.start : chunk.end], key, SCALE).tolist()
    assert len(selected) == METHOD.top_k
    assert selected == sorted(set(selected))
    assert set(selected) <= set(chunk.candidates)


def test_the_vote_is_that_of_the_mean_query():
    query, key, _ = random_layer()
    chunk = Chunk(96, 128, range(4, 80), METHOD.top_k)
    keys = key[:, 4:80].repeat_interleave(3, dim=0)
    votes = (torch.einsum("hd,hnd->hn", query[:, 96:128].mean(1), keys) * SCALE).softmax(-1).sum(0)
    expected = [4 + index for index in best(votes, METHOD.top_k)]
    assert WAYS[TOKENSELECT](chunk, query[:, 96:128], key, SCALE).tolist() == expected


def test_random_is_another_choice_for_another_chunk():
    first, second = Chunk(96, 128, range(4, 80), 24), Chunk(100, 101, range(4, 80), 24)
    chosen = [WAYS[RANDOM](c, *random_layer()[:2], SCALE).tolist() for c in (first, first, second)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_queries_that_stay_the_same_reuse_until_the_selection_is_too_old():
    method = replace(METHOD, refresh_interval=4, similarity_threshold=0.8)
    tail = [Chunk(p, p + 1, range(4, p - 16), 24) for p in range(100, 120)]
    same = torch.ones(6, 120, HEAD_SIZE)
    assert share_reused(same, 2, tail, method) == pytest.approx(16 / 20)  # one in five selects
    turning = torch.eye(HEAD_SIZE)[torch.arange(120) % HEAD_SIZE].expand(6, 120, HEAD_SIZE)
    assert share_reused(turning, 2, tail, method) == 0
    assert share_reused(same, 2, tail, replace(method, similarity_threshold=1.0)) is None


def test_layers_with_a_sliding_window_stay_as_they_are(tmp_path, tokens):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16))
    diagnosed = DiagnosedModel(saved(model, tmp_path), dtype="float32")
    with pytest.raises(UnsupportedModel, match="No layer of this model selects"):
        compare_layers(diagnosed, tokens, METHOD)


def test_a_model_that_attends_otherwise_is_refused_by_name(tmp_path, tokens):
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16))
    with pytest.raises(UnsupportedModel, match="Gemma2Attention attends with softcap"):
        DiagnosedModel(saved(model, tmp_path), dtype="float32").losses(tokens, 1)


def test_a_prompt_that_is_attended_in_full_says_how_long_it_must_be(llama, tokens):
    with pytest.raises(NothingSelects, match=r"40 tokens .* more than 44"):
        compare_layers(llama, tokens[:40], METHOD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "--settings", "{"), "is no JSON"),
        (("inspect", "--settings", '{"positions": "reassigned"}'), "Leave `positions` out"),
        (("tune", "--settings", '{"top": 3}'), "top_k"),
        (("tune", "--length", "2048", "--budget", "4000"), "attend to all of 2,0"),
        (("inspect", "--prompt", "no-such-file.txt"), "no-such-file.txt"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(smollm2, arguments, message: str):
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert message in found.output
    assert "Traceback" not in found.output


def test_a_model_on_disk_is_inspected_from_the_command_line(smollm2, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The harbour was quiet. " * 60)
    settings = '{"top_k": 32, "n_init": 4, "n_local": 32, "query_chunk": 64, "tail_queries": 8}'
    found = CliRunner().invoke(
        app,
        [
            *("inspect", "--prompt", str(prompt), "--settings", settings),
            *("--plot", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")),
        ],
    )
    assert found.exit_code == 0, found.output
    assert "tokenselect" in found.output
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert '"layer": 29' in (tmp_path / "a.json").read_text()
