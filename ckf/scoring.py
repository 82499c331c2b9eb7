"""Scores of rows and requests: one forward pass per batch, never by sampling."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ckf.assembly import Assembly
from ckf.batches import Collator
from ckf.packed_attention import PackedRows
from ckf.prompts import ANSWERS, Encoded, Question
from ckf.weighing import weigh

Progress = Callable[[int], None]


LOGITS_AT_ONCE = 2**28  # a GiB in float32


@dataclass
class Answers:
    """One-token answers of rows: logits over the answer words and what greedy decoding says."""

    logits: np.ndarray  # (N, words), in the order of ANSWERS[task]
    log_total: np.ndarray  # (N,) logsumexp over the whole vocabulary
    greedy: np.ndarray  # (N,) index of the word greedy decoding says, -1: some other token

    def losses(self, answer: np.ndarray) -> np.ndarray:
        """Cross-entropy (N,) of the true words, given by index."""
        return self.log_total - np.take_along_axis(self.logits, answer[:, None], 1)[:, 0]


class Scorer:
    """Runs encoded prompts through the model in batches of similar length.

    Args:
        base_only: score the bare language model, without LoRA and vectors.
    """

    def __init__(
        self, assembly: Assembly, base_only: bool = False, progress: Progress | None = None
    ) -> None:
        self.assembly, self.model = assembly, assembly.model
        self.base_only = base_only
        self.weights = assembly.weights  # of the language model beside a prior, by task
        own = assembly.batcher.collator
        self.padded = own.padded()
        # sorted by length there is next to nothing to pad, and attention stays within a row
        self.collator = own if own.tells_rows else self.padded
        self.progress = progress or (lambda rows: None)

    @property
    def vectors(self) -> bool:
        """Whether prompts are in the vector form."""
        return self.assembly.uses_vectors and not self.base_only

    @torch.no_grad()
    def answers(self, prompts: Sequence[Encoded], users, histories) -> Answers:
        """One-token answers of prompts (N) of one task; users (N,), histories (N, h)."""
        task = prompts[0].task if prompts else "ctr"
        index = self._words(task)
        logits = np.zeros((len(prompts), len(index)), np.float64)
        total, greedy = np.zeros(len(prompts)), np.full(len(prompts), -1)
        for rows, batch in self._batches(prompts, users, histories):
            out = self.model.answer_logits(batch)  # (b, vocabulary)
            own = self._weighed(task, out[:, index.to(out.device)], batch, index)
            logits[rows] = own
            total[rows] = out.logsumexp(1).double().cpu().numpy()
            says = (out.argmax(1).cpu().unsqueeze(1) == index).any(1).numpy()
            greedy[rows] = np.where(says, own.argmax(1), -1)
        return Answers(logits, total, greedy)

    @torch.no_grad()
    def word_logits_and_prior(
        self, prompts: Sequence[Encoded], users, histories
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of prompts (N) of one task: logits (N, words) of the answer words, and the prior in them.

        The prior is NaN for words that have none.
        """
        index = self._words(prompts[0].task)
        logits = np.zeros((len(prompts), len(index)))
        priors = np.zeros_like(logits)
        for rows, batch in self._batches(prompts, users, histories):
            out = self.model.answer_logits(batch)[:, index]
            logits[rows] = out.double().cpu().numpy()
            priors[rows] = _prior_of(batch, index, len(rows))
        return logits, priors

    @torch.no_grad()
    def word_logits(self, prompts: Sequence[Encoded], users, histories) -> list[np.ndarray]:
        """Logits over the answer words of each prompt, in the order of ANSWERS; of any tasks."""
        found: list[np.ndarray] = [np.empty(0)] * len(prompts)
        words = {task: self._words(task) for task in {p.task for p in prompts}}
        for rows, batch in self._batches(prompts, users, histories):
            out = self.model.answer_logits(batch)  # (b, vocabulary)
            tasks = np.array([prompts[row].task for row in rows])
            for task in sorted(set(tasks)):
                places = np.flatnonzero(tasks == task)
                picked = out[torch.from_numpy(places)[:, None], words[task]]  # (places, words)
                weighed = self._weighed(task, picked, batch, words[task], places)
                for row, own in zip(rows[places], weighed, strict=True):
                    found[row] = own
        return found

    @torch.no_grad()
    def losses(self, prompts: Sequence[Encoded], users, histories) -> np.ndarray:
        """Mean cross-entropy (N,) over each prompt's answer tokens."""
        losses = np.zeros(len(prompts))
        for rows, batch in self._batches(prompts, users, histories):
            losses[rows] = self.model(**batch)["row_losses"].double().cpu().numpy()
        return losses

    @torch.no_grad()
    def texts(
        self, questions: Sequence[Question], users, histories, max_new_tokens: int
    ) -> list[str]:
        """Greedy answers in words, to questions of any tasks, whatever the base is set to."""
        encoder = self.assembly.batcher.encoder
        # penalties and the like, which generate() takes from the base where nobody says otherwise
        own = self.model.backbone.generation_config.to_dict()
        own.pop("transformers_version", None)
        settings = {name: None for name, value in own.items() if value is not None}
        settings |= {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
        settings |= {"use_cache": True, "max_new_tokens": max_new_tokens}
        settings |= {"eos_token_id": encoder.end, "pad_token_id": encoder.filler}
        prompts = [encoder.encode(q, self.vectors) for q in questions]
        texts = [""] * len(prompts)
        for rows, batch in self._batches(prompts, users, histories, self.padded):
            tokens = self.model.backbone.generate(
                inputs_embeds=self.model.embed(batch),
                attention_mask=batch["attention_mask"],
                task_ids=batch["task_ids"],
                **settings,
            )
            decoded = self.assembly.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for row, text in zip(rows, decoded, strict=True):
                texts[row] = text.strip().split("\n")[0].strip()
        return texts

    def _weighed(
        self, task: str, logits: Tensor, batch: dict, index: Tensor, places=slice(None)
    ) -> np.ndarray:
        """Logits (r, words) of the batch's rows ``places``, the language model's part weighed."""
        own, weight = logits.double().cpu().numpy(), self.weights.get(task, 1.0)
        if weight == 1.0 or "prior_rows" not in batch:
            return own
        return weigh(own, _prior_of(batch, index, batch["row_tasks"].shape[0])[places], weight)

    def _words(self, task: str) -> Tensor:
        """Tokens (words,) of a task's answer words, in the order of ANSWERS."""
        words = self.assembly.batcher.encoder.answer_tokens(task)[1]
        return torch.tensor([words[w] for w in ANSWERS[task]])

    def _batches(
        self, prompts, users, histories, collator: Collator | None = None
    ) -> Iterator[tuple[np.ndarray, dict]]:
        """Row indices and their batch; sorted by length, at most batch_tokens tokens each.

        And no more logits than fit: vocabularies reach 262,144, and sentences are 64 tokens.
        """
        collator = collator or self.collator
        users, histories = np.asarray(users), np.asarray(histories)
        device, was_training = self.model.device, self.model.training
        if was_training:  # else what decoding keeps would be forgotten
            self.model.eval()
        try:
            columns = max((1 + len(p.answer) for p in prompts), default=1)
            words = self.model.backbone.config.get_text_config().vocab_size
            most = max(1, LOGITS_AT_ONCE // (words * columns))
            for rows in _by_length(prompts, self.assembly.config.evaluate.batch_tokens, most):
                batch = collator([prompts[r] for r in rows], users[rows], histories[rows])
                batch = {k: _move(v, device) for k, v in batch.items()}
                if self.base_only:
                    batch["task_ids"] = torch.full_like(batch["task_ids"], -1)
                yield rows, batch
                self.progress(len(rows))
        finally:
            if was_training:
                self.model.train()


class PriorScorer(Scorer):
    """Answers of the prior by itself, as of a language model that gives every word the same."""

    @torch.no_grad()
    def answers(self, prompts: Sequence[Encoded], users, histories) -> Answers:
        """As ``Scorer.answers``, over the answer words alone."""
        index = self._words(prompts[0].task if prompts else "ctr")
        logits = np.full((len(prompts), len(index)), -np.inf)
        for rows, batch in self._batches(prompts, users, histories):
            own = _prior_of(batch, index, len(rows))
            logits[rows] = np.where(np.isnan(own), -np.inf, own)
        return Answers(logits, np.logaddexp.reduce(logits, axis=1), logits.argmax(1))


def _prior_of(batch: dict, index: Tensor, rows: int) -> np.ndarray:
    """(rows, words): the prior of the words ``index``, NaN where a row has none."""
    found = np.full((rows, len(index)), np.nan)
    if "prior_rows" in batch:
        own = batch["prior_tokens"].cpu().unsqueeze(1) == index  # (entries, words)
        known = own.any(1)
        at = batch["prior_rows"].cpu()[known], own.int().argmax(1)[known]
        found[at] = batch["prior_values"].cpu()[known]
    return found


def _by_length(prompts: Sequence[Encoded], budget: int, most: int) -> Iterator[np.ndarray]:
    order = np.argsort([-p.length for p in prompts], kind="stable")
    start = 0
    while start < len(order):
        count = max(1, min(most, budget // prompts[order[start]].length))
        yield order[start : start + count]
        start += count


def _move(value: Tensor | PackedRows | int, device: torch.device) -> Tensor | PackedRows | int:
    return value if isinstance(value, int) else value.to(device, non_blocking=True)
