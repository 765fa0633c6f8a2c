"""What `scheduler` relies on in vLLM; apart from it, since it cannot be imported without vLLM."""

from vllm_tokenselect.hooks.seam import Seam

SEAMS = (
    Seam(
        name="scheduler",
        module="vllm.v1.core.sched.scheduler",
        qualname="Scheduler._reserve_prefill_lookahead",
        parameters=("self", "request", "num_computed_tokens", "num_new_tokens"),
        contains=("return max(num_new_tokens, 0)",),
        why="ends a prefill step where a query chunk ends",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.sched.scheduler",
        qualname="Scheduler.schedule",
        parameters=("self",),
        contains=(
            "num_new_tokens = self._reserve_prefill_lookahead(request, "
            "request.num_computed_tokens, num_new_tokens)",
            "num_new_tokens = self._reserve_prefill_lookahead("
            "request, num_computed_tokens, num_new_tokens)",
            "self._get_local_prefix_cache_hit(request",
            "while req_index < len(self.running) and token_budget > 0:",
            "preempted_req = self.running[-1]",
            "preempted_req = self.running.pop()",
            "num_lookahead_tokens=self.num_lookahead_tokens",
            "if not ready_to_schedule:",
            "num_running >= self.max_num_active_reqs",
        ),
        why="asks the methods above and below for running and for waiting requests, and preempts "
        "the last of the running ones",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.sched.scheduler",
        qualname="Scheduler._get_local_prefix_cache_hit",
        parameters=("self", "request"),
        contains=("self.kv_cache_manager.get_computed_blocks(request",),
        why="cuts a prefix-cache hit at a chunk boundary below the reader's limit",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.sched.scheduler",
        qualname="Scheduler._update_request_as_session",
        parameters=("self", "session", "update"),
        contains=(
            "session.num_prompt_tokens = len(session.prompt_token_ids)",
            "session.sampling_params = update.sampling_params",
        ),
        why="continues a streaming request, which then shares no more blocks",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.kv_cache_manager",
        qualname="KVCacheManager.get_computed_blocks",
        parameters=("self", "request"),
        contains=("self.coordinator.find_longest_cache_hit(request.block_hashes,",),
        why="looks a hit up through the coordinator, where the limit is applied",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.kv_cache_manager",
        qualname="KVCacheManager.allocate_slots",
        parameters=("self", "request", "num_new_tokens"),
        contains=("self.coordinator.cache_blocks(request, num_tokens_to_cache)",),
        why="enters blocks into the prefix cache through the coordinator, where they are limited",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.kv_cache_manager",
        qualname="KVCacheManager.cache_blocks",
        parameters=("self", "request", "num_computed_tokens"),
        contains=("self.coordinator.cache_blocks(request, num_computed_tokens)",),
        why="enters blocks into the prefix cache through the coordinator, where they are limited",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.single_type_kv_cache_manager",
        qualname="SingleTypeKVCacheManager.get_num_blocks_to_allocate",
        parameters=("self", "request_id", "num_tokens"),
        contains=(
            "num_required_blocks = cdiv(num_tokens, self.block_size)",
            "num_req_blocks = len(self.req_to_blocks.get(request_id, ()))",
        ),
        why="counts the blocks that a request needs, which tells when they may run short",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.sched.scheduler",
        qualname="Scheduler._mamba_block_aligned_split",
        parameters=("self", "request", "num_new_tokens"),
        contains=(
            "block_size <= max_prefill_tokens",
            "if self.mamba_partial_cache_hit and not use_internal_checkpoint",
        ),
        why="ends prefill steps of hybrid models, all of them at multiples of the block",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.sched.scheduler",
        qualname="Scheduler._try_schedule_encoder_inputs",
        parameters=(
            "self",
            "request",
            "num_computed_tokens",
            "num_new_tokens",
            "encoder_compute_budget",
            "shift_computed_tokens",
        ),
        contains=("self.encoder_cache_manager.can_allocate(",),
        why="ends a step before an image that does not fit, where a chunk may have to go on",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.encoder_cache_manager",
        qualname="EncoderCacheManager.can_allocate",
        parameters=(
            "self",
            "request",
            "input_id",
            "encoder_compute_budget",
            "num_embeds_to_schedule",
        ),
        contains=(
            "if num_embeds > encoder_compute_budget:",
            "if num_embeds <= self.num_free_slots:",
            "if num_embeds > self.num_freeable_slots:",
        ),
        why="keeps room for all images of one chunk",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.sched.scheduler",
        qualname="Scheduler._handle_blocked_waiting_request",
        parameters=("self", "request"),
        why="keeps a request waiting whose adapter would be one too many",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.kv_cache_coordinator",
        qualname="KVCacheCoordinator.cache_blocks",
        parameters=("self", "request", "num_computed_tokens"),
        contains=("replay_boundaries=boundaries",),
        why="tells each group of layers where a hit on a prompt may end",
    ),
    Seam(
        name="scheduler",
        module="vllm.v1.core.single_type_kv_cache_manager",
        qualname="SingleTypeKVCacheManager.cache_blocks",
        parameters=("self", "request", "num_tokens", "retention_interval"),
        contains=(
            "reachable_boundaries = [*replay_boundaries]",
            "reachable_boundaries.append(request.shared_prefix_boundary)",
        ),
        why="keeps the blocks before where a hit may end, of those that a sliding window leaves",
    ),
)
