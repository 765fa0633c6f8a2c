"""`tokenselect tune` measures what sharing keeps, proposes the best anchors, and writes what it chose."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tests.method.definition import CONFIG, HEAD_SIZE, SCALE
from tests.models.shortened import first_layers
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.method.anchors import choose_anchors
from vllm_tokenselect.method.settings import Method
from vllm_tokenselect.profiles import read_profile
from vllm_tokenselect.tools.cli.app import app
from vllm_tokenselect.tools.inspect.candidates import (
    Candidate,
    SettingsCost,
    choose,
    make_candidates,
    tokens_read,
)
from vllm_tokenselect.tools.inspect.layers import TOKENS, compare_layers
from vllm_tokenselect.tools.inspect.model import DiagnosedModel
from vllm_tokenselect.tools.inspect.reading import (
    Passage,
    alike,
    read_in_full,
    read_selecting,
    shared_tokens,
)
from vllm_tokenselect.tools.inspect.selections import (
    TOKENSELECT,
    attended_positions,
    by_vote,
    chunks_of,
)
from vllm_tokenselect.tools.inspect.selective import SelectiveAttention
from vllm_tokenselect.tools.inspect.sharing import SharedMass, kept_by, propose_anchors

LENGTH, GENERATED = 150, 20
LAYERS = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> DiagnosedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=LAYERS))
    for layer in model.model.layers:  # attention that looks at something
        layer.self_attn.q_proj.weight.data *= 30
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return DiagnosedModel(str(folder), dtype="float32")


def random_tokens(length: int = LENGTH, seed: int = 1) -> list[int]:
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def random_layer(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(6, LENGTH, HEAD_SIZE, generator=generator)
    key, value = torch.randn(2, 2, LENGTH, HEAD_SIZE, generator=generator)
    return query, key, value


def outputs(method: Method, layers) -> dict[int, torch.Tensor]:
    """What selective attention makes of random layers with these numbers."""
    chunks = chunks_of(method, LENGTH, LENGTH - GENERATED)
    attention = SelectiveAttention(method, chunks)
    return {layer: attention(layer, *random_layer(layer), SCALE) for layer in layers}


def test_generated_tokens_attend_to_what_the_anchor_below_selected_and_prompts_select_everywhere():
    method = replace(CONFIG, anchor_layers=(2, 5))
    layers = range(2, 8)
    alone, shared = outputs(CONFIG, layers), outputs(method, layers)
    prompt = LENGTH - GENERATED
    for layer in layers:
        assert torch.equal(shared[layer][:, :prompt], alone[layer][:, :prompt])
        if layer in (2, 5):
            assert torch.equal(shared[layer], alone[layer])
            query, key, _ = random_layer(layer)
            selected = {
                c.start: attended_positions(
                    c, by_vote(c, query[:, c.start : c.end], key, SCALE), method
                )
                for c in chunks_of(method, LENGTH, prompt)
                if c.start >= prompt
            }
            continue
        query, key, value = random_layer(layer)
        for position, attended in selected.items():
            keys, values = (x[:, attended].repeat_interleave(3, dim=0) for x in (key, value))
            weights = (torch.einsum("hd,hnd->hn", query[:, position], keys) * SCALE).softmax(-1)
            expected = torch.einsum("hn,hnd->hd", weights, values)
            torch.testing.assert_close(shared[layer][:, position], expected)


@pytest.mark.parametrize("anchors", ["all", 1, 2, 3, 9, (4,), (3, 8)])
def test_the_layers_that_select_are_those_that_a_server_would_choose(anchors):
    layers = [2, 3, 4, 6, 7, 8]  # 5 might have a sliding window
    method = replace(CONFIG, anchor_layers=anchors)
    alone, shared = outputs(CONFIG, layers), outputs(method, layers)
    own = [layer for layer in layers if torch.equal(alone[layer], shared[layer])]
    assert own == choose_anchors(anchors, layers)


def test_generated_tokens_of_short_contexts_attend_to_everything(llama):
    prompt = LENGTH - GENERATED
    passage = Passage("text", random_tokens(), GENERATED)
    methods = [replace(CONFIG, min_context=context) for context in (0, prompt + 5, LENGTH)]
    (losses,) = read_selecting(llama, [passage], methods)
    for method, loss in zip(methods, losses, strict=True):
        chunks = [
            replace(chunk, candidates=None) if prompt < chunk.end <= method.min_context else chunk
            for chunk in chunks_of(CONFIG, LENGTH, prompt)
        ]
        defined = llama.losses(passage.tokens, GENERATED, SelectiveAttention(CONFIG, chunks))
        assert loss == pytest.approx(defined.mean().item(), abs=1e-4)
    assert len(set(losses)) == len(methods), "the contexts should show"


def test_the_matrix_is_the_attention_that_falls_on_what_a_layer_below_selected(llama):
    tokens = random_tokens()
    singles = [c for c in chunks_of(CONFIG, LENGTH, LENGTH) if c.end - c.start == 1]
    mass = SharedMass(CONFIG)
    mass.measure(singles)
    seen = {}

    def watch(layer, query, key, value, scale):
        seen[layer] = query, key
        return mass(layer, query, key, value, scale)

    llama.losses(tokens, 1, watch)
    kept = mass.matrix()
    assert mass.layers == list(range(LAYERS))
    for below in range(LAYERS):
        for layer in range(LAYERS):
            shares = []
            for chunk in singles:
                positions = attended_positions(
                    chunk,
                    by_vote(
                        chunk, seen[below][0][:, chunk.start : chunk.end], seen[below][1], 0.25
                    ),
                    CONFIG,
                )
                query, key = seen[layer]
                keys = key[:, : chunk.end].repeat_interleave(2, dim=0)
                logits = torch.einsum("hd,hnd->hn", query[:, chunk.start], keys) * 0.25
                shares.append(float(logits.softmax(-1)[:, positions].sum(-1).mean()))
            expected = np.mean(shares) if below <= layer else 0.0
            assert kept[below, layer] == pytest.approx(expected, abs=1e-5)
    worst = mass.worst()
    assert np.all(worst <= kept)
    assert worst[1, 3] < kept[1, 3]
    of_inspect = compare_layers(llama, tokens, CONFIG, num_tokens=len(singles))
    own = [report.mass[TOKENS][TOKENSELECT] for report in of_inspect]
    assert kept.diagonal() == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("count", range(1, 8))
def test_no_other_anchors_keep_more_than_the_proposed_ones(count: int):
    random = np.random.default_rng(count)
    kept = np.triu(random.random((7, 7)))
    proposed = propose_anchors(kept, count)
    assert len(proposed) == count
    assert proposed[0] == 0, "the first layer has none below it"
    others = ((0, *rest) for rest in combinations(range(1, 7), count - 1))
    assert kept_by(kept, proposed) == pytest.approx(max(kept_by(kept, a) for a in others))


def test_what_is_read_once_for_several_passages_and_settings_is_what_each_reads_alone(llama):
    shared = random_tokens(100, seed=2)
    passages = [
        Passage("a", shared + random_tokens(40, seed=3), 10),
        Passage("a", shared + random_tokens(40, seed=4), 10),
        Passage("b", random_tokens(130, seed=5), 25),
    ]
    assert [len(group) for group in alike(passages, CONFIG)] == [2, 1]
    assert shared_tokens(passages[:2], CONFIG) == 96
    methods = [replace(CONFIG, anchor_layers=anchors) for anchors in ("all", (0, 2), (0,))]
    for passage, losses in zip(passages, read_selecting(llama, passages, methods), strict=True):
        chunks = chunks_of(CONFIG, len(passage.tokens), passage.prompt_len)
        for method, loss in zip(methods, losses, strict=True):
            alone = llama.losses(passage.tokens, passage.count, SelectiveAttention(method, chunks))
            assert loss == pytest.approx(alone.mean().item(), abs=1e-4)
        assert len(set(losses)) == len(methods), "fewer anchors should show"
    full = read_in_full(llama, passages, CONFIG, SharedMass(CONFIG))
    alone = [llama.losses(p.tokens, p.count).mean().item() for p in passages]
    assert full == pytest.approx(alone, abs=1e-4)


def candidate(top_k: int, share: int = 1, dense: int = 0) -> Candidate:
    method = replace(CONFIG, top_k=top_k, dense_layers=dense)
    return Candidate(method, f"1 in {share}", top_k / share + 1000 * dense)


def cost(tried: Candidate, added: float, kind: str = "text") -> SettingsCost:
    return SettingsCost(tried, kind, 2.0, added, added - 0.01, added + 0.01, 3, 9, 100)


def test_the_cheapest_settings_keep_the_loss_on_every_kind_and_so_do_their_larger_budgets():
    costs = [cost(candidate(k), a) for k, a in ((256, 0.0), (512, 0.05), (1024, 0.01))]
    assert choose(costs, 0.02) == candidate(1024), "256 was lucky"
    costs += [cost(candidate(1024, 2), 0.01), cost(candidate(512, 2, dense=1), 0.0)]
    assert choose(costs, 0.02) == candidate(1024, 2), "dense layers read the whole context"
    costs += [cost(candidate(1024, 2), 0.3, "needles")]
    assert choose(costs, 0.02) == candidate(1024)
    assert choose([cost(candidate(2048), 0.5)], 0.02) is None


def test_candidates_are_named_by_the_layers_of_the_model_and_those_with_more_anchors_read_more():
    kept = np.triu(np.ones((24, 24)))
    methods = [replace(CONFIG, dense_layers=dense) for dense in (1, 3)]
    candidates = make_candidates(methods, range(1, 25), {"mean": kept, "same": kept}, context=1000)
    for dense, selecting in ((1, 24), (3, 22)):
        own = [c for c in candidates if c.method.dense_layers == dense]
        assert [c.choice for c in own] == ["all", *(f"1 in {n}, mean" for n in (2, 3, 4, 6))]
        assert own[0].method.anchor_layers == "all"
        for tried, share in zip(own[1:], (2, 3, 4, 6), strict=True):
            anchors = tried.method.anchor_layers
            assert anchors[0] == dense
            assert len(anchors) == round(selecting / share)
        reads = [c.reads for c in own]
        assert reads == sorted(reads, reverse=True)
    given = replace(CONFIG, dense_layers=1, anchor_layers=(1, 7))
    candidates_of_given = make_candidates([given], range(1, 25), {"mean": kept}, context=1000)
    assert candidates_of_given[1].choice == "as given"
    assert candidates_of_given[1].method == given
    # One dense layer reads all; 24 attend to 44 each, and score 1,000 keys.
    assert candidates[0].reads == pytest.approx((1000 + 24 * (44 + 500)) / 25)
    assert tokens_read(replace(CONFIG, min_context=1000), range(1, 13), 1, 1000) == 1000


def test_tune_writes_a_profile_that_a_server_can_take(smollm2, tmp_path):
    model = first_layers(smollm2, tmp_path / "small", 4)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The harbour was quiet. " * 60)
    settings = {"n_init": 4, "n_local": 32, "query_chunk": 64, "tail_queries": 8, "min_context": 0}
    profile, matrix, picture = (tmp_path / name for name in ("p.json", "m.json", "m.png"))
    found = CliRunner().invoke(
        app,
        [
            *("tune", str(model), "--prompt", str(prompt), "--settings", json.dumps(settings)),
            *("--budget", "32", "--budget", "64", "--dense-layers", "1", "--max-loss", "9"),
            *("--context", "400", "--count", "8"),
            *("--profile", str(profile), "--json", str(matrix), "--plot", str(picture)),
        ],
    )
    assert found.exit_code == 0, found.output
    written = read_profile(profile)
    # Everything is good enough, so the cheapest is chosen.
    assert written.settings == {**settings, "top_k": 32, "dense_layers": 1, "anchor_layers": [1]}
    assert TokenSelectConfig.from_mapping(written.settings).method.anchor_layers == (1,)
    assert written.model.name == "small"
    assert (written.model.layers, written.model.kv_heads, written.model.head_size) == (4, 3, 64)
    assert [(lost.kind, lost.prompts, lost.tokens) for lost in written.lost] == [
        ("your prompts", 1, 8)
    ]
    results = json.loads(matrix.read_text())
    assert results["layers"] == [1, 2, 3]
    assert np.all(np.triu(results["kept"])[np.triu_indices(3)] > 0.1)
    assert picture.stat().st_size > 10_000
