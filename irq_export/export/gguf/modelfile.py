"""The Modelfile with which Ollama runs a stock pair.

Ollama has templates of its own (Go's ``text/template``) and recognises some jinja templates inside a
GGUF. A TEMPLATE is written only where the checkpoint's chat template renders exactly what one of the two
formats below renders; otherwise a comment says that it is left to Ollama.
"""

from __future__ import annotations

from dataclasses import dataclass

from irq_formats.errors import IrqError
from irq_runtime.chat_template import render_template

__all__ = ["MODELFILE_NAME", "modelfile"]

MODELFILE_NAME = "Modelfile"

_CHAT = (("system", "Be brief."), ("user", "Hi {there}"), ("assistant", "Hello."), ("user", "2 + 2?"))


@dataclass(frozen=True)
class _Format:
    """A chat format: how one message looks, in Python and in Go.

    Attributes:
        message: Format string of one message.
        opening: What precedes the reply.
        go: Ollama's template.
    """

    message: str
    opening: str
    go: str


_CHATML = _Format(
    "<|im_start|>{role}\n{content}<|im_end|>\n",
    "<|im_start|>assistant\n",
    "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n",
)
_LLAMA3 = _Format(
    "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
    "{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
)


def modelfile(base_name: str, adapter_name: str | None, chat_template: str | None, bos: str) -> str:
    """Return the text of a Modelfile.

    Args:
        base_name: File beside it.
        adapter_name: Adapter beside it, or None.
        chat_template: The checkpoint's jinja template, or None.
        bos: Text of the beginning-of-sequence token, which runtimes add themselves.
    """
    lines = [f"FROM ./{base_name}"]
    if adapter_name is not None:
        lines += [
            "# Required: part of the base's weights (block offsets) is in the adapter.",
            f"ADAPTER ./{adapter_name}",
        ]
    found = _recognise(chat_template, bos) if chat_template else None
    if found:
        lines.append(f'TEMPLATE """{found.go}"""')
    elif chat_template:
        lines.append("# TEMPLATE: left to Ollama, which reads tokenizer.chat_template from the file.")
    else:
        lines.append("# TEMPLATE: none, the model has no chat template.")
    return "\n".join(lines) + "\n"


def _recognise(template: str, bos: str) -> _Format | None:
    """Return the format that renders a conversation exactly as the template does."""
    messages = [{"role": role, "content": content} for role, content in _CHAT]
    variables = {"messages": messages, "add_generation_prompt": True, "bos_token": bos, "eos_token": ""}
    try:
        rendered = render_template(template, variables)
    except IrqError:
        return None
    for known in (_CHATML, _LLAMA3):
        text = "".join(known.message.format(**message) for message in messages) + known.opening
        if rendered.removeprefix(bos) == text:
            return known
    return None
