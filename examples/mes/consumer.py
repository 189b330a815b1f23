"""Acts on the voice commands of a site, each once, and tells each device what became of it.

python consumer.py broker.plant 1883 'acme/hall-2/voice/+/evt/command' done.db
"""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
import sys
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

host, port, topics, file = sys.argv[1:]
done = sqlite3.connect(file)  # on the disk: a restart must not act again on what it acted on before
done.execute("CREATE TABLE IF NOT EXISTS done (id TEXT PRIMARY KEY, verdict TEXT, reason TEXT)")


def act(command: dict[str, Any]) -> tuple[str, str]:
    """Your part: do it and return ("accepted", ""), or ("rejected", why)."""
    expires_at = dt.datetime.fromisoformat(command["expires_at"])
    if command["time_quality"] == "synchronized" and expires_at < dt.datetime.now(dt.timezone.utc):
        return "rejected", "it came too late"
    print(command["device"], command["intent"], command["slots"], flush=True)
    return "accepted", ""


def on_connect(client: mqtt.Client, *_: object) -> None:
    client.subscribe(topics, qos=1)


def on_message(client: mqtt.Client, _: object, message: mqtt.MQTTMessage) -> None:
    payload = json.loads(message.payload)
    command = payload.get("data", payload)  # CloudEvents or plain
    known = done.execute("SELECT verdict, reason FROM done WHERE id = ?", (command["id"],)).fetchone()
    verdict, reason = known or act(command)
    done.execute("INSERT OR IGNORE INTO done VALUES (?, ?, ?)", (command["id"], verdict, reason))
    done.commit()
    receipt = {"command_id": command["id"], "verdict": verdict, "reason": reason}
    client.publish(message.topic.replace("/evt/command", "/req/receipt"), json.dumps(receipt), qos=1)


client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "mes", protocol=mqtt.MQTTv5)
client.on_connect, client.on_message = on_connect, on_message
session = Properties(PacketTypes.CONNECT)
session.SessionExpiryInterval = 3600  # the broker keeps commands while we restart, and drops what expires meanwhile
client.connect(host, int(port), clean_start=False, properties=session)
client.loop_forever()
