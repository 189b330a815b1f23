"""The consumer in thirty lines, to read first. After a crash it says accepted of what it may not have done; no TLS.

python minimal.py broker.plant 1883 'acme/hall-2/voice/+/evt/command' done.db
"""

import json
import sqlite3
import sys

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

host, port, topics, file = sys.argv[1:]
done = sqlite3.connect(file)
done.execute("CREATE TABLE IF NOT EXISTS commands (id TEXT PRIMARY KEY)")


def on_message(client: mqtt.Client, _: object, message: mqtt.MQTTMessage) -> None:
    content = json.loads(message.payload)
    command = content.get("data", content)  # CloudEvents or plain
    with done:  # written down first, so that nothing is done twice
        new = done.execute("INSERT OR IGNORE INTO commands VALUES (?)", (command["id"],)).rowcount
    if new:
        print(command["device"], command["intent"], command["slots"], flush=True)  # your part
    receipt = {"command_id": command["id"], "verdict": "accepted", "reason": ""}
    client.publish(message.topic.replace("/evt/command", "/req/receipt"), json.dumps(receipt), qos=1)


client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "mes", protocol=mqtt.MQTTv5)
client.on_connect = lambda *_: client.subscribe(topics, qos=1)
client.on_message = on_message
session = Properties(PacketTypes.CONNECT)
session.SessionExpiryInterval = 3600  # the broker keeps commands while we restart
client.connect(host, int(port), clean_start=False, properties=session)
client.loop_forever()
