"""transformers' Trainer with our order of the data, a held-out loss over tokens, and small states.

transformers averages the means of batches, which depends on the micro-batch, and with several processes
weights the examples that fill up the last round wrongly: neither is the loss of the held-out data. Here every
process sums the nats and the learnt tokens of its share, and the sums are added.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer

from irq_export.train.dataset import Collator, EpochOrder, Rows
from irq_export.train.prompts import IGNORED
from irq_export.train.sharding import trained_state

__all__ = ["AdapterTrainer"]


class AdapterTrainer(Trainer):
    """Trains on rows in a given order, and saves what is trained and nothing else.

    Args:
        rows: The training data.
        order: Of the training data.
        held_out: Data to evaluate on, if there is any.
        collator: Makes batches.
        **kwargs: Of transformers' Trainer.
    """

    def __init__(
        self, rows: Rows, order: EpochOrder, held_out: Rows | None, collator: Collator, **kwargs: Any
    ) -> None:
        super().__init__(train_dataset=rows.filled(), eval_dataset=held_out, data_collator=collator, **kwargs)
        self._order = order
        self._held_out = held_out
        self._collator = collator
        self.remove_callback(PrinterCallback)  # prints on stdout, which carries the result

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Log the held-out loss in nats a learnt token: that of any micro-batch and number of devices."""
        size, place, places = (
            self.args.per_device_eval_batch_size,
            self.args.process_index,
            self.args.world_size,
        )
        model = cast("nn.Module", self.model)
        model.eval()
        one = torch.ones((), device=self.args.device)
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # nats, tokens
        for rows in self._held_out.share(size, place, places) if self._held_out else ():
            batch = self._prepare_inputs(self._collator(rows))
            with torch.no_grad(), self.compute_loss_context_manager():
                nats = model(**batch, num_items_in_batch=one).loss
            tokens = (batch["labels"][:, 1:] != IGNORED).sum()  # the label of position 0 is never used
            sums += torch.stack([nats.double(), tokens.double()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; of a sharded model nothing else is gathered: the base is on disk."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = trained_state(cast("nn.Module", self.model))
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
