"""Chat templates: what transformers renders, and nothing worse than an error of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from irq_formats.errors import MalformedFile, UsageError
from irq_runtime.chat_template import render_template
from irq_runtime.tokenizer import Tokenizer

MESSAGES = [
    {"role": "user", "content": "Hi {{ 7 * 7 }} <b> & 'é'"},
    {"role": "assistant", "content": "yes\n"},
]


def with_template(template: str | None) -> Tokenizer:
    model = tokenizers.Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, []))
    return Tokenizer(model, bos=0, stop_tokens=(1,), chat_template=template)


class TestRender:
    def test_a_real_template(self, shared_data: Path) -> None:
        folder = shared_data / "models" / "smollm2-135m-instruct"
        template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        expected = AutoTokenizer.from_pretrained(folder)
        for prompt in (True, False):
            assert with_template(template).render_chat(MESSAGES, prompt) == expected.apply_chat_template(
                MESSAGES, tokenize=False, add_generation_prompt=prompt
            )

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{% generation %}{{ m }}{{ loop.index }}{% endgeneration %}{% endfor %}",
            "{% generation %}{% set seen = 1 %}{{ seen }}{% endgeneration %}{{ seen }}",
            "{%- generation -%} a {%- endgeneration -%} b",
            "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}x",
            "{% if tools is defined and documents is defined %}x{% endif %}",
            "{{ messages | tojson(ensure_ascii=False) }}{{ messages | tojson(True) }}",
            "{{ messages | tojson(indent=2, separators=(',', ': '), sort_keys=True) }}",
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
            "{% if add_generation_prompt %}go{% endif %}\n  {# gone #}\n  {% if true %}\n x\n  {% endif %}\n",
        ],
    )
    def test_equals_transformers(self, template: str) -> None:
        [expected], _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True)
        assert with_template(template).render_chat(MESSAGES) == expected

    def test_variables(self) -> None:
        tokenizer = with_template("{{ bos_token }}{{ messages[0].role }}{{ eos_token }}{{ enable_thinking }}")
        assert tokenizer.render_chat(MESSAGES) == "<s>user</s>"
        assert tokenizer.render_chat(MESSAGES, variables={"enable_thinking": False}) == "<s>user</s>False"
        with pytest.raises(UsageError, match="bos_token"):
            tokenizer.render_chat(MESSAGES, variables={"bos_token": "x"})

    def test_given_tools_are_seen(self) -> None:
        tools: list[dict[str, Any]] = [{"name": "f"}]
        tokenizer = with_template("{{ tools[0].name }}")
        assert tokenizer.render_chat(MESSAGES, variables={"tools": tools}) == "f"


class TestRefusals:
    def test_no_template(self) -> None:
        with pytest.raises(UsageError):
            with_template(None).render_chat(MESSAGES)

    def test_refusal_of_the_template(self) -> None:
        with pytest.raises(UsageError, match="alternate"):
            render_template("{{ raise_exception('roles must alternate') }}", {})

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.append(1) }}",
            "{{ cycler.__init__.__globals__.os.system('true') }}",
            "{% for i in range(10**9) %}{% endfor %}",
            "{% include '/etc/passwd' %}",
            "{% if %}",
            "{% generation %}",
            "{{ 1 / 0 }}",
            "{{ messages[9].content }}",
            "{{ messages.x.y }}",
            "{{ messages | nonsense }}",
            "{{ messages | tojson(indent=messages) }}",
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
            "{{ 'a' * 10**15 }}",
            "{{ strftime_now(1) }}",
        ],
        ids=range(16),
    )
    def test_broken_and_hostile_templates(self, template: str) -> None:
        with pytest.raises(MalformedFile):
            render_template(template, {"messages": MESSAGES})
