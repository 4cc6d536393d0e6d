"""The arms of scripts/reproduce_paper.py compute what transformers and irq_export.iec compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch

from irq_export.iec import IecLinear

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


def test_arms_equal_transformers_with_iec_modules() -> None:
    """Two arms, two seeds, with and without IEC: losses and gradients are those of the modules themselves."""
    from _reproduce_model import KINDS, MODULES, Adapters, Arms, Shape, Weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    models = [LlamaForCausalLM(config).double().requires_grad_(False) for _ in range(2)]
    models[1].model.embed_tokens.weight.copy_(models[0].model.embed_tokens.weight)
    shape = Shape.from_config(config.to_dict())
    layers = [model.model.layers for model in models]
    linears = {
        kind: torch.stack(
            [torch.stack([arm[i].get_submodule(MODULES[kind]).weight for arm in layers]) for i in range(2)]
        )
        for kind in KINDS
    }
    weights = Weights(
        models[0].model.embed_tokens.weight, torch.ones(5, 64, dtype=torch.float64), linears
    )  # fresh norms are ones
    adapters = Adapters(shape, [3, 4], [True, False], [True, False], rank=12, scaling=0.5)
    with torch.no_grad():
        for table in (adapters.a, adapters.b):
            for kind in KINDS:
                table[kind] = torch.randn_like(table[kind]).double().mul_(0.1).requires_grad_()
        adapters.beta = torch.randn_like(adapters.beta).double().requires_grad_()
    arms = Arms(shape, weights, adapters)
    tokens = torch.randint(50, (2, 3, 8))
    positions, targets = torch.tensor([[0, 5, 9], [1, 2, 20]]), torch.randint(50, (2, 3))
    targets[1, 2] = -100
    losses = arms.losses(tokens, positions, targets)
    losses.sum().backward()

    for arm, model in enumerate(models):
        wrapped = {}
        for layer in range(2):
            for index, kind in enumerate(KINDS):
                name = f"model.layers.{layer}.{MODULES[kind]}"
                module = IecLinear(model.get_submodule(name), 12, scaling=0.5, dtype=torch.float64)
                with torch.no_grad():
                    module.lora_a.copy_(adapters.a[kind][layer, arm])
                    module.lora_b.copy_(adapters.b[kind][layer, arm])
                    beta = adapters.beta[index, :, layer, arm] * (1.0 if arm == 0 else 0.0)
                    module.beta1.fill_(beta[0])
                    module.beta2.fill_(beta[1])
                model.set_submodule(name, module)
                wrapped[kind, layer] = module
        logits = model(tokens[arm]).logits.flatten(0, 1)[positions[arm]]
        loss = torch.nn.functional.cross_entropy(logits, targets[arm], ignore_index=-100)
        loss.backward()
        torch.testing.assert_close(losses[arm], loss.float(), rtol=1e-5, atol=0)
        for (kind, layer), module in wrapped.items():
            for ours, theirs in ((adapters.a, module.lora_a), (adapters.b, module.lora_b)):
                torch.testing.assert_close(ours[kind].grad[layer, arm], theirs.grad, rtol=1e-3, atol=1e-7)
            got = adapters.beta.grad[KINDS.index(kind), :, layer, arm]
            expected = torch.cat([module.beta1.grad, module.beta2.grad]) * (1.0 if arm == 0 else 0.0)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)


def test_clip_bounds_each_arm_alone() -> None:
    from _reproduce_model import Adapters, Shape

    shape = Shape(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocab=8, eps=1e-5, theta=1e4)
    adapters = Adapters(shape, [0, 0], [True, True], [True, True], rank=8, scaling=1.0)
    for p in adapters.parameters():
        p.grad = torch.zeros_like(p)
    adapters.beta.grad[0, 1, 1, 0] = 3.0
    adapters.a["q"].grad[1, 0, 2, 5] = 4.0
    adapters.b["v"].grad[0, 1, 0, 0] = 0.2
    norms = adapters.clip(0.5)
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.2]))
    torch.testing.assert_close(adapters.beta.grad[0, 1, 1, 0], torch.tensor(0.3))
    torch.testing.assert_close(adapters.a["q"].grad[1, 0, 2, 5], torch.tensor(0.4))
    torch.testing.assert_close(adapters.b["v"].grad[0, 1, 0, 0], torch.tensor(0.2))


def test_rows_add_up_over_runs(tmp_path: Path) -> None:
    """A row that is there is not computed again; one of another seed or another number of steps is."""
    from _reproduce_table import compact
    from reproduce_paper import Rows, read_rows

    path, setting = tmp_path / "rows.jsonl", {"base": "a", "rank": 64}
    row = {"model": "m", "stage": "after", "codebook": "nf4", "arm": "QLoRA", "seed": 0, "steps": 5}
    row |= {"data": "instruct"}
    Rows(path, "m", setting).add(row | {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"model": "m", "stage": "aft')  # killed here
    assert len(read_rows(path)) == 1
    again = Rows(path, "m", setting)
    assert again.has(**row)
    assert not again.has(**row | {"seed": 1})
    assert not again.has(**row | {"steps": 6})
    again.add(row | {"seed": 1})
    assert [found["seed"] for found in read_rows(path)] == [0, 1]
    assert [compact(found) for found in read_rows(path)] == [row | {"loss": 1.0}, row | {"seed": 1}]


def test_rows_of_another_setting_are_refused(tmp_path: Path) -> None:
    """Another rank, base or number of questions does not pass for what is there."""
    from reproduce_paper import Rows, fingerprint

    path, base = tmp_path / "rows.jsonl", tmp_path / "base.safetensors"
    base.write_bytes(b"weights")
    setting = {"base": fingerprint(base), "rank": 64, "questions": None}
    Rows(path, "m", setting).add({"model": "m", "stage": "before"})
    base.write_bytes(b"other weights")
    for change in ({"rank": 32}, {"base": fingerprint(base)}, {"questions": 10}):
        with pytest.raises(click.UsageError, match="another setting"):
            Rows(path, "m", setting | change)
    Rows(path, "another model", {"base": "b"})


def test_the_page_shows_what_the_rows_say(repo: Path) -> None:
    """Every table of docs/paper.md is what the script prints from the committed rows."""
    from _reproduce_table import compact, tables

    lines = (repo / "docs" / "paper-rows.jsonl").read_text("utf-8").splitlines()
    page = (repo / "docs" / "paper.md").read_text("utf-8")
    assert tables([compact(json.loads(line)) for line in lines]).strip() in page


def test_batches_pair_the_seeds() -> None:
    """Every seed sees every example of a class once before any twice, in batches of one shape."""
    from _reproduce_data import Sequences, batches

    rng = np.random.default_rng(0)
    examples = Sequences.of([([i, *rng.integers(0, 9, int(rng.integers(4, 60)))], 2) for i in range(64)])
    seen: dict[int, list[int]] = {0: [], 1: []}
    for tokens, positions, targets in batches(examples, [0, 1], 40, 4):
        assert tokens.shape[:2] == (2, 4)
        assert positions.shape == targets.shape
        for seed in seen:
            seen[seed] += tokens[seed, :, 0].tolist()
            scored = targets[seed] >= 0
            row, column = np.divmod(positions[seed][scored], tokens.shape[2])
            np.testing.assert_array_equal(tokens[seed, row, column + 1], targets[seed][scored])
    for order in seen.values():
        counts = np.bincount(order, minlength=64)
        short = examples.lengths <= 32
        for group in (counts[short], counts[~short]):
            assert group.max() - group.min() <= 1
    assert seen[0] != seen[1]


def test_sequences_with_one_beginning_are_read_once() -> None:
    """Letters behind a question: the scores of sequences read one by one, from fewer tokens."""
    from _reproduce_data import Sequences
    from _reproduce_eval import log_likelihood
    from _reproduce_model import KINDS, Arms, Shape, Weights

    shape = Shape(layers=1, hidden=64, ffn=96, heads=4, kv_heads=2, vocab=20, eps=1e-5, theta=1e4)
    torch.manual_seed(0)
    linears = {kind: torch.randn((1, 2, *shape.linear(kind))) * 0.2 for kind in KINDS}
    model = Arms(shape, Weights(torch.randn(20, 64), torch.ones(3, 64), linears))
    read = []
    model.watch = lambda kind, layer, x: read.append(x.shape[1]) if kind == "q" else None
    question = list(range(1, 12))
    pairs = [([*question, letter], len(question)) for letter in (3, 5, 7)] + [([4, 9, 2, 8, 6], 2)]
    together = log_likelihood(model, Sequences.of(pairs))
    assert read == [2 * 32]  # two beginnings, padded to a bucket
    alone = np.concatenate([log_likelihood(model, Sequences.of([pair])) for pair in pairs], axis=1)
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    assert len(np.unique(together.round(3))) == together.size


def test_a_subject_counts_once_in_mmlu() -> None:
    """The mean over subjects of the shares of right answers, whatever their sizes."""
    from _reproduce_data import Choices, Sequences
    from _reproduce_eval import _accuracy

    question = np.repeat(np.arange(4), 2)
    choices = Choices(
        Sequences.of([([1, 2], 1)] * 8),
        question,
        gold=np.array([True, False] * 4),
        characters=np.ones(8, int),
        subject=np.repeat([0, 0, 0, 1], 2),
    )
    scores = np.array([[1.0, 0, 0, 1, 0, 1, 1, 0]])  # right, wrong, wrong; right
    assert _accuracy(scores, choices, normalised=False) == pytest.approx((1 / 3 + 1) / 2)
    assert _accuracy(scores[:, :6], choices.first(3), normalised=False) == pytest.approx(1 / 3)


def _questions(gold: list[int]) -> object:
    """Questions of two choices."""
    from _reproduce_data import Choices, Sequences

    right = np.array([[c == g for c in range(2)] for g in gold]).ravel()
    pairs = [([1, 2], 1)] * len(right)
    return Choices(
        Sequences.of(pairs), np.repeat(np.arange(len(gold)), 2), right, np.ones(len(right), np.int32)
    )


def test_the_first_of_equal_choices_counts() -> None:
    """As in `irq-export evaluate`: an answer that shares the first place is not right for it."""
    from _reproduce_eval import _accuracy
    from reproduce_paper_rounding import verdicts

    task = _questions([0, 1, 1, 0])
    scores = np.array([[2.0, 2.0, 3.0, 3.0, 0.0, 1.0, 0.0, 1.0]])  # tied right, tied wrong, right, wrong
    assert _accuracy(scores, task, normalised=False) == pytest.approx(0.5)
    found = verdicts(scores, task)
    assert found.first.tolist() == [[True, False, True, False]]
    assert found.some.tolist() == [[True, True, True, False]]
    assert found.tied.tolist() == [[True, True, False, False]]


def test_arms_in_bfloat16_have_logits_in_float32() -> None:
    """Tokens whose embeddings differ by less than the grid of bfloat16 logits are told apart."""
    from _reproduce_data import Sequences
    from _reproduce_eval import divergence, log_likelihood
    from _reproduce_model import KINDS, Arms, Shape, Weights

    shape = Shape(layers=1, hidden=64, ffn=96, heads=4, kv_heads=2, vocab=8, eps=1e-5, theta=1e4)
    torch.manual_seed(0)
    linears = {kind: torch.zeros((1, 1, *shape.linear(kind)), dtype=torch.bfloat16) for kind in KINDS}
    embedding = torch.full((8, 64), 0.25)
    embedding[3, 0] += 2**-7  # of a logit of 16: 0.008, where bfloat16 steps by 0.125
    weights = Weights(embedding.bfloat16(), torch.ones((3, 64), dtype=torch.bfloat16), linears)
    model = Arms(shape, weights)
    pairs = [([1, 2, choice], 2) for choice in (3, 4)]
    (scores,) = log_likelihood(model, Sequences.of(pairs))
    hidden = model.hidden(torch.tensor([[[1, 2]]]))
    rounded = model.logits(hidden)[0, -1]
    assert rounded[3] == rounded[4]
    assert scores[0] - scores[1] == pytest.approx(2**-7, rel=1e-3)
    assert divergence(model, model, torch.tensor([[1, 2, 3]])).item() == 0


def test_the_page_says_what_the_rounding_was_worth(repo: Path) -> None:
    from reproduce_paper_rounding import table

    lines = (repo / "docs" / "paper-rounding.jsonl").read_text("utf-8").splitlines()
    page = (repo / "docs" / "paper.md").read_text("utf-8")
    assert table([json.loads(line) for line in lines]) in page


def test_tables_say_which_of_equal_choices_was_taken() -> None:
    from _reproduce_table import TASKS, _choices

    row = {"model": "m", "stage": "before", "codebook": "none", "arm": "full", "mmlu": 0.25}
    row |= dict.fromkeys(TASKS, 0.5)
    assert "| boolq, ties right | hellaswag | mean | mmlu, ties right |" in _choices([row], "m", "nf4")[0]
    assert "| boolq | hellaswag | mean | mmlu |" in _choices([row | {"ties": "first"}], "m", "nf4")[0]


def test_tokens_of_large_vocabularies_fit() -> None:
    """Llama 3's and Qwen's do not fit 16 bits."""
    from _reproduce_data import Sequences

    assert Sequences.of([([151_935, 3], 1)]).ids.tolist() == [151_935, 3]


def test_books_are_cut_one_behind_the_other(repo: Path) -> None:
    from _reproduce_data import _book_windows
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(repo / "irq_export" / "demo_model" / "tokenizer.json"))
    books = ["Once upon a time there was a cat. " * 4, "The end of it. " * 9, "never read"]
    ids = [i for book in books[:2] for i in tokenizer.encode(book, add_special_tokens=False).ids]
    found = _book_windows(tokenizer, books, 8, len(ids) // 8)
    assert found.ids.tolist() == ids[: len(ids) // 8 * 8]
    assert set(found.lengths) == {8}
