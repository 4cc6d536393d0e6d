"""What clients may send: OpenAI's fields, those of llama.cpp and vLLM for samplers, and their limits."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from irq_runtime.sampling import SamplingParams

__all__ = ["ChatRequest", "CompletionRequest", "Request"]

#: Fields that this server cannot do, and their values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "typical_p": (1,),
    "mirostat": (0,),
    "grammar": ("",),
}

#: Fields that change no reply, whatever they say.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_prompt",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

#: Other names of fields: llama.cpp's, and OpenAI's newer one.
_ALIASES = {
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}


def _whole_text(text: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("not_unicode", "half of a surrogate pair is not a character")
    return text


def _few(values: Any) -> Any:
    if isinstance(values, dict) and len(values) > _MOST_BIASES:  # before all their faults are listed
        raise PydanticCustomError("too_many", "at most {most} tokens", {"most": _MOST_BIASES})
    return values


def _several(value: Any) -> Any:
    """Return one text, or the tokens of one, as a list of one."""
    is_tokens = isinstance(value, list) and value and not isinstance(value[0], str | list)
    return [value] if isinstance(value, str) or is_tokens else value


def _form(value: Any) -> str:
    return "[list]" if isinstance(value, list) else "[text]"


def _whole_values(values: dict[str, Any]) -> dict[str, Any]:
    _whole_text(json.dumps(values, ensure_ascii=False))
    return values


_Text = Annotated[str, AfterValidator(_whole_text)]
_Stop = Annotated[str, Field(max_length=256), AfterValidator(_whole_text)]
_Token = Annotated[int, Field(ge=0, lt=1 << 31)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_FIRST_FAULT = Field(fail_fast=True)  # a list of all faults takes seconds
_Tokens = Annotated[list[Annotated[int, Strict()]], _FIRST_FAULT]
_TEXT, _LIST = Tag("[text]"), Tag("[list]")
_BY_FORM = Discriminator(_form)  # else a list is told that it is no text
_Prompt = Annotated[Annotated[_Text, _TEXT] | Annotated[_Tokens, _LIST], _BY_FORM]

_MOST_BIASES = 1024

#: Below, a temperature is greedy: dividing by it would overflow.
_GREEDY_BELOW = 1e-5


class StreamOptions(BaseModel):
    """Of a streamed reply."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(BaseModel):
    """Fields of both endpoints; null means the default, and a field that is not known is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: _Text | None = None
    max_tokens: int = Field(-1, ge=-1)  # -1: what the context holds
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[_Token, _Bias], BeforeValidator(_few)] = {}
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)  # -1 is null too, as in llama.cpp and vLLM
    stop: Annotated[list[_Stop], Field(max_length=16), BeforeValidator(_several)] = []
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {
            name: value for name, value in data.items() if value is not None and name not in _WITHOUT_EFFECT
        }
        for alias, name in _ALIASES.items():
            if alias in given and given.setdefault(name, given[alias]) != given.pop(alias):
                raise PydanticCustomError("two_names", "{name} is given twice, and differs", {"name": name})
        for name in given.keys() - cls.model_fields.keys():
            if given.pop(name) not in _NEUTRAL.get(name, ()):
                shown = name[:64].encode("ascii", "backslashreplace").decode()
                raise PydanticCustomError("unsupported", "{name} is not supported", {"name": shown})
        return given

    @model_validator(mode="after")
    def _streamed(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("alone", "stream_options is of a stream")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, room: int, seed: int, stop_tokens: tuple[int, ...]) -> SamplingParams:
        """Return the sampler's parameters, for a context that has room for so many more tokens."""
        return SamplingParams(
            max_tokens=room if self.max_tokens < 0 else min(self.max_tokens, room),
            temperature=self.temperature if self.temperature >= _GREEDY_BELOW else 0.0,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            seed=seed,
            stop_tokens=() if self.ignore_eos else stop_tokens,
        )


class CompletionRequest(Request):
    """Body of ``/v1/completions``."""

    prompt: Annotated[list[_Prompt], _FIRST_FAULT, BeforeValidator(_several)]
    max_tokens: int = Field(16, ge=-1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> CompletionRequest:
        if self.echo and (self.logprobs or 0) > 5:
            raise PydanticCustomError("too_many", "with echo, logprobs is at most 5")
        return self


class TextPart(BaseModel):
    """A piece of a message; only text."""

    type: str = Field(pattern="^text$")
    text: _Text


_Content = Annotated[Annotated[_Text, _TEXT] | Annotated[list[TextPart], _FIRST_FAULT, _LIST], _BY_FORM]


class Message(BaseModel):
    """One turn of a conversation; what else it says of itself is not shown to the template."""

    role: _Text = Field(min_length=1, max_length=64)
    content: _Content | None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)

    @property
    def text(self) -> str:
        """The whole text."""
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content or ())
        )


class ChatRequest(Request):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_whole_values)] = {}
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _shown(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("alone", "top_logprobs needs logprobs: true")
        return self
