"""The Modelfile with which Ollama runs a stock pair.

Ollama has templates of its own (Go's ``text/template``) and recognises some jinja templates inside a
GGUF. A TEMPLATE is written only where the checkpoint's chat template renders exactly what one of the two
formats below renders, with a SYSTEM where it says something of its own to a conversation without a system
message; otherwise a comment says that it is left to Ollama. The template is the checkpoint's,
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

_Chat = tuple[tuple[str, str], ...]
_CHAT: _Chat = (("system", "Be brief."), ("user", "Hi {there}"), ("assistant", "Hello."), ("user", "2 + 2?"))


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

    @property
    def mark(self) -> str:
        """Return the token with which a message begins."""
        return self.message.partition("{")[0]

    def text(self, chat: _Chat) -> str:
        """Return a conversation and the opening of the reply."""
        return "".join(self.message.format(role=role, content=text) for role, text in chat) + self.opening


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
        known, system = found
        lines.append(f'TEMPLATE """{known.go}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
    elif chat_template:
        lines.append("# TEMPLATE: left to Ollama, which reads tokenizer.chat_template from the file.")
    else:
        lines.append("# TEMPLATE: none, the model has no chat template.")
    return "\n".join(lines) + "\n"


def _recognise(template: str, bos: str) -> tuple[_Format, str] | None:
    """Return the format that renders conversations exactly as the template does, and its system message.

    That is what the template says to a conversation without one; often nothing.
    """
    known = next((one for one in (_CHATML, _LLAMA3) if one.mark in template), None)
    if known is None or "strftime_now" in template:
        return None  # other formats need not be rendered; what changes by the day cannot be written down
    whole, rest = _render(template, bos, _CHAT), _render(template, bos, _CHAT[1:])
    start = _between(whole, "", known.text(_CHAT))
    if start not in ("", bos):
        return None
    said = _between(rest, start, known.text(_CHAT[1:]))
    if not said:
        return None if said is None else (known, "")
    before, _, after = known.message.replace("{role}", "system").partition("{content}")
    system = _between(said, before, after)
    return None if system is None or '"""' in system else (known, system)


def _between(text: str | None, before: str, after: str) -> str | None:
    """Return what stands between two texts; None if that is not how it begins and ends."""
    if text is None or len(text) < len(before) + len(after):
        return None
    if not text.startswith(before) or not text.endswith(after):
        return None
    return text[len(before) : len(text) - len(after)]


def _render(template: str, bos: str, chat: _Chat) -> str | None:
    """Render a template in a process of its own; return None if it fails, or takes too much."""
    variables = {
        "messages": [{"role": role, "content": content} for role, content in chat],
        "add_generation_prompt": True,
        "bos_token": bos,
        "eos_token": "",
    }
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
