"""The Modelfile with which Ollama runs a stock pair.

Ollama has templates of its own (Go's ``text/template``) and recognises some jinja templates inside a
GGUF. A TEMPLATE is written only where the checkpoint's chat template renders exactly what one of the two
formats below renders; otherwise a comment says that it is left to Ollama. The template is the checkpoint's,
so it is rendered in a process of its own, with little time and memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

__all__ = ["MODELFILE_NAME", "modelfile"]

MODELFILE_NAME = "Modelfile"

#: What a process does that renders a template; limits are set after the imports, which need more.
_RENDER = """
import sys
sys.path[:] = filter(None, sys.path)  # not the current directory
import json, resource
from irq_runtime.chat_template import render_template
given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (2, 2))  # seconds
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))  # bytes
json.dump(render_template(given["template"], given["variables"]), sys.stdout)
"""
_RENDER_SECONDS = 60  # on a machine that is busy

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
    if not any(known.opening[: known.opening.index(">")] in template for known in (_CHATML, _LLAMA3)):
        return None  # other formats need not be rendered
    messages = [{"role": role, "content": content} for role, content in _CHAT]
    variables = {"messages": messages, "add_generation_prompt": True, "bos_token": bos, "eos_token": ""}
    rendered = _render(template, variables)
    for known in (_CHATML, _LLAMA3):
        text = "".join(known.message.format(**message) for message in messages) + known.opening
        if rendered is not None and rendered.removeprefix(bos) == text:
            return known
    return None


def _render(template: str, variables: dict[str, object]) -> str | None:
    """Render a template in a process of its own; return None if it fails, or takes too much."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _RENDER],
            input=json.dumps({"template": template, "variables": variables}),
            capture_output=True,
            text=True,
            timeout=_RENDER_SECONDS,
            check=True,
        )
    except subprocess.SubprocessError:
        return None
    return str(json.loads(done.stdout))
