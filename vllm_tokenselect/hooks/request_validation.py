"""Refuse a request whose own settings cannot be served, while the client can still be told.

Wraps three functions of the process that sends requests to an engine. Each works for one engine, whose
configuration says what requests may ask; another engine of the same process has its own.

- `InputProcessor.process_inputs`, which every request passes, also in an offline `LLM`.
- `BaseServing._check_model`, the first thing that every endpoint does with a request, before it begins
  a response: a stream is refused with HTTP 400 like any other request.
- `GenerateBaseServing._with_kv_transfer_rejection_cleanup`, which knows the request as it was sent, before
  its `true` has become 1, and what stands beside `vllm_xargs`.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.engine.connectors import HANDED_OVER, NO_STREAMS, asks_for_handed_over
from vllm_tokenselect.engine.replayed_steps import prompt_steps
from vllm_tokenselect.hooks.registration import is_selected
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.method.misplaced import looks_like_ours
from vllm_tokenselect.method.request_settings import (
    SWITCH,
    requested_top_k,
    transfer_settings,
)
from vllm_tokenselect.method.settings import FULL_ATTENTION, Method, SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.input_processor import InputProcessor

SEAMS = (
    Seam(
        name="request_validation",
        module="vllm.v1.engine.input_processor",
        qualname="InputProcessor.process_inputs",
        parameters=("self", "request_id", "prompt", "params"),
        contains=("current_platform.validate_request(engine_input, params)", "self.vllm_config"),
        why="refuses a request whose own settings cannot be served",
        retired_by="vLLM tells `Platform.validate_request` which engine the request is for",
    ),
    Seam(
        name="request_validation",
        module="vllm.entrypoints.serve.engine.serving",
        qualname="BaseServing._check_model",
        parameters=("self", "request"),
        contains=("self._is_model_supported(request.model)",),
        why="refuses it before a response is begun",
        retired_by="vLLM processes a request's input before it begins the response",
    ),
    Seam(
        name="request_validation",
        module="vllm.entrypoints.generate.base.serving",
        qualname="GenerateBaseServing._with_kv_transfer_rejection_cleanup",
        parameters=("self", "awaitable", "request", "raw_request"),
        contains=("return await awaitable",),
        why="refuses settings that would not be read, or not as they were sent",
        retired_by="vLLM refuses arguments that it does not read, and hands on others as they were sent",
    ),
)


class Engine:
    """What requests may ask of one engine."""

    def __init__(self, vllm_config: VllmConfig, method: Method, device_type: str) -> None:
        self.vllm_config = vllm_config
        self.method = method
        self.device_type = device_type

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Engine | None:
        """The engine of a configuration; None if it is not on TOKENSELECT."""
        if not is_selected(vllm_config.attention_config):
            return None
        config = TokenSelectConfig.from_additional_config(vllm_config.additional_config)
        return cls(vllm_config, config.method, vllm_config.device_config.device_type)

    @cached_property
    def why_not_full_attention(self) -> str | None:
        """Why `"off"` cannot be served; None if it can. Asked late: it loads GPU libraries."""
        if self.method.reassigns_positions:
            return (
                "positions are reassigned, and a whole context may have more tokens than the model was "
                "trained on; it takes a server without that setting"
            )
        if self.device_type != "cuda":
            return None
        from vllm_tokenselect.engine.gpu_libraries import serves_full_attention

        return serves_full_attention(self.vllm_config)

    def check(self, extra_args: Mapping[str, Any] | None) -> None:
        """Check a request's extra arguments.

        Raises:
            VLLMValidationError: naming the value and what is allowed. The server answers it with HTTP
                400; it answers a `ValueError` from some places with 500 and without the message.
        """
        try:
            top_k = requested_top_k(extra_args, self.method.top_k)
            if top_k == FULL_ATTENTION and self.why_not_full_attention is not None:
                raise SettingsError(
                    f'{SWITCH}="off" cannot be served here: {self.why_not_full_attention}'
                )
        except SettingsError as error:
            _refuse(str(error))

    def check_transfer(
        self, params: Mapping[str, Any] | None, extra_args: Mapping[str, Any] | None
    ) -> None:
        """Check by which settings another server computed what a request asks for.

        Args:
            params: vLLM's `kv_transfer_params` of the request.

        Raises:
            VLLMValidationError: naming both servers' settings. vLLM then has the other server free its
                blocks.
        """
        if not (params and params.get("do_remote_prefill") and self._asks_for_handed_over):
            return
        config = self.vllm_config
        block_size = config.cache_config.block_size
        own = transfer_settings(
            self.method.for_blocks(block_size),
            requested_top_k(extra_args, self.method.top_k),
            config.parallel_config.tensor_parallel_size,
            block_size,
        )
        said = params.get(HANDED_OVER)
        theirs = said.get("settings") if isinstance(said, dict) else None
        if theirs == own:
            return
        computed = (
            f"it does not say by which settings (field {HANDED_OVER!r}), so the other server is not on "
            "TOKENSELECT, or a router dropped the field"
            if theirs is None
            else f"the other server computed it with {theirs}"
        )
        _refuse(
            f"the prompt of another server cannot be read: {computed}; this request has {own}. Give both "
            "servers the same settings and the request to both of them the same vllm_xargs",
            parameter="kv_transfer_params",
        )

    @cached_property
    def _asks_for_handed_over(self) -> bool:
        return asks_for_handed_over(self.vllm_config)


def engine_of(processor: InputProcessor) -> Engine | None:
    """The engine that an input processor works for; None if it is not on TOKENSELECT."""
    if "_tokenselect_engine" not in vars(processor):
        processor._tokenselect_engine = Engine.of(processor.vllm_config)
    engine: Engine | None = processor._tokenselect_engine
    return engine


def validate(processor: InputProcessor, params: Any, continued: bool = False) -> None:
    """Check vLLM's sampling or pooling parameters, before `InputProcessor.process_inputs` does.

    Args:
        continued: whether more input may follow (vLLM's streaming input).

    Raises:
        VLLMValidationError: see `Engine.check`; for streaming input where it could be too short for a step,
            and beside a KV connector.
    """
    engine = engine_of(processor)
    if engine is None:
        return
    engine.check(getattr(params, "extra_args", None))
    if continued and engine.vllm_config.kv_transfer_config is not None:
        _refuse(NO_STREAMS)
    if continued and prompt_steps(engine.vllm_config, engine.method).replayed:
        _refuse(
            f"streaming input cannot be served with the tokenselect setting anchor_layers="
            f"{engine.method.anchor_layers!r} and CUDA graphs: a graph would take a few tokens that are "
            "added for generated ones. Send whole prompts; the server serves it with --enforce-eager, or "
            'with anchor_layers "all"'
        )


def check_request(serving: Any, request: Any) -> None:
    """Check the settings of an endpoint's request, before a response to it is begun.

    Raises:
        VLLMValidationError: see `Engine.check`.
    """
    processor = getattr(serving, "input_processor", None)  # only endpoints that generate have one
    engine = None if processor is None else engine_of(processor)
    if engine is None:
        return
    sampling = getattr(request, "sampling_params", None)
    extra_args = getattr(request, "vllm_xargs", None) or getattr(sampling, "extra_args", None)
    engine.check(extra_args)
    engine.check_transfer(getattr(request, "kv_transfer_params", None), extra_args)
    _check_unread(request, getattr(request, "model_extra", None) or {})


async def check_as_sent(
    serving: Any, awaitable: Coroutine[Any, Any, Any], request: Any, raw_request: Any
) -> None:
    """Check a request's body as it was sent; vLLM has parsed and kept it.

    Args:
        awaitable: what would answer the request; closed if the request is refused.

    Raises:
        VLLMValidationError: see `Engine.check`.
    """
    engine = engine_of(serving.input_processor)
    if engine is None or raw_request is None:
        return
    body = await raw_request.json()
    try:
        engine.check(body.get("vllm_xargs"))
        _check_unread(request, body)
    except Exception:
        awaitable.close()
        raise


def _check_unread(request: Any, body: Mapping[str, Any]) -> None:
    """Refuse what looks like a setting in a place where nothing reads it."""
    if beside := {name: value for name, value in body.items() if looks_like_ours(name)}:
        _refuse(
            f"{beside!r} stands beside vllm_xargs, where it is not read; put it into vllm_xargs"
        )
    own = [name for name in getattr(request, "vllm_xargs", None) or () if looks_like_ours(name)]
    if own and getattr(request, "use_beam_search", False):
        _refuse(
            f"{' and '.join(map(repr, own))} cannot be used with use_beam_search, for which vLLM does not "
            "read vllm_xargs; leave one of them out"
        )


def _refuse(message: str, parameter: str = "vllm_xargs") -> NoReturn:
    from vllm.exceptions import VLLMValidationError

    raise VLLMValidationError(message, parameter=parameter) from None


def _validate_and_process(
    process_inputs: Any,
    processor: InputProcessor,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    validate(processor, params, continued=bool(kwargs.get("resumable")))
    return process_inputs(processor, request_id, prompt, params, *args, **kwargs)


async def _check_request_and_model(check_model: Any, serving: Any, request: Any) -> Any:
    check_request(serving, request)
    return await check_model(serving, request)


async def _check_as_sent_and_answer(
    answer: Any, serving: Any, awaitable: Coroutine[Any, Any, Any], request: Any, raw_request: Any
) -> Any:
    await check_as_sent(serving, awaitable, request, raw_request)
    return await answer(serving, awaitable, request, raw_request)


def install() -> None:
    """Wrap the functions; safe to call again."""
    process_inputs, check_model, answer = SEAMS
    process_inputs.wrap(_validate_and_process)
    check_model.wrap(_check_request_and_model)
    answer.wrap(_check_as_sent_and_answer)
