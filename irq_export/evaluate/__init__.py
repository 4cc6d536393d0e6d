"""Benchmarks on the trained model and on what was exported from it, with one harness.

A task (:mod:`~irq_export.evaluate.tasks`) is a list of questions read from local files; a scorer
(:mod:`~irq_export.evaluate.scorers`) gives log-likelihoods, whatever runs the model; a measure
(:mod:`~irq_export.evaluate.measures`) knows its standard error and that of a paired difference. So a drop
that an export causes is a number with an error bar.
"""
