"""The settings tree: one YAML file, typed and checked before anything starts.

Law: every error names the key, the value and what was expected (``mqtt.port: 99999 is not 1..65535``), all errors of
a file come at once, and an unknown key is an error, because a misspelt key that silently does nothing costs a night
shift.
"""

from __future__ import annotations

import datetime as dt
import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

ENVIRONMENT_PREFIX = "EDGE_ASR__"
"""``EDGE_ASR__MQTT__HOST=broker`` overrides ``mqtt.host``."""


_SHOWN = 80
"""Characters of a wrong value that an error shows."""

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}

_EXPECTED = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "expected `key: value` lines below it"),
    "tuple_type": "expected a list, [a, b] or lines that begin with `- `",
    "too_short": "needs at least one entry",
}
"""Kind of error -> what pydantic says in the terms of a programmer."""

_NAMES_OR_PATHS = {"model.name", "commands.grammars"}
_PATH = re.compile(r"/|\.ya?ml$")


class SettingsError(Exception):
    """The settings cannot be used; the message is one line per problem, each with its remedy. Exit code 78."""


def _topic_segment(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", value):
        raise ValueError("may hold only A-Z a-z 0-9 _ - (it becomes one level of an MQTT topic)")
    return value


TopicSegment = Annotated[str, AfterValidator(_topic_segment)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _none_set(cls, given: object) -> object:
        """``mqtt:`` with every line below it commented out is a section without keys."""
        return {} if given is None else given


class Site(_Section):
    """Where the device stands (ISA-95); the levels that are set become the topic root, in this order."""

    enterprise: TopicSegment | None = None
    site: TopicSegment | None = None
    area: TopicSegment | None = None
    line: TopicSegment | None = None
    cell: TopicSegment | None = None


class Model(_Section):
    """Which ears."""

    name: str | None = None
    """Name of a bundled or imported model, or the path, with a ``/`` in it, of a directory in SenseVoice's contract
    (model.int8.onnx, tokens.txt). None: the one that `edge-asr models activate` chose, else the bundled one."""
    signed_by: Path | None = None
    """Ed25519 public key (PEM): only models whose manifest is signed with it are imported and used."""
    engine: Literal["onnxruntime", "sherpa-onnx"] = "onnxruntime"
    """sherpa-onnx gives text only: commands are then matched on the text."""
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    language: Literal["auto", "zh", "en", "yue", "ja", "ko"] = "auto"
    """Fixed language, or auto."""
    languages: tuple[Literal["zh", "en", "yue", "ja", "ko"], ...] = ()
    """With auto: the languages spoken at this site; anything else heard is rejected. Empty: all."""
    language_model: bool = True
    """Weigh what may have been said by how likely its words follow each other, where the model knows that."""
    use_itn: bool = False
    """Write numbers as digits and add punctuation; command grammars work on spoken words, so off by default."""
    threads: Annotated[int, Field(ge=1, le=64)] = 1
    """Threads within one decode."""
    optimized: bool = True
    """Run a faster graph that was made and proven for this CPU; the daemon makes it where there is none."""


class Vad(_Section):
    """When does someone speak."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Speech probability that opens the gate; it closes 0.15 lower."""
    pre_roll_s: Annotated[float, Field(ge=0, le=2)] = 0.4
    """Audio kept from before the onset: detectors notice a first word 40 ms late at the median, 1.4 s at worst."""
    min_speech_s: Annotated[float, Field(ge=0.03, le=5)] = 0.2
    """Shorter bursts of speech are dropped."""
    min_silence_s: Annotated[float, Field(ge=0.1, le=5)] = 0.6
    """Silence that ends an utterance."""
    max_utterance_s: Annotated[float, Field(ge=2, le=30)] = 20.0
    """Longer speech is cut at its quietest moment near the end: memory and accuracy suffer beyond 20 s."""
    energy_gate_dbfs: Annotated[float, Field(ge=-120, le=0)] = -65.0
    """Frames quieter than this skip the detector: silence costs next to nothing."""

    @model_validator(mode="after")
    def _room_for_speech(self) -> Vad:
        if self.pre_roll_s + self.min_speech_s >= self.max_utterance_s:
            raise ValueError("max_utterance_s must be more than pre_roll_s + min_speech_s, or no speech is long enough")
        return self


class Partials(_Section):
    """Text while someone still speaks."""

    enabled: bool = True
    interval_s: Annotated[float, Field(ge=0.2, le=10)] = 0.6
    """A new partial at most this often; the first thing dropped under load."""


class MicrophoneSource(_Section):
    """A sound card or USB microphone."""

    type: Literal["microphone"]
    name: TopicSegment = "microphone"
    device: str | int = "default"
    """``default``, part of a name, an ALSA card id (``hw:CARD=Array``) or an index; see `edge-asr devices`."""
    channel: Annotated[int, Field(ge=1, le=64)] = 1
    """Which channel of a microphone array, counted from 1."""
    rate: Annotated[int, Field(ge=8000, le=192_000)] | None = None
    """Hz; None: the device's own."""


class FilesSource(_Section):
    """Recordings played as if someone spoke: files, or directories of them in name order."""

    type: Literal["files"]
    name: TopicSegment = "files"
    paths: Annotated[tuple[Path, ...], Field(min_length=1)]
    realtime: bool = True
    """False: as fast as the recognizer keeps up, nothing lost."""


class StdinSource(_Section):
    """Raw mono signed 16-bit little-endian PCM on standard input."""

    type: Literal["stdin"]
    name: TopicSegment = "stdin"
    rate: Annotated[int, Field(ge=8000, le=192_000)] = 16_000


SourceSettings = Annotated[MicrophoneSource | FilesSource | StdinSource, Field(discriminator="type")]


AudioEvent = Literal["BGM", "Applause", "Laughter", "Cry", "Sneeze", "Breath", "Cough", "Event_UNK"]
"""What SenseVoice calls sound that is more than plain speech."""


class Commands(_Section):
    """What may be commanded."""

    grammars: tuple[str, ...] = ("factory.en",)
    """Names of bundled grammars or paths of grammar files (``*.yaml``); several languages side by side are fine."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Below: rejected as not understood. An intent may ask for more."""
    ttl_s: Annotated[float, Field(ge=3, le=86_400)] = 10.0
    """Life of a command unless its intent says otherwise; brokers count its last 2 seconds too coarsely to be used."""
    max_noise_dbfs: Annotated[float, Field(ge=-60, le=0)] = -18.0
    """A source whose noise stays above this is not trusted: its commands are rejected, only "cancel" passes."""
    refuse_events: tuple[AudioEvent, ...] = ("Applause", "Laughter", "Cry", "Sneeze", "Breath", "Cough")
    """Audio events, by the model, in which nothing is commanded, only "cancel" passes; add BGM where no radio plays."""
    confirm_within_s: Annotated[float, Field(ge=3, le=300)] = 15.0
    """A risky command that is not confirmed within this time is cancelled."""


class Hotword(_Section):
    """A word or phrase of the site; in YAML also the phrase alone."""

    phrase: Annotated[str, Field(min_length=1)]
    """As the transcript shall show it: RCCB, conveyor belt, 3号机."""
    weight: Annotated[float, Field(ge=0, le=20)] | None = None
    """None: the weight of all."""
    spoken: tuple[str, ...] = ()
    """What the model may write where ``phrase`` is said, if it is not the same in other letters."""

    @model_validator(mode="before")
    @classmethod
    def _phrase_alone(cls, given: object) -> object:
        return {"phrase": given} if isinstance(given, str) else given


class Hotwords(_Section):
    """Words of the site that the model hardly knows and shall prefer."""

    phrases: tuple[Hotword, ...] = ()
    file: Path | None = None
    """More of them: one phrase per line, its own weight after a colon if it has one, ``#`` for comments."""
    weight: Annotated[float, Field(ge=0, le=20)] = 2.0
    """Nats per token by which a hotword may be less likely than the free text; see docs/hotwords.md."""


class ClassLimits(_Section):
    """What one class of messages may be, dead letters included."""

    max_bytes: Annotated[int, Field(ge=100_000)] | None = None
    """Beyond it the oldest of the class go. None: as much as fits into the outbox."""
    days: Annotated[float, Field(gt=0, le=3650)] | None = None
    """Older ones are deleted undelivered. Days that the box ran are counted, whatever its clock shows. None: they
    wait until there is no room."""


class OutboxLimits(_Section):
    """For each class; every message that goes is counted (`edge-asr outbox status`) and an alarm."""

    command: ClassLimits = ClassLimits()
    """evt/command, evt/expired, evt/pending."""
    transcript: ClassLimits = ClassLimits()
    """evt/transcript."""
    rejection: ClassLimits = ClassLimits()
    """evt/rejected."""
    alarm: ClassLimits = ClassLimits()
    """evt/alarm: what the device tells of itself."""


class Outbox(_Section):
    """The durable queue between the microphone and the broker."""

    path: Path | None = None
    """SQLite file; None: outbox.db in the state directory."""
    max_bytes: Annotated[int, Field(ge=1_000_000)] = 256 * 1024 * 1024
    """Size limit; when it is reached the oldest transcripts go first and commands last, each loss counted."""
    limits: OutboxLimits = OutboxLimits()


class Tls(_Section):
    """Encryption and identity towards the broker (TLS 1.2 or newer)."""

    ca_file: Path | None = None
    """None: the system's certificate authorities."""
    cert_file: Path | None = None
    key_file: Path | None = None

    @model_validator(mode="after")
    def _pair(self) -> Tls:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: set both or neither")
        return self


class _Access(_Section):
    """How a broker lets us in."""

    port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """None: 1883, or 8883 with TLS."""
    username: str | None = None
    password_file: Path | None = None
    """File whose first line is the password (systemd: LoadCredential=); a password in the settings would leak."""
    tls: Tls | None = None


class Broker(_Access):
    """One of several brokers."""

    host: str


class Mqtt(_Access):
    """One broker or several. Without any nothing is published; the outbox keeps everything meanwhile."""

    host: str | None = None
    brokers: tuple[Broker, ...] = ()
    """Several in order, the plant's first: the first that accepts us gets everything, and we return when it is back."""
    client_id: TopicSegment | None = None
    """None: edge-asr-<device>."""
    payload: Literal["cloudevents", "plain"] = "cloudevents"
    """CloudEvents 1.0 structured JSON, or its flat data alone for tag-based SCADA."""
    replay_per_s: Annotated[int, Field(ge=10, le=100_000)] = 1_500
    """Messages a second at most while a backlog is sent: a consumer that falls behind would get live commands late,
    because they wait behind the backlog in the broker's queue for it."""
    keepalive_s: Annotated[int, Field(ge=5, le=600)] = 15
    max_retry_s: Annotated[float, Field(ge=1, le=3600)] = 30.0
    """Reconnecting never gives up; the pause grows to this, with jitter. So often the way back to a better broker is
    tried, too."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Mqtt:
        alone = [name for name in Broker.model_fields if getattr(self, name) is not None]
        if self.brokers and alone:
            raise ValueError(f"with brokers set, {alone[0]} belongs into its entries")
        return self


Verb = Literal[
    "ping", "status", "say-again", "confirm", "cancel", "reload", "hotwords", "grammar", "mute", "unmute", "receipt"
]
"""What can be asked of the device on ``req/<verb>``."""


class Requests(_Section):
    """What may be asked of the device over MQTT; who may ask is for the broker's access rules to say."""

    allow: tuple[Verb, ...] = get_args(Verb)
    """Empty: the device listens to no requests at all."""
    receipt_within_s: Annotated[float, Field(ge=1, le=86_400)] | None = None
    """The MES answers every command with req/receipt within this time, or an alarm is raised; None: it need not."""


def _address(text: str) -> str:
    return str(ipaddress.ip_address(text))


UdpPort = Annotated[int, Field(ge=1024, le=65_535)]
IceServer = Annotated[
    str,
    Field(pattern=r"^(stun:[^\s?:]+(:\d{1,5})?|turns?:[^\s?:]+(:\d{1,5})?(\?transport=(udp|tcp))?)$"),
]


class Gateway(_Section):
    """Browsers, phones and headsets of the plant network as further sources; needs the extra ``gateway``."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all of IPv4; ``::``: all of IPv4 and IPv6."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8443
    tls: bool = True
    """False: for a proxy on this machine, or to try it here; then ``host`` must be a loopback address."""
    cert_file: Path | None = None
    """None: what `edge-asr gateway cert` has made in the state directory."""
    key_file: Path | None = None
    open: bool = False
    """True: this machine's own programs need no token; then ``host`` must be a loopback address."""
    announce: Annotated[str, AfterValidator(_address)] | None = None
    """Address by which WebRTC peers reach this machine behind a port mapping (containers); None: its own addresses."""
    udp_ports: tuple[UdpPort, UdpPort] | None = None
    """First and last UDP port for WebRTC, e.g. ``[50000, 50099]``, as a firewall or a port mapping lets them through: a
    call needs one for each address of this machine. None: whichever the kernel gives."""
    ice_servers: tuple[IceServer, ...] = ()
    """STUN and TURN servers to ask, e.g. ``stun:10.0.0.1``, ``turn:10.0.0.1?transport=tcp``; of each kind the first is
    used. None by default: nothing is contacted."""
    ice_username: str | None = None
    """For the TURN server."""
    ice_password_file: Path | None = None
    """File whose first line is its password (systemd: LoadCredential=)."""
    origins: tuple[str, ...] = ()
    """Web pages of other hosts that may use it, e.g. ``https://mes.plant``; its own page always may."""
    max_sessions: Annotated[int, Field(ge=1, le=1000)] = 64
    max_sessions_per_token: Annotated[int, Field(ge=1, le=1000)] = 4
    max_sessions_per_address: Annotated[int, Field(ge=1, le=1000)] = 16
    """Several stations may stand behind one address translation."""
    max_connections_per_address: Annotated[int, Field(ge=8, le=2048)] = 256
    """Of 2048 in all. A page has one that stays and up to six others for a moment; where a whole plant comes from one
    address, translated or through a proxy, raise it."""
    max_session_s: Annotated[float, Field(ge=60, le=604_800)] = 86_400.0
    idle_s: Annotated[float, Field(ge=10, le=86_400)] = 3600.0
    """A session in which nobody spoke for so long ends; the page opens another when the button is pressed."""
    resume_s: Annotated[float, Field(ge=1, le=600)] = 30.0
    """How long a session waits for its client after the connection was lost."""

    @model_validator(mode="after")
    def _open_only_to_this_machine(self) -> Gateway:
        if not (self.tls and not self.open) and self.host not in {"127.0.0.1", "::1", "localhost"}:
            raise ValueError("without TLS, or open without tokens, host must be 127.0.0.1 (or ::1, localhost)")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: set both or neither")
        return self

    @model_validator(mode="after")
    def _webrtc(self) -> Gateway:
        if self.udp_ports is not None and self.udp_ports[0] > self.udp_ports[1]:
            raise ValueError("udp_ports are the first and the last one, in this order")
        if (self.ice_username is None) != (self.ice_password_file is None):
            raise ValueError("ice_username and ice_password_file belong together: set both or neither")
        if self.ice_username is None and any(server.startswith("turn") for server in self.ice_servers):
            raise ValueError("a TURN server in ice_servers wants ice_username and ice_password_file")
        return self


class Recorder(_Section):
    """Doubtful utterances, kept for people to label; off unless a key is set. See docs/privacy.md."""

    public_key: Path | None = None
    """X25519 public key (PEM) to which every recording is sealed; only its private key, kept elsewhere, opens them.
    None: nothing is recorded."""
    below: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Commands with less confidence are kept, transcripts where there are no grammars, and everything that was rejected
    for what was heard."""
    max_bytes: Annotated[int, Field(ge=1_000_000)] = 512 * 1024 * 1024
    """When it is reached the oldest go first."""
    days: Annotated[float, Field(gt=0, le=3650)] = 30.0
    """Older recordings are deleted, without a key too; what counts is the time for which the box ran."""


class Privacy(_Section):
    """What may leave the box or stay on it."""

    publish: Literal["everything", "commands"] = "everything"
    """commands: no transcript and no partial is kept or sent, and commands and rejections carry no free text."""
    transcript_days: Annotated[float, Field(gt=0, le=3650)] | None = None
    """Transcripts that have waited longer for a broker are deleted; see `outbox.limits.transcript.days`, of which the
    shorter counts. None: they wait until the outbox is full."""


class Audit(_Section):
    """A hash-chained record of what was said, understood, sent and done; see docs/privacy.md."""

    enabled: bool = False
    texts: bool = True
    """With the words that were heard; they are never there where privacy.publish is commands."""
    days: Annotated[float, Field(gt=0, le=36_500)] = 365.0
    """Older files of the log, one for each day, are deleted; also those of a log that was switched off. What counts is
    the time for which the box ran."""


class Monitoring(_Section):
    """Numbers for Prometheus and answers for whoever asks whether the box works; no text of anybody's."""

    host: str = "127.0.0.1"
    """Only this machine may ask, unless another address is set; there is no password."""
    port: Annotated[int, Field(ge=1, le=65_535)] | None = 9776
    """Of /metrics, /livez and /readyz. None: nobody may ask."""


class Tracing(_Section):
    """A trace per utterance for OpenTelemetry; needs the extra ``otel``. See docs/monitoring.md."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^/]+/.+$")] | None = None
    """Where a collector takes OTLP over HTTP, e.g. http://127.0.0.1:4318/v1/traces. None: no traces."""


class Sparkplug(_Section):
    """A mirror as Sparkplug B 3.0 for SCADA; needs the extra ``sparkplug``. See docs/scada.md."""

    enabled: bool = False
    group: TopicSegment | None = None
    """Group id; None: the site's levels, joined by ``-``. The edge node id is the device's name."""


class HomeAssistant(_Section):
    """Discovery, so that Home Assistant shows the device by itself. See docs/scada.md."""

    enabled: bool = False
    prefix: TopicSegment = "homeassistant"
    """Home Assistant's own setting of that name."""


class Log(_Section):
    """What the daemon says about itself."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "journald"] = "auto"
    """auto: fields to journald under systemd, text otherwise."""


class Settings(_Section):
    """Everything the daemon can be told."""

    device: TopicSegment = "edge-asr"
    """This box's name, unique under its topic root."""
    site: Site = Site()
    state_dir: Path | None = None
    """None: systemd's STATE_DIRECTORY, else ~/.local/state/edge-asr."""
    model: Model = Model()
    vad: Vad = Vad()
    partials: Partials = Partials()
    sources: tuple[SourceSettings, ...] = (MicrophoneSource(type="microphone"),)
    commands: Commands = Commands()
    hotwords: Hotwords = Hotwords()
    outbox: Outbox = Outbox()
    mqtt: Mqtt = Mqtt()
    tracing: Tracing = Tracing()
    sparkplug: Sparkplug = Sparkplug()
    home_assistant: HomeAssistant = HomeAssistant()
    requests: Requests = Requests()
    gateway: Gateway | None = None
    """None: no gateway."""
    recorder: Recorder = Recorder()
    privacy: Privacy = Privacy()
    audit: Audit = Audit()
    monitoring: Monitoring = Monitoring()
    log: Log = Log()

    @model_validator(mode="after")
    def _unique_source_names(self) -> Settings:
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sources: the name {twice[0]!r} is used twice; give each source its own `name`")
        return self

    @model_validator(mode="after")
    def _nothing_is_kept_in_private(self) -> Settings:
        if self.privacy.publish == "commands" and self.recorder.public_key is not None:
            raise ValueError("recorder.public_key: with privacy.publish: commands nothing may be recorded; unset one")
        return self

    @property
    def topic_root(self) -> str:
        """``enterprise/site/area/line/cell/voice/device`` with missing levels left out."""
        levels = [self.site.enterprise, self.site.site, self.site.area, self.site.line, self.site.cell]
        return "/".join([level for level in levels if level] + ["voice", self.device])

    @property
    def state_directory(self) -> Path:
        """Where the outbox lives unless told otherwise."""
        if self.state_dir is not None:
            return self.state_dir
        of_systemd = os.environ.get("STATE_DIRECTORY")
        if of_systemd:
            return Path(of_systemd.split(":")[0])
        try:
            home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        except RuntimeError:  # a container's user that no file names
            raise SettingsError("state_dir: this user has no home directory; set it, or STATE_DIRECTORY") from None
        return Path(home) / "edge-asr"

    @property
    def recordings_directory(self) -> Path:
        """Where the recorder keeps doubtful utterances."""
        return self.state_directory / "recordings"

    @property
    def audit_directory(self) -> Path:
        """Where the audit log is."""
        return self.state_directory / "audit"

    @property
    def models_directory(self) -> Path:
        """Where imported models live."""
        return self.state_directory / "models"

    @property
    def gateway_directory(self) -> Path:
        """Where the gateway's certificates and tokens live."""
        return self.state_directory / "gateway"

    @property
    def outbox_path(self) -> Path:
        """The outbox's SQLite file."""
        return self.outbox.path or self.state_directory / "outbox.db"


def load(path: Path | None, overrides: dict[str, Any] | None = None) -> Settings:
    """Read settings: defaults, then the file, then ``EDGE_ASR__*`` variables, then ``overrides`` (dotted keys).

    Relative paths in the file are taken from the file's folder, others from the current one. Raises SettingsError.
    """
    tree = _read_yaml(path) if path is not None else {}
    changed = {**_environment(), **{key: ("--set", value) for key, value in (overrides or {}).items()}}
    for dotted, (_, value) in changed.items():
        _put(tree, dotted, value)

    def origin(key: str) -> str:
        own = [where for dotted, (where, _) in changed.items() if f"{key}.".startswith(f"{dotted}.")]
        return own[-1] if own else str(path or "settings")

    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        lines = (f"{origin('.'.join(map(str, each['loc'])))}: {explain(each, Settings)}" for each in problems(error))
        raise SettingsError("\n".join(lines)) from None

    def absolute(key: str, given: Path) -> Path:
        folder = Path.cwd() if path is None or key in changed else path.resolve().parent
        try:
            return folder / given.expanduser()
        except RuntimeError:
            raise SettingsError(f"{origin(key)}: {key}: {str(given)!r} names the home of nobody here") from None

    return _anchored(settings, absolute)


def parse_yaml(text: str) -> object:
    """What a YAML text says. Raises ValueError: one line with the place."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise ValueError(f"{where}{problem}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """Refuses what PyYAML lets through: a key that stands twice, and `2024-99-99`, which it dies of."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        """Build a mapping whose keys all differ."""
        written = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, (key, _) in enumerate(node.value):
            if (key.tag, key.value) in written[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands here twice", key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002
        """Build a value; one that cannot be built has a place."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError):
            problem = f"{_shown(node.value)} cannot be read as {node.tag.rpartition(':')[2]}; put it in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise SettingsError(f"{path}: cannot be read ({reason}); check --settings and the file's permissions") from None
    except ValueError as error:
        raise SettingsError(f"{path}: {error}; mend the YAML there") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: holds a {type(tree).__name__}, expected `key: value` lines")
    return tree


def _environment() -> dict[str, tuple[str, object]]:
    """Dotted key -> (variable, value)."""
    found: dict[str, tuple[str, object]] = {}
    for name, value in sorted(os.environ.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            try:
                found[name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")] = name, parse_yaml(value)
            except ValueError:
                raise SettingsError(f"{name}: {_shown(value)} is not a YAML value") from None
    return found


def _put(tree: dict[str, Any], dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        below = tree[key] = {} if tree.get(key) is None else tree[key]
        if not isinstance(below, dict):
            raise SettingsError(f"{dotted}: cannot be set, {key} is {_shown(below)}, expected a section")
        tree = below
    tree[last] = value


def _shown(value: object) -> str:
    """A value for an error: on one line and not longer than it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def problems(error: ValidationError) -> list[ErrorDetails]:
    """What is wrong, without the complaint that a list is too short because its bad entries do not count."""
    return [each for each in error.errors() if each["type"] != "too_short" or not each["input"]]


def explain(problem: ErrorDetails, root: type[BaseModel]) -> str:
    """One line: key, value, expectation; ``root`` is the model that was validated."""
    location = list(problem["loc"])
    if root is Settings and location[:1] == ["sources"]:
        del location[2:3]  # pydantic puts the chosen kind of source there
    key = ".".join(str(part) for part in location)
    key = key if key.isprintable() and key else repr(key)
    value, context = problem["input"], problem.get("ctx", {})
    kind = problem["type"]
    if not location:
        return str(context["error"]) if kind == "value_error" else f"holds {_shown(value)}, expected `key: value` lines"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys_beside(location, root), n=1)
        return f"{key}: unknown key" + (f"; did you mean `{near[0]}`?" if near else "; remove it")
    if kind == "union_tag_invalid":
        return f"{key}.type: {_shown(context['tag'])} is not one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{key}.type: missing, expected one of 'microphone', 'files', 'stdin'"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "value_error":
        reason = str(context.get("error", problem["msg"]))
        return f"{key}: {reason}" if isinstance(value, (dict, list, BaseModel)) else f"{key}: {_shown(value)} {reason}"
    bounds = limits(location, root)
    if bounds and kind in {"less_than_equal", "greater_than_equal", "less_than", "greater_than"}:
        return f"{key}: {_shown(value)} is not {bounds}"
    expected = _EXPECTED.get(kind) or problem["msg"][0].lower() + problem["msg"][1:]
    quotes = "; put it in quotes" if kind == "string_type" and isinstance(value, (int, float, dt.date)) else ""
    return f"{key}: {_shown(value)} is wrong: {expected}{quotes}"


def _model_at(location: Sequence[int | str], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section that holds the last key of a location; numbers and dictionary keys in between are stepped over."""
    model = root
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            continue
        nested = [inner for inner in _types_in(field.annotation) if issubclass(inner, BaseModel)]
        if not nested:
            return None
        model = nested[0]
    return model


def _types_in(annotation: object) -> list[type]:
    """Every class named anywhere in an annotation."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [found for part in get_args(annotation) for found in _types_in(part)]


def _keys_beside(location: list[int | str], root: type[BaseModel]) -> list[str]:
    if location[0] == "sources" and root is Settings:
        return sorted(
            {key for kind in _types_in(SourceSettings) if issubclass(kind, _Section) for key in kind.model_fields}
        )
    model = _model_at(location[:-1], root)
    return list(model.model_fields) if model else []


def limits(location: Sequence[int | str], root: type[BaseModel]) -> str | None:
    """``1..65535`` or ``above 0`` for a field that has bounds."""
    model = _model_at(location[:-1], root)
    field = model.model_fields.get(str(location[-1])) if model else None
    if field is None:
        return None
    metadata = list(field.metadata)
    for part in get_args(field.annotation):
        if get_origin(part) is Annotated:
            metadata += [bound for item in part.__metadata__ for bound in (*getattr(item, "metadata", ()), item)]
    bounds = {name: getattr(m, name) for name in _BOUNDS for m in metadata if hasattr(m, name)}
    if {"ge", "le"} <= bounds.keys():
        return f"{bounds['ge']}..{bounds['le']}"
    return " and ".join(f"{_BOUNDS[name]} {bound}" for name, bound in bounds.items()) or None


def _anchored(settings: Settings, absolute: Callable[[str, Path], Path]) -> Settings:
    """The same settings with every path made absolute by a function of its key and itself."""

    def anchor(key: str, value: Any) -> Any:  # noqa: ANN401 - walks a tree of any settings value
        if isinstance(value, Path):
            return absolute(key, value)
        if isinstance(value, str) and key in _NAMES_OR_PATHS and _PATH.search(value):
            return str(absolute(key, Path(value)))
        if isinstance(value, BaseModel):
            names = type(value).model_fields
            return value.model_copy(update={n: anchor(f"{key}.{n}".lstrip("."), getattr(value, n)) for n in names})
        if isinstance(value, tuple):
            return tuple(anchor(key, item) for item in value)
        return value

    return anchor("", settings)  # type: ignore[no-any-return]
