"""Acts on the voice commands of a site, each once at most, and tells each device what became of it.

python consumer.py broker.plant 1883 'acme/hall-2/voice/+/evt/command' done.db
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sqlite3
import sys
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

parser = argparse.ArgumentParser()
for name in ("host", "port", "topics", "file"):
    parser.add_argument(name)
for name, help_ in {"ca": "authority of the broker", "cert": "who we are", "key": "proves it"}.items():
    parser.add_argument(f"--{name}", metavar="PEM", help=help_)
parser.add_argument("--remember", type=int, default=1000, help="commands of each device")
chosen = parser.parse_args()

INTERRUPTED = "rejected", "interrupted: nobody knows whether it was done"

done = sqlite3.connect(chosen.file)  # on the disk: a restart must not act again on what it acted on before
done.execute("CREATE TABLE IF NOT EXISTS commands (id TEXT PRIMARY KEY, device TEXT, verdict TEXT, reason TEXT)")
FORGET = """DELETE FROM commands WHERE device = ? AND rowid NOT IN
    (SELECT rowid FROM commands WHERE device = ? ORDER BY rowid DESC LIMIT ?)"""


def act(command: dict[str, Any]) -> tuple[str, str]:
    """Your part: do it and return ("accepted", ""), or ("rejected", why)."""
    print(command["device"], command["intent"], command["slots"], flush=True)
    return "accepted", ""


def read(payload: bytes) -> tuple[dict[str, Any], bool]:
    """The command, and whether it is too late: by our clock, so only where a time service has set the device's."""
    content = json.loads(payload)
    command = content.get("data", content)  # CloudEvents or plain
    json.dumps(command, ensure_ascii=False).encode()  # half a surrogate pair cannot be stored
    if not all(isinstance(command[name], str) for name in ("id", "device", "intent")) or "slots" not in command:
        raise ValueError("fields are missing")
    expires_at = dt.datetime.fromisoformat(command["expires_at"])
    return command, command["time_quality"] == "synchronized" and expires_at < dt.datetime.now(dt.timezone.utc)


def once(command: dict[str, Any], *, late: bool) -> tuple[str, str]:
    """Written down first, then acted on: whatever kills us in between, the command is not done twice."""
    known = done.execute("SELECT verdict, reason FROM commands WHERE id = ?", (command["id"],)).fetchone()
    if known:
        return known
    with done:
        done.execute("INSERT INTO commands VALUES (?, ?, ?, ?)", (command["id"], command["device"], *INTERRUPTED))
        done.execute(FORGET, (command["device"], command["device"], chosen.remember))
    verdict, reason = ("rejected", "it came too late") if late else act(command)
    with done:
        done.execute("UPDATE commands SET verdict = ?, reason = ? WHERE id = ?", (verdict, reason, command["id"]))
    return verdict, reason


def on_connect(client: mqtt.Client, *_: object) -> None:
    client.subscribe(chosen.topics, qos=1)


def on_message(client: mqtt.Client, _: object, message: mqtt.MQTTMessage) -> None:
    try:
        command, late = read(message.payload)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        print(f"{message.topic} holds no command: {error!r}", file=sys.stderr, flush=True)
        return
    verdict, reason = once(command, late=late)
    receipt = {"command_id": command["id"], "verdict": verdict, "reason": reason}
    client.publish(message.topic.replace("/evt/command", "/req/receipt"), json.dumps(receipt), qos=1)
    # Only now paho acknowledges the command: one that kills us is sent again, and answered as interrupted.


client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "mes", protocol=mqtt.MQTTv5)
client.on_connect, client.on_message = on_connect, on_message
if chosen.ca:
    client.tls_set(chosen.ca, chosen.cert, chosen.key)
session = Properties(PacketTypes.CONNECT)
session.SessionExpiryInterval = 3600  # the broker keeps commands while we restart, and drops what expires meanwhile
client.connect(chosen.host, int(chosen.port), clean_start=False, properties=session)
client.loop_forever()
