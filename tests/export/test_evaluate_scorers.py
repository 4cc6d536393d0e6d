"""Log-likelihoods: every runtime against a plain loop over the torch model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from irq_export.evaluate.questions import Question, Request, encode_pair, requests_of
from irq_export.evaluate.scorers import LlamaCppScorer, Scorer, engine_scorer, reference_scorer
from irq_export.evaluate.torch_scorer import TorchScorer
from irq_export.parity.llamacpp import LlamaCpp
from irq_formats.errors import UsageError
from irq_runtime.engine import Engine
from irq_runtime.reference import load_model
from tests.tiny_files import write_stock
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import save_tiny_tokenizer
from tests.tolerance import LOGLIKELIHOOD_FLOAT32, LOGLIKELIHOOD_FLOAT64

CONTEXT = 64


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", seed=3)


@pytest.fixture(scope="module")
def gguf(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scorers") / "m.gguf"
    write_stock(path, model)
    return path


@pytest.fixture(scope="module")
def requests_() -> list[Request]:
    """Choices of one context, a context that grows, equal requests, one too long, single tokens."""
    rng = np.random.default_rng(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(0, 259, n))

    context, other = tokens(20), tokens(7)
    requests = [Request(context, tokens(n)) for n in (1, 1, 5, 2)]
    requests += [Request(context + other, tokens(3)), Request(context[:9], tokens(4)), Request(other, other)]
    requests += [requests[2], Request(tokens(90), tokens(6)), Request(tokens(1), tokens(1))]
    return requests


def plain_loop(model: PreTrainedModel, requests: list[Request]) -> list[tuple[float, bool]]:
    """One forward pass a request, in float64; what does not fit is cut off in front."""
    model = model.double()
    found = []
    for request in requests:
        read = list(request.context + request.continuation)[-CONTEXT - 1 :][:-1]
        with torch.no_grad():
            logits = model(torch.tensor([read])).logits[0, -len(request.continuation) :]
        target = torch.tensor(request.continuation)
        total = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
        found.append((total, bool((logits.argmax(-1) == target).all())))
    return found


@pytest.fixture(scope="module")
def expected(requests_: list[Request]) -> list[tuple[float, bool]]:
    return plain_loop(tiny_model("llama", seed=3), requests_)


def check(
    scorer: Scorer, requests: list[Request], expected: list[tuple[float, bool]], tolerance: float
) -> None:
    done: list[int] = []
    scores = scorer.score(requests, done.append)
    assert done[-1] == len(requests)
    assert done == sorted(done)
    for score, (logprob, greedy), request in zip(scores, expected, requests, strict=True):
        assert abs(score.logprob - logprob) <= tolerance * len(request.continuation)
        assert score.greedy in (greedy, None)


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_torch_batches_change_nothing(
    requests_: list[Request], expected: list[tuple[float, bool]], batch_tokens: int
) -> None:
    model = tiny_model("llama", seed=3).double()
    scorer = TorchScorer(model, max_length=CONTEXT, batch_tokens=batch_tokens)
    check(scorer, requests_, expected, LOGLIKELIHOOD_FLOAT64)


def test_torch_reads_equal_sequences_once(model: PreTrainedModel) -> None:
    """The four letters of a question cost one sequence."""
    calls: list[torch.Size] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    TorchScorer(model).score([Request((1, 2, 3), (letter,)) for letter in (5, 6, 7, 8)])
    handle.remove()
    assert calls == [torch.Size([1, 3])]


RUNTIMES: dict[str, Callable[[Path], Scorer]] = {
    "native exact": lambda path: engine_scorer(Engine(path, context=CONTEXT)),
    "reference float64": lambda path: reference_scorer(load_model(path), np.float64),
    "reference float32": lambda path: reference_scorer(load_model(path)),
}


@pytest.mark.parametrize("name", RUNTIMES)
def test_caches_change_nothing(
    gguf: Path, requests_: list[Request], expected: list[tuple[float, bool]], name: str
) -> None:
    scorer = RUNTIMES[name](gguf)
    assert scorer.name == name
    scorer.max_length = CONTEXT
    tolerance = LOGLIKELIHOOD_FLOAT64 if name.endswith("64") else LOGLIKELIHOOD_FLOAT32
    check(scorer, requests_, expected, tolerance)
    check(scorer, requests_[::-1], expected[::-1], tolerance)


def test_shared_contexts_are_read_once(gguf: Path) -> None:
    engine = Engine(gguf, context=CONTEXT)
    scorer = engine_scorer(engine)
    read: list[int] = []
    for name in ("_last", "_each"):
        step = getattr(scorer, name)
        setattr(scorer, name, lambda tokens, step=step: (read.append(len(tokens)), step(tokens))[1])
    context = tuple(range(30))
    scorer.score([Request(context, (i, i + 1, i + 2)) for i in range(4)])
    assert read == [30, 2, 2, 2, 2]
    scorer.score([Request((*context[:25], 99, 98), (1,))])
    assert read[-1] == 2


def test_a_failed_request_leaves_no_wrong_cache(gguf: Path) -> None:
    """After an error in the middle the next answer is that of a fresh scorer."""
    scorer = engine_scorer(Engine(gguf, context=CONTEXT))
    good = Request((5, 6, 7, 8), (9, 10))
    first = scorer.score([good])
    with pytest.raises(UsageError):
        scorer.score([Request((5, 6, 7, 9999), (1,))])
    with pytest.raises(UsageError):
        scorer.score([Request(good.context, (9999, 1))])
    assert scorer.score([good])[0].logprob == pytest.approx(first[0].logprob, abs=LOGLIKELIHOOD_FLOAT32)


def test_llama_cpp(
    model: PreTrainedModel, requests_: list[Request], expected: list[tuple[float, bool]], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    from tests.export.parity.test_llamacpp import write_base

    write_base(tmp_path / "m.gguf", model)
    fits = [i for i, r in enumerate(requests_) if len(r.context + r.continuation) < CONTEXT - 1]
    assert len(fits) == len(requests_) - 1
    with LlamaCpp(tmp_path / "m.gguf", ctx=CONTEXT - 1, threads=1) as server:
        scorer = LlamaCppScorer(server)
        check(scorer, [requests_[i] for i in fits], [expected[i] for i in fits], LOGLIKELIHOOD_FLOAT32)


def test_requests() -> None:
    with pytest.raises(UsageError, match="needs a context"):
        Request((), (1,))
    with pytest.raises(UsageError, match="longer than the model"):
        Request((1,), tuple(range(9))).fitted(8)
    assert Request((1, 2, 3), (4, 5)).fitted(3) == Request((2, 3), (4, 5))
    assert Request((1, 2, 3), (4, 5)).fitted(4) == Request((1, 2, 3), (4, 5))


def test_blanks_belong_to_the_continuation(tmp_path: Path) -> None:
    tokenizer = save_tiny_tokenizer(tmp_path, bos=False)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    pair = encode_pair(encode, "The quick ", " brown")
    assert tokenizer.decode(pair.context) == "The quick"
    assert tokenizer.decode(pair.continuation) == "  brown"
    assert list(pair.context + pair.continuation) == encode("The quick  brown")


def test_examples_are_dropped_until_they_fit() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    question = Question(("Q?",) * 2, ("a", "b"), 0, header="head ", shots=("one ", "two ", "three "))
    whole = requests_of(question, encode, 100)
    assert bytes(whole[0].context) == b"head one two three Q?"
    assert bytes(requests_of(question, encode, len(b"head one two Q? a"))[1].context) == b"head one two Q?"
    assert bytes(requests_of(question, encode, 3)[0].context) == b"head Q?"
