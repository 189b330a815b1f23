"""The example file and the JSON Schema say of the settings what the settings are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from edge_asr import settings, settings_reference
from edge_asr.settings import Settings, SettingsError
from tests.sysbox import CHECKOUT
from tests.test_cli import typed

EXAMPLE = settings_reference.example()
KEY = re.compile(r"^( *)#(?=[a-z-])", re.MULTILINE)
SCHEMA = settings_reference.schema()
KEYS = [at for at, text in enumerate(EXAMPLE.split("\n")) if KEY.match(text)]
BELONGING = {
    "cert_file": "key_file",
    "key_file": "cert_file",
    "ice_username": "ice_password_file",
    "ice_password_file": "ice_username",
}


def test_the_shipped_example_is_current() -> None:
    shipped = (CHECKOUT / "examples/settings.yaml").read_text(encoding="utf-8")
    assert shipped == EXAMPLE, "type: edge-asr settings example > examples/settings.yaml"


def test_the_example_as_it_is_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(EXAMPLE, encoding="utf-8")
    assert settings.load(tmp_path / "s.yaml") == Settings()


def uncommented(line: int, indent: int) -> str:
    """The example with one key in force, and with it the section that it stands in and the key it cannot be without."""
    lines = EXAMPLE.split("\n")
    wanted = {line}
    name = lines[line].strip().lstrip("#").partition(":")[0]
    for near in range(max(0, line - 60), min(len(lines), line + 4)):
        text = lines[near]
        if near < line and KEY.match(text) and len(text) - len(text.lstrip()) < indent:
            wanted = {each for each in wanted if each == line} | {near}
        elif near < line and text and not text.startswith((" ", "#")):
            wanted = {line}
        if text.strip().startswith(f"#{BELONGING.get(name)}:"):
            wanted.add(near)
    if any("- type: files" in lines[at] for at in wanted):  # is nothing without its paths
        wanted.add(next(at for at, text in enumerate(lines) if "#paths:" in text))
    return "\n".join(KEY.sub(r"\1", text) if at in wanted else text for at, text in enumerate(lines))


@pytest.mark.parametrize(
    "line",
    [at for at, text in enumerate(EXAMPLE.split("\n")) if KEY.match(text)],
    ids=lambda at: EXAMPLE.split("\n")[at],
)
def test_every_key_of_the_example_is_right_when_its_mark_is_removed(tmp_path: Path, line: int) -> None:
    text = EXAMPLE.split("\n")[line]
    changed = uncommented(line, len(text) - len(text.lstrip()))
    (tmp_path / "s.yaml").write_text(changed, encoding="utf-8")
    try:
        settings.load(tmp_path / "s.yaml")
    except SettingsError as error:
        pytest.fail(f"{error}\n{text}")
    assert not list(Draft202012Validator(SCHEMA).iter_errors(yaml.safe_load(changed)))


def test_every_key_stands_in_the_example_with_its_meaning() -> None:
    keys = {key for model in sections(Settings) for key in model.model_fields}
    assert keys - {"type", "phrase", "spoken", "ca_file"} <= set(re.findall(r"^ *#?([a-z_]+):", EXAMPLE, re.MULTILINE))


def sections(model: Any) -> list[Any]:
    found = [model]
    for field in model.model_fields.values():
        nested = settings_reference.section_of(field)
        if nested is not None:
            found += sections(nested)
    return found


def test_the_schema_is_one_and_describes_every_key() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["device"]["description"].startswith("This box's name")
    assert SCHEMA["$defs"]["Vad"]["properties"]["pre_roll_s"]["description"].startswith("Audio kept from")


@pytest.mark.parametrize(
    "tree",
    [
        {"mqtt": None},
        {"mqtt": {"host": "h", "port": 99_999}},
        {"mqtt": {"hots": "h"}},
        {"vad": {"threshold": "much"}},
        {"vad": {"threshold": 0.4}},
        {"hotwords": {"phrases": ["RCCB", {"phrase": "x", "weight": 3}]}},
        {"hotwords": {"phrases": [""]}},
        {"sources": [{"type": "files"}]},
        {"sources": [{"type": "files", "paths": ["a"]}]},
        {"sources": [{"type": "radio"}]},
        {"log": {"level": "loud"}},
        {"monitoring": {"port": None}},
        {"gateway": {"port": 8443}},
    ],
)
def test_editor_and_daemon_agree_on_what_is_right(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    accepted = True
    try:
        settings.load(tmp_path / "s.yaml")
    except SettingsError:
        accepted = False
    assert Draft202012Validator(SCHEMA).is_valid(tree) is accepted


def test_the_verbs_print_them_and_what_is_really_set(tmp_path: Path) -> None:
    assert typed("settings", "example").stdout == EXAMPLE
    assert json.loads(typed("settings", "schema").stdout) == json.loads(json.dumps(SCHEMA))
    (tmp_path / "s.yaml").write_text("device: from-file\nmqtt: {host: a, port: 1}", encoding="utf-8")
    shown = typed(
        "settings", "show", "-s", str(tmp_path / "s.yaml"), "--set", "mqtt.port=2", EDGE_ASR__MQTT__HOST="from-variable"
    )
    tree = yaml.safe_load(shown.stdout)
    assert (tree["device"], tree["mqtt"]["host"], tree["mqtt"]["port"]) == ("from-file", "from-variable", 2)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path: Path) -> None:
    done = typed("run", "--dry-run", "--set", f"state_dir={tmp_path}/state", "--set", "mqtt.host=mes")
    assert done.returncode == 0, done.stderr
    assert "publish to  mes:1883, below voice/edge-asr/" in done.stdout
    assert "listen to   microphone (microphone)" in done.stdout
    assert not (tmp_path / "state").exists()
    assert typed("run", "--dry-run", "--set", "model.name=nowhere").returncode == 78
