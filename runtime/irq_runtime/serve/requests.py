"""What clients may send: OpenAI's fields, those of llama.cpp and vLLM for samplers, and their limits."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from irq_runtime.sampling import SamplingParams

__all__ = ["ChatRequest", "CompletionRequest", "Request"]

#: Fields that would change the reply, which this server cannot do, and their values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "functions": ([],),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}


def _whole_text(text: str) -> str:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("not_unicode", "half of a surrogate pair is not a character")
    return text


_Text = Annotated[str, AfterValidator(_whole_text)]
_Stop = Annotated[_Text, Field(max_length=256)]
_FIRST_FAULT = Field(fail_fast=True)  # a list of all faults takes seconds
_Tokens = Annotated[list[Annotated[int, Field(strict=True)]], _FIRST_FAULT]

#: Below, a temperature is greedy: dividing by it would overflow.
_GREEDY_BELOW = 1e-5


class StreamOptions(BaseModel):
    """Of a streamed reply."""

    include_usage: bool = False


class Request(BaseModel):
    """Fields of both endpoints; null means the default, unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    model: _Text | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] = []
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        for name, neutral in _UNSUPPORTED.items():
            if name in given and given[name] not in neutral:
                raise PydanticCustomError("unsupported", "{name} is not supported", {"name": name})
        return given

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, seed: int, stop_tokens: tuple[int, ...]) -> SamplingParams:
        """Return the sampler's parameters."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature if self.temperature >= _GREEDY_BELOW else 0.0,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            stop_tokens=stop_tokens,
        )


class CompletionRequest(Request):
    """Body of ``/v1/completions``."""

    prompt: _Text | _Tokens | Annotated[list[_Text], _FIRST_FAULT] | Annotated[list[_Tokens], _FIRST_FAULT]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        return [tokens] if tokens else [item for item in self.prompt if not isinstance(item, int)]


class TextPart(BaseModel):
    """A piece of a message; only text."""

    type: str = Field(pattern="^text$")
    text: _Text


class Message(BaseModel):
    """One turn of a conversation."""

    role: _Text = Field(min_length=1, max_length=64)
    content: _Text | Annotated[list[TextPart], _FIRST_FAULT] | None = None

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
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
