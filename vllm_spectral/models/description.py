"""The attention geometry and identity of a model, read from its directory without loading it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_spectral.errors import UnsupportedModelError
from vllm_spectral.models.decoder import Decoder, read_config
from vllm_spectral.models.support import Support, assess

_SAMPLE_BYTES = 1 << 16
_SAMPLES_PER_FILE = 16


@dataclass(frozen=True)
class ModelFingerprint:
    """What a profile remembers of its model; two models with equal fingerprints share a profile."""

    model_type: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    weights: str
    """Hex digest over every weight file's size, header and evenly spaced samples of its bytes."""

    def differences(self, other: ModelFingerprint) -> list[str]:
        """Human-readable list of the fields in which ``other`` differs."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name} {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class ModelDescription:
    """Attention geometry of a decoder, and whether it can be served."""

    path: Path
    model_type: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    support: Support

    def __str__(self) -> str:
        return f"{self.model_type} in {self.path}"

    @classmethod
    def from_directory(cls, path: Path) -> ModelDescription:
        """Read ``config.json``.

        Raises:
            UnsupportedModelError: if the directory holds no readable decoder configuration.
        """
        decoder = Decoder(read_config(path))
        support = assess(decoder)
        try:
            sizes = decoder.geometry()
        except (LookupError, TypeError, ValueError) as error:
            # What has no uniform attention heads is often a known kind of model: then that is the better answer.
            support.require_served(path)
            raise UnsupportedModelError(
                f"{path / 'config.json'} does not describe a decoder with attention heads ({error}); "
                "what it leaves to the library's defaults must be written out"
            ) from None
        return cls(
            path=path,
            model_type=decoder.model_type,
            num_layers=sizes.num_layers,
            num_query_heads=sizes.num_query_heads,
            num_kv_heads=sizes.num_kv_heads,
            head_dim=sizes.head_dim,
            max_positions=sizes.max_positions,
            support=support,
        )

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token adds to the cache, all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def require_supported(self) -> None:
        """Raise :class:`UnsupportedModelError`, naming every obstacle, unless the model can be served."""
        self.support.require_served(self.path)

    def fingerprint(self) -> ModelFingerprint:
        """Identity of the model. Reads about 1 MiB per weight file.

        Raises:
            UnsupportedModelError: if there are no safetensors weights.
        """
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UnsupportedModelError(f"{self.path} has no *.safetensors weights; convert the model to safetensors")
        digest = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size};".encode())
            with file.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(min(header, size)))
                for sample in range(_SAMPLES_PER_FILE):
                    stream.seek(size * sample // _SAMPLES_PER_FILE)
                    digest.update(stream.read(_SAMPLE_BYTES))
        return ModelFingerprint(
            self.model_type, self.num_layers, self.num_kv_heads, self.head_dim, digest.hexdigest()[:32]
        )
