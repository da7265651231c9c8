"""The plugin: registered once, cheap, and absent where it was never tested."""

from __future__ import annotations

import logging

import pytest

from vllm_spectral import plugin


def registered() -> str | None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    path: str = AttentionBackendEnum.CPU_ATTN.get_path()
    return path


def test_registering_twice_is_registering_once() -> None:
    plugin.register()
    first = registered()
    plugin.register()
    assert registered() == first == "vllm_spectral.backend.selection.SpectralCPUBackend"


def test_an_untested_vllm_keeps_its_own_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.99.0")
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "vllm_spectral" not in (registered() or "")
    assert "inactive" in caplog.text


def test_another_platform_keeps_its_own_backend_and_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm import platforms
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    monkeypatch.setattr(type(platforms.current_platform), "is_cpu", lambda _: False)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "vllm_spectral" not in (registered() or "")
    assert "NO effect" in caplog.text
