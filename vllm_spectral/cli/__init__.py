"""The command line: one file per command, assembled in :mod:`vllm_spectral.cli.main`."""
