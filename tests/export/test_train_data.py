"""Training data: formats told apart or refused, and only what the assistant says is learnt."""

from __future__ import annotations

import gzip
import json
import lzma
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizers import PRE_TOKENIZERS, save_tiny_tokenizer
from transformers import AutoTokenizer

from irq_export.train.config import TrainConfig
from irq_export.train.data_formats import load_conversations
from irq_export.train.dataset import Collator, EpochOrder, Rows, load_rows, pack
from irq_export.train.prompts import IGNORED, Example, encode
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3.14159?"},
    {"role": "assistant", "content": "It's pi, isn't it?"},
    {"role": "user", "content": "東京? Größe!"},
    {"role": "assistant", "content": "  over the lazy dog; 678\n\nThe end "},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": "a", "input": "c", "output": "b", "category": "x"}],
    "dolly": [{"instruction": "a", "context": "c", "response": "b"}],
    "input-output": [{"input": "a", "output": "b"}],
    "prompt-completion": [{"prompt": "a", "completion": "b", "template": "t"}],
    "messages": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    "oasst": [
        {"message_id": 1, "parent_id": None, "role": "prompter", "text": "a", "rank": None},
        {"message_id": 2, "parent_id": 1, "role": "assistant", "text": "worse", "rank": 1},
        {"message_id": 3, "parent_id": 1, "role": "assistant", "text": "b", "rank": 0},
        {"message_id": 4, "parent_id": 3, "role": "prompter", "text": "never answered", "rank": 0},
    ],
}


def write(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def tokenizer_of(directory: Path, kind: str = "gpt-2", template: str | None = None, bos: bool = True) -> Any:
    directory.mkdir(exist_ok=True)
    save_tiny_tokenizer(directory, kind, bos=bos, chat_template=template)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "</s>"}))
    return AutoTokenizer.from_pretrained(str(directory))


def learnt(tokenizer: Any, example: Example) -> list[str]:
    """The stretches of text that are learnt."""
    stretches: list[list[int]] = []
    for i, label in enumerate(example.labels):
        if label != IGNORED:
            if i == 0 or example.labels[i - 1] == IGNORED:
                stretches.append([])
            stretches[-1].append(int(label))
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in stretches]


@pytest.mark.parametrize("name", ROWS)
def test_formats_are_told_by_their_keys(name: str, tmp_path: Path) -> None:
    found, conversations = load_conversations(write(tmp_path / "data.json", ROWS[name]))
    assert found == name
    assert [(m["role"], m["content"]) for m in conversations[0]] == [("user", "a"), ("assistant", "b")]
    assert conversations[0][0].get("context") == ("c" if name in ("alpaca", "dolly") else None)


def test_flan_keys_are_input_and_output(tmp_path: Path) -> None:
    found, conversations = load_conversations(write(tmp_path / "f.json", [{"inputs": "a", "targets": "b"}]))
    assert found == "input-output"
    assert conversations[0][1]["content"] == "b"


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "only"}],
        [{"prompt": "a", "completion": "b", "input": "c", "output": "d"}],
        [{"instruction": "a", "output": "b", "response": "c"}],
        [{"instruction": "a", "output": "b"}, {"input": "a", "output": "b"}, {"prompt": "x"}],
        [{"messages": [], "conversations": []}],
    ],
)
def test_unclear_formats_are_refused(rows: list[dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not clear"):
        load_conversations(write(tmp_path / "data.json", rows))


def test_a_wanted_format_settles_what_is_unclear(tmp_path: Path) -> None:
    source = write(tmp_path / "d.json", [{"prompt": "a", "completion": "b", "input": "c", "output": "d"}])
    assert load_conversations(source, "prompt-completion")[1][0][1]["content"] == "b"
    with pytest.raises(UsageError, match="not of the format"):
        load_conversations(source, "messages")


def test_files_that_do_not_parse_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl.xz").write_bytes(lzma.compress(b'{"input": "a", "output": "b"}\n\n'))
    assert load_conversations(str(tmp_path / "lines.jsonl.xz"))[0] == "input-output"
    (tmp_path / "bad.jsonl").write_text('{"input": "a"\n')
    (tmp_path / "list.json").write_text("[[1]]")
    (tmp_path / "cut.json.gz").write_bytes(b"no gzip")
    (tmp_path / "null.json").write_text('[{"instruction": "a", "output": null}]')
    (tmp_path / "no.json.bz2").write_bytes(b"no bzip2")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    damaged = bytearray(gzip.compress(json.dumps(ROWS["alpaca"] * 99).encode()))
    damaged[12:40] = b"\xff" * 28
    (tmp_path / "damaged.json.gz").write_bytes(damaged)
    names = [
        "bad.jsonl",
        "list.json",
        "cut.json.gz",
        "null.json",
        "no.json.bz2",
        "deep.json",
        "damaged.json.gz",
    ]
    for name in names:
        with pytest.raises(MalformedFile, match=name):
            load_conversations(str(tmp_path / name))
    for name in ("absent.json", "tatsu-lab/alpaca"):
        with pytest.raises(UsageError, match="no such file"):
            load_conversations(name)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """A string may hold the other line breaks of Unicode as they are, and a mistake is told with its line."""
    row = {"instruction": "a\u2028b\u2029c\u0085d", "output": "yes"}
    lines = [json.dumps(row, ensure_ascii=False)] * 2
    (tmp_path / "lines.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    _, conversations = load_conversations(str(tmp_path / "lines.jsonl"))
    assert [messages[0]["content"] for messages in conversations] == [row["instruction"]] * 2
    (tmp_path / "lines.jsonl").write_text("\n".join([*lines, "{"]), encoding="utf-8")
    with pytest.raises(MalformedFile, match="line 3: not JSON"):
        load_conversations(str(tmp_path / "lines.jsonl"))


def test_conversations_that_begin_with_the_assistant_are_dropped(tmp_path: Path) -> None:
    """ShareGPT has such rows: no template renders the nothing that was asked."""
    turns = [
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "b"},
    ]
    source = write(tmp_path / "d.json", [{"conversations": turns}, *ROWS["sharegpt"]])
    rows = load_rows([source], tokenizer_of(tmp_path, template=CHATML), TrainConfig())
    assert len(rows) == 1
    assert "1 examples, 1 dropped that begin with the assistant" in rows.notes[0]


@pytest.mark.parametrize("kind", [*PRE_TOKENIZERS, "sentencepiece"])
def test_chat_labels_are_what_the_assistant_says(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, kind, CHATML)
    example = encode(tokenizer, TWO_TURNS, "chat")
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert example.ids.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    answers = [turn["content"] + "<|im_end|>" for turn in TWO_TURNS if turn["role"] == "assistant"]
    assert [text.strip() for text in learnt(tokenizer, example)] == [text.strip() for text in answers]
    asked = tokenizer.apply_chat_template(TWO_TURNS[:2], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]  # what the model sees before it answers
    first = int(np.flatnonzero(example.labels != IGNORED)[0])
    assert example.ids[:first].tolist() == ids


def test_templates_that_end_with_the_end_of_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, template=LLAMA2)
    example = encode(tokenizer, TWO_TURNS[1:], "chat")
    assert [text.endswith("</s>") for text in learnt(tokenizer, example)] == [True, True]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no') }}", "refuses"),
        ("{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}", "rewrites"),
        ([{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}], "refuses"),  # no default
    ],
)
def test_templates_that_cannot_be_learnt_from_are_refused(template: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        encode(tokenizer_of(tmp_path, template=template), TWO_TURNS, "chat")


@pytest.mark.parametrize("prompt", ["alpaca", "plain"])
@pytest.mark.parametrize("bos", [True, False])
def test_pairs_learn_the_answer_and_the_end(prompt: str, bos: bool, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, bos=bos)
    messages = [
        {"role": "user", "content": "Q", "context": "C"},
        {"role": "assistant", "content": "The dog."},
    ]
    example = encode(tokenizer, messages, prompt)
    assert learnt(tokenizer, example) == ["The dog.</s>"]
    assert (example.ids[0] == tokenizer.bos_token_id) == bos
    text = tokenizer.decode(example.ids)
    assert ("### Input:\nC" in text) == (prompt == "alpaca")
    with pytest.raises(UsageError, match="chat template"):
        encode(tokenizer, TWO_TURNS, prompt)


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "stories260k-fp32/hf"])
def test_real_tokenizers(model: str, shared_data: Path) -> None:
    """The instruction files, through the tokenizers of two real models."""
    tokenizer = AutoTokenizer.from_pretrained(str(shared_data / "models" / model))
    prompt = "chat" if tokenizer.chat_template else "alpaca"
    _, conversations = load_conversations(str(shared_data / "instruct" / "alpaca_en_demo_1k.json"))
    for messages in conversations[:60]:
        example = encode(tokenizer, messages, prompt)
        (text,) = learnt(tokenizer, example)
        assert text.strip() == (messages[1]["content"] + tokenizer.eos_token).strip()
        first = int(np.flatnonzero(example.labels != IGNORED)[0])
        before = tokenizer.decode(example.ids[:first])
        assert messages[0]["content"].split()[-1] in before
        alone = tokenizer(before, add_special_tokens=False)["input_ids"]
        assert prompt != "chat" or example.ids[:first].tolist() == alone


def examples(lengths: list[int]) -> list[Example]:
    rng = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = rng.integers(0, 259, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 2, IGNORED, ids).astype(np.int32)
        made.append(Example(ids, labels))
    return made


def test_packing_changes_no_loss() -> None:
    made = examples([9, 21, 14, 30, 5, 17])
    rows = pack(made, 40)
    assert sorted(id(example) for row in rows for example in row) == sorted(id(example) for example in made)
    assert all(sum(len(example.ids) for example in row) <= 40 for row in rows)
    assert len(rows) < len(made)
    model = tiny_model(attn_implementation="sdpa")
    total = sum(example.targets for example in made)
    packed = Collator(0, packed=True)(rows)
    alone = Collator(0)([(example,) for example in made])
    with torch.no_grad():
        losses = [
            model(**batch, use_cache=False, num_items_in_batch=total).loss.item() for batch in (packed, alone)
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    broken = {
        **packed,
        "position_ids": torch.arange(packed["input_ids"].shape[1]).expand_as(packed["input_ids"]),
    }
    with torch.no_grad():  # the comparison can fail: examples that see each other
        loss = model(**broken, use_cache=False, num_items_in_batch=total).loss.item()
    assert loss != pytest.approx(losses[1], rel=1e-6)


def test_packing_takes_the_first_row_that_fits_and_no_longer_than_sorting() -> None:
    lengths = np.random.default_rng(2).integers(1, 65, 60_000)
    made = [Example(np.zeros(length, np.int32), np.zeros(length, np.int32)) for length in lengths]
    expected: list[list[Example]] = []
    for example in sorted(made[:500], key=lambda example: -len(example.ids)):
        fitting = (row for row in expected if sum(len(e.ids) for e in row) + len(example.ids) <= 64)
        row = next(fitting, None)
        if row is None:
            expected.append(row := [])
        row.append(example)
    assert [[id(e) for e in row] for row in pack(made[:500], 64)] == [
        [id(e) for e in row] for row in expected
    ]
    started = time.monotonic()
    pack(made, 64)
    assert time.monotonic() - started < 5  # 0.2 s; looking at every row took 18 s


@pytest.mark.parametrize("group", [True, False])
def test_order_is_a_function_of_seed_and_epoch(group: bool) -> None:
    lengths = np.random.default_rng(1).integers(1, 500, 1003).tolist()
    order = EpochOrder(lengths, 16, seed=3, group=group)
    first = list(order)
    assert Counter(first) == Counter(range(1003))
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    spread = [np.ptp([lengths[i] for i in first[at : at + 16]]) for at in range(0, 992, 16)]
    assert (np.mean(spread) < 100) == group


@pytest.mark.parametrize("count", [1, 7, 8, 13])
def test_several_devices_learn_every_row_once(count: int) -> None:
    """What fills up their last round has nothing to learn, in training and in evaluation."""
    rows = Rows(tuple((example,) for example in examples(list(range(5, 5 + count)))), ())
    order = list(EpochOrder(rows.lengths, 8, seed=3, group=True, multiple=4))
    assert len(order) % 4 == 0
    assert sorted(order)[:count] == list(range(count))
    filled = rows.filled()
    assert all(not example.targets for i in order if i >= count for example in filled[i])
    shares = [list(rows.share(2, place, 2)) for place in range(2)]
    assert len(shares[0]) == len(shares[1])
    assert {len(batch) for share in shares for batch in share} == {2}
    seen = [row for share in shares for batch in share for row in batch]
    numbers = {id(row): i for i, row in enumerate(rows.rows)}
    assert sorted(numbers[id(row)] for row in seen if id(row) in numbers) == list(range(count))
    fillers = Collator(0)([row for row in seen if id(row) not in numbers] or [filled[count]])
    assert (fillers["labels"] == IGNORED).all()
    assert (fillers["attention_mask"].sum(dim=1) == 1).all()  # a row that attends to nothing may be NaN


def test_cutting_and_dropping_are_said(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    rows = [
        {"input": "a", "output": "fox " * 100},
        {"input": "dog " * 100, "output": "cut away"},
        {"input": "a", "output": "b"},
    ]
    config = TrainConfig(max_length=40, data=(write(tmp_path / "d.json", rows),))
    loaded = load_rows(config.data, tokenizer, config)
    assert len(loaded) == 2
    assert max(loaded.lengths) == 40
    assert "2 cut to 40 tokens, 1 dropped" in loaded.notes[0]
    assert "input-output, prompt plain, 2 examples" in loaded.notes[0]
    with pytest.raises(UsageError, match="no chat template"):
        load_rows(config.data, tokenizer, TrainConfig(prompt="chat"))
