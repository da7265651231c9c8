"""The Helm chart: rendered by Helm's own library, validated strictly, and refusing what is wrong."""

from __future__ import annotations

import argparse
import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python as helm
import jsonschema
import pytest
import yaml
from vllm_spectral_server.metrics import METRICS, PREFIX

from deploy.chart import CASES, CHART, VERSIONS, Manifest, notes, render, validate
from vllm_spectral import __version__

DOCUMENT = Path(__file__).parents[2] / "docs" / "kubernetes.md"
OLDEST, NEWEST = VERSIONS[0], VERSIONS[-1]


def one(kind: str, values: Mapping[str, Any] | None = None) -> Manifest:
    (found,) = [manifest for manifest in render(values) if manifest["kind"] == kind]
    return found


def pod(values: Mapping[str, Any] | None = None) -> Manifest:
    spec: Manifest = one("Deployment", values)["spec"]["template"]["spec"]
    return spec


def server(values: Mapping[str, Any] | None = None) -> Manifest:
    (container,) = pod(values)["containers"]
    result: Manifest = container
    return result


def argument(container: Manifest, flag: str) -> str:
    value: str = container["args"][container["args"].index(flag) + 1]
    return value


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("case", CASES)
def test_every_manifest_is_valid(case: str, version: str) -> None:
    manifests = render(CASES[case])
    assert {"Deployment", "Service", "Pod"} <= {manifest["kind"] for manifest in manifests}
    for manifest in manifests:
        validate(manifest, version)


def test_the_cases_reach_every_template() -> None:
    kinds = {manifest["kind"] for case in CASES for manifest in render(CASES[case])}
    assert kinds == {
        "Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor", "ScaledObject",
        "Pod",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["Deployment", "ServiceMonitor", "ScaledObject"])
def test_the_validation_would_find_a_misspelled_field(kind: str) -> None:
    manifest = copy.deepcopy(one(kind, CASES["everything"]))
    part = {
        "Deployment": lambda m: m["spec"]["template"]["spec"]["containers"][0]["readinessProbe"],
        "ServiceMonitor": lambda m: m["spec"]["endpoints"][0],
        "ScaledObject": lambda m: m["spec"]["triggers"][0],
    }[kind](manifest)
    part["periodSecond"] = 5
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest, NEWEST)


def test_helm_finds_nothing_to_complain_of() -> None:
    report = helm.lint(str(CHART))
    assert not report["errors"]
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


def test_the_chart_installs_this_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def paths(schema: Any, values: Any, here: str = "") -> Iterator[tuple[str, bool]]:
    """Names of values and whether the schema and ``values.yaml`` both have them."""
    for name in schema.get("properties", {}).keys() | (values.keys() if "properties" in schema else set()):
        where = f"{here}.{name}" if here else name
        yield where, name in schema["properties"] and name in values
        if name in values and isinstance(values[name], dict):
            yield from paths(schema["properties"].get(name, {}), values[name], where)


def test_schema_and_defaults_have_the_same_names() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    found = dict(paths(schema, yaml.safe_load((CHART / "values.yaml").read_text())))
    # `global` is Helm's own, for charts in charts.
    assert {name for name, both in found.items() if not both} == {"global", "resources.claims"}
    assert len(found) > 80


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelled name": ({"replica": 2}, "replica"),
    "a misspelled name further in": ({"kvCache": {"bytes": "2Gi"}}, "bytes"),
    "a wrong type": ({"replicas": "two"}, "replicas"),
    "a decimal unit": ({"kvCache": {"size": "2GB"}}, "kvCache"),
    "no CPU limit": ({"resources": {"limits": {"cpu": None}}}, "cpu"),
    "an unknown preset": ({"profile": {"preset": "tiny"}}, "preset"),
    "an unknown source": ({"model": {"source": "s3"}}, "source"),
    "a port that is none": ({"service": {"port": 0}}, "port"),
    "a tag for a digest": ({"image": {"digest": "latest"}}, "digest"),
    "a model claim without a name": ({"model": {"source": "persistentVolumeClaim"}}, "model.persistentVolumeClaim"),
    "a claim that nobody reads": ({"model": {"persistentVolumeClaim": "models"}}, "model.source is not"),
    "the demo from the hub": ({"model": {"source": "hub"}}, "not on the hub"),
    "a profile claim without a name": ({"profile": {"source": "persistentVolumeClaim"}}, "profile.persistentVolumeClaim"),
    "a config map without a name": ({"profile": {"source": "configMap"}}, "profile.configMap"),
    "a profile in the image without a path": ({"profile": {"source": "image"}}, "whole path"),
    "a path as the profile's name": ({"profile": {"file": "a/b.spectral"}}, "without directories"),
    "protection without a key": ({"auth": {"protectAll": True}}, "auth.existingSecret"),
    "scaling without a Prometheus": ({"autoscaling": {"enabled": True}}, "autoscaling.prometheusAddress"),
    "fewer at most than at least": ({"autoscaling": {"minReplicas": 9}}, "maxReplicas"),
    "no service account": ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
    "a cache larger than the pod": ({"kvCache": {"size": "8Gi"}}, "does not fit"),
    "caches of all ranks larger than the pod": (
        {"kvCache": {"size": "3Gi"}, "parallelism": {"data": 3}}, "3Gi on 3 ranks does not fit",
    ),
    "a flag that has a value": ({"extraArgs": ["--tensor_parallel_size=2"]}, "parallelism.tensor"),
    "a key on the command line": ({"extraArgs": ["--api-key", "secret"]}, "auth.existingSecret"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_by_name(name: str) -> None:
    values, message = WRONG[name]
    with pytest.raises(helm.HelmError, match=re.escape(message)):
        render(values)


def test_the_server_asks_for_nothing_it_does_not_need() -> None:
    """What Kubernetes' restricted standard for pods wants, and a read-only root file system."""
    for values in (CASES[case] for case in CASES if case != "openshift"):
        manifests = render(values)
        pods = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] == "Deployment"]
        pods += [m["spec"] for m in manifests if m["kind"] == "Pod"]
        for spec in pods:
            assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
            assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
            for container in [*spec.get("initContainers", []), *spec["containers"]]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
                }  # fmt: skip
                assert container["resources"]["limits"]
            assert not any("hostPath" in volume for volume in spec.get("volumes", []))


def test_openshift_chooses_the_uid() -> None:
    context = pod(CASES["openshift"])["securityContext"]
    assert context["runAsNonRoot"] and not {"runAsUser", "fsGroup"} & context.keys()


def test_every_mount_has_its_volume() -> None:
    for values in CASES.values():
        spec = pod(values)
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        # What the image, vLLM and Python write is on volumes: the rest is read-only.
        assert {"/cache", "/tmp", "/dev/shm"} <= {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}


def test_probes() -> None:
    container = server()
    assert (
        container["startupProbe"]["httpGet"]
        == container["livenessProbe"]["httpGet"]
        == {"path": "/health", "port": "http"}
    )
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] == 900
    # A kubelet cannot send a secret in a header: the image's own script can.
    guarded = server({"auth": {"existingSecret": "keys", "protectAll": True}})
    assert guarded["readinessProbe"]["exec"]["command"][-1].endswith("healthcheck.py")
    assert "--protect-all" in guarded["args"]
    assert {"name": "keys", "key": "api-key"} in [
        e["valueFrom"]["secretKeyRef"] for e in guarded["env"] if "valueFrom" in e
    ]


def test_a_pod_is_given_the_time_that_its_parts_take() -> None:
    spec = pod({"shutdown": {"drainSeconds": 300, "deregisterSeconds": 20}})
    (container,) = spec["containers"]
    assert argument(container, "--shutdown-timeout") == "300"
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    assert spec["terminationGracePeriodSeconds"] > 300 + 20


THREADS = [("8", 1, "8"), (8, 2, "4"), ("3500m", 1, "3"), ("500m", 1, "1"), ("7.5", 2, "3"), ("1", 4, "1")]


@pytest.mark.parametrize(("cpu", "ranks", "threads"), THREADS)
def test_threads_are_the_cores_that_the_pod_is_given(cpu: str | int, ranks: int, threads: str) -> None:
    """VLLM would start one for every core of the node."""
    container = server({"resources": {"limits": {"cpu": cpu, "memory": "64Gi"}}, "parallelism": {"tensor": ranks}})
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert (environment["OMP_NUM_THREADS"], environment["VLLM_CPU_OMP_THREADS_BIND"]) == (threads, "nobind")


def test_where_model_and_profile_come_from() -> None:
    container = server()
    assert container["args"][1] == "demo"
    assert argument(container, "--profile") == "/profile/profile.spectral"
    claim = {"model": {"source": "persistentVolumeClaim", "name": "llama", "persistentVolumeClaim": "models"}}
    assert server(claim)["args"][1] == "/models/llama"
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in server(claim)["env"]
    hub = CASES["hub"]
    assert not any(each["name"] == "HF_HUB_OFFLINE" for each in server(hub)["env"])
    assert (
        argument(server({"profile": {"source": "image", "file": "/opt/p.spectral"}}), "--profile") == "/opt/p.spectral"
    )
    assert "initContainers" not in pod({"profile": {"source": "configMap", "configMap": "profile"}})
    (calibrate,) = pod(claim)["initContainers"]
    assert calibrate["args"][-3:] == ["/models/llama", "/profile/profile.spectral", "quality"]


def test_the_network_is_closed_unless_the_model_comes_from_it() -> None:
    closed = one("NetworkPolicy")["spec"]
    assert closed["policyTypes"] == ["Ingress", "Egress"] and closed["egress"] == []
    assert closed["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}], "from": [{"podSelector": {}}]}]
    ports = [port["port"] for rule in one("NetworkPolicy", CASES["hub"])["spec"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 443]


def test_selectors_find_the_servers_and_nothing_else() -> None:
    manifests = render(CASES["everything"])
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        by_kind["Service"]["spec"]["selector"],
        by_kind["Deployment"]["spec"]["selector"]["matchLabels"],
        by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector and selector.items() <= labels
        assert not selector.items() <= by_kind["Pod"]["metadata"]["labels"].items(), "the test is no server"
    assert (
        by_kind["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        <= by_kind["Service"]["metadata"]["labels"].items()
    )


def test_scaling_asks_for_what_there_is() -> None:
    scaled = one("ScaledObject", CASES["everything"])
    deployment = one("Deployment", CASES["everything"])
    assert "replicas" not in deployment["spec"], "whoever scales owns the number"
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    queue, cache = (trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])
    assert queue == 'sum(vllm:num_requests_waiting{namespace="ns",service="demo-vllm-spectral"})'
    ours = set(re.findall(r"vllm_spectral:(\w+)", cache))
    assert ours and ours <= {metric.name for metric in METRICS} and PREFIX in cache
    one_trigger = CASES["everything"] | {"autoscaling": CASES["everything"]["autoscaling"] | {"cacheUsage": 0}}
    assert len(one("ScaledObject", one_trigger)["spec"]["triggers"]) == 1


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt-get install prometheus")
def test_scaling_counts_what_waits_in_all_pods_of_this_release_and_no_other(tmp_path: Path) -> None:
    """The queries, evaluated by Prometheus over series as a service monitor labels them."""
    queue, cache = (t["metadata"]["query"] for t in one("ScaledObject", CASES["everything"])["spec"]["triggers"])
    ours = 'namespace="ns",service="demo-vllm-spectral"'
    series = {
        f'vllm:num_requests_waiting{{{ours},pod="a",engine="0"}}': 3,
        f'vllm:num_requests_waiting{{{ours},pod="a",engine="1"}}': 4,
        f'vllm:num_requests_waiting{{{ours},pod="b",engine="0"}}': 5,
        'vllm:num_requests_waiting{namespace="ns",service="another",pod="c",engine="0"}': 100,
        f'vllm_spectral:used_bytes{{{ours},pod="a"}}': 90,
        f'vllm_spectral:used_bytes{{{ours},pod="b"}}': 10,
        f'vllm_spectral:pool_bytes{{{ours},pod="a"}}': 100,
        f'vllm_spectral:pool_bytes{{{ours},pod="b"}}': 100,
    }
    cases = [{"expr": e, "eval_time": "1m", "exp_samples": [{"value": v}]} for e, v in ((queue, 12), (cache, 0.5))]
    inputs = [{"series": name, "values": f"{value}x5"} for name, value in series.items()]
    file = tmp_path / "queries.yaml"
    file.write_text(
        yaml.safe_dump({"tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": cases}]})
    )  # fmt: skip
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_notes_warn() -> None:
    assert "NO API KEY" in notes() and "calibrates again" in notes()
    assert "NO " not in notes(CASES["everything"])


def test_the_documentations_values_and_messages_are_the_charts() -> None:
    text = DOCUMENT.read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        for manifest in render(yaml.safe_load(block)):
            validate(manifest, NEWEST)
    messages = re.findall(r"^\| .* \| `(.*)` \|$", text, re.MULTILINE)
    assert len(messages) >= 4
    refusals = []
    for values, _ in WRONG.values():
        with pytest.raises(helm.HelmError) as refused:
            render(values)
        refusals.append(str(refused.value))
    for message in messages:
        assert any(message in refusal for refusal in refusals), message


def test_rendered_arguments_are_what_the_server_takes() -> None:
    """Through the parsers that `vllm-spectral serve` uses, ours and vLLM's; names of flags must not drift apart."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm_spectral_server.launch import refuse

    from vllm_spectral.cli.serve import add_parser

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    for case in CASES:
        container = server(CASES[case])
        ours, rest = parser.parse_known_args(container["args"])
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", ours.model, *rest])
        refuse(args)
        size = CASES[case].get("kvCache", {}).get("size", "2Gi")
        assert args.kv_cache_memory_bytes == int(size[:-2]) << {"Gi": 30, "Mi": 20}[size[-2:]]
        assert (args.host, args.port) == ("0.0.0.0", 8000)
