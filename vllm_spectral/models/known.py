"""What was found out about models and kernels by hand: the places to add to."""

from __future__ import annotations

SUPPORTED_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that stock vLLM's paged CPU attention takes as well, so that exempt layers always have a kernel."""

RUN_TYPES = {"llama": "SmolLM2-135M-Instruct", "qwen2": "a small random model"}
"""Model types that were run from spectral pages, and with which model; the one place to add to after a run."""

READ_TYPES = frozenset({
    "apertus", "arcee", "bailing_moe", "chatglm", "cohere", "dbrx", "deepseek", "ernie4_5", "ernie4_5_moe", "exaone",
    "exaone4", "falcon", "gemma", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite",
    "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax",
    "internlm2", "internlm3", "mimo", "minicpm", "minimax_m2", "ministral3", "mistral", "mixtral", "nemotron", "olmo",
    "olmo2", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl",
    "qwen2_vl_text", "qwen3", "qwen3_moe", "qwen3_vl_text", "seed_oss", "smollm3", "solar", "stablelm", "starcoder2",
})  # fmt: skip
"""Model types that were not run, but whose attention in vLLM 0.32 does what the fields read here say, and no more."""

BOTH_WAYS = frozenset({
    "bagel", "bert", "big_bird", "camembert", "data2vec-text", "diffusion_gemma", "distilbert", "dream", "electra",
    "ernie", "gemma3", "hrm_text", "llada", "modernbert", "molmo2", "moondream3", "nomic_bert", "paligemma",
    "roberta", "xlm-roberta",
})  # fmt: skip
"""Encoders, diffusion models, and models whose images attend to themselves as a whole."""

STATE_SPACE = frozenset({
    "bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h", "nemotron_h_puzzle", "plamo2",
    "rwkv", "xlstm", "zamba", "zamba2",
})  # fmt: skip
"""All layers or some of them Mamba or the like."""
