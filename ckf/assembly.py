"""Putting a run's parts together: data, CF vectors, backbone, prompts, meta-network."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ckf.backbone import load_backbone
from ckf.batches import Collator, QuestionMaker, RowBatcher, VectorLookup
from ckf.cf import CFVectors
from ckf.config import RunConfig
from ckf.data.prepared import PreparedData
from ckf.metanet import MetaNetwork
from ckf.model import CKFModel, embedding_scale, packs_rows_right
from ckf.patch import patch_model
from ckf.prompts import PromptEncoder


@dataclass
class Assembly:
    """All parts of a run, ready to train or to answer."""

    config: RunConfig
    data: PreparedData
    vectors: CFVectors
    model: CKFModel
    tokenizer: PreTrainedTokenizerBase
    maker: QuestionMaker
    batcher: RowBatcher
    packed: bool

    @property
    def tasks(self) -> list[str]:
        return list(self.config.tasks)

    @property
    def uses_vectors(self) -> bool:
        return self.model.metanet is not None


def assemble(
    config: RunConfig, data: PreparedData, vectors: CFVectors, device: torch.device
) -> Assembly:
    """Load the backbone, patch it, and build prompts and meta-network around it.

    Fresh weights follow the torch seed. Raises ValueError for a model, tokenizer or setting that
    does not fit.
    """
    backbone, tokenizer = load_backbone(config.model, device)
    lora = config.lora
    patch_model(
        backbone,
        {task: (lora.ranks or {}).get(task, lora.r) for task in config.tasks},
        r=lora.r,
        shared_r=lora.shared_r,
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
    lookup = metanet = None
    if config.metanet.kind != "none":
        lookup = VectorLookup(vectors)
        width = backbone.get_input_embeddings().weight.shape[1]
        scale = embedding_scale(backbone)
        settings = config.metanet
        metanet = MetaNetwork(lookup.dim, width, scale, settings.kind, settings.hidden).to(device)
    _check_window(config, backbone)
    packed = _choose_packing(config.train.packing, backbone)
    titles = [data.title(i) for i in range(data.n_items)]
    encoder = PromptEncoder(tokenizer, titles, config.prompt)
    maker = QuestionMaker(data, config)
    collator = Collator(list(config.tasks), lookup, encoder.filler, packed)
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
    right = packs_rows_right(backbone)
    if wanted is True and not right:
        raise ValueError(
            "train.packing is true, but rows packed into one sequence see each other in this "
            "model; set train.packing to auto or false"
        )
    return right
