"""Checkpoints from what people already have.

* bitsandbytes NF4 models, with the QLoRA adapter trained on them: moved bit for bit
  (:mod:`~irq_export.importers.bitsandbytes`).
* Adapters of the released IR-QLoRA code: their base was never stored and is searched again
  (:mod:`~irq_export.importers.released`).
* QA-LoRA's pooled adapters: folded into the offsets of a checkpoint (:mod:`~irq_export.importers.pooled`).
"""
