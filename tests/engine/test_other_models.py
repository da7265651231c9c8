"""Other shapes through the whole path: head_dim 128, and keys with biases.

The models are small and random, with the demo model's tokenizer. That shows the mechanics (shapes, calibration, pages,
evaluation); it shows nothing about quality on a trained model of that kind.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.process import command as cli
from vllm_spectral.profile.storage import load_profile

SHAPES: dict[str, dict[str, Any]] = {
    "llama-128": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    "qwen2-biases": {"model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
}
LARGE_BIAS = 8.0


def make(directory: Path, demo: Path, shape: dict[str, Any]) -> None:
    """A random model that transformers and vLLM both know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = shape | {
        "hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 49152,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("k_proj.bias"):
                weight[::7] = LARGE_BIAS
            elif weight.ndim == 2:
                weight.mul_(3.0)  # logits that differ enough to be compared
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (demo / file).exists():
            shutil.copy(demo / file, directory)


@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_path(name: str, demo: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    make(tmp_path, demo, SHAPES[name])
    path = tmp_path / "profile.spectral"
    text = tmp_path / "text.txt"
    text.write_text(texts["prose"].read_text()[:40_000])
    command = cli("calibrate", str(tmp_path), "-o", str(path), "--preset", "balanced", "--text", str(text))
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    profile = load_profile(path)
    assert profile.bits_per_element == 3.0
    command = cli(
        "evaluate", str(tmp_path), "--profile", str(path), "--strict", "--text", str(text), "--context", "512"
    )
    found = subprocess.run([*command, "--windows", "2", "--json"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    served, strict = json.loads(found.stdout)["candidates"]
    # A random model's most likely token is decided by next to nothing, its distribution is not.
    assert 0 < served["texts"][0]["kl"] < strict["texts"][0]["kl"] < 0.5
