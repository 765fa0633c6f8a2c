"""A request whose own settings cannot be served is refused when it arrives."""

import asyncio
import re
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.entrypoints.generate.base import serving as generate_serving
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine import serving
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import input_processor

from vllm_tokenselect.hooks import request_validation
from vllm_tokenselect.hooks.engine_config import configure
from vllm_tokenselect.hooks.registration import backend_member
from vllm_tokenselect.method.settings import Method

PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}


BAD = {"tokenselect_top_k": 4096}
ALLOWED = "tokenselect_top_k an integer from 1 to this server's 2048"


@pytest.fixture
def make_config(make_vllm_config):
    """Configurations of engines of one process; None for one that is not on TOKENSELECT."""

    def make(settings: dict | None = None, backend="TOKENSELECT"):
        config = make_vllm_config()
        config.attention_config.backend = backend_member() if backend else None
        config.additional_config = {"tokenselect": {"query_chunk": 64, **(settings or {})}}
        configure(config, "cpu")
        return config

    return make


@pytest.fixture(params=["hook", "diff"])
def vllm(request, monkeypatch):
    """vLLM's own input processor and servings, with the hook or with our diff."""
    load = request.getfixturevalue("load_patched") if request.param == "diff" else None
    if load is not None:
        return SimpleNamespace(
            InputProcessor=load("vllm/v1/engine/input_processor.py").InputProcessor,
            check_model=load("vllm/entrypoints/serve/engine/serving.py").BaseServing._check_model,
            around=load(
                "vllm/entrypoints/generate/base/serving.py"
            ).GenerateBaseServing._with_kv_transfer_rejection_cleanup,
        )
    request_validation.install()
    request_validation.install()
    return SimpleNamespace(
        InputProcessor=input_processor.InputProcessor,
        check_model=serving.BaseServing._check_model,
        around=generate_serving.GenerateBaseServing._with_kv_transfer_rejection_cleanup,
    )


@pytest.fixture
def make_processor(vllm, make_config):
    """vLLM's real input processor of an engine, without a tokenizer."""

    def make(*settings, **options):
        renderer = SimpleNamespace(
            _executor=None,
            tokenizer=None,
            get_eos_token_id=lambda: 0,
            validate_token_ids=lambda token_ids: None,
        )
        return vllm.InputProcessor(make_config(*settings, **options), renderer)

    return make


def send(processor, **extra_args):
    params = SamplingParams(max_tokens=1, extra_args=extra_args or None)
    return processor.process_inputs("id", PROMPT, params, ("generate",))


def test_a_value_that_cannot_be_served_is_refused_with_what_is_allowed(make_processor):
    with pytest.raises(VLLMValidationError, match=f"tokenselect_top_k=4096 .* {ALLOWED}"):
        send(make_processor(), **BAD)


def test_what_can_be_served_reaches_the_engine_as_it_was_sent(make_processor):
    processor = make_processor()
    for extra_args in ({}, {"tokenselect": "off"}, {"tokenselect_top_k": 2048, "other": 1}):
        assert send(processor, **extra_args).sampling_params.extra_args == (extra_args or None)


def test_without_tokenselect_the_arguments_are_somebody_elses(make_processor):
    processor = make_processor(backend=None)
    assert send(processor, **BAD).sampling_params.extra_args == BAD


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_engines_of_one_process_refuse_by_their_own_settings(make_processor, order):
    each = [({"top_k": 256}, "TOKENSELECT"), ({"top_k": 64}, "TOKENSELECT"), (None, None)]
    made = {index: make_processor(each[index][0], backend=each[index][1]) for index in order}
    assert send(made[0], tokenselect_top_k=128)
    with pytest.raises(VLLMValidationError, match="top_k=128 .* this server's 64"):
        send(made[1], tokenselect_top_k=128)
    with pytest.raises(VLLMValidationError, match="top_k=99999 .* this server's 256"):
        send(made[0], tokenselect_top_k=99999)
    assert send(made[2], tokenselect_top_k=99999)


def test_pooling_has_no_settings_of_ours(make_processor):
    request_validation.validate(make_processor(), PoolingParams())


def test_streaming_input_is_refused_beside_a_connector(make_processor):
    processor = make_processor()
    request_validation.validate(processor, SamplingParams(), continued=True)
    processor.vllm_config.kv_transfer_config = KVTransferConfig()
    with pytest.raises(VLLMValidationError, match="cannot be served with a KV connector"):
        request_validation.validate(processor, SamplingParams(), continued=True)
    request_validation.validate(processor, SamplingParams())


class Body:
    """Stands in for Starlette's request, which keeps its parsed body."""

    def __init__(self, **body) -> None:
        self.body = body

    async def json(self):
        return self.body


@pytest.fixture
def ask(vllm, make_processor):
    """What an endpoint does before it begins a response, with a request as it was sent."""

    def ask(
        body: dict,
        raw: bool = True,
        kind=CompletionRequest,
        backend="TOKENSELECT",
        transfer: KVTransferConfig | None = None,
    ) -> str:
        request = kind(model="m", prompt="p", **body)
        processor = make_processor(backend=backend)
        processor.vllm_config.kv_transfer_config = transfer
        endpoint = SimpleNamespace(
            input_processor=processor,
            request_logger=None,
            has_kv_connector=False,
            _is_model_supported=lambda name: True,
        )

        async def answer():
            await vllm.check_model(endpoint, request)
            return "answered"

        raw_request = Body(model="m", prompt="p", **body) if raw else None
        return asyncio.run(vllm.around(endpoint, answer(), request, raw_request))

    return ask


NEAR = [
    ({"vllm_xargs": BAD}, f"tokenselect_top_k=4096 cannot be used: .*{ALLOWED}"),
    ({"vllm_xargs": {"tokenselect_topk": 5}}, f"no extra argument 'tokenselect_topk'; .*{ALLOWED}"),
    ({"vllm_xargs": {"top_k_tokenselect": 5}}, f"no extra argument 'top_k_tokenselect'.*{ALLOWED}"),
    ({"vllm_xargs": {"TOKENSELECT": "off"}}, f"no extra argument 'TOKENSELECT'; .*{ALLOWED}"),
    ({"vllm_xargs": {"tokenselct_top_k": 5}}, f"no extra argument 'tokenselct_top_k'.*{ALLOWED}"),
    ({"vllm_xargs": {"tokenselect_top_k": "5"}}, f"tokenselect_top_k='5' .*{ALLOWED}"),
    ({"vllm_xargs": {"tokenselect_top_k": 5.0}}, f"tokenselect_top_k=5.0 .*{ALLOWED}"),
    ({"tokenselect": "off"}, "{'tokenselect': 'off'} stands beside vllm_xargs, .*into vllm_xargs"),
    ({"TokenSelect_top_k": 5}, "{'TokenSelect_top_k': 5} stands beside vllm_xargs"),
    (
        {"vllm_xargs": {"tokenselect": "off"}, "use_beam_search": True},
        "'tokenselect' cannot be used with use_beam_search, .*leave one of them out",
    ),
]


@pytest.mark.parametrize("raw", [True, False], ids=["http", "run-batch"])
@pytest.mark.parametrize(("body", "message"), NEAR, ids=lambda value: str(value)[:40])
def test_an_endpoint_refuses_before_it_begins_a_response(ask, body, message, raw):
    with pytest.raises(VLLMValidationError, match=message):
        ask(body, raw)
    assert ask(body, raw, backend=None) == "answered"


def test_true_is_no_number_though_vllm_reads_it_as_one(ask):
    body = {"vllm_xargs": {"tokenselect_top_k": True}}
    with pytest.raises(VLLMValidationError, match=f"tokenselect_top_k=True .*{ALLOWED}"):
        ask(body)
    assert ask({"vllm_xargs": {"tokenselect_top_k": 1, "flag": True}}) == "answered"


OFFERED = {"do_remote_prefill": True, "remote_block_ids": [[1, 2]]}


def offer(settings: str) -> dict:
    return OFFERED | {"tokenselect": {"settings": settings, "prompt": "..."}}


@pytest.mark.parametrize("name", ["NixlConnector", "MultiConnector"])
def test_what_a_server_of_other_settings_computed_is_refused_with_both(ask, name):
    children = {"connectors": [{"kv_connector": "NixlConnector", "kv_role": "kv_both"}]}
    extra = children if name == "MultiConnector" else {}
    transfer = KVTransferConfig(
        kv_connector=name, kv_role="kv_consumer", kv_connector_extra_config=extra
    )
    with pytest.raises(VLLMValidationError, match="computed it with v1:top_k=1; this") as refused:
        ask({"kv_transfer_params": offer("v1:top_k=1")}, transfer=transfer)
    assert refused.value.parameter == "kv_transfer_params"
    own = re.search("this request has (.*)[.] Give both", str(refused.value)).group(1)
    assert "top_k=2048," in own
    assert "tail_queries=" in own
    assert ask({"kv_transfer_params": offer(own)}, transfer=transfer) == "answered"
    # The settings are the request's own.
    few = {"tokenselect_top_k": 64}
    with pytest.raises(VLLMValidationError, match=r"this request has v1:top_k=64,"):
        ask({"kv_transfer_params": offer(own), "vllm_xargs": few}, transfer=transfer)
    of_few = offer(own.replace("top_k=2048", "top_k=64"))
    assert ask({"kv_transfer_params": of_few, "vllm_xargs": few}, transfer=transfer) == "answered"
    # A server on another backend says nothing.
    with pytest.raises(VLLMValidationError, match="the other server is not on TOKENSELECT"):
        ask({"kv_transfer_params": OFFERED}, transfer=transfer)
    assert ask({"kv_transfer_params": {"do_remote_decode": True}}, transfer=transfer) == "answered"


def test_other_connectors_do_not_read_what_is_offered(ask):
    transfer = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    assert ask({"kv_transfer_params": OFFERED}, transfer=transfer) == "answered"
    assert ask({"kv_transfer_params": OFFERED}) == "answered"


@pytest.fixture
def gpu_libraries(monkeypatch):
    """Stands in for the module that knows the GPU's libraries; counts how often it is asked."""
    module = SimpleNamespace(asked=0, reason=None)

    def serves_full_attention(vllm_config):
        module.asked += 1
        return module.reason

    module.serves_full_attention = serves_full_attention
    monkeypatch.setitem(sys.modules, "vllm_tokenselect.engine.gpu_libraries", module)
    return module


OFF = {"tokenselect": "off"}


def test_off_is_refused_where_the_gpu_cannot_attend_to_everything(gpu_libraries):
    gpu_libraries.reason = "SDPA copies what it attends to"
    engine = request_validation.Engine(None, Method(), "cuda")
    for _ in range(2):
        with pytest.raises(VLLMValidationError, match='="off" cannot be served here: SDPA copies'):
            engine.check(OFF)
    assert gpu_libraries.asked == 1
    engine.check({"tokenselect_top_k": 5})


def test_off_is_served_elsewhere(gpu_libraries):
    request_validation.Engine(None, Method(), "cuda").check(OFF)
    gpu_libraries.reason = "not asked on a CPU"
    request_validation.Engine(None, Method(), "cpu").check(OFF)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_off_is_refused_where_positions_are_reassigned(device):
    engine = request_validation.Engine(None, Method(positions="reassigned"), device)
    with pytest.raises(VLLMValidationError, match='="off" cannot be served .* are reassigned'):
        engine.check(OFF)
