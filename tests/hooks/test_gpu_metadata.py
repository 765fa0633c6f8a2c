"""The metadata of a GPU's steps, built from what vLLM's model runners hand over."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from vllm.config import CUDAGraphMode, ModelConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.hooks.conftest import BLOCK_SIZE, MAX_NUM_SEQS
from tests.kernels_gpu.cases import DEVICE
from tests.models.families import FAMILIES, save_config
from vllm_tokenselect.backend import gpu_metadata
from vllm_tokenselect.backend.gpu_metadata import GpuTokenSelectMetadataBuilder
from vllm_tokenselect.engine import gpu_libraries, graph_sizes, step_requests
from vllm_tokenselect.engine.gpu_libraries import choose_library, serves_full_attention
from vllm_tokenselect.method.requests import RequestTable
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method, SettingsError

SPEC = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)


@pytest.fixture
def builder(make_vllm_config):
    config = make_vllm_config()
    config.additional_config["tokenselect"] |= {"anchor_layers": 2, "min_context": 2900}
    config.compilation_config.max_cudagraph_capture_size = 8
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    anchor = SimpleNamespace(took_role=True, follows=False)
    config.compilation_config.static_forward_context["layer"] = SimpleNamespace(impl=anchor)
    built = GpuTokenSelectMetadataBuilder(SPEC, ["layer"], config, torch.device(DEVICE))
    built.model_runner_v2 = True
    built.table = RequestTable(MAX_NUM_SEQS)
    step_requests.publish_table(config, built.table)
    return built


def metadata(
    queries: list[int], lens: list[int], seats: list[int] | None, padding: int = 0
) -> CommonAttentionMetadata:
    """As Model Runner V2 builds it; padded requests have no queries, no bound and no seat."""
    starts = np.cumsum([0, *queries, *[0] * padding]).astype(np.int32)
    real = torch.tensor(lens + [0] * padding, dtype=torch.int32, device=DEVICE)
    num_reqs = len(queries) + padding
    return CommonAttentionMetadata(
        query_start_loc=torch.from_numpy(starts).to(DEVICE),
        query_start_loc_cpu=torch.from_numpy(starts),
        seq_lens=real,
        seq_lens_cpu_upper_bound=torch.tensor(lens, dtype=torch.int32),
        num_reqs=num_reqs,
        num_actual_tokens=sum(queries) + padding,
        max_query_len=max(queries),
        max_seq_len=max(lens),
        block_table_tensor=torch.zeros((num_reqs, 256), dtype=torch.int32, device=DEVICE),
        slot_mapping=torch.zeros(sum(queries) + padding, dtype=torch.int64, device=DEVICE),
        req_idx=None if seats is None else np.array(seats),
    )


def addresses(built) -> list[tuple]:
    return [
        (tensor.data_ptr(), tuple(tensor.shape))
        for group in built.step.groups
        for tensor in (
            *(group.row_seq, group.query_start_loc, group.query_len, group.candidate_end),
            *(group.scored_end, group.context_end, group.table_end, group.reused_end),
            *(
                group.top_k,
                group.seat,
                group.cached_seat,
                group.owner,
                group.chains,
                group.columns.starts,
                *(tiles.table for tiles in group.tiles),
            ),
        )
    ]


def test_a_decoding_step_is_written_where_the_captured_one_was(builder):
    captured = builder.build_for_cudagraph_capture(metadata([1] * 4, [1] * 4, None))
    later = builder.build(0, metadata([1, 1], [3000, 40], [2, 0], padding=2))
    assert addresses(later) == addresses(captured)
    (group,) = captured.step.groups
    assert group.context_end.tolist() == [3000, 40, 0, 0]
    assert group.query_len.tolist() == [1, 1, 0, 0]


def test_a_prompt_is_cut_by_its_own_length_which_its_seat_knows(builder):
    builder.table.add("long", 3000, 2048, seat=3)
    builder.table.add("short", 2900, 2048, seat=1)
    step = metadata([64, 64], [2880, 2880], [3, 1])
    built = builder.build(0, step)
    # 2880 is before the tail of the first; the second's begins at 2890.
    lens = [length for group in built.step.groups for length in group.query_lens.tolist()]
    assert lens == [64, 64]
    builder.table.add("shorter", 2880, 2048, seat=0)
    built = builder.build(0, metadata([64], [2880], [0]))
    lens = [length for group in built.step.groups for length in group.query_lens.tolist()]
    assert lens == [54] + [1] * 10


def test_dummy_steps_belong_to_no_request(builder):
    built = builder.build(0, metadata([40], [40], None))
    assert [group.query_lens.tolist() for group in built.step.groups] == [[40]]


@pytest.mark.parametrize(
    ("library", "support"),
    [("flash", "UNIFORM_BATCH"), ("sdpa", "UNIFORM_SINGLE_TOKEN_DECODE"), ("xformers", "NEVER")],
)
def test_cuda_graphs_are_promised_as_far_as_what_decodes_takes_them(
    library, support, make_vllm_config, monkeypatch
):
    monkeypatch.setattr(gpu_metadata, "choose_library", lambda *arguments: library)
    config = make_vllm_config()
    config.additional_config["tokenselect"]["attention"] = library
    promised = GpuTokenSelectMetadataBuilder.get_cudagraph_support
    assert promised(config, SPEC) is AttentionCGSupport[support]
    # The own kernel attends all rows of decoding steps.
    config.additional_config["tokenselect"]["attention"] = "auto"
    assert promised(config, SPEC) is AttentionCGSupport.UNIFORM_BATCH


def test_a_library_that_cannot_attend_is_refused_by_name():
    assert choose_library("sdpa", 128, torch.bfloat16) == "sdpa"
    assert choose_library("auto", 128, torch.float32) == "sdpa"
    with pytest.raises(SettingsError, match="attention='flash' cannot be used: flash has no kern"):
        choose_library("flash", 128, torch.float32)


@pytest.mark.parametrize(
    ("library", "version", "cache_dtype", "reason"),
    [
        ("flash", 3, "auto", None),
        ("flash", 3, "fp8_e4m3", "a KV cache of fp8_e4m3 .* --kv-cache-dtype auto"),
        ("flash", 2, "auto", "FlashAttention 2 attends over gathered tokens .* Hopper"),
        ("sdpa", 3, "auto", "sdpa attends over gathered tokens"),
        ("xformers", 3, "auto", "xformers attends over gathered tokens"),
    ],
)
def test_full_attention_is_served_where_the_cache_is_read_in_place(
    library, version, cache_dtype, reason, make_vllm_config, monkeypatch
):
    config = make_vllm_config()
    config.additional_config["tokenselect"]["min_context"] = 0
    config.cache_config.cache_dtype = cache_dtype
    monkeypatch.setattr(gpu_libraries, "choose_library", lambda *arguments: library)
    monkeypatch.setattr(gpu_libraries, "get_flash_attn_version", lambda head_size: version)
    answer = serves_full_attention(config)
    if reason is None:
        assert answer is None
    else:
        assert re.match(reason, answer)
    limits = graph_sizes.step_limits(config, 2, 1)
    longest = config.model_config.max_model_len
    assert (limits.table_width == longest) == (reason is None)


@pytest.mark.parametrize(("large", "served"), [(256, True), (512, False)])
def test_full_attention_is_served_only_where_the_largest_heads_are_read_in_place(
    large, served, make_vllm_config, tmp_path, monkeypatch
):
    """Gemma 4: heads of 256 elements in its sliding-window layers, of 512 in those that select."""
    family, options = FAMILIES["Gemma 4"]
    model = save_config(tmp_path, family, {**options, "head_dim": 256, "global_head_dim": large})
    config = make_vllm_config()
    config.model_config = ModelConfig(model=str(model), skip_tokenizer_init=True, dtype="bfloat16")
    monkeypatch.setattr(
        gpu_libraries, "get_flash_attn_version", lambda head_size: 3 if head_size <= 256 else 4
    )
    answer = serves_full_attention(config)
    assert (answer is None) == served
    assert served or "heads of up to 256" in answer


def test_requests_carry_their_top_k_seat_and_owner_to_the_rows(builder):
    table = builder.table
    table.add("first", 100, 300, seat=3)
    table.add("off", 100, FULL_ATTENTION, seat=1)
    table.add("short", 100, 300, seat=2)
    built = builder.build(0, metadata([1, 1, 1], [3000, 3001, 2900], [3, 1, 2], padding=1))
    (group,) = built.step.groups
    assert group.top_k.tolist()[:3] == [300, FULL_ATTENTION, FULL_ATTENTION]
    assert group.seat.tolist() == [3, 1, 2, -1]
    assert group.chains.tolist() == [[0, 1], *[[0, 0]] * 3]
    assert group.cached_seat.tolist() == [3, -1, -1, -1]
    assert group.owner.tolist() == [*table.owners[[3, 1, 2]], 0]
    assert group.scored_end.tolist()[1:3] == [Method().n_init] * 2


@pytest.mark.parametrize("replays", [False, True], ids=["eager", "graphs"])
def test_the_end_of_a_prompt_is_never_taken_for_generated_tokens(builder, replays):
    mode = CUDAGraphMode.FULL_AND_PIECEWISE if replays else CUDAGraphMode.NONE
    builder.vllm_config.compilation_config.cudagraph_mode = mode
    builder.table.add("generates", 100, 300, seat=3)
    builder.table.add("dense", 3200, 2900, seat=1)
    built = builder.build(0, metadata([1, 1], [3000, 3200], [3, 1]))
    # A step that is replayed has one kind of groups; a row that sees all may be in either.
    assert [group.follows for group in built.step.groups] == ([True] if replays else [True, False])
    builder.table.add("selects", 3200, 300, seat=2)
    step = metadata([1, 1], [3000, 3200], [3, 2])
    if replays:
        with pytest.raises(RuntimeError, match="has position 3199 of a prompt"):
            builder.build(0, step)
    else:
        groups = builder.build(0, step).step.groups
        assert [(group.num_rows, group.follows) for group in groups] == [(1, True), (1, False)]
