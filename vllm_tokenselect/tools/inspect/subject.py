"""The model and the settings that `tokenselect inspect` and `tokenselect tune` look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.method.settings import Method, SettingsError
from vllm_tokenselect.profiles import ProfileModel, resolve_profile
from vllm_tokenselect.tools.common.options import SUCH_AS, json_object
from vllm_tokenselect.tools.common.smollm2 import ensure_smollm2
from vllm_tokenselect.tools.inspect.model import DiagnosedModel


@dataclass(frozen=True)
class Subject:
    """The model and the settings to inspect.

    Attributes:
        model: folder or name of a model of transformers; None for SmolLM2-135M-Instruct.
        settings: tokenselect settings as JSON.
        device: of torch.
        dtype: of the weights; None for float32 on CPUs, and that of the files elsewhere.
        length: tokens of the built-in passages.
        seed: of the built-in passages.
    """

    model: str | None
    settings: str
    device: str
    dtype: str | None
    length: int
    seed: int

    @property
    def name(self) -> str:
        return self.model or str(ensure_smollm2())

    def given(self) -> dict[str, Any]:
        """The settings as they were given, with those of a profile in its place.

        Raises:
            ValueError: when they are no JSON object, or the profile cannot be used.
        """
        given = json_object(self.settings, "--settings", SUCH_AS)
        if "profile" not in given:
            return given
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.name).get_text_config()
        return resolve_profile(given, ProfileModel.of(self.name, config)).settings

    def method(self, **changed: Any) -> Method:
        """The settings, some of them changed.

        Raises:
            ValueError: when they are no settings, or of reassigned positions.
        """
        method = TokenSelectConfig.from_mapping(self.given() | changed).method
        if method.reassigns_positions:
            raise SettingsError(
                'positions "reassigned" cannot be inspected: transformers hands over keys that are '
                "already rotated. Leave `positions` out."
            )
        return method

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.name)
        tokenizer.model_max_length = 10**9  # no warning about long texts
        return tokenizer

    def described(self, method: Method) -> dict[str, Any]:
        """What the reader of a report must know of it."""
        return {"subject": asdict(self), "settings": asdict(method)}

    def load(self) -> DiagnosedModel:
        dtype = self.dtype or ("float32" if self.device == "cpu" else "auto")
        return DiagnosedModel(self.name, self.device, dtype)
