"""LMCache sees what may be shared of a request, named by all that its blocks depend on."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from vllm_tokenselect.config import SettingsError, TokenSelectConfig
from vllm_tokenselect.hooks import block_hashes, lmcache_requests
from vllm_tokenselect.hooks.block_hashes import SettingsHasher, shareable_tokens
from vllm_tokenselect.hooks.seam import SeamBroken

BLOCK, CHUNK = 16, 64
# Of a prompt of 250 tokens others share 192.
SETTINGS = {"query_chunk": CHUNK, "tail_queries": 32, "top_k": 300, "n_local": 64}


class Connector:
    """As much of LMCache's connector as is relied on: a tracker for each request."""

    def __init__(self, chunk: int) -> None:
        self.scheduler_adapter = SimpleNamespace(lmcache_tokens_per_chunk=chunk)
        self.request_trackers: dict[str, SimpleNamespace] = {}

    def _get_or_create_request_tracker(self, request: Request) -> SimpleNamespace:
        return self.request_trackers.setdefault(
            request.request_id,
            SimpleNamespace(
                all_token_ids=request.all_token_ids,
                mm_adjusted_prompt_ids=list(request.prompt_token_ids),
                cache_salt=request.cache_salt or "",
            ),
        )


class Engine:
    """A scheduler with LMCache's connector, by these settings."""

    def __init__(self, template, chunk: int = CHUNK, groups: int = 1, **settings) -> None:
        self.config = TokenSelectConfig.from_additional_config({"tokenselect": SETTINGS | settings})
        self.method = self.config.method.for_blocks(BLOCK)
        self.connector = Connector(chunk)
        self.vllm_config = template
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[None] * groups)
        self.requests: dict[str, Request] = {}
        lmcache_requests.limit_requests(self, self.connector, self.limit, CHUNK)
        init_none_hash(sha256)
        self.hasher = SettingsHasher(get_request_block_hasher(BLOCK, sha256), self.config, 1, BLOCK)

    def limit(self, request: Request) -> int:
        return shareable_tokens(request, self.method)

    def track(self, length: int = 250, top_k: int | None = None, **options) -> SimpleNamespace:
        """LMCache's tracker of a new request."""
        args = {} if top_k is None else {"tokenselect_top_k": top_k}
        request = Request(
            request_id=f"request {len(self.requests)}",
            prompt_token_ids=list(range(length)),
            sampling_params=SamplingParams(max_tokens=9, extra_args=args),
            pooling_params=None,
            block_hasher=self.hasher,
            **options,
        )
        self.requests[request.request_id] = request
        return self.connector._get_or_create_request_tracker(request)


@pytest.fixture
def engine(make_vllm_config, monkeypatch):
    monkeypatch.setattr(lmcache_requests, "SEAMS", ())
    block_hashes.install()
    return lambda **options: Engine(make_vllm_config(), **options)


def test_lmcache_sees_a_prompt_up_to_its_limit(engine):
    tracker = engine().track(250)
    assert list(tracker.all_token_ids) == tracker.mm_adjusted_prompt_ids == list(range(192))
    assert len(engine().track(90).all_token_ids) == 0


def test_a_tracker_is_cut_once_and_stays_so_while_a_request_generates(engine):
    serving = engine()
    tracker = serving.track(250)
    (request,) = serving.requests.values()
    request.append_output_token_ids([1] * 200)
    assert serving.connector._get_or_create_request_tracker(request) is tracker
    assert len(tracker.all_token_ids) == 192


def test_a_salt_tells_apart_all_that_blocks_depend_on_beside_tokens(engine):
    plain = engine()
    adapter = LoRARequest("adapter", 1, "/adapter")
    quantized = copy.deepcopy(plain.vllm_config)
    quantized.cache_config.cache_dtype = "fp8"
    salts = [
        plain.track().cache_salt,
        plain.track(top_k=100).cache_salt,
        plain.track(lora_request=adapter).cache_salt,
        plain.track(cache_salt="mine").cache_salt,
        engine(n_local=32).track().cache_salt,
        Engine(quantized).track().cache_salt,
    ]
    assert len({*salts}) == len(salts)
    assert plain.track(200).cache_salt == engine().track(230).cache_salt == salts[0]
    assert engine(top_k=500).track(top_k=300).cache_salt == salts[0]
    assert not {*"@/\\\0"} & {*"".join(salts)}, "LMCache allows none of these"


def test_blocks_that_were_in_the_prefix_cache_are_not_lost():
    blocks = [SimpleNamespace(block_hash=name) for name in (None, b"cached", None, b"cached")]
    pool = SimpleNamespace(blocks=blocks)
    scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=pool))
    assert lmcache_requests.lost_blocks(scheduler, {1, 2, 3}) == {2}


def test_chunks_that_hold_no_whole_query_chunks_are_refused(engine):
    engine(chunk=3 * CHUNK)
    with pytest.raises(SettingsError, match="chunks of 96 tokens.*--chunk-size 64"):
        engine(chunk=96)


def test_a_model_with_several_kinds_of_blocks_is_refused(engine):
    with pytest.raises(SettingsError, match="whose layers keep 2 kinds of blocks"):
        engine(groups=2)


def test_another_lmcache_is_refused_by_name(monkeypatch, tmp_path):
    integration = tmp_path / "lmcache" / "integration" / "vllm"
    integration.mkdir(parents=True)
    for folder in (integration, *integration.parents[:2]):
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lmcache", raising=False)
    with pytest.raises(SeamBroken, match=r"this LMCache: .*Install lmcache==0\.5\.6"):
        lmcache_requests.SEAMS[0].require()
