"""Tiny random models of several families, for tests."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

VOCABULARY = 64

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_CONFIGS = {
    "llama": lambda: LlamaConfig(**_COMMON),
    "qwen3": lambda: Qwen3Config(**_COMMON, head_dim=8),
    "mistral": lambda: MistralConfig(**_COMMON),
    "gemma": lambda: GemmaConfig(**_COMMON, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**_COMMON, head_dim=8, sliding_window=16),
    "phi": lambda: PhiConfig(**_COMMON),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        dropout=0.0,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    ),
}
FAMILIES = tuple(_CONFIGS)


def tiny_model(family: str = "llama", seed: int = 0) -> torch.nn.Module:
    """A two-layer random model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = _CONFIGS[family]()
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id = 0
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(batch: int = 4, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length), none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def randomise_adapters(model: torch.nn.Module, seed: int = 2, scale: float = 0.3) -> None:
    """Adapters as after training: every A, B and gate random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ckf_gate" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
