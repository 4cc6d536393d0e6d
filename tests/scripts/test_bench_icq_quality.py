"""The page of ``scripts/bench_icq_quality.py`` speaks of the model and the windows it is of."""

from __future__ import annotations


def test_page_of_a_short_run() -> None:
    from bench_icq_quality import page

    setting = {"model": "demo", "weights": 10, "block_size": 64, "length": 8, "windows": 3, "text": "a.txt"}
    windows = {"nll": [1.0, 2.0, 3.0], "kl": [0.1, 0.2, 0.3]}
    row = windows | {"bits_per_weight": 4.5, "entropy": 3.5, "rel_mse": 0.01}
    results = {"setting": setting | {"device": "CPU"}, "base": windows, "f32/nf4/plain": row}
    text = page(results)
    assert "over the first 3 windows" in text
    assert "| perplexity, 3 | KL, 3 |" in text
    assert "SmolLM2" not in text
    assert "Q4_1" not in text  # what is read out of the tables of SmolLM2
    assert "Q4_1" in page(results, first=results)
