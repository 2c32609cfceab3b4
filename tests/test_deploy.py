"""What deploy/ has: checked by the tools that read it, and its command lines by our own parser.

No container engine, cluster or service manager is needed; a tool that is not there skips its test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support.command_line import parsed
from tests.support.paths import ROOT
from thinwire.node.cli.swarm_commands import Coordinator

DEPLOY = ROOT / "deploy"
KUSTOMIZATIONS = ("base", "gpu", "three", "monitoring", "monitoring-three")

SCHEMA = "1.33"
"""Kubernetes' version."""

MADE_BY_HAND = {"ticket", "seat-ticket", "grafana", "coordinator-http"}
"""Secrets that users make, as the comments say; the last one may be absent."""


def tool(name: str) -> str:
    """Its path: beside this Python (the test extra brings it), or of the machine."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"there is no {name} on this machine")
    return found


def said_by(*command: str, text: str | None = None) -> str:
    """What it writes to either stream; fails if it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=DEPLOY)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- the image


def test_the_dockerfile_has_no_lint() -> None:
    assert said_by(tool("hadolint"), "Dockerfile") == ""


def test_the_image_is_built_from_every_package() -> None:
    """A folder that is not copied, or that .dockerignore keeps back, is missing from the wheel."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = setuptools["package-dir"]
    folders = {
        places.get(name, name.removeprefix("thinwire.").partition(".")[0]) for name in setuptools["packages"]
    }
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), flags=re.M)
    copied = {source for sources in copies for source in sources.split()}
    assert folders <= copied
    assert ignored[1] == "*"
    assert {f"!{source}" for source in copied} == {line for line in ignored if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)


# --------------------------------------------------------------------------------------------------- compose


def compose(*profiles: str, files: tuple[str, ...] = ("compose.yaml",)) -> dict[str, Any]:
    """The files as compose understands them."""
    named = [word for profile in profiles for word in ("--profile", profile)]
    named += [f"--file={file}" for file in files]
    shown = said_by(tool("docker-compose"), *named, "config", "--format=json")
    model: dict[str, Any] = json.loads(shown)
    return model


def test_compose_takes_the_file_with_every_profile() -> None:
    monitoring = {"prometheus", "alertmanager", "grafana"}
    assert set(compose("cpu")["services"]) == {"coordinator", "node"}
    assert set(compose("gpu", "monitoring")["services"]) == {"coordinator", "node-gpu", *monitoring}
    assert set(compose("monitoring")["services"]) == monitoring
    services = compose("*")["services"]
    for service in services.values():
        for volume in service["volumes"]:
            assert volume["type"] == "volume" or Path(volume["source"]).exists(), volume
        for port in service.get("ports", ()):  # only libp2p is for everybody
            assert port["target"] == 4001 or port["host_ip"] == "127.0.0.1"
    nodes = [parsed(services[name]["command"]) for name in ("node", "node-gpu")]
    coordinator = parsed(services["coordinator"]["command"])
    for node in nodes:
        assert node.ticket == f"@{coordinator.ticket_file}"
    mounted = {v["target"]: v["source"] for v in services["coordinator"]["volumes"]}
    assert (mounted["/runs"] / coordinator.run_file.relative_to("/runs")).exists()
    assert f"coordinator:{coordinator.port}" in coordinator.announce


def test_three_coordinators_of_compose_find_each_other() -> None:
    alone = compose("cpu")["services"]["coordinator"]
    services = compose("cpu", files=("compose.yaml", "compose.three.yaml"))["services"]
    assert set(services) == {"coordinator", "coordinator-2", "coordinator-3", "node"}
    first = parsed(services["coordinator"]["command"])
    assert first.seats == 3
    only = [word for word in services["coordinator"]["command"] if "seat" not in word]
    assert only == alone["command"], "a run that one coordinator has begun is gone on with"
    targets = {volume["target"] for volume in services["coordinator"]["volumes"]}
    assert targets >= {volume["target"] for volume in alone["volumes"]}
    for name in ("coordinator-2", "coordinator-3"):
        seat = parsed(services[name]["command"])
        assert seat.replica == str(first.seat_ticket_file)
        assert f"{name}:{seat.port}" in seat.announce
        mounted = {volume["target"]: volume["source"] for volume in services[name]["volumes"]}
        assert mounted[str(first.seat_ticket_file.parent)] == "seats"
        assert mounted["/var/lib/thinwire"] == name, "each has a disk of its own"
    watched = compose("monitoring", files=("compose.yaml", "compose.three.yaml"))["services"]["prometheus"]
    mounted = {volume["target"]: volume["source"] for volume in watched["volumes"]}
    asked = asks_all_of(Path(mounted["/etc/prometheus/prometheus.yml"]).read_text())
    assert asked == [f"{name}:9100" for name in services if name != "node"]


def asks_all_of(config: str) -> list[str]:
    """The coordinators that Prometheus asks how they are; fails unless it also asks each for nodes, all else
    being as it is with one coordinator."""
    one = yaml.safe_load((DEPLOY / "monitoring/prometheus.yml").read_text())
    several = yaml.safe_load(config)
    targets: list[str] = several["scrape_configs"][0]["static_configs"][0]["targets"]
    one["scrape_configs"][0]["static_configs"][0]["targets"] = targets
    (sd,) = one["scrape_configs"][1]["http_sd_configs"]
    one["scrape_configs"][1]["http_sd_configs"] = [{**sd, "url": f"http://{host}/sd"} for host in targets]
    assert several == one
    return targets


# ------------------------------------------------------------------------------------------------ Kubernetes


def kustomized(name: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    kubectl = tool("kubectl")
    version = said_by(kubectl, "version", "--client")
    if "Kustomize Version: v5" not in version:
        pytest.skip(f"kustomize 5 is needed, kubectl has another: {version.strip()[:200]}")
    return list(yaml.safe_load_all(said_by(kubectl, "kustomize", f"kubernetes/{name}")))


@pytest.fixture(scope="module", params=KUSTOMIZATIONS)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return kustomized(request.param)


def containers(objects: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each with its pod's specification."""
    for found in objects:
        if found["kind"] == "StatefulSet":
            spec = found["spec"]["template"]["spec"]
            yield from ((container, spec) for container in spec["containers"])


def test_kubernetes_objects_are_valid(objects: list[dict[str, Any]]) -> None:
    for found in objects:
        assert kubernetes_validate.validate(found, SCHEMA, strict=True) is not None
    assert {found["metadata"].get("namespace", "thinwire") for found in objects} == {"thinwire"}


def test_everything_that_kubernetes_objects_name_is_there(objects: list[dict[str, Any]]) -> None:
    names = {(found["kind"], found["metadata"]["name"]) for found in objects}
    for container, spec in containers(objects):
        volumes = {v["name"]: v for v in spec["volumes"]}
        claims = {"state", "data"}
        assert {m["name"] for m in container["volumeMounts"]} <= volumes.keys() | claims
        projected = [s for v in volumes.values() for s in v.get("projected", {}).get("sources", ())]
        for source in (*volumes.values(), *projected):
            if "configMap" in source:
                assert ("ConfigMap", source["configMap"]["name"]) in names
            if "secret" in source:
                name = source["secret"].get("secretName") or source["secret"]["name"]
                assert ("Secret", name) in names or name in MADE_BY_HAND
        for variable in container.get("env", ()):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            assert secret is None or secret["name"] in MADE_BY_HAND


def test_pods_may_run_in_a_restricted_namespace(objects: list[dict[str, Any]]) -> None:
    for container, spec in containers(objects):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"]
        assert not own["allowPrivilegeEscalation"]
        assert own["capabilities"] == {"drop": ["ALL"]}


def test_services_and_policies_open_the_ports_that_pods_have(objects: list[dict[str, Any]]) -> None:
    pods = {}
    for found in objects:
        if found["kind"] == "StatefulSet":
            template = found["spec"]["template"]
            ports = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
            pods[template["metadata"]["labels"]["app.kubernetes.io/name"]] = ports
    for found in objects:
        if found["kind"] == "Service":
            ports = pods[found["spec"]["selector"]["app.kubernetes.io/name"]]
            assert {p["targetPort"]: p["port"] for p in found["spec"]["ports"]}.items() <= ports.items()
        elif found["kind"] == "NetworkPolicy" and found["spec"]["podSelector"]:
            ports = pods[found["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]]
            for rule in found["spec"]["ingress"]:
                assert {p["port"] for p in rule["ports"]} <= ports.keys()
    for container, _ in containers(objects):
        if container["image"].startswith("thinwire"):
            command = parsed([arg.replace("$(THREADS)", "2") for arg in container["args"]])
            name = "coordinator" if isinstance(command, Coordinator) else "node"
            assert command.port == pods[name]["p2p"]
            assert command.http == f"0.0.0.0:{pods[name]['http']}"


def test_the_gpu_overlay_gives_its_nodes_a_gpu() -> None:
    (node,) = (container for container, _ in containers(kustomized("gpu")) if container["name"] == "node")
    command = parsed([arg.replace("$(THREADS)", "2") for arg in node["args"]])
    assert command.device == "cuda"
    assert node["image"].endswith(":cuda")
    assert node["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_three_coordinators_of_kubernetes_have_disks_and_names_of_their_own() -> None:
    objects = kustomized("three")
    sets = {found["metadata"]["name"]: found["spec"] for found in objects if found["kind"] == "StatefulSet"}
    assert sets["coordinator"]["replicas"] + sets["seat"]["replicas"] == 3
    assert sets["seat"]["volumeClaimTemplates"]
    first, seat = (
        parsed([arg.replace("$(POD_NAME)", "seat-0") for arg in container["args"]])
        for container, spec in containers(objects)
        if container["name"] in ("coordinator", "seat")
    )
    assert first.seats == 3
    assert Path(seat.replica).name == first.seat_ticket_file.name
    assert seat.announce == (f"seat-0.{sets['seat']['serviceName']}:4001",)
    maps = [found["data"] for found in kustomized("monitoring-three") if found["kind"] == "ConfigMap"]
    (prometheus,) = (text for data in maps for text in data.values() if "\nscrape_configs:" in text)
    assert asks_all_of(prometheus) == ["coordinator:9100", "seat-0.seat:9100", "seat-1.seat:9100"]


def test_kubernetes_and_compose_get_the_same_monitoring_files() -> None:
    """One that is not in the list would be missing in the cluster alone."""
    folder = DEPLOY / "monitoring"
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    generators = (*listed["configMapGenerator"], *listed["secretGenerator"])
    mounted: set[Path] = set()
    for service in compose("monitoring")["services"].values():
        for volume in service["volumes"]:
            source = Path(volume["source"])
            if volume["type"] == "bind":
                mounted |= {source} if source.is_file() else {p for p in source.rglob("*") if p.is_file()}
    assert mounted
    assert {folder / file for generator in generators for file in generator["files"]} == mounted


# ------------------------------------------------------------------------------------- systemd and SkyPilot


@pytest.mark.parametrize(
    "unit", ["thinwire-coordinator.service", "thinwire-seat.service", "thinwire-node@.service"]
)
def test_systemd_verifies_the_units(unit: str, tmp_path: Path) -> None:
    """With a program that exists in the place of the installed one."""
    text = (DEPLOY / "systemd" / unit).read_text()
    installed = "/opt/thinwire/bin/thinwire"
    (line,) = re.findall(r"^ExecStart=(.+)$", text, flags=re.M)
    program, *args = shlex.split(
        line.replace("$THINWIRE_ARGS", "").replace("%S", "/var/lib").replace("%d", "/run")
    )
    assert program == installed
    assert parsed(args) is not None
    copy = tmp_path / unit.replace("@", "@x")
    copy.write_text(text.replace(f"ExecStart={installed} ", f"ExecStart={sys.executable} "))
    assert said_by(tool("systemd-analyze"), "verify", str(copy)) == ""


def test_the_script_for_spot_machines_has_no_lint() -> None:
    shellcheck = tool("shellcheck")
    task = yaml.safe_load((DEPLOY / "skypilot" / "node.yaml").read_text())
    assert said_by(shellcheck, "skypilot/node.sh") == ""
    for part in ("setup", "run"):
        assert said_by(shellcheck, "--shell=bash", "-", text=task[part]) == ""
    started = (DEPLOY / "skypilot" / "node.sh").read_text()
    (line,) = re.findall(r"^thinwire (join .+?) <<<", started, flags=re.M)
    for shell, value in {'"$state"': "s", '"${announce[@]}"': "", "${ARGS:-}": task["envs"]["ARGS"]}.items():
        line = line.replace(shell, value)
    assert parsed(line.split()).device == "cuda"
