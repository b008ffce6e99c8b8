"""Tiny models of families beyond those of `excise.models.tiny`, and what can be done to each.

A row says which module RMU trains by name, whether its blocks run apart from the rest of the
model, and what RMU trains where no module is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from excise.models.checkpoint import Checkpoint, save_model
from excise.models.tiny import BYTE_VOCAB, byte_tokenizer

IDS = {"vocab_size": BYTE_VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
SHORT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
PLAIN = {**SHORT, "intermediate_size": 64}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 1024}
FAIRSEQ = {"ffn_dim": 64, "dropout": 0.0, "max_position_embeddings": 1024}
TWO_OF_FOUR = {"num_experts_per_tok": 2, "num_experts": 4}
LOCAL = {"num_experts_per_tok": 2, "num_local_experts": 4}
SSM = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What can be done to a family.

    Attributes:
        config: Fields of a tiny configuration of it, of three blocks.
        module: A module of block 1 that RMU trains by name.
        found: Whether its parts are found, so that RMU trains without names.
        apart: Whether its blocks run apart from the rest.
    """

    config: Mapping[str, Any]
    module: str
    found: bool = True
    apart: bool = True


def _dense(module: str = "layers.1.mlp.down_proj", **more: Any) -> Family:
    return Family({**SHAPE, **more}, module)


FEW: dict[str, Family] = {
    "opt": Family({**SHORT, **FAIRSEQ, "word_embed_proj_dim": 16}, "layers.1.fc2", found=False),
    "xglm": Family(
        {"d_model": 32, "num_layers": 3, "attention_heads": 2, **FAIRSEQ}, "layers.1.fc2",
        found=False,
    ),
    "gptj": Family({**GPT, "rotary_dim": 4}, "h.1.mlp.fc_out"),
    "bloom": Family({"hidden_size": 32, "n_layer": 3, "n_head": 2}, "h.1.mlp.dense_4h_to_h"),
    "falcon": Family(SHORT, "h.1.mlp.dense_4h_to_h"),
    "mpt": Family(
        {"d_model": 32, "n_heads": 2, "n_layers": 3, "expansion_ratio": 2, "max_seq_len": 1024},
        "blocks.1.ffn.down_proj",
    ),
    "gpt_oss": _dense("layers.1.self_attn.o_proj", **LOCAL, sliding_window=8),
    "dbrx": Family(
        {
            "d_model": 32, "n_heads": 2, "n_layers": 3, "max_seq_len": 1024,
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4,
                           "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
        },
        "blocks.1.ffn.experts.mlp.w2", found=False,
    ),
    "mamba": Family(SSM, "layers.1.mixer.out_proj", found=False),
    "mamba2": Family(
        {**SSM, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 16},
        "layers.1.mixer.out_proj", found=False,
    ),
    "rwkv": Family(
        {"hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32,
         "intermediate_size": 64},
        "blocks.1.feed_forward.value", found=False, apart=False,
    ),
    "zamba2": Family(
        {
            **PLAIN, "num_key_value_heads": 2, "n_mamba_heads": 4, "mamba_headdim": 16,
            "layers_block_type": ["mamba", "hybrid", "hybrid"], "mamba_d_state": 8,
            "mamba_expand": 2, "mamba_ngroups": 1, "num_mem_blocks": 1, "chunk_size": 16,
            "adapter_rank": 4, "use_mamba_kernels": False,
        },
        "layers.1.mamba_decoder.mamba.out_proj", found=False,
    ),
    "falcon_h1": Family(
        {**SHAPE, **HEADS, "mamba_d_ssm": 64, "mamba_chunk_size": 16, "mamba_n_groups": 1},
        "layers.1.mamba.out_proj",
    ),
    "recurrent_gemma": Family(
        {**SHAPE, "lru_width": 32, "block_types": ["recurrent", "attention", "recurrent"],
         "attention_window_size": 16},
        "layers.1.mlp_block.down_proj", found=False,
    ),
    "gemma3n_text": Family(
        {
            **SHAPE, "num_hidden_layers": 5, "num_kv_shared_layers": 2, "laurel_rank": 4,
            "vocab_size_per_layer_input": BYTE_VOCAB, "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0], "sliding_window": 8,
        },
        "layers.1.mlp.down_proj",
    ),
    "gemma3": Family(
        {
            "text_config": {**SHAPE, "vocab_size": BYTE_VOCAB, "sliding_window": 8},
            "vision_config": {**PLAIN, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14},
        },
        "language_model.layers.1.mlp.down_proj",
    ),
}  # fmt: skip
"""Families of which each is a kind of its own."""

MORE: dict[str, Family] = {
    **dict.fromkeys(("gemma", "stablelm", "cohere", "olmo", "olmo3", "granite", "glm4", "nemotron",
                     "smollm3"), _dense()),
    **dict.fromkeys(("cohere2", "exaone4"), _dense(sliding_window=8)),
    "starcoder2": _dense("layers.1.mlp.c_proj"),
    "phi": Family(PLAIN, "layers.1.mlp.fc2"),
    "persimmon": Family(PLAIN, "layers.1.mlp.dense_4h_to_h"),
    "biogpt": Family({**PLAIN, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
                     "layers.1.fc2", found=False),
    "gpt_neo": Family(
        {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "intermediate_size": 64,
         "attention_types": [[["global", "local"], 1], [["global"], 1]]},
        "h.1.mlp.c_proj",
    ),
    "gpt_bigcode": Family({**GPT, "n_inner": 64}, "h.1.mlp.c_proj"),
    "codegen": Family({**GPT, "rotary_dim": 4}, "h.1.mlp.fc_out"),
    "lfm2": Family({**SHAPE, "layer_types": ["conv", "full_attention", "conv"],
                    "block_auto_adjust_ff_dim": False}, "layers.1.feed_forward.w2", found=False),
    **dict.fromkeys(("phimoe", "granitemoe"), _dense("layers.1.self_attn.o_proj", **LOCAL)),
    "olmoe": _dense("layers.1.self_attn.o_proj", **TWO_OF_FOUR),
    "qwen3_moe": _dense("layers.1.self_attn.o_proj", **TWO_OF_FOUR, moe_intermediate_size=32),
    "qwen2_moe": _dense("layers.1.mlp.shared_expert.down_proj", **TWO_OF_FOUR,
                        moe_intermediate_size=32, shared_expert_intermediate_size=32),
    "deepseek_v3": Family(
        {**PLAIN, **LATENT, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1,
         "num_experts_per_tok": 2, "topk_group": 1, "moe_intermediate_size": 32,
         "first_k_dense_replace": 1},
        "layers.1.mlp.shared_experts.down_proj",
    ),
    "llama4_text": _dense("layers.1.feed_forward.shared_expert.down_proj", num_local_experts=4,
                          num_experts_per_tok=1, intermediate_size_mlp=64),
    "qwen3_next": _dense(
        "layers.1.mlp.shared_expert.down_proj", **TWO_OF_FOUR, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "falcon_mamba": Family(SSM, "layers.1.mixer.out_proj", found=False),
    "granitemoehybrid": Family(
        {**SHAPE, **LOCAL, **HEADS, "layer_types": ["mamba", "attention", "mamba"],
         "mamba_expand": 2, "shared_intermediate_size": 32},
        "layers.1.shared_mlp.output_linear", found=False,
    ),
    "jamba": Family(
        {**SHAPE, **TWO_OF_FOUR, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
         "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "layers.1.self_attn.o_proj", found=False,
    ),
    "bamba": Family({**SHAPE, **HEADS, "attn_layer_indices": [1], "mamba_chunk_size": 16},
                    "layers.1.feed_forward.down_proj", found=False, apart=False),
}  # fmt: skip
"""Families that are like one of `FEW` or of the tiny models, or slow."""

FAMILIES = {**FEW, **MORE}


def save_family(name: str, to: Path) -> tuple[Checkpoint, Any]:
    """Write a tiny random model of a family; return it on disk and in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = FAMILIES[name].config
    config = AutoConfig.for_model(name, **fields, **({} if "text_config" in fields else IDS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return save_model(model, byte_tokenizer(), to), model
