"""What the README tells a newcomer to type works as written in a fresh clone; a command arrives at mosquitto_sub."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edge_asr import cli
from tests.broker import wait_until
from tests.payloads import complaint
from tests.sysbox import CHECKOUT

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every line of the README's shell blocks, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`git clone <this repository> edge-asr && cd edge-asr`, with this test run's interpreter."""
    assert commands()[0] == "git clone <this repository> edge-asr && cd edge-asr"
    folder = tmp_path_factory.mktemp("newcomer") / "edge-asr"
    subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), str(folder)], check=True)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A newcomer's: nothing of this test run's, and no sound card."""
    own = {
        "HOME": str(tmp_path),
        "PULSE_SERVER": f"unix:{tmp_path}/nothing",
        "PYTHON": f"{sys.base_prefix}/bin/python3",
    }
    return {**{k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "EDGE_ASR"))}, **own}


@pytest.fixture
def subscription(clone: Path, environment: dict[str, str], tmp_path: Path) -> tuple[Path, Path]:
    """`tools/run --demo` under way, and mosquitto_sub started as its first line says: what each has printed."""
    demo, heard = tmp_path / "demo", tmp_path / "heard"
    assert "tools/run --demo" in commands()
    with demo.open("wb") as output, heard.open("wb") as messages:
        running = subprocess.Popen(
            ["tools/run", "--demo"], cwd=clone, env=environment, stdout=output, stdin=subprocess.DEVNULL
        )
        wait_until(lambda: b"mosquitto_sub" in demo.read_bytes() or running.poll() is not None, "the demo starts", 180)
        line = re.search(r"(mosquitto_sub .*)", demo.read_text(encoding="utf-8"))
        assert line, demo.read_text(encoding="utf-8")
        subscriber = subprocess.Popen(["bash", "-c", f"exec {line[1]}"], stdout=messages)
        try:
            assert running.wait(240) == 0, demo.read_text(encoding="utf-8")
        finally:
            running.kill()
            running.wait()
            subscriber.kill()
            subscriber.wait()
    return demo, heard


@pytest.mark.timeout(600)
def test_the_demo_ends_by_itself_and_a_strangers_mosquitto_sub_gets_the_commands(
    subscription: tuple[Path, Path],
) -> None:
    demo, heard = (path.read_text(encoding="utf-8") for path in subscription)
    published = re.search(r"(\d+) of (\d+) published messages arrived", demo)
    assert published
    assert published[1] == published[2] != "0"
    assert "► SetSpeed(machine=mixer, speed=1200 rpm)" in demo
    messages = [line.split(" ", 1) for line in heard.splitlines()]
    assert [said for topic, payload in messages if (said := complaint(topic, json.loads(payload)))] == []
    topics = [topic for topic, _ in messages]
    assert topics.count("voice/edge-asr/evt/command") == demo.count("► ")


@pytest.mark.timeout(600)
def test_run_without_a_microphone_says_so_and_plays_the_demo(clone: Path, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        ["tools/run"],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    ) as running:
        assert running.stdout
        said = b""
        for line in running.stdout:
            said += line
            if b"online" in line:
                os.killpg(running.pid, signal.SIGINT)
        assert running.wait(60) in {0, 1, 130}
    assert b"No microphone found: playing the bundled recordings instead." in said


def test_every_command_of_the_readme_exists() -> None:
    named = set(re.findall(r"`edge-asr ([a-z]+)", README))
    assert named == set(cli.main.list_commands(click.Context(cli.main)))
    for line in commands():
        program = line.split()[0].removeprefix(".venv/bin/")
        assert program in {"git", "edge-asr"} or (CHECKOUT / program).is_file()


def test_every_file_that_the_readme_and_docs_link_to_exists() -> None:
    for page in [CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
