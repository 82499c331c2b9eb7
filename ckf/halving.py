"""A training step that does not fit into the GPU's memory goes through in halves."""

import logging

import torch

from ckf.processes import process_count

logger = logging.getLogger("ckf.train")


class HalvedSteps:
    """For a Trainer whose collator keeps its rows under "entries" and whose loss is their mean.

    Out of memory, the step is undone and its batch cut in two, whose gradients add up to the
    whole's; later batches are cut alike. The trainer multiplies its loss by ``loss_share``.
    """

    loss_share = 1.0
    _parts = 1

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = dict(inputs)
        entries = inputs.pop("entries")
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        noted = self.step_notes()
        while True:
            try:
                return self._in_parts(model, inputs, entries, num_items_in_batch)
            except torch.cuda.OutOfMemoryError as error:
                why = str(error).partition("\n")[0]
            # past the except clause, whose traceback holds the step's activations
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            self.set_step_notes(noted)
            self._cut_smaller(len(entries), why)

    def _in_parts(self, model, inputs: dict, entries: list, num_items_in_batch) -> torch.Tensor:
        if self._parts == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        size = -(-len(entries) // self._parts)
        total = 0.0
        try:
            for start in range(0, len(entries), size):
                part = entries[start : start + size]
                batch = self.data_collator(part)
                del batch["entries"]
                self.loss_share = len(part) / len(entries)
                total = total + super().training_step(model, batch, num_items_in_batch)
        finally:
            self.loss_share = 1.0
        return total

    def _cut_smaller(self, rows: int, why: str) -> None:
        """Twice as many parts; ValueError where that cannot help."""
        step = self.state.global_step + 1
        if self._parts >= rows or process_count() > 1:
            left = "a single row" if self._parts >= rows else "a batch of one of the processes"
            raise ValueError(
                f"step {step} ran out of GPU memory with {left} ({why}); lower prompt.max_tokens, "
                "or train.batch_size with a higher train.accumulation, or set "
                "train.gradient_checkpointing: true"
            )
        if self._parts == 1:
            logger.warning(
                "step %d ran out of GPU memory (%s): batches of %d rows now go through in parts, "
                "with the same gradients; a lower train.batch_size with a higher "
                "train.accumulation avoids the failed attempt",
                step, why, rows,
            )  # fmt: skip
        self._parts *= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
