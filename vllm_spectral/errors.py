"""Errors a user can act on.

Everything that is wrong with the *input* (a file, a flag, a model, a version) is a
:class:`SpectralError`. The command line prints it as one line and leaves with exit code 2;
anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class SpectralError(Exception):
    """Base of every error caused by input; the message names the cause and the way out."""

    exit_code = 2


class ConfigError(SpectralError):
    """A flag, an environment variable or ``additional_config`` is not acceptable."""


class ProfileError(SpectralError):
    """A profile file cannot be used."""


class ProfileNotFoundError(ProfileError):
    """There is no file at the given path."""


class ProfileFormatError(ProfileError):
    """The file is not a complete spectral profile (truncated, foreign, malformed)."""


class ProfileVersionError(ProfileError):
    """The profile's schema version is not one this release reads."""


class ProfileDigestError(ProfileError):
    """The content does not match the digest stored in it: corrupted or tampered with."""


class ProfileMismatchError(ProfileError):
    """The profile is sound but was made for another model."""


class UnsupportedModelError(SpectralError):
    """The model cannot be served from spectral pages."""


class KernelError(SpectralError):
    """The compiled kernels are missing, or the instruction set asked for is."""


class UnsupportedVersionError(SpectralError):
    """The installed vLLM is outside the tested range."""
