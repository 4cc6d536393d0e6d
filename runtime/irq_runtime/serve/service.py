"""From a parsed request to what is to be generated."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass, replace

from irq_formats.errors import MalformedFile, UsageError
from irq_runtime.serve.errors import NoSuchModel, PromptTooLong
from irq_runtime.serve.generation import Generation
from irq_runtime.serve.options import ServeOptions
from irq_runtime.serve.requests import ChatRequest, CompletionRequest, Request
from irq_runtime.serve.scheduler import Scheduler
from irq_runtime.tokenizer import Tokenizer

__all__ = ["Service"]


@dataclass(frozen=True)
class Service:
    """What the endpoints need.

    Attributes:
        options: The operator's.
        tokenizer: The model's.
        scheduler: Runs generations.
        vocab_size: Tokens the model knows.
        context: Positions a text may have.
    """

    options: ServeOptions
    tokenizer: Tokenizer
    scheduler: Scheduler
    vocab_size: int
    context: int

    def completion(self, request: CompletionRequest) -> list[Generation]:
        """Return what a completion asks for, ``n`` generations for each prompt.

        Raises:
            UsageError: There are more texts than can wait, or a prompt is empty or holds an unknown token.
            PromptTooLong: A prompt exceeds the limit.
            NoSuchModel: Another model is asked for.
        """
        self.check_model(request.model)
        most = self.options.queue + self.options.sequences
        if len(request.prompt) * request.n > most:
            raise UsageError("too many texts", expected=f"at most {most}", hint="Send several requests")
        prompts = [self._tokens(prompt) for prompt in request.prompt]
        generations = self._generations(request, prompts, request.logprobs)
        if not request.echo:
            return generations
        texts = [self._text(prompt) for prompt in request.prompt for _ in range(request.n)]
        return [replace(asked, echo=text) for asked, text in zip(generations, texts, strict=True)]

    def chat(self, request: ChatRequest) -> list[Generation]:
        """Return what a chat asks for, ``n`` generations.

        Raises:
            UsageError: The model has no chat template, it refuses the messages or fails on them, or a token
                is unknown.
            PromptTooLong: The conversation exceeds the limit.
            NoSuchModel: Another model is asked for.
        """
        self.check_model(request.model)
        if self.tokenizer.chat_template is None:
            raise UsageError("the model has no chat template", hint="Use /v1/completions")
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            text = self.tokenizer.render_chat(messages, variables=request.chat_template_kwargs)
        except MalformedFile as error:  # a server cannot tell a broken template from what it does not expect
            raise UsageError("the chat template fails on this request", got=error.got) from error
        prompt = self.tokenizer.encode(text, add_special=False)
        return self._generations(request, [prompt], request.top_logprobs if request.logprobs else None)

    def check_model(self, asked: str | None) -> None:
        """Raise NoSuchModel if another model than the served one is asked for."""
        if asked is not None and asked != self.options.model_name:
            raise NoSuchModel("no such model", expected=self.options.model_name, got=asked[:200])

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            bos = self.tokenizer.bos
            return self.tokenizer.encode(prompt) or ([] if bos is None else [bos])
        return prompt

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _generations(
        self, request: Request, prompts: list[list[int]], logprobs: int | None
    ) -> list[Generation]:
        limit = min(self.options.max_prompt or self.context, self.context - 1)
        if not prompts:
            raise UsageError("no prompt")
        for prompt in prompts:
            if not prompt:
                raise UsageError("the prompt is empty")
            self._check_tokens(prompt)  # of texts too: a tokenizer may know more than the model
            if len(prompt) > limit:
                raise PromptTooLong(
                    "the prompt is too long", expected=f"at most {limit} tokens", got=len(prompt)
                )
        self._check_tokens(request.logit_bias)
        first = secrets.randbits(32) if request.seed in (None, -1) else request.seed
        return [
            Generation(
                tuple(prompt),
                request.sampling(
                    self.context - len(prompt), (first + copy) % (1 << 64), self.tokenizer.stop_tokens
                ),
                tuple(request.stop),
                logprobs,
            )
            for prompt in prompts
            for copy in range(request.n)
        ]

    def _check_tokens(self, tokens: Collection[int]) -> None:
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < self.vocab_size:
                raise UsageError("no such token", expected=f"0 to {self.vocab_size - 1}", got=token)
