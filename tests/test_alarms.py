"""Alarms as a whole: what the documentation names is what the code raises, and each was provoked by a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import time
from pathlib import Path

import pytest
import yaml
from typing_extensions import Self

from edge_asr.events import SAMPLE_RATE, Draft
from edge_asr.outbox import Outbox, read_statistics
from tests.broker import PATIENCE_S, Broker, Received, Subscriber, wait_until
from tests.soundcard import sound_card
from tests.sysbox import skip_where_containers_are_forbidden
from tests.test_daemon import COMMAND, running, write_settings
from tests.test_monitoring import COOLER, JETSON, ZONE, tree

CHECKOUT = Path(__file__).parent.parent
KINDS = re.findall(
    r"^\| `([a-z-]+)` \| (?:critical|warning) \|",
    (CHECKOUT / "docs/monitoring.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


ROOMS = "".join(path.read_text(encoding="utf-8") for path in sorted((CHECKOUT / "edge_asr").glob("*.py")))
EVENTS = set(re.findall(r'(?:alarm_draft|found\.append\()\(\s*"([a-z-]+)"', ROOMS))
STATES = set(re.findall(r'(?:Condition|_Trouble)\(\s*"([a-z-]+)"', ROOMS.replace("TOO_NOISY", '"too-noisy"')))


def test_the_documentation_lists_every_alarm_that_can_be_raised() -> None:
    assert set(KINDS) == EVENTS | STATES


def test_every_event_has_an_alert_rule_of_its_own_because_the_metric_of_alarms_shows_states_only() -> None:
    rules = yaml.safe_load((CHECKOUT / "monitoring/alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert {rule["labels"]["kind"] for rule in rules if "kind" in rule["labels"]} == EVENTS


@pytest.mark.parametrize("kind", KINDS)
def test_every_alarm_is_provoked_by_a_test(kind: str) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (CHECKOUT / "tests").glob("test_*.py"))
    assert re.search(rf'[" ]{kind}[" ]', tests)


# ---------------------------------------------------------------- with real parts, as the control room hears of them

DEVICE = "acme/voice/press-07"
ALARMS = f"{DEVICE}/evt/alarm"


def alarms(subscriber: Subscriber, kind: str) -> list[Received]:
    return [message for message in subscriber.on("evt/alarm") if message.data["kind"] == kind]


def the_alarm(subscriber: Subscriber, kind: str, state: str = "raised") -> Received:
    """The one alarm of a kind and state, once it has come."""

    def told() -> list[Received]:
        return [message for message in alarms(subscriber, kind) if message.data["state"] == state]

    subscriber.wait_for(lambda _: bool(told()), f"{kind} is {state}", 2 * PATIENCE_S)
    (alarm,) = told()
    return alarm


def test_an_outbox_that_overflows_while_the_broker_is_away_is_an_alarm_when_it_is_back(tmp_path: Path) -> None:
    outbox = tmp_path / "state" / "outbox.db"
    with contextlib.closing(Outbox(outbox, 10_000_000)) as opened:
        asyncio.run(opened.append(*(Draft("evt/transcript", "transcript", {"text": "x" * 600}) for _ in range(120))))
    broker = Broker(tmp_path)
    limits = {"limits": {"transcript": {"max_bytes": 100_000}}}
    with running(write_settings(tmp_path, broker.port, outbox=limits)) as box:
        box.say(COMMAND)
        wait_until(lambda: read_statistics(outbox).dropped["transcript"], "a transcript goes")
        with broker, Subscriber(broker, ALARMS) as subscriber:
            alarm = the_alarm(subscriber, "outbox-dropped")
            assert alarm.data["severity"] == "critical"
            assert re.fullmatch(r"the outbox was full: dropped were \d+ transcript", alarm.data["detail"])
            wait_until(lambda: not read_statistics(outbox).waiting["transcript"], "the rest is sent")
            box.say(COMMAND)
            wait_until(lambda: read_statistics(outbox).waiting["command"] == 0, "a command is sent")
            assert len(alarms(subscriber, "outbox-dropped")) == 1


def test_a_message_that_a_broker_refuses_for_good_is_an_alarm(tmp_path: Path) -> None:
    """Its rules forbid transcripts and take what comes of them."""
    rules = tmp_path / "rules"
    allowed = [f"topic write {DEVICE}/{topic}" for topic in ("evt/command", "evt/alarm", "status", "meta", "health")]
    rules.write_text("\n".join([*allowed, "topic read #", ""]), encoding="ascii")
    rules.chmod(0o600)
    outbox = tmp_path / "state" / "outbox.db"
    with Broker(tmp_path, extra=f"acl_file {rules}") as broker, Subscriber(broker, ALARMS) as subscriber:
        with running(write_settings(tmp_path, broker.port)) as box:
            box.say(COMMAND)
            wait_until(lambda: outbox.exists() and read_statistics(outbox).dead_letters, "it is put aside")
            box.feed(bytes(2 * SAMPLE_RATE * 12))  # an alarm of another kind, with which health is looked at
            alarm = the_alarm(subscriber, "outbox-refused")
        assert (alarm.data["severity"], alarm.data["detail"]) == ("critical", "refused for good were 1 transcript")
        assert "access rules" in alarm.data["remedy"]


HASTY = """
from edge_asr import alarms, capture, caretaker, cli, hearing
alarms.QUIET_S = 1.0
caretaker.HEALTH_INTERVAL_S = caretaker.BOARD_LIMIT_S = 1.0
hearing._LOSS_WINDOW_NS = 4 * 10**9
capture.RateMeter.PIECE_NS = 10**9
capture.RateMeter.PIECES = 3
cli.main()
"""
"""A daemon that looks back over seconds where the product looks back over a minute."""

MICROPHONE = [{"type": "microphone", "name": "press"}]


class Clocked:
    """Writes silence into a pipe at a rate of its own."""

    def __init__(self, path: Path, rate: int) -> None:
        self.rate = rate
        self.lost = 0
        """Samples that it leaves out next."""
        self._path, self._done = path, threading.Event()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        owed, last = 0.0, time.monotonic()
        pipe = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)  # waits for no reader, neither now nor in the end
        while not self._done.wait(0.02):
            now = time.monotonic()
            owed, last = owed + (now - last) * self.rate - self.lost, now
            self.lost, pairs = 0, max(0, int(owed) // 2)
            with contextlib.suppress(BlockingIOError):
                os.write(pipe, b"\x40\x00\xc0\xff" * pairs)
            owed -= 2 * pairs
        os.close(pipe)


def test_audio_that_a_driver_loses_without_a_word_is_an_alarm_until_a_while_has_passed_without(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    with sound_card() as card, Broker(tmp_path) as broker, Subscriber(broker, ALARMS) as subscriber:
        card.plug_pipe(pipe, SAMPLE_RATE)
        path = write_settings(tmp_path, broker.port, sources=MICROPHONE)
        with (
            Clocked(pipe, SAMPLE_RATE) as device,
            running(path, program=("-c", HASTY), **card.environment) as box,
        ):
            box.wait_for_log("capturing from")
            device.lost = round(1.2 * SAMPLE_RATE)  # less than after which a device counts as away
            alarm = the_alarm(subscriber, "microphone-overrun")
            assert (alarm.data["source"], alarm.data["severity"]) == ("press", "warning")
            assert re.fullmatch(r"press: \d\.\d s of audio were lost within a minute", alarm.data["detail"])
            the_alarm(subscriber, "microphone-overrun", "over")


def test_a_device_that_delivers_fewer_samples_than_it_says_is_an_alarm_until_it_keeps_its_word(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    with sound_card() as card, Broker(tmp_path) as broker, Subscriber(broker, f"{DEVICE}/#") as subscriber:
        card.plug_pipe(pipe, SAMPLE_RATE)
        path = write_settings(tmp_path, broker.port, sources=MICROPHONE)
        with (
            Clocked(pipe, SAMPLE_RATE * 9 // 10) as device,
            running(path, program=("-c", HASTY), **card.environment),
        ):
            alarm = the_alarm(subscriber, "microphone-rate")
            assert (alarm.data["source"], alarm.data["severity"]) == ("press", "critical")
            assert re.fullmatch(r"press: the device delivers \d+ % fewer samples than it says", alarm.data["detail"])
            assert "sources.rate" in alarm.data["remedy"]
            subscriber.wait_for(
                lambda _: any(
                    "microphone-rate" in message.data["microphones"]["press"]["troubles"]
                    for message in subscriber.on("/health")
                ),
                "health shows it",
            )
            device.rate = SAMPLE_RATE
            the_alarm(subscriber, "microphone-rate", "over")


BEHIND = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /sys/class/thermal && exec "$@"')
"""Starts a program that sees another board."""


def test_a_board_that_is_hot_and_throttled_is_two_alarms_until_it_has_cooled_down(
    tmp_path: Path, broker: Broker
) -> None:
    skip_where_containers_are_forbidden()
    board = tree(tmp_path / "sys", JETSON)
    path = write_settings(tmp_path, broker.port)
    with (
        Subscriber(broker, ALARMS) as subscriber,
        running(path, program=("-c", HASTY), prefix=(*BEHIND, str(board / "class/thermal"))),
    ):
        hot, slow = the_alarm(subscriber, "board-hot"), the_alarm(subscriber, "board-throttled")
        assert (hot.data["severity"], slow.data["severity"]) == ("critical", "warning")
        assert hot.data["detail"] == "the board is at 98 °C and switches itself off at 102 °C"
        assert slow.data["detail"] == "the board works slower than it could: cpu-throttle-alert"
        tree(board, {f"{ZONE}0/temp": "61000", f"{COOLER}1/cur_state": "0"})
        for kind in ("board-hot", "board-throttled"):
            the_alarm(subscriber, kind, "over")


def test_a_sensor_that_hangs_is_told_and_left_out_until_it_answers_and_holds_up_nothing(
    tmp_path: Path, broker: Broker
) -> None:
    skip_where_containers_are_forbidden()
    board = tree(tmp_path / "sys", {f"{ZONE}0/type": "cpu-thermal"})
    sensor = board / f"{ZONE}0/temp"
    os.mkfifo(sensor)  # whoever reads it waits for whoever writes
    path = write_settings(tmp_path, broker.port)
    with (
        Subscriber(broker, f"{DEVICE}/health") as subscriber,
        running(path, program=("-c", HASTY), prefix=(*BEHIND, str(board / "class/thermal"))) as box,
    ):

        def temperatures() -> list[float | None]:
            return [message.data["temperature_c"] for message in subscriber.messages]

        box.wait_for_log("the board's sensors have not answered for 1 s; health goes on without them")
        subscriber.wait_for(lambda _: len(temperatures()) > 1, "health goes on")
        assert set(temperatures()) == {None}
        sensor.write_text("61000\n", encoding="ascii")
        subscriber.wait_for(lambda _: 61.0 in temperatures(), "the temperature")
        wait_until(lambda: box.log.count("sensors have not answered") == 2, "it hangs again")
        box.process.terminate()
        assert box.process.wait(PATIENCE_S) == 0
