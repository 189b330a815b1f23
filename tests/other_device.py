"""Somebody follows docs/gateway.md with a tablet; a program of its own, for it isolates itself.

The box, its daemon and its broker are in a network namespace; the tablet, a real browser with a home of its own that
trusts nothing but what is installed there, reaches it by an address. Prints what came of it.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.broker import wait_until
from tests.faults.link import Link, isolated
from tests.gateway import START_S, browsing, microphone_file
from tests.payloads import check

PORT = 8443


def edge_asr(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "edge_asr.cli"]
    return subprocess.run([*program, *arguments], check=True, capture_output=True, text=True)


def install_authority(home: Path, url: str, promised: str) -> None:
    """Load the certificate, compare its fingerprint, make it an authority: step 4 on a Linux tablet."""
    certificate = home / "ca.crt"
    subprocess.run(["curl", "--silent", "--insecure", "--output", str(certificate), f"{url}/ca.crt"], check=True)
    shown = ["openssl", "x509", "-in", str(certificate), "-noout", "-fingerprint", "-sha256"]
    fingerprint = subprocess.run(shown, check=True, capture_output=True, text=True).stdout.strip().partition("=")[2]
    assert fingerprint in promised
    store = home / ".pki/nssdb"
    store.mkdir(parents=True)
    certutil = ["certutil", "-d", f"sql:{store}"]
    subprocess.run([*certutil, "-N", "--empty-password"], check=True)
    subprocess.run([*certutil, "-A", "-n", "box", "-t", "C,,", "-i", str(certificate)], check=True)


def follow(folder: Path, address: str, prefix: Sequence[str]) -> dict[str, str]:
    settings, url = folder / "settings.yaml", f"https://{address}:{PORT}"
    settings.write_text(
        f"device: press-07\nstate_dir: {folder}/state\nsources: []\nmqtt: {{host: 127.0.0.1}}\n"
        "gateway: {host: 0.0.0.0}\n"
    )
    made = edge_asr("gateway", "cert", address, "--settings", str(settings))
    link = re.search(r"#token=\S+", edge_asr("gateway", "token", "add", "tablet-3", "--settings", str(settings)).stderr)
    assert link
    subprocess.run([*prefix, "ip", "link", "set", "lo", "up"], check=True)
    watch = ["mosquitto_sub", "-V", "mqttv5", "-C", "1", "-W", "60", "-q", "1", "-t", "voice/press-07/evt/command"]
    daemon = [sys.executable, "-m", "edge_asr.cli", "run", "--settings", str(settings)]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([*prefix, "mosquitto"], stderr=log) as broker,
        subprocess.Popen([*prefix, *daemon], stderr=log) as running,
    ):
        try:
            wait_until(lambda: "connected to the broker" in (folder / "log").read_text(), "the daemon", limit_s=START_S)
            with subprocess.Popen([*prefix, *watch], stdout=subprocess.PIPE, text=True) as subscriber:
                said = talk(folder, url, link[0], made.stdout)
                assert subscriber.stdout
                command = check("voice/press-07/evt/command", json.loads(subscriber.stdout.read()))
        finally:
            running.terminate()
            running.wait(20)
            broker.kill()
    return {"said": said, "intent": command["intent"], "source": command["source"]}


def talk(folder: Path, url: str, link: str, promised: str) -> str:
    """Open the page, hold the button, talk; what the page shows."""
    home = folder / "home"
    home.mkdir()
    install_authority(home, url, promised)
    environment: dict[str, str | float | bool] = {**os.environ, "HOME": str(home)}
    with browsing(folder, microphone_file(folder, "11-stop-press-two"), env=environment) as browser:
        page = browser.pages[0]
        page.goto(f"{url}/{link}")
        page.wait_for_selector("#gateway-state[data-state=on]")
        page.locator("#talk").hover()
        page.mouse.down()
        page.wait_for_selector("#history li[data-kind=command]")
        page.mouse.up()
        return page.inner_text("#history .said")


def scenario(folder: Path) -> object:
    with Link(random.Random(1)) as link:  # noqa: S311
        return follow(folder, link.device_side, link.prefix)


if __name__ == "__main__":
    isolated(scenario)
