"""The container files without Docker or a cluster: what they name exists, what they run is run on this machine."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import shutil
import ssl
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

import edge_asr
from edge_asr import settings
from edge_asr.gateway import certificates
from edge_asr.settings import Settings
from tests.broker import HOST, free_port, wait_until
from tests.sysbox import CHECKOUT
from tests.test_monitoring import get

FOLDER = CHECKOUT / "containers"
SETTINGS_INSIDE = "/etc/edge-asr/settings.yaml"
STATE_INSIDE = "/var/lib/edge-asr"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def services() -> dict[str, dict[str, Any]]:
    (compose,) = documents("compose.yaml")
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


def mounted(service: str) -> dict[str, Path]:
    """Path inside -> the checkout's file."""
    pairs = (volume.split(":")[:2] for volume in services()[service]["volumes"])
    return {inside: FOLDER / source for source, inside in pairs if source.startswith(".")}


def pod(text: str) -> dict[str, Any]:
    (stateful,) = (each for each in yaml.safe_load_all(text) if each["kind"] == "StatefulSet")
    found: dict[str, Any] = stateful["spec"]["template"]["spec"]
    claims = {claim["metadata"]["name"] for claim in stateful["spec"]["volumeClaimTemplates"]}
    return {**found, "names": {volume["name"] for volume in found["volumes"]} | claims}


KUBERNETES = (FOLDER / "kubernetes.yaml").read_text(encoding="utf-8")
OWN = KUBERNETES.replace("#own:", "")
"""As its comment says for a certificate of one's own."""


def test_their_settings_are_settings() -> None:
    (gateway,), (audio,) = documents("settings.yaml"), documents("settings-audio.yaml")
    config, *_ = documents("kubernetes.yaml")
    for tree in (gateway, audio, yaml.safe_load(config["data"]["settings.yaml"])):
        chosen = Settings.model_validate(tree)
        assert chosen.monitoring.host == "0.0.0.0"  # noqa: S104 - the probes come from outside the container


def test_compose_mounts_files_that_exist_and_volumes_that_it_declares() -> None:
    (compose,), (audio,) = documents("compose.yaml"), documents("audio.yaml")
    for service in (*compose["services"].values(), *audio["services"].values()):
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (FOLDER / source).exists() if source.startswith(".") else source in compose["volumes"], volume


@pytest.mark.parametrize("text", [KUBERNETES, OWN], ids=["made", "own"])
def test_nothing_runs_as_root_and_every_mount_has_a_volume(text: str) -> None:
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001"]
    found = pod(text)
    assert found["securityContext"]["runAsUser"] == 10001
    used = set()
    for container in (*found["initContainers"], *found["containers"]):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        used |= {mount["name"] for mount in container["volumeMounts"]}
    assert used == found["names"]


def test_every_copied_path_exists_and_every_image_of_ours_is_of_this_version() -> None:
    for line in (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            assert all((CHECKOUT / part).exists() for part in line.split()[1:-1]), line
    found = pod(KUBERNETES)
    ours = [container["image"] for container in (*found["initContainers"], *found["containers"])]
    ours += [services()[name]["image"] for name in ("certificate", "edge-asr")]
    assert set(ours) == {f"edge-asr:{edge_asr.__version__}"}


def test_every_path_of_the_build_is_in_the_checkout_that_docker_sees() -> None:
    ignored = Path(CHECKOUT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ".venv" in ignored
    assert not {"edge_asr", "models", "systemd", "examples"} & set(ignored)


def test_grafana_comes_up_with_prometheus_and_the_dashboard() -> None:
    inside = mounted("grafana")
    ((source,),) = (
        yaml.safe_load(file.read_text(encoding="utf-8"))["datasources"]
        for path, file in inside.items()
        if path.startswith("/etc/grafana/provisioning/datasources/")
    )
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert source["url"].removeprefix("http://").removesuffix(":9090") in services()
    ((provider,),) = (
        yaml.safe_load(file.read_text(encoding="utf-8"))["providers"]
        for path, file in inside.items()
        if path.startswith("/etc/grafana/provisioning/dashboards/")
    )
    folder = PurePosixPath(provider["options"]["path"])
    (dashboard,) = (path for path in inside if PurePosixPath(path).parent == folder)
    assert services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
    assert json.loads(inside[dashboard].read_text(encoding="utf-8"))["uid"] == "edge-asr"


def test_prometheus_finds_its_rules_and_asks_the_daemon(tmp_path: Path) -> None:
    for path, file in mounted("prometheus").items():
        target = tmp_path / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    config = tmp_path / "etc/prometheus/prometheus.yml"
    done = subprocess.run(["promtool", "check", "config", config], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout
    (job,) = yaml.safe_load(config.read_text(encoding="utf-8"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"edge-asr:{Settings().monitoring.port}"]}]


def run(arguments: list[str], state: Path) -> subprocess.CompletedProcess[str]:
    """What a container runs, with this machine's paths."""
    here = [{SETTINGS_INSIDE: str(FOLDER / "settings.yaml")}.get(each, each) for each in arguments]
    environment = {**os.environ, "STATE_DIRECTORY": str(state)}
    command = [sys.executable, "-m", "edge_asr.cli", *here]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60)


def compose_command() -> list[str]:
    return shlex.split(services()["certificate"]["command"].replace("${EDGE_ASR_NAMES:-}", "voice.hall-2.example"))


def pod_command() -> list[str]:
    (container,) = pod(KUBERNETES)["initContainers"]
    found: list[str] = container["args"]
    return found


@pytest.mark.parametrize(
    ("command", "name"), [(compose_command(), "voice.hall-2.example"), (pod_command(), "edge-asr.default.svc")]
)
def test_the_certificate_is_made_once_and_left_alone_at_the_next_start(
    command: list[str], name: str, tmp_path: Path
) -> None:
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{name}, " in done.stdout
    made = (tmp_path / "gateway/server.crt").read_bytes()
    assert "days more" in run(command, tmp_path).stdout
    assert (tmp_path / "gateway/server.crt").read_bytes() == made


def test_the_gateway_of_the_containers_comes_up_with_that_certificate(tmp_path: Path) -> None:
    assert run(compose_command(), tmp_path).returncode == 0
    port, numbers = free_port(), free_port()
    environment = {
        **os.environ,
        "STATE_DIRECTORY": str(tmp_path),
        "EDGE_ASR__MQTT__HOST": HOST,
        "EDGE_ASR__MQTT__PORT": str(free_port()),  # the broker is not there yet
        "EDGE_ASR__GATEWAY__HOST": HOST,
        "EDGE_ASR__GATEWAY__PORT": str(port),
        "EDGE_ASR__MONITORING__HOST": HOST,
        "EDGE_ASR__MONITORING__PORT": str(numbers),
    }
    command = [sys.executable, "-m", "edge_asr.cli", "run", "--settings", str(FOLDER / "settings.yaml")]
    trust = ssl.create_default_context(cafile=certificates.Files(tmp_path / "gateway").authority)

    def page() -> int:
        connection = http.client.HTTPSConnection("localhost", port, timeout=10, context=trust)
        with contextlib.closing(connection), contextlib.suppress(ConnectionError):
            connection.request("GET", "/ca.crt")
            return connection.getresponse().status
        return 0

    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, env=environment, stderr=log) as daemon:
        try:
            wait_until(lambda: daemon.poll() is not None or page() == 200, "the gateway answers")
            assert daemon.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            assert get(numbers, "/livez") == (200, "ok\n")  # what Dockerfile and Kubernetes ask
        finally:
            daemon.terminate()


def test_a_certificate_of_ones_own_is_taken_from_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = pod(OWN)["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    gateway = settings.load(FOLDER / "settings.yaml").gateway
    assert gateway is not None
    (mount,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "certificate")
    assert {gateway.cert_file, gateway.key_file} == {Path(mount, "tls.crt"), Path(mount, "tls.key")}
