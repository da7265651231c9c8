"""The Helm chart, rendered by Helm's own library and validated against the schemas of what it makes. Nothing is fetched."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate.utils import all_versions

CHART = Path(__file__).parent / "helm" / "vllm-spectral"
CASES: dict[str, dict[str, Any]] = {"default": {}} | {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "ci").glob("*.yaml"))
}
"""Values by name: the defaults, and the files in the chart's folder ``ci``."""
RELEASE, NAMESPACE = "demo", "ns"
VERSIONS = [version for version in dict.fromkeys(all_versions()) if version >= "1.27"]
"""Kubernetes' minor versions from the chart's ``kubeVersion`` on."""

Manifest = dict[str, Any]


def render(values: Mapping[str, Any] | None = None) -> list[Manifest]:
    """All manifests of a release, as Helm would apply them; hooks included.

    Raises:
        helm.HelmError: if the chart refuses the values.
    """
    texts = [text for name, text in _files(values).items() if name.endswith(".yaml")]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def notes(values: Mapping[str, Any] | None = None) -> str:
    """What Helm prints after an installation."""
    (text,) = [text for name, text in _files(values).items() if name.endswith("NOTES.txt")]
    return text


def _files(values: Mapping[str, Any] | None) -> dict[str, str]:
    with helm.Chart.load(CHART) as chart:
        files: dict[str, str] = chart.render(dict(values or {}), name=RELEASE, namespace=NAMESPACE)
    return files


def validate(manifest: Manifest, version: str) -> None:
    """Strictly: fields that do not exist are errors.

    Args:
        manifest: what is validated.
        version: of Kubernetes.

    Raises:
        jsonschema.ValidationError: if it is not valid; Kubernetes' own kinds raise a subclass.
    """
    if manifest["kind"] in ("ServiceMonitor", "ScaledObject"):
        jsonschema.validate(manifest, _custom_schema(manifest["kind"]))
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


@functools.cache
def _custom_schema(kind: str) -> Any:
    if kind == "ServiceMonitor":
        from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor as Model
    else:
        from cloudcoil.models.keda.v1alpha1 import ScaledObject as Model  # type: ignore[assignment]
    return _strict(Model.model_json_schema(by_alias=True))


def _strict(node: Any) -> Any:
    """A schema whose objects have no other fields than those it names: the models let unknown ones pass."""
    if isinstance(node, dict):
        node = {key: _strict(value) for key, value in node.items()}
        if "properties" in node:
            node.setdefault("additionalProperties", False)
    return [_strict(each) for each in node] if isinstance(node, list) else node
