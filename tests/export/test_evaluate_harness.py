"""Our tasks against EleutherAI's lm-evaluation-harness: its definitions, its requests, its scores.

Runs where the package ``lm_eval`` is installed; the files come from the shared data, nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from irq_export.evaluate.harness import measure_task
from irq_export.evaluate.models import EvaluatedModel, open_model
from irq_export.evaluate.questions import Request
from irq_export.evaluate.tasks import Task, load_task
from tests.tiny_models import save_tiny_model
from tests.tiny_tokenizers import VOCAB_SIZE, save_tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="the optional package lm_eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = {
    "arc_easy": [
        {
            "question": f"Why {i}?",
            "choices": {"text": ["red hat", "cat", "bats", "a fox"], "label": list("ABCD")},
        }
        | {"answerKey": "ABCD"[i % 4]}
        for i in range(12)
    ],
    "openbookqa": [
        {"question_stem": f"The fox {i}", "choices": {"text": ["jumps", "is lazy "], "label": ["A", "B"]}}
        | {"answerKey": "AB"[i % 2]}
        for i in range(12)
    ],
    "piqa": [{"goal": f"To {i}", "sol1": "jump over", "sol2": "sleep", "label": i % 2} for i in range(12)],
    "boolq": [
        {"passage": "The dog is lazy.", "question": f"is the fox {i}", "label": i % 2} for i in range(12)
    ],
    "winogrande": [
        {"sentence": f"The fox beat the dog {i} as the _ was quick.", "option1": "fox", "option2": "dog"}
        | {"answer": "12"[i % 2]}
        for i in range(12)
    ],
    "hellaswag": [
        {"activity_label": "Jump", "ctx_a": f"A fox {i} jumps.", "ctx_b": "the dog", "label": str(i % 4)}
        | {"endings": ["sleeps [step] on", "barks", "runs  away", " [title] is lazy"]}
        for i in range(12)
    ],
}
FILES = {"arc_easy": "test", "openbookqa": "test"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EvaluatedModel]:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "llama", vocab_size=VOCAB_SIZE)
    save_tiny_tokenizer(path)
    with open_model(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def manager() -> object:
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.mark.slow(reason="lm_eval indexes thousands of task files and compiles templates: a minute")
@pytest.mark.parametrize("name", ROWS)
def test_scores_are_those_of_lm_eval(
    name: str, model: EvaluatedModel, manager: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from irq_export.evaluate.lm_eval_model import HarnessModel

    split = FILES.get(name, "validation")
    file = tmp_path / name / f"{split}.jsonl"
    file.parent.mkdir()
    file.write_text("\n".join(map(json.dumps, ROWS[name])))
    rows = datasets.Dataset.from_list(ROWS[name])
    local = datasets.DatasetDict(dict.fromkeys(["train", "validation", "test"], rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: local)
    theirs = lm_eval.simple_evaluate(
        model=HarnessModel(model),
        tasks=[name],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    task = load_task(name, tmp_path)
    assert isinstance(task, Task)
    measures = measure_task(task, lambda text: model.tokenizer.encode(text, add_special=False), model.scorer)
    metrics = {m.partition(",")[0] for m in theirs["results"][name] if re.match(r"acc(_norm)?,", m)}
    assert metrics == {measure.name for measure in measures}
    for measure in measures:
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert [sample[measure.name] for sample in samples] == measure.samples.tolist()
        assert theirs["results"][name][f"{measure.name},none"] == pytest.approx(measure.value)
        texts = [list(pair) for sample in samples for pair in sample["arguments"]]
        ours = [
            [context, f" {choice}"]
            for question in task.questions
            for context, choice in zip(question.contexts, question.choices, strict=True)
        ]
        assert texts == ours


@pytest.mark.parametrize("context", ["", " ", "\n\n"])
def test_blanks_alone_are_no_context(context: str, model: EvaluatedModel) -> None:
    """The blanks at the end of a context belong to the continuation; before them stands BOS."""
    from lm_eval.api.instance import Instance

    from irq_export.evaluate.lm_eval_model import HarnessModel

    asked = [Instance("loglikelihood", {}, (context, "the fox"), 0)]
    ((logprob, _),) = HarnessModel(model).loglikelihood(asked)
    tokens = tuple(model.tokenizer.encode(f"{context}the fox", add_special=False))
    (score,) = model.scorer.score([Request((model.tokenizer.bos,), tokens)])
    assert logprob == pytest.approx(score.logprob)
