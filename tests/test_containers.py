"""The container files without Docker or a cluster: whatever they name exists, and their settings are settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from edge_asr.settings import Settings
from tests.sysbox import CHECKOUT

FOLDER = CHECKOUT / "containers"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def test_their_settings_are_settings() -> None:
    (alone,) = documents("settings.yaml")
    config, *_ = documents("kubernetes.yaml")
    for tree in (alone, yaml.safe_load(config["data"]["settings.yaml"])):
        chosen = Settings.model_validate(tree)
        assert chosen.monitoring.host == "0.0.0.0"  # noqa: S104 - the probes come from outside the container


def test_compose_mounts_files_that_exist_and_volumes_that_it_declares() -> None:
    (compose,) = documents("compose.yaml")
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (FOLDER / source).exists() if source.startswith(".") else source in compose["volumes"], volume


def test_nothing_runs_as_root_and_every_copied_path_exists() -> None:
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001"]
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            assert all((CHECKOUT / part).exists() for part in line.split()[1:-1]), line
    (stateful,) = (each for each in documents("kubernetes.yaml") if each["kind"] == "StatefulSet")
    pod = stateful["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 10001
    (container,) = pod["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    named = {volume["name"] for volume in pod["volumes"]} | {
        claim["metadata"]["name"] for claim in stateful["spec"]["volumeClaimTemplates"]
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == named


def test_every_path_of_the_build_is_in_the_checkout_that_docker_sees() -> None:
    ignored = Path(CHECKOUT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ".venv" in ignored
    assert not {"edge_asr", "models", "systemd", "examples"} & set(ignored)
