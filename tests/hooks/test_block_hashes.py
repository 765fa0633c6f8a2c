"""Requests and servers of different settings share no blocks."""

import pytest

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.engine import EngineCoreRequest, core
from vllm.v1.request import Request

from tests.hooks.conftest import BLOCK_SIZE, MAX_NUM_SEQS, QUERY_CHUNK
from tests.hooks.serving import Serving
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.hooks import block_hashes
from vllm_tokenselect.hooks.block_hashes import SettingsHasher
from vllm_tokenselect.hooks.registration import backend_member
from vllm_tokenselect.method.request_settings import fingerprint
from vllm_tokenselect.method.settings import Method, SettingsError

FUNCTION = "generate_block_hash_extra_keys"
PROMPT = list(range(1, 601))  # of which others may share the first chunk of 512
SHARED = 512 // BLOCK_SIZE
OFF = {"tokenselect": "off"}
FEWER = {"tokenselect_top_k": 100}


@pytest.fixture(params=["hook", "diff"])
def vllm_utils(request, monkeypatch):
    """vLLM's real hashing, with the hook or with our diff."""
    original = getattr(kv_cache_utils.generate_block_hash_extra_keys, "__wrapped__", None)
    for module in (kv_cache_utils, block_pool):
        monkeypatch.setattr(module, FUNCTION, original or getattr(module, FUNCTION))
    if request.param == "diff":
        import vllm_tokenselect.hooks.scheduler  # noqa: F401 - marks a process that schedules for us

        module = request.getfixturevalue("load_patched")("vllm/v1/core/kv_cache_utils.py")
    else:
        module = kv_cache_utils
        block_hashes.install()
        block_hashes.install()
    module.init_none_hash(sha256)
    return module


@pytest.fixture
def hashes(vllm_utils):
    """Block hashes of the prompt in an engine of these settings, with a request's own arguments."""

    def compute(settings: dict, extra_args=None, **options) -> list[bytes]:
        hasher = vllm_utils.get_request_block_hasher(BLOCK_SIZE, sha256)
        request = Request(
            request_id="id",
            prompt_token_ids=PROMPT,
            sampling_params=SamplingParams(extra_args=extra_args),
            pooling_params=None,
            block_hasher=SettingsHasher(
                hasher, TokenSelectConfig.from_mapping(settings), block_size=BLOCK_SIZE
            ),
            **options,
        )
        assert len(request.block_hashes) == len(PROMPT) // BLOCK_SIZE
        return request.block_hashes[:SHARED]

    return compute


def bound(sampling_params, pooling_params=None, **options) -> Request:
    """A request of an engine with default settings."""
    hasher = SettingsHasher(lambda request: [], TokenSelectConfig())
    return Request("id", PROMPT, sampling_params, pooling_params, block_hasher=hasher, **options)


def test_what_was_computed_alike_is_hashed_alike(hashes):
    same = [
        hashes({}),
        hashes({}, {"tokenselect": "on", "somebody": "else's"}),
        hashes({}, {"tokenselect_top_k": 2048}),
        hashes({"tail_queries": 1, "similarity_threshold": 0.5, "workspace_mb": 7}),
        hashes({"top_k": 4096}, {"tokenselect_top_k": 2048}),
    ]
    assert all(other == same[0] for other in same)


def test_no_block_is_shared_between_settings(hashes):
    different = [
        hashes({}),
        hashes({}, OFF),
        hashes({}, FEWER),
        hashes({"top_k": 1024}),
        hashes({"n_init": 64}),
        hashes({"n_local": 64}),
        hashes({"query_chunk": 64}),
        hashes({}, cache_salt="tenant"),
        hashes({}, OFF, cache_salt="tenant"),
    ]
    assert len({block for blocks in different for block in blocks}) == SHARED * len(different)


def test_past_the_limit_of_a_request_its_blocks_have_names_that_no_other_comes_to(vllm_utils):
    hasher = vllm_utils.get_request_block_hasher(BLOCK_SIZE, sha256)
    ours = SettingsHasher(hasher, TokenSelectConfig(), block_size=BLOCK_SIZE)
    first, second = (
        Request("id", PROMPT, SamplingParams(), None, block_hasher=ours) for _ in range(2)
    )
    assert first.block_hashes[:SHARED] == second.block_hashes[:SHARED]
    assert not {*first.block_hashes[SHARED:]} & {*second.block_hashes[SHARED:]}
    before = first.block_hashes.copy()
    first.append_output_token_ids([1] * BLOCK_SIZE)
    assert first.block_hashes[: len(before)] == before, "they keep their names"
    assert len(first.block_hashes) == len(before) + 1


def test_prompts_that_part_within_a_chunk_share_no_block_of_it(vllm_utils):
    hasher = vllm_utils.get_request_block_hasher(BLOCK_SIZE, sha256)
    ours = SettingsHasher(hasher, TokenSelectConfig(query_chunk=64, tail_queries=1), 1, BLOCK_SIZE)

    def blocks(prompt: list[int], **options) -> list[bytes]:
        request = Request("id", prompt, SamplingParams(), None, block_hasher=ours, **options)
        return request.block_hashes

    whole, parting = blocks(PROMPT), blocks([*PROMPT[:127], 0, *PROMPT[128:]])
    same = [a == b for a, b in zip(whole, parting, strict=True)]
    assert same == [True] * 4 + [False] * (len(whole) - 4), (
        "the second chunk differs in its last token"
    )
    assert blocks(PROMPT)[:36] == whole[:36], "what is equal is found"
    image = MultiModalFeatureSpec(None, "image", "cat", PlaceholderRange(120, 8))
    seen = blocks(PROMPT, mm_features=[image])
    assert [a == b for a, b in zip(whole[:8], seen[:8], strict=True)] == [True] * 4 + [False] * 4


def test_an_engine_that_is_not_on_tokenselect_hashes_as_vllm_does(hashes, vllm_utils):
    ours = hashes({})
    request = Request("id", PROMPT, SamplingParams(extra_args={"tokenselect": "theirs"}), None)
    assert vllm_utils.generate_block_hash_extra_keys(request, 0, BLOCK_SIZE, 0) == (None, 0)
    plain = vllm_utils.get_request_block_hasher(BLOCK_SIZE, sha256)(request)
    assert not set(plain) & set(ours)


def test_the_first_block_names_the_settings_beside_vllms_own_keys(vllm_utils):
    request = bound(SamplingParams(extra_args=OFF), cache_salt="tenant")
    generate = vllm_utils.generate_block_hash_extra_keys
    keys, _ = generate(request, 0, BLOCK_SIZE, 0)
    salt, settings, (tag, of_chunk) = keys
    assert (salt, settings) == (("cache_salt", "tenant"), ("tokenselect", "v1:off"))
    assert tag == "tokenselect"
    assert vllm_utils.to_event_extra_keys([keys]) == [("tenant", "v1:off", of_chunk)]
    assert generate(request, BLOCK_SIZE, 2 * BLOCK_SIZE, 0) == (None, 0)


class EngineCore:
    """vLLM's real `preprocess_add_request`, of an engine that schedules nothing."""

    def __init__(self, core, vllm_config, block_hasher) -> None:
        self.vllm = object.__new__(core.EngineCore)
        self.vllm.vllm_config = vllm_config
        self.vllm.mm_receiver_cache = None
        self.vllm.request_block_hasher = block_hasher

    def add(self, extra_args: dict | None, resumable: bool = False) -> Request:
        request = EngineCoreRequest(
            request_id="id",
            prompt_token_ids=PROMPT,
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=1, extra_args=extra_args),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            resumable=resumable,
        )
        return self.vllm.preprocess_add_request(request)[0]


@pytest.fixture(params=["hook", "diff"])
def make_core(request, make_vllm_config, vllm_utils, monkeypatch):
    """Make engines of one process, each with settings of its own; None for one on CPU_ATTN."""
    monkeypatch.setattr("vllm_tokenselect.hooks.scheduler.SEAMS", ())
    monkeypatch.setattr(
        core.EngineCore, "preprocess_add_request", core.EngineCore.preprocess_add_request
    )
    block_hashes.install()
    module = core
    if request.param == "diff":
        module = request.getfixturevalue("load_patched")("vllm/v1/engine/core.py")

    def make(settings: dict | None, prefix_caching: bool = True) -> EngineCore:
        config = make_vllm_config()
        config.additional_config = {} if settings is None else {"tokenselect": settings}
        config.attention_config.backend = None if settings is None else backend_member()
        hasher = vllm_utils.get_request_block_hasher(BLOCK_SIZE, sha256)
        return EngineCore(module, config, hasher if prefix_caching else None)

    return make


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)], ids=str)
def test_engines_of_one_process_hash_by_their_own_settings(make_core, hashes, order):
    each = [{"top_k": 256}, {"top_k": 64}, None]
    engines = {index: make_core(each[index]) for index in order}
    found = [engines[index].add(None).block_hashes[:SHARED] for index in range(3)]
    assert found[:2] == [hashes(each[0]), hashes(each[1])]
    assert not {*found[0], *found[1]} & {*found[2]}
    assert engines[0].add({"tokenselect_top_k": 64}).block_hashes[:SHARED] == found[1]
    assert engines[2].add({"tokenselect": "theirs"}).block_hashes[:SHARED] == found[2]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_request_that_no_front_checked_is_refused_before_the_engine_has_it(
    make_core, prefix_caching
):
    engine = make_core({"top_k": 256}, prefix_caching)
    make_core({"top_k": 1024}, prefix_caching)
    for extra_args in ({"tokenselect": "of"}, {"tokenselect_top_k": 300}):
        with pytest.raises(SettingsError, match="this server's 256"):
            engine.add(extra_args)
    assert engine.add({"tokenselect_top_k": 256}).num_tokens == len(PROMPT)


def test_streaming_input_is_refused_beside_a_connector(make_core):
    engine = make_core({})
    engine.vllm.vllm_config.kv_transfer_config = KVTransferConfig()
    with pytest.raises(SettingsError, match="streaming input cannot be served with a KV connector"):
        engine.add(None, resumable=True)
    assert engine.add(None).num_tokens == len(PROMPT)


def test_pooling_requests_have_no_settings_of_their_own(vllm_utils):
    request = bound(None, pooling_params=PoolingParams())
    keys, _ = vllm_utils.generate_block_hash_extra_keys(request, 0, BLOCK_SIZE, 0)
    assert keys[0] == ("tokenselect", fingerprint(Method(), Method.top_k))


def test_events_about_cached_blocks_tell_the_same_keys(make_vllm_config, monkeypatch):
    """vLLM's block pool imported the function by name."""
    monkeypatch.setattr("vllm_tokenselect.hooks.scheduler.SEAMS", ())
    Serving(make_vllm_config())
    assert (
        block_pool.generate_block_hash_extra_keys is kv_cache_utils.generate_block_hash_extra_keys
    )
    request = bound(SamplingParams(extra_args=OFF))
    keys, _ = block_pool.generate_block_hash_extra_keys(request, 0, BLOCK_SIZE, 0)
    assert ("tokenselect", "v1:off") in keys


@pytest.fixture
def serving(make_vllm_config, monkeypatch):
    monkeypatch.setattr("vllm_tokenselect.hooks.scheduler.SEAMS", ())
    return Serving(make_vllm_config(4 * QUERY_CHUNK + MAX_NUM_SEQS), num_blocks=200)


def start_of(serving, extra_args) -> int:
    """Tokens of a prompt of 300 that a request takes from the prefix cache."""
    request = serving.add([5] * 300, extra_args=extra_args)
    return next(start for computed, start, *_ in serving.run() if computed is request)


@pytest.mark.parametrize(
    ("first", "then"),
    [(None, OFF), (OFF, None), (None, FEWER), (FEWER, None), (OFF, FEWER), (FEWER, OFF)],
    ids=str,
)
def test_a_prompt_asked_again_with_other_settings_is_computed_anew(serving, first, then):
    assert [start_of(serving, extra_args) for extra_args in (first, then)] == [0, 0]
    assert [start_of(serving, extra_args) for extra_args in (first, then)] == [256, 256]


def test_a_continued_stream_shares_no_more(serving):
    """Its answer is in the middle of a prompt now, and was not computed as others would."""
    serving.add([5] * 100, max_tokens=40, request_id="stream", resumable=True)
    serving.run_until_waiting("stream")
    serving.add([6] * 100, max_tokens=4, request_id="stream", resumable=True)
    serving.run_until_waiting("stream")
    session = serving.scheduler.requests["stream"]
    assert session.num_prompt_tokens > 200
    blocks = serving.scheduler.kv_cache_manager.get_blocks("stream").blocks[0]
    shared = [block for block in blocks if block.block_hash is not None]
    assert len(shared) == QUERY_CHUNK // BLOCK_SIZE, "those of the first part of its input"
