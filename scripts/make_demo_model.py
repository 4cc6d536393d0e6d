"""Train the demo model that ships in ``irq_export/demo_model``.

A byte-level BPE vocabulary and a small Llama are trained from scratch on the stories of a
public-domain corpus (`demo_text`), then finished, briefly and at a low rate, on children's tales
and made-up stories, so that greedy text keeps its thread.  Every training window starts at a
paragraph and behind a begin token, so any sentence is a fair prompt.
The weights are rounded to fp16 *before* anything is measured: the card describes the file.

    python scripts/make_demo_model.py --corpus gutenberg_train.txt.xz \
        --index gutenberg_train.index.tsv --held-out gutenberg_val.txt.xz \
        --held-out-index gutenberg_val.index.tsv --out irq_export/demo_model --seed 0
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from demo_text import read_corpus, tell_story
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

log = logging.getLogger("make_demo_model")

BOS, EOS = "<|bos|>", "<|eos|>"
TALES = ("Alcott", "Andersen", "Baum", "Burnett", "Carroll", "Grimm", "Nesbit", "Wilde")  # for the finish
PROMPTS = ("Once upon a time", "The little girl said", "In the forest there lived")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the training run, apart from the corpus."""

    seed: int
    steps: int
    batch: int
    context: int
    learning_rate: float
    warmup: int
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0


# ---------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer; `BOS` is put in front of every encoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return tokenizer


def tokenizer_config(context: int) -> dict[str, object]:
    """The ``tokenizer_config.json`` of transformers; the template makes a story of a conversation."""
    template = (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
        "{% endfor %}"
    )
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": template,
    }


def token_stream(tokenizer: Tokenizer, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode documents one after another.

    Returns:
        Tokens, uint16 (n,), every document closed by `EOS`; and the positions, int64 (m,), at
        which a paragraph begins.
    """
    tokens: list[int] = []
    starts: list[int] = []
    line_feed, eos = tokenizer.token_to_id("Ċ"), tokenizer.token_to_id(EOS)
    for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        starts.append(len(tokens))
        starts += [len(tokens) + i + 1 for i, token in enumerate(encoding.ids) if token == line_feed]
        tokens += [*encoding.ids, eos]
    return np.array(tokens, np.uint16), np.array(starts, np.int64)


# --------------------------------------------------------------------------------------------- model


def model_config(vocabulary: int, context: int) -> LlamaConfig:
    """2.6 M parameters; every linear reads 256 or 512 values, a multiple of any block size in use."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )


def train(model: LlamaForCausalLM, stream: np.ndarray, starts: np.ndarray, recipe: Recipe) -> None:
    """Train in place with AdamW and a cosine schedule; bf16 autocast; compiled on CUDA.

    Args:
        model: fp32 parameters, on the device to train on.
        stream: Tokens, uint16 (n,).
        starts: Positions where a window may begin, int64 (m,).
        recipe: Hyperparameters.
    """
    device = model.device
    cuda = device.type == "cuda"
    tokens = torch.from_numpy(stream.astype(np.int64)).to(device)  # (n,)
    usable = torch.from_numpy(starts[starts + recipe.context <= len(stream)]).to(device)  # (m',)
    last = int(usable[-1]) + 1
    window = torch.arange(recipe.context, device=device)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.learning_rate, betas=recipe.betas, fused=cuda,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / recipe.warmup, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)),
    )
    loss_function = torch.compile(window_loss) if cuda else window_loss
    model.train()
    for step in range(recipe.steps):
        somewhere = torch.randint(last, (recipe.batch,), generator=generator, device=device)
        picked = usable[torch.searchsorted(usable, somewhere)]  # the paragraph after a uniform position
        targets = tokens[picked[:, None] + window]  # (batch, context)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_function(model, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step + 1 == recipe.steps:
            log.info("step %d of %d: loss %.4f", step, recipe.steps, loss.item())


def window_loss(model: LlamaForCausalLM, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy, nats, of token windows (batch, context), each read behind a begin token (id 0)."""
    inputs = F.pad(targets[:, :-1], (1, 0), value=0)  # (batch, context)
    logits = model(input_ids=inputs, use_cache=False).logits  # (batch, context, vocabulary)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, stream: np.ndarray, context: int) -> float:
    """Total nats of a stream (n,) in windows that do not overlap, fp32; a shorter last one is kept."""
    model.eval()
    tokens = torch.from_numpy(stream.astype(np.int64)).to(model.device)
    windows = torch.split(tokens, context)
    batches = [torch.stack(windows[i : min(i + 16, len(windows) - 1)])
               for i in range(0, len(windows) - 1, 16)]  # fmt: skip
    return sum(window_loss(model, batch, "sum").item() for batch in [*batches, windows[-1][None]])


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, length: int = 96) -> str:
    """The prompt and its most likely continuation of ``length`` tokens."""
    model.eval()
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)  # (1, prompt)
    for _ in range(length):
        logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0].tolist())


# -------------------------------------------------------------------------------------------- output


def card(facts: dict[str, object], books: tuple[str, ...], samples: list[str]) -> str:
    """The model card."""
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    quotes = "\n\n".join("> " + sample.replace("\n", "\n>\n> ") for sample in samples)
    shelves: dict[str, list[str]] = {}
    for author, _, title in sorted(book.partition("/") for book in books):
        shelves.setdefault(author, []).append(title)
    titles = "\n".join(f"- {author}: {'; '.join(shelf)}" for author, shelf in shelves.items())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# irq-export demo model

A small Llama that tells stories in the manner of a century ago. It exists so that `irq-export demo`
and the tests have a real, trained model at hand without a download; it is of no other use. It knows
nothing, and its books carry the prejudices of their time. Trained from scratch by
`scripts/make_demo_model.py`, fp32 weights under bf16 autocast, with no thought of quantisation, and
stored as fp16: first on all the books, then briefly on the children's tales among them and on made-up
stories of four plots. What it tells after "Once upon a time" is mostly one of those plots, which is
what keeps greedy text of so small a model readable.

| fact | value |
| --- | --- |
{table}

Perplexity is that of the fp16 file, evaluated in fp32 over windows of the training context that do
not overlap, each behind `{BOS}`. The held-out books are whole books that training never saw.

## Greedy text

{quotes}

## Tokenizer

Byte-level BPE (GPT-2's pre-tokenizer, no prefix space), trained on the same text. `{BOS}` (0) opens
every text, `{EOS}` (1) ends a chapter.

## Licence and provenance

Weights and tokenizer: Apache-2.0. Training text: Project Gutenberg editions of books in the public
domain in the United States, reduced to prose (ASCII, a paragraph a line; front matter, verse and
notes left out); the plots of the made-up stories were written for this project
(`scripts/demo_plots.txt`, Apache-2.0). The training books, under the author, editor or illustrator
the corpus files them by:

{titles}
"""


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--corpus", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--index", type=click.Path(exists=True, path_type=Path), help="Titles of the corpus.")
@click.option("--held-out", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--held-out-index", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--steps", default=9500, show_default=True)
@click.option("--batch", default=128, show_default=True, help="Windows a step.")
@click.option("--context", default=512, show_default=True, help="Tokens a window.")
@click.option("--learning-rate", default=3e-3, show_default=True)
@click.option("--finish-steps", default=400, show_default=True, help="Windows of 256, 16 a step.")
@click.option("--finish-rate", default=6e-4, show_default=True, help="Learning rate of the finish.")
@click.option("--stories", default=6000, show_default=True, help="Made-up stories of the finish.")
@click.option(
    "--start",
    type=click.Path(exists=True, path_type=Path),
    help="Only finish: weights and tokenizer of an earlier run with --finish-steps 0.",
)
@click.option("--vocabulary", default=1024, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--hardware", default=None, help="How the card names the device.")
def main(
    corpus: Path, index: Path | None, held_out: Path, held_out_index: Path | None, out: Path,
    seed: int, steps: int, batch: int, context: int, learning_rate: float, finish_steps: int,
    finish_rate: float, stories: int, start: Path | None, vocabulary: int, device: str,
    hardware: str | None,
) -> None:  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s")
    recipe = Recipe(seed, steps, batch, context, learning_rate, warmup=min(200, max(1, steps // 10)))
    finish = Recipe(seed + 1, finish_steps, 16, 256, finish_rate, warmup=max(1, finish_steps // 10))
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    books, unseen = read_corpus(corpus, index), read_corpus(held_out, held_out_index)
    log.info("%d books, %d characters", len(books.titles), books.characters)
    if start is None:
        tokenizer = train_tokenizer(books.documents, vocabulary)
    else:
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json"))
    stream, starts = token_stream(tokenizer, books.documents)
    unseen_stream, _ = token_stream(tokenizer, unseen.documents)
    log.info("%d training tokens, %d held out", len(stream), len(unseen_stream))

    model = LlamaForCausalLM(model_config(vocabulary, context)).to(device)
    began = time.perf_counter()
    if start is None:
        train(model, stream, starts, recipe)
    else:
        model.load_state_dict(load_file(start / "model.safetensors", device), strict=False)  # tied head
    tales, made_up = read_corpus(corpus, index, TALES).documents, random.Random(seed)
    tales = (*tales, *(tell_story(made_up) for _ in range(stories)))
    if finish_steps:
        train(model, *token_stream(tokenizer, tales), finish)
    seconds = time.perf_counter() - began
    torch.set_float32_matmul_precision("highest")
    for parameter in model.parameters():  # what is measured below is the file, not the run
        parameter.data = parameter.data.half().float()
    nats = held_out_loss(model, unseen_stream, context)
    windows = stream[: len(stream) // context * context].reshape(-1, context)  # (windows, context)
    sample = windows[:: max(1, len(stream) // len(unseen_stream))].ravel()  # as much as is held out
    seen = held_out_loss(model, sample, context) / len(sample)
    samples = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]

    state = {name: tensor.half().contiguous().cpu() for name, tensor in model.state_dict().items()
             if name != "lm_head.weight"}  # fmt: skip
    parameters = sum(tensor.numel() for tensor in state.values())
    facts: dict[str, object] = {
        "parameters": f"{parameters:,}",
        "shape": "hidden 256, 4 layers, 8 heads on 4 key-value heads of 32, feed-forward 512, tied head",
        "vocabulary": f"{vocabulary}",
        "training text": f"{len(books.titles)} books, {books.characters:,} characters, "
        f"{len(stream):,} tokens",
        "sha256 of the training books": f"`{books.raw_sha256}`",
        "held-out text": f"{'; '.join(unseen.titles)}: {unseen.characters:,} characters, "
        f"{len(unseen_stream):,} tokens",
        "sha256 of the held-out books": f"`{unseen.raw_sha256}`",
        "held-out perplexity": f"{math.exp(nats / len(unseen_stream)):.3f} per token",
        "held-out bits per character": f"{nats / math.log(2) / unseen.characters:.4f}",
        "training-text perplexity": f"{math.exp(seen):.3f} per token (a sample of {len(sample):,} tokens)",
        "seed": seed,
        "recipe": describe(recipe) + "; AdamW, cosine to zero, bf16 autocast, no dropout",
        "finish": f"{describe(finish)}; on the tales of {', '.join(TALES)} and "
        f"{stories:,} made-up stories" + ("; begun from the fp16 file of the books" if start else ""),
        "tokens seen": f"{steps * batch * context:,} ({steps * batch * context / len(stream):.1f} epochs), "
        f"then {finish_steps * finish.batch * finish.context:,}",
        "trained on": f"{hardware or device} ({seconds:.0f} s)",
    }
    write_model(out, model.config, tokenizer, state, context)
    (out / "README.md").write_text(card(facts, books.titles, samples), "utf-8")
    click.echo(json.dumps({"facts": facts, "samples": samples}, indent=2))


def describe(recipe: Recipe) -> str:
    """A recipe in words, without its seed."""
    return ", ".join(f"{key} {value}" for key, value in asdict(recipe).items() if key != "seed")


def write_model(
    out: Path, config: LlamaConfig, tokenizer: Tokenizer, state: dict[str, torch.Tensor], context: int
) -> None:
    """Write the Hugging Face directory: weights, configuration, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float16"
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    documents = {
        "config.json": config.to_diff_dict(),
        "tokenizer_config.json": tokenizer_config(context),
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False},
    }
    (out / "model.safetensors").chmod(0o644)
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
