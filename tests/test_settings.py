"""The settings tree: what holds when nothing is said, who overrides whom, and one clear line for everything wrong."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from edge_asr import settings
from edge_asr.settings import FilesSource, MicrophoneSource, Settings, SettingsError, StdinSource

SECTIONS: tuple[type[BaseModel], ...] = (
    *(Settings, settings.Site, settings.Model, settings.Vad, settings.Partials, settings.Commands, settings.Outbox),
    *(
        settings.Mqtt,
        settings.Sparkplug,
        settings.HomeAssistant,
        settings.Tls,
        settings.Log,
        MicrophoneSource,
        FilesSource,
        StdinSource,
    ),
)
KEYS = sorted({key for section in SECTIONS for key in section.model_fields})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    return tmp_path / "etc" / "settings.yaml"


def load(file: Path, text: str) -> Settings:
    file.write_text(text, encoding="utf-8")
    return settings.load(file)


def refusal(file: Path, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        settings.load(file, overrides)
    return str(caught.value)


# ---------------------------------------------------------------- what is right


def test_without_a_file_everything_has_a_default() -> None:
    options = settings.load(None)
    assert options == Settings()
    assert options.model.name is None
    assert options.sources == (MicrophoneSource(type="microphone"),)
    assert options.topic_root == "voice/edge-asr"


def test_an_empty_file_and_empty_sections_change_nothing(file: Path) -> None:
    assert load(file, "") == Settings()
    assert load(file, "mqtt:\n  # host: broker\nlog:\n") == Settings()


def test_the_levels_of_the_plant_that_are_set_become_the_topic_root(file: Path) -> None:
    options = load(file, "device: edge07\nsite: {enterprise: acme, area: hall-2, cell: press}\n")
    assert options.topic_root == "acme/hall-2/press/voice/edge07"


def test_sources_of_every_type_stand_side_by_side(file: Path) -> None:
    text = "sources: [{type: microphone, channel: 2}, {type: files, paths: [a.wav]}, {type: stdin, rate: 8000}]"
    kinds = [(type(source), source.name) for source in load(file, text).sources]
    assert kinds == [(MicrophoneSource, "microphone"), (FilesSource, "files"), (StdinSource, "stdin")]


def test_relative_paths_of_the_file_are_taken_from_its_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", "/srv/worker")
    options = load(
        file,
        """
        outbox: {path: state/outbox.db}
        mqtt: {password_file: /run/credentials/password, tls: {ca_file: ca.pem}}
        sources: [{type: files, paths: [../recordings, ~/mine]}]
        model: {name: ./models/small}
        commands: {grammars: [factory.en, press.yaml, lines/four.yml]}
        """,
    )
    folder = file.parent
    assert options.outbox_path == folder / "state/outbox.db"
    assert options.mqtt.password_file == Path("/run/credentials/password")
    assert options.mqtt.tls is not None
    assert options.mqtt.tls.ca_file == folder / "ca.pem"
    assert isinstance(options.sources[0], FilesSource)
    assert options.sources[0].paths == (folder / "../recordings", Path("/srv/worker/mine"))
    assert options.model.name == str(folder / "models/small")
    assert options.commands.grammars == ("factory.en", str(folder / "press.yaml"), str(folder / "lines/four.yml"))


def test_relative_paths_typed_in_a_shell_are_taken_from_where_one_is(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("state_dir: state\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_ASR__MQTT__PASSWORD_FILE", "password")
    options = settings.load(file, {"commands.grammars": ["press.yaml"]})
    assert options.state_dir == file.parent / "state"
    assert options.mqtt.password_file == tmp_path / "password"
    assert options.commands.grammars == (str(tmp_path / "press.yaml"),)


def test_the_outbox_lies_in_the_state_directory_of_systemd_else_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/srv/worker/state")
    assert Settings().outbox_path == Path("/srv/worker/state/edge-asr/outbox.db")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/edge-asr:/var/lib/other")
    assert Settings().outbox_path == Path("/var/lib/edge-asr/outbox.db")


def test_a_user_without_a_home_is_one_line_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(SettingsError, match="state_dir: this user has no home directory; set it, or STATE_DIRECTORY"):
        _ = Settings().outbox_path


def test_variables_override_the_file_and_overrides_override_both(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("mqtt: {host: from-file, port: 1, keepalive_s: 20}\n")
    monkeypatch.setenv("EDGE_ASR__MQTT__PORT", "2")
    monkeypatch.setenv("EDGE_ASR__MQTT__HOST", "from-variable")
    monkeypatch.setenv("EDGE_ASR__MODEL__LANGUAGES", "[zh, en]")
    options = settings.load(file, {"mqtt.port": 3, "mqtt.tls": {}})
    assert (options.mqtt.host, options.mqtt.port, options.mqtt.keepalive_s) == ("from-variable", 3, 20)
    assert options.model.languages == ("zh", "en")
    assert options.mqtt.tls == settings.Tls()


def test_a_variable_fills_a_section_that_the_file_leaves_empty(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("mqtt:\n")
    monkeypatch.setenv("EDGE_ASR__MQTT__PORT", "1884")
    assert settings.load(file).mqtt.port == 1884


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().device = "other"


# ---------------------------------------------------------------- what is wrong

WRONG = {
    "mqtt: {port: 99999}": "mqtt.port: 99999 is not 1..65535",
    "mqtt: {port: many}": "mqtt.port: 'many' is wrong: input should be a valid integer",
    "mqtt: {keepalive_s: 15.5}": "mqtt.keepalive_s: 15.5 is wrong: input should be a valid integer",
    "mqtt: {max_retry_s: .nan}": "mqtt.max_retry_s: nan is not 1..3600",
    "mqtt: {host: on}": "mqtt.host: True is wrong: input should be a valid string; put it in quotes",
    "device: 2026-11-22": "device: datetime.date(2026, 11, 22) is wrong: input should be a valid string; put it in",
    "mqtt: broker": "mqtt: 'broker' is wrong: expected `key: value` lines below it",
    "mqtt: {brokers: [{host: a}, {host: b, prot: 1}]}": "mqtt.brokers.1.prot: unknown key; did you mean `port`?",
    "mqtt: {brokers: [{port: 1}]}": "mqtt.brokers.0.host: missing",
    "mqtt: {brokers: [{host: a, port: 0}]}": "mqtt.brokers.0.port: 0 is not 1..65535",
    "mqtt: {brokers: [{host: a}], username: b}": "mqtt: with brokers set, username belongs into its entries",
    "mqtt: {replay_per_s: 0}": "mqtt.replay_per_s: 0 is not 10..100000",
    "mqtt: {payload: xml}": "mqtt.payload: 'xml' is wrong: input should be 'cloudevents' or 'plain'",
    "mqtt: {prot: 1883}": "mqtt.prot: unknown key; did you mean `port`?",
    "mqqt: {port: 1883}": "mqqt: unknown key; did you mean `mqtt`?",
    "mqtt: {tls: {files: 1}}": "mqtt.tls.files: unknown key",
    "zzz: 1": "zzz: unknown key; remove it",
    '"z\\nz": 1': "'z\\nz': unknown key; remove it",
    "1: 2": "1: 1 is wrong: keys should be strings",
    "vad: {threshold: 0}": "vad.threshold: 0 is not above 0 and below 1",
    "vad: {pre_roll_s: 9}": "vad.pre_roll_s: 9 is not 0..2",
    "outbox: {max_bytes: 5}": "outbox.max_bytes: 5 is not at least 1000000",
    "commands: {ttl_s: .inf}": "commands.ttl_s: inf is not 3..86400",
    "commands: {grammars: factory.en}": "commands.grammars: 'factory.en' is wrong: expected a list",
    "device: line 4": "device: 'line 4' may hold only A-Z a-z 0-9 _ -",
    "site: {area: a/b}": "site.area: 'a/b' may hold only",
    "mqtt: {tls: {cert_file: a}}": "mqtt.tls: cert_file and key_file belong together: set both or neither",
    "mqtt: {tls: {key_file: a}}": "mqtt.tls: cert_file and key_file belong together: set both or neither",
    "state_dir: ~nobody-of-that-name/x": "state_dir: '~nobody-of-that-name/x' names the home of nobody here",
    "sources: 5": "sources: 5 is wrong: expected a list",
    "sources: [microphone]": "sources.0: 'microphone' is wrong: expected `key: value` lines below it",
    "sources: [{name: a}]": "sources.0.type: missing, expected one of 'microphone', 'files', 'stdin'",
    "sources: [{type: mic}]": "sources.0.type: 'mic' is not one of 'microphone', 'files', 'stdin'",
    "sources: [{type: files}]": "sources.0.paths: missing",
    "sources: [{type: files, paths: []}]": "sources.0.paths: [] is wrong: needs at least one entry",
    "sources: [{type: files, paths: [5]}]": "sources.0.paths.0: 5 is wrong: input is not a valid path",
    "sources: [{type: microphone, chanel: 1}]": "sources.0.chanel: unknown key; did you mean `channel`?",
    "sources: [{type: microphone, rate: 44}]": "sources.0.rate: 44 is not 8000..192000",
    "sources: [{type: stdin}, {type: files, paths: [a], name: stdin}]": "sources: the name 'stdin' is used twice",
    f"log: {'x' * 9999}": f"log: '{'x' * 76}... is wrong: expected `key: value` lines",
    # YAML itself
    "mqtt: {port: 1": "line 1, column 15: expected ',' or '}', but got '<stream end>'; mend the YAML there",
    "a: b\n\tc: d": "line 2, column 1: found character '\\t' that cannot start any token",
    "device: 2026-99-99": "line 1, column 9: '2026-99-99' cannot be read as timestamp; put it in quotes",
    "mqtt: {port: !!int x}": "line 1, column 14: 'x' cannot be read as int",
    "log: !!bool [x]": "line 1, column 6: expected a scalar node",
    f"mqtt: {{port: {'9' * 5000}}}": "cannot be read as int",
    "mqtt: {port: 1}\nlog: {}\nmqtt: {host: a}": "line 3, column 1: 'mqtt' stands here twice; mend the YAML there",
    "? [a]\n: 1": "line 1, column 3: found unhashable key",
    "a: !!python/object:os.system x": "line 1, column 4: could not determine a constructor",
    "[" * 5000: "nested too deeply; mend the YAML there",
    "\0": "special characters are not allowed; mend the YAML there",
    "- device: a": "holds a list, expected `key: value` lines",
    "device=a": "holds a str, expected `key: value` lines",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=lambda text: repr(text)[:50])
def test_every_mistake_is_one_line_with_file_key_value_and_what_was_expected(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    message = refusal(file)
    assert message.startswith(f"{file}: ")
    assert WRONG[text] in message
    assert "\n" not in message
    assert len(message) < 300


def test_all_mistakes_of_a_file_come_at_once(file: Path) -> None:
    file.write_text("mqtt: {port: 0, keepalive_s: 1}\nmodel: {language: de}\n")
    keys = [line.removeprefix(f"{file}: ").split(":")[0] for line in refusal(file).splitlines()]
    assert sorted(keys) == ["model.language", "mqtt.keepalive_s", "mqtt.port"]


def test_a_missing_file_a_folder_and_a_binary_file_are_named(file: Path) -> None:
    assert refusal(file).startswith(f"{file}: cannot be read (No such file or directory); check --settings")
    assert refusal(file.parent).startswith(f"{file.parent}: cannot be read (Is a directory)")
    file.write_bytes(b"\x80\xff\x00")
    assert refusal(file).startswith(f"{file}: cannot be read (not UTF-8 text)")


def test_a_wrong_variable_is_named_instead_of_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("mqtt: {port: 1883}\n")
    monkeypatch.setenv("EDGE_ASR__MQTT__PORT", "0")
    assert refusal(file) == "EDGE_ASR__MQTT__PORT: mqtt.port: 0 is not 1..65535"
    monkeypatch.setenv("EDGE_ASR__MQTT__PORT", "[1")
    assert refusal(file) == "EDGE_ASR__MQTT__PORT: '[1' is not a YAML value"
    monkeypatch.setenv("EDGE_ASR__MQTT__PORT", "2026-99-99")
    assert refusal(file) == "EDGE_ASR__MQTT__PORT: '2026-99-99' is not a YAML value"


def test_a_wrong_override_is_named_instead_of_the_file(file: Path) -> None:
    file.write_text("device: press\n")
    assert refusal(file, {"mqtt.port": 0}) == "--set: mqtt.port: 0 is not 1..65535"
    assert refusal(file, {"mqtt": {"port": 0}}) == "--set: mqtt.port: 0 is not 1..65535"
    assert refusal(file, {"": 0}) == "--set: '': unknown key; remove it"
    assert refusal(file, {"device.name": 0}) == "device.name: cannot be set, device is 'press', expected a section"


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(["microphone", "files", "stdin", "~x", "~nobody-of-that-name", "a/b.yaml", "auto", "\0"]),
)
TREES = st.recursive(
    SCALARS,
    lambda below: st.one_of(
        st.lists(below, max_size=3), st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=9), below, max_size=4)
    ),
    max_leaves=12,
)


def accepts_or_refuses(text: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        message = ""
        try:
            options = settings.load(file)
        except SettingsError as error:
            message = str(error)
        else:
            assert Settings.model_validate(options) == options
        assert all(line.startswith(f"{file}: ") for line in message.splitlines())


@given(st.dictionaries(st.sampled_from(sorted(Settings.model_fields)), TREES, max_size=3) | TREES)
@example({"sources": [{"type": "files", "paths": ["\0"]}]})
def test_no_tree_whatsoever_does_anything_but_load_or_be_refused(tree: object) -> None:
    accepts_or_refuses(yaml.safe_dump(tree, allow_unicode=True))


@given(st.binary() | st.text(alphabet="abc: -[]{}&*!|>'\"#%@`,?\n\t0127.~=<_") | st.text())
@example("a: &a [*a]")
@example("sources: &a [*a]")
@example("device: =")
@example("<<: [1]")
def test_no_bytes_whatsoever_do_anything_but_load_or_be_refused(text: str | bytes) -> None:
    accepts_or_refuses(text)
