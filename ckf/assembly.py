"""Putting a run's parts together: data, CF vectors, backbone, prompts, meta-network."""

from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase

from ckf.backbone import check_reads_embeddings
from ckf.base_model import Loaded, load_base
from ckf.batches import Collator, QuestionMaker, RowBatcher, VectorLookup
from ckf.cf import CFVectors
from ckf.config import RunConfig
from ckf.controls import ShuffledUsers
from ckf.data.prepared import PreparedData
from ckf.match import MatchScores
from ckf.metanet import MetaNetwork
from ckf.model import CKFModel, embedding_scale
from ckf.packed_attention import attends_packed
from ckf.packing import attend_packed, packs_rows_right
from ckf.patch import patch_model
from ckf.prior import AnswerPrior
from ckf.prompts import ANSWERS, PromptEncoder

ONE_LORA = "all"  # the name of the only LoRA where lora.per_task is false


@dataclass
class Assembly:
    """All parts of a run, ready to train or to answer.

    weights: what the language model counts beside a prior, by task (ckf.weighing); 1 where missing.
    """

    config: RunConfig
    data: PreparedData
    vectors: CFVectors
    model: CKFModel
    tokenizer: PreTrainedTokenizerBase
    maker: QuestionMaker
    batcher: RowBatcher
    packed: bool
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(self.config.tasks)

    @property
    def uses_vectors(self) -> bool:
        return self.model.metanet is not None

    def forget_held_out(self) -> None:
        """Let go of the vectors that only training shows."""
        self.vectors = replace(self.vectors, held_out=None)
        lookup, matches = self.batcher.collator.lookup, self.batcher.collator.matches
        if lookup is not None:
            lookup.vectors = replace(lookup.vectors, held_out=None)
        if matches is not None:
            matches.vectors = self.vectors

    def lora_of(self, task: str) -> str:
        """The name of the LoRA that a task's rows take beside the shared one."""
        return task if self.config.lora.per_task else ONE_LORA


def assemble(
    config: RunConfig,
    data: PreparedData,
    vectors: CFVectors,
    device: torch.device,
    loaded: Loaded | None = None,
) -> Assembly:
    """Load the backbone, patch it, and build prompts and meta-network around it.

    Fresh weights follow the torch seed.

    Args:
        loaded: what ``load_base`` gave, unpatched, to be used instead of loading it again.

    Raises:
        ValueError: a model, tokenizer or setting that does not fit.
    """
    backbone, tokenizer = loaded or load_base(config, device)
    check_reads_embeddings(backbone)
    lora = config.lora
    ranks = {task: (lora.ranks or {}).get(task, lora.r) for task in config.tasks}
    patch_model(
        backbone,
        ranks if lora.per_task else {ONE_LORA: lora.r},
        r=lora.r,
        shared_r=lora.shared_r if lora.per_task else 0,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        target_modules=lora.target_modules,
        shared_modules=lora.shared_modules,
        task_modules=lora.task_modules,
        gate=lora.gate,
        gate_per_layer=lora.gate_per_layer,
        backend=lora.backend,
    )
    _check_window(config, backbone)
    packed = _choose_packing(config.train.packing, backbone)
    titles = [data.title(i) for i in range(data.n_items)]
    matches = config.metanet.match != "none"
    encoder = PromptEncoder(tokenizer, titles, config.prompt, matches)
    lookup, scores, metanet = _vector_parts(config, data, vectors, backbone, encoder)
    maker = QuestionMaker(data, config)
    tasks = list(config.tasks)
    one_lora = not lora.per_task
    prior = None
    if config.metanet.match == "prior":
        prior = AnswerPrior(scores, maker, _one_token_answers(config, encoder))
    tells_rows = packed and attends_packed(backbone)
    collator = Collator(tasks, lookup, encoder.filler, packed, one_lora, scores, prior, tells_rows)
    return Assembly(
        config,
        data,
        vectors,
        CKFModel(backbone, metanet),
        tokenizer,
        maker,
        RowBatcher(maker, encoder, collator),
        packed,
    )


def _vector_parts(config: RunConfig, data, vectors, backbone, encoder: PromptEncoder):
    """What looks vectors up, what makes CF scores, and the meta-network; None for text."""
    settings = config.metanet
    if settings.kind == "none":
        return None, None, None
    shuffle = settings.shuffle_users
    lookup = ShuffledUsers(vectors, data, config.seed) if shuffle else VectorLookup(vectors)
    scores = MatchScores(vectors, data) if settings.match != "none" else None
    embedding = backbone.get_input_embeddings()
    metanet = MetaNetwork(
        lookup.dim,
        embedding.weight.shape[1],
        embedding_scale(backbone),
        settings.kind,
        settings.hidden,
        matches=scores is not None,
    ).to(backbone.device)
    if scores is not None and "ctr" in config.tasks:
        words = encoder.answer_tokens("ctr")[1]
        answers = torch.tensor([words["Yes"], words["No"]], device=embedding.weight.device)
        metanet.start_matches_at(*embedding(answers).float())
    return lookup, scores, metanet


def _one_token_answers(config: RunConfig, encoder: PromptEncoder) -> dict[str, list[int]]:
    """Tokens of the answer words, in the order of ``ANSWERS``, of the tasks answered by one."""
    by_title = config.prompt.rank_by == "title"
    tasks = [t for t in config.tasks if t in ANSWERS and not (t == "topk" and by_title)]
    words = {task: encoder.answer_tokens(task)[1] for task in tasks}
    return {task: [words[task][word] for word in ANSWERS[task]] for task in tasks}


def _check_window(config: RunConfig, backbone) -> None:
    window = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    if window and config.prompt.max_tokens > window:
        raise ValueError(
            f"prompt.max_tokens is {config.prompt.max_tokens}, but {config.model.name} takes at "
            f"most {window} tokens; lower it"
        )


def _choose_packing(wanted: str | bool, backbone) -> bool:
    if wanted is False:
        return False
    if attend_packed(backbone):
        return True
    if wanted == "auto" and "flash" not in str(backbone.config._attn_implementation):
        return False  # attention over all pairs of a batch would cost more than padding
    right = packs_rows_right(backbone)
    if wanted is True and not right:
        raise ValueError(
            "train.packing is true, but rows packed into one sequence see each other in this "
            "model; set train.packing to auto or false"
        )
    return right
