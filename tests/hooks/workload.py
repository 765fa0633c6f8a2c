"""Engines of many kinds without a model: vLLM's real scheduler and block manager, and what arrives."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import (
    CUDAGraphMode,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_tokenselect.engine import graph_sizes
from vllm_tokenselect.gpu.graph_size import workspace_for
from vllm_tokenselect.gpu.limits import StepLimits
from vllm_tokenselect.hooks.scheduler import TokenSelectAsyncScheduler, TokenSelectScheduler
from vllm_tokenselect.method.settings import Method

# With these, prompts of more than 20 tokens may select.
SHORT = {"n_init": 4, "n_local": 12, "top_k": 3}


@dataclass(frozen=True)
class Engine:
    """What of an engine's configuration decides how long a step is."""

    query_chunk: int = 64
    tail_queries: int = 10
    block_size: int = 16
    budget: int = 68
    max_num_seqs: int = 4
    scheduler: dict[str, Any] = field(default_factory=dict)  # more of SchedulerConfig
    asynchronous: bool = False
    in_flight: int = 1  # steps that are scheduled before the first one's tokens are known
    prefix_caching: bool = True
    max_model_len: int = 4096
    spare_blocks: int = 0  # beside those that one request of the greatest length needs
    prefix_match_unit: int = 0  # as long as a block, if 0
    window: int = 0  # of a second group of layers
    local_chunk: int = 0  # a second group of layers attends within chunks of so many tokens
    states: bool = False  # a second group of layers keeps states
    drafts: int = 0
    heads: bool = False  # what drafts reads the model's hidden states (EAGLE), instead of n-grams
    max_loras: int = 0
    encoder_limit: int = 0  # tokens of images in the cache, and in a step
    shares: bool = False  # layers share selections, and CUDA graphs replay decoding steps
    workspace: int = 0  # CUDA graphs replay steps of so many of the longest contexts at once

    def configure(self, template: Any) -> Any:
        """A `VllmConfig` like `template`."""
        config = copy.copy(template)
        config.model_config = copy.copy(template.model_config)
        config.model_config.max_model_len = self.max_model_len
        config.scheduler_config = SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=self.max_model_len,
            is_encoder_decoder=False,
            async_scheduling=self.asynchronous,
            **self.scheduler,
        )
        config.cache_config = copy.copy(template.cache_config)
        config.cache_config.block_size = self.block_size
        config.cache_config.enable_prefix_caching = self.prefix_caching
        config.cache_config.num_gpu_blocks = self.num_blocks()
        config.cache_config.mamba_cache_mode = "align" if self.prefix_caching else "none"
        config.additional_config = {
            "tokenselect": {"query_chunk": self.query_chunk, "tail_queries": self.tail_queries}
        }
        config.compilation_config = copy.copy(template.compilation_config)
        if self.shares:
            config.additional_config["tokenselect"]["anchor_layers"] = 2
        if self.shares or self.workspace:
            config.additional_config["tokenselect"] |= SHORT
            config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        if self.drafts:
            n_grams = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 2}
            heads = {"method": "eagle", "model": template.model_config.model}
            config.speculative_config = SpeculativeConfig(
                num_speculative_tokens=self.drafts,
                target_model_config=template.model_config,
                target_parallel_config=ParallelConfig(),
                **(heads if self.heads else n_grams),
            )
        if self.max_loras:
            config.lora_config = LoRAConfig(max_loras=self.max_loras, max_cpu_loras=8)
        return config

    @property
    def graph_limits(self) -> StepLimits | None:
        """Limits of steps that CUDA graphs replay; None where these never fill the workspace."""
        if not self.workspace:
            return None
        method = Method(**SHORT, query_chunk=self.query_chunk, tail_queries=self.tail_queries)
        limits = StepLimits(method, 2, 1, self.max_model_len, 1 << 30)
        contexts = max(self.workspace, 1 + self.drafts)
        return replace(limits, workspace_bytes=workspace_for(limits, contexts))

    def num_blocks(self) -> int:
        """As many as vLLM insists on when an engine starts, and the spare ones."""
        sizes = [group.kv_cache_spec.block_size for group in self.groups()]
        return 1 + sum(-(-self.max_model_len // size) + 2 for size in sizes) + self.spare_blocks

    def groups(self) -> list[KVCacheGroupSpec]:
        heads = {"num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
        specs: list[Any] = [FullAttentionSpec(block_size=self.block_size, **heads)]
        if self.window:
            specs.append(
                SlidingWindowSpec(block_size=self.block_size, sliding_window=self.window, **heads)
            )
        if self.local_chunk:
            local = {"attention_chunk_size": self.local_chunk, **heads}
            specs.append(ChunkedLocalAttentionSpec(block_size=self.block_size, **local))
        if self.states:
            specs.append(
                MambaSpec(
                    block_size=self.block_size if self.prefix_caching else self.max_model_len,
                    shapes=((4, 4),),
                    dtypes=(torch.float32,),
                    mamba_cache_mode="align" if self.prefix_caching else "none",
                )
            )
        return [KVCacheGroupSpec([f"layer {index}"], spec) for index, spec in enumerate(specs)]


@dataclass(frozen=True)
class Arrival:
    """A request: at which step, which tokens, and what else comes with it."""

    step: int
    text: Sequence[tuple[int, int]]  # runs of one token each, and how long they are
    max_tokens: int = 3
    images: Sequence[tuple[int, int, str]] = ()  # offset, length, identifier
    lora: int = 0
    priority: int = 0
    continuations: int = 0  # how often a stream's input goes on, with the same tokens again
    transfer: dict[str, Any] | None = None  # the request's kv_transfer_params

    @property
    def tokens(self) -> list[int]:
        return [token for token, count in self.text for _ in range(count)]


def start_engine(
    engine: Engine, template: Any, kind: type[Workload] | None = None, **options: Any
) -> Workload:
    """Start an engine, which may refuse to; `template` is a `VllmConfig`."""
    with pytest.MonkeyPatch.context() as patch:
        # Reading vLLM's source for each scheduler would take most of the time of these tests.
        patch.setattr("vllm_tokenselect.hooks.scheduler.SEAMS", ())
        patch.setattr("vllm_tokenselect.hooks.connector_loads.CONNECTOR_SEAMS", ())
        patch.setattr("vllm_tokenselect.hooks.lmcache_requests.SEAMS", ())
        patch.setattr(graph_sizes, "replayed_limits", lambda _: engine.graph_limits)
        if engine.encoder_limit:
            # What vLLM would find out by loading the processor of a model that sees images.
            budget = SimpleNamespace(
                encoder_compute_budget=engine.encoder_limit, encoder_cache_size=engine.encoder_limit
            )
            patch.setattr(ModelConfig, "supports_multimodal_inputs", True)
            patch.setattr("vllm.v1.core.sched.scheduler.MultiModalBudget", lambda *_, **__: budget)
        return (kind or Workload)(engine, template, **options)


class Workload:
    """Runs requests through the scheduler of an engine."""

    def __init__(self, engine: Engine, template: Any) -> None:
        self.engine = engine
        config = self.configure(engine, template)
        init_none_hash(sha256)
        # vLLM 0.33 hashes a block with the tokens behind it that EAGLE reads.
        self.lookahead = getattr(config, "num_hash_lookahead_tokens", 0)
        hasher = get_request_block_hasher(
            engine.prefix_match_unit or engine.block_size,
            sha256,
            *((self.lookahead,) if self.lookahead else ()),
        )
        self.hasher = self.make_hasher(config, hasher)
        ours = TokenSelectAsyncScheduler if engine.asynchronous else TokenSelectScheduler
        self.kv_cache_config = KVCacheConfig(
            num_blocks=engine.num_blocks(),
            kv_cache_tensors=[],
            kv_cache_groups=engine.groups(),
            prefix_cache_retention_interval=config.cache_config.prefix_cache_retention_interval,
        )
        self.scheduler = ours(
            vllm_config=config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            hash_block_size=engine.prefix_match_unit or None,
            block_size=math.lcm(*(group.kv_cache_spec.block_size for group in engine.groups())),
        )
        self.requests: dict[str, Request] = {}
        self.arrivals: dict[str, Arrival] = {}
        self.continued: dict[str, int] = {}
        self.unanswered: deque[SchedulerOutput] = deque()
        self.steps: list[tuple[Request, int, int, bool]] = []
        self.first_of_steps: list[int] = []  # among `steps`, of each step that the scheduler made
        self.ends: dict[str, Any] = {}  # the last output of each request that ended

    def configure(self, engine: Engine, template: Any) -> Any:
        return engine.configure(template)

    def make_hasher(self, config: Any, hasher: Any) -> Any:
        return hasher

    def add(self, arrival: Arrival, request_id: str | None = None) -> Request:
        resumable = arrival.continuations > self.continued.get(request_id or "", 0)
        new = request_id is None
        request_id = request_id or str(len(self.requests))
        request = Request(
            request_id=request_id,
            prompt_token_ids=arrival.tokens,
            sampling_params=SamplingParams(
                max_tokens=arrival.max_tokens,
                ignore_eos=True,
                extra_args={"kv_transfer_params": arrival.transfer} if arrival.transfer else None,
            ),
            pooling_params=None,
            mm_features=[
                MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, length))
                for offset, length, name in arrival.images
            ],
            lora_request=LoRARequest(f"adapter {arrival.lora}", arrival.lora, "adapter")
            if arrival.lora
            else None,
            priority=arrival.priority,
            arrival_time=float(len(self.requests)),
            block_hasher=self.hasher,
            resumable=resumable or arrival.continuations > 0,
        )
        if new:
            self.requests[request_id] = request
            self.arrivals[request_id] = arrival
        self.scheduler.add_request(request)
        return request

    def unfinished(self) -> list[Request]:
        return [request for request in self.requests.values() if not request.is_finished()]

    def step(self) -> int:
        """Schedule a step, and answer the oldest one if enough are in flight; tokens scheduled."""
        engine = self.engine
        for request in self.scheduler.running:
            if engine.drafts and request.num_output_tokens:
                request.spec_token_ids = [7] * engine.drafts
        output = self.scheduler.schedule()
        cached = output.scheduled_cached_reqs
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        starting = {*starts, *cached.resumed_req_ids}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.first_of_steps.append(len(self.steps))
        for id_, tokens in output.num_scheduled_tokens.items():
            start = starts[id_]
            self.steps.append((self.requests[id_], start, start + tokens, id_ in starting))
        # What a step samples is known when it is scheduled.
        output.samples = {  # type: ignore[attr-defined]
            id_: not self.requests[id_].is_prefill_chunk for id_ in output.num_scheduled_tokens
        }
        output.transferred = self.run_model(output)  # type: ignore[attr-defined]
        self.unanswered.append(output)
        if len(self.unanswered) >= engine.in_flight:
            self.answer()
        self.go_on_with_streams()
        return int(output.total_num_scheduled_tokens)

    def run_model(self, output: SchedulerOutput) -> KVConnectorOutput | None:
        """What a model runner does with a step; there is none here."""
        return None

    def answer(self) -> None:
        output = self.unanswered.popleft()
        ids = list(output.num_scheduled_tokens)
        outputs = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={id_: index for index, id_ in enumerate(ids)},
                sampled_token_ids=[[7] if output.samples[id_] else [] for id_ in ids],  # type: ignore[attr-defined]
                kv_connector_output=output.transferred,  # type: ignore[attr-defined]
            ),
        )
        for of_client in outputs.values():
            self.ends |= {o.request_id: o for o in of_client.outputs if o.finish_reason is not None}

    def spans_by_step(self) -> list[list[tuple[int, int]]]:
        """First and last token of each request that the scheduler gave tokens to, step by step."""
        cuts = pairwise([*self.first_of_steps, len(self.steps)])
        return [[(start, end) for _, start, end, _ in self.steps[a:b]] for a, b in cuts]

    def go_on_with_streams(self) -> None:
        for id_, request in self.requests.items():
            if request.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
                continue
            arrival, count = self.arrivals[id_], self.continued.get(id_, 0)
            if count < arrival.continuations:
                self.continued[id_] = count + 1
                self.add(arrival, id_)
            else:
                self.scheduler.finish_requests(id_, RequestStatus.FINISHED_ABORTED)

    def run(self, arrivals: Sequence[Arrival], most_steps: int) -> None:
        """Serve `arrivals`; fails if they have not all ended after `most_steps`."""
        waiting = deque(sorted(arrivals, key=lambda arrival: arrival.step))
        for number in range(most_steps):
            while waiting and waiting[0].step <= number:
                self.add(waiting.popleft())
            if not waiting and not self.unfinished():
                return
            self.step()
        stuck = [
            f"{r.request_id}: {r.num_computed_tokens} of {r.num_prompt_tokens} tokens, {r.status.name}"
            for r in self.unfinished()
        ]
        raise AssertionError(f"not at an end after {most_steps} steps: {'; '.join(stuck)}")
