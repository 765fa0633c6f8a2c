"""vLLM's real scheduler under our rules, with a model that always answers the same token."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.hooks.conftest import BLOCK_SIZE, QUERY_CHUNK, TAIL_QUERIES
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.hooks.block_hashes import SettingsHasher
from vllm_tokenselect.hooks.preemption import blocks_may_run_short
from vllm_tokenselect.hooks.scheduler import TokenSelectScheduler

CONFIG = TokenSelectConfig(query_chunk=QUERY_CHUNK, tail_queries=TAIL_QUERIES)
NUM_BLOCKS = 41  # one of them is vLLM's null block


class Serving:
    """The scheduler, its requests, and what a step of it did."""

    def __init__(
        self,
        vllm_config: Any,
        scheduler_cls: type = TokenSelectScheduler,
        num_blocks: int = NUM_BLOCKS,
    ) -> None:
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32
        )
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        init_none_hash(sha256)
        # vLLM 0.33 hashes a block with the tokens behind it that EAGLE reads.
        self.lookahead = getattr(vllm_config, "num_hash_lookahead_tokens", 0)
        hasher = get_request_block_hasher(
            BLOCK_SIZE, sha256, *((self.lookahead,) if self.lookahead else ())
        )
        self.block_hasher = SettingsHasher(hasher, CONFIG, lookahead=self.lookahead)
        self.scheduler = scheduler_cls(
            vllm_config=vllm_config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK_SIZE,
        )
        self.requests: dict[str, Request] = {}

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 3,
        extra_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        options.setdefault("request_id", str(len(self.requests)))
        request = Request(
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args
            ),
            pooling_params=None,
            block_hasher=self.block_hasher,
            **options,
        )
        self.requests.setdefault(request.request_id, request)
        self.scheduler.add_request(request)
        return request

    def step(
        self, drafts: int = 0, accepted: Random | None = None
    ) -> list[tuple[Request, int, int, bool]]:
        """Run one step; returns for each request [start, end) and whether it starts here.

        With `drafts`, every request that generates gets that many, of which the model accepts a
        number that is drawn from `accepted`.
        """
        for request in self.scheduler.running:
            if drafts and request.num_output_tokens and not request.num_output_placeholders:
                request.spec_token_ids = [7] * drafts
        computed = {r.request_id: r.num_computed_tokens for r in self.scheduler.running}
        expected_shortage = blocks_may_run_short(self.scheduler)
        output = self.scheduler.schedule()
        if self.scheduler.policy == SchedulingPolicy.FCFS:
            self.check_preemption(computed, output.preempted_req_ids or set(), expected_shortage)
        cached = output.scheduled_cached_reqs
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        starting = {*starts, *cached.resumed_req_ids}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        ids = list(output.num_scheduled_tokens)
        ends = {id_: starts[id_] + output.num_scheduled_tokens[id_] for id_ in ids}
        complete = {id_: ends[id_] >= self.requests[id_].num_tokens for id_ in ids}
        self.check_prefix_cache()
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={id_: index for index, id_ in enumerate(ids)},
                sampled_token_ids=[
                    [7] * (1 + self.accepted(output, id_, accepted)) if complete[id_] else []
                    for id_ in ids
                ],
            ),
        )
        return [(self.requests[id_], starts[id_], ends[id_], id_ in starting) for id_ in ids]

    @staticmethod
    def accepted(output: SchedulerOutput, id_: str, random: Random | None) -> int:
        drafts = len(output.scheduled_spec_decode_tokens.get(id_, ()))
        return random.randint(0, drafts) if random else 0

    def check_preemption(
        self, computed: dict[str, int], victims: set[str], expected_shortage: bool
    ) -> None:
        """Check the order, given the computed tokens of the requests that ran before the step."""
        order = [r.request_id for r in self.scheduler.running if r.request_id in computed]
        assert order == [id_ for id_ in computed if id_ not in victims], (
            "the order of the running requests was changed for good"
        )
        assert expected_shortage or not victims, "a shortage of blocks came unexpected"
        for victim in victims:
            assert all(computed[victim] <= computed[survivor] for survivor in order), (
                f"{computed[victim]} computed tokens were thrown away, and {computed} there were"
            )

    def check_prefix_cache(self) -> None:
        for request in self.scheduler.running:
            limit = CONFIG.method.shareable_tokens(request.num_prompt_tokens)
            blocks = self.scheduler.kv_cache_manager.get_blocks(request.request_id).blocks[0]
            past_limit = blocks[limit // BLOCK_SIZE :]
            assert all(block.block_hash is None for block in past_limit), (
                f"tokens past {limit} of a prompt of {request.num_prompt_tokens} can be shared"
            )

    def run(self) -> list[tuple[Request, int, int, bool]]:
        """Run until every request has ended; each step must compute something."""
        steps = []
        while not all(request.is_finished() for request in self.requests.values()):
            computed = self.step()
            assert computed, "nothing was computed although requests are waiting"
            steps += computed
        return steps

    def run_until_waiting(self, request_id: str) -> None:
        """Run until a streaming request waits for more input."""
        while self.requests[request_id].status != RequestStatus.WAITING_FOR_STREAMING_REQ:
            assert self.step(), "nothing was computed although the request is not done"
