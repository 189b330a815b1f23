"""The verbs of `edge-asr outbox`: what waits for the broker, and what becomes of messages that it refused for good.

Looking is always possible. Changing something needs the outbox to itself, so the daemon must be stopped for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edge_asr import clock, service
from edge_asr.command_line import EXIT_FOUND, EXIT_NO_INPUT, ExamplesLast, example, with_settings
from edge_asr.outbox import Outbox, read_dead_letters, read_statistics
from edge_asr.settings import Settings


@click.group(cls=ExamplesLast)
def outbox() -> None:
    """The queue between the microphone and the broker."""


@outbox.command("status", epilog=example("edge-asr outbox status"))
@with_settings
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def outbox_status(options: Settings, *, as_json: bool, **_: object) -> None:
    """Show what waits for the broker and what was dropped; exit code 66 if there is no outbox yet.

    Root, without STATE_DIRECTORY, sees the service's.
    """
    options = service.seen_by_administrator(options)
    statistics = asdict(read_statistics(_existing(options)))
    if as_json:
        click.echo(json.dumps(statistics))
        return
    click.echo(f"{'file':14s} {options.outbox_path}")
    for name, value in statistics.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name.replace('_', ' '):14s} {'none' if shown in {None, ''} else shown}")


@outbox.command("dead-letters", epilog=example("edge-asr outbox dead-letters", "edge-asr outbox dead-letters --json"))
@with_settings
@click.option("--json", "as_json", is_flag=True, help="One JSON object per message, with its data.")
def outbox_dead_letters(options: Settings, *, as_json: bool, **_: object) -> None:
    """List the messages that the broker refused for good, and why; the daemon may be running."""
    found = read_dead_letters(_existing(service.seen_by_administrator(options)))
    for letter in found:
        message = letter.message
        if as_json:
            click.echo(json.dumps({**asdict(message), "reason": letter.reason}, ensure_ascii=False))
        else:
            click.echo(f"{message.seq:8d}  {clock.iso(message.created_wall_ns)}  {message.topic}: {letter.reason}")
    if not found and not as_json:
        click.echo("no dead letters")


def _with_choice(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the numbers of dead letters, or --all."""
    command = click.option("--all", "everything", is_flag=True, help="All dead letters.")(command)
    return click.argument("seqs", nargs=-1, type=int, metavar="[SEQ]...")(command)


@outbox.command("requeue", epilog=example("edge-asr outbox requeue 1718 1719", "edge-asr outbox requeue --all"))
@with_settings
@_with_choice
def outbox_requeue(options: Settings, seqs: tuple[int, ...], *, everything: bool, **_: object) -> None:
    """Send dead letters again, under their old number and id, when the daemon next runs; it must be stopped.

    A command whose life is over meanwhile leaves as `evt/expired`.
    """
    _change(options, seqs, everything, Outbox.requeue, "requeued")


@outbox.command("discard", epilog=example("edge-asr outbox discard 1718", "edge-asr outbox discard --all"))
@with_settings
@_with_choice
def outbox_discard(options: Settings, seqs: tuple[int, ...], *, everything: bool, **_: object) -> None:
    """Delete dead letters for good; the daemon must be stopped."""
    _change(options, seqs, everything, Outbox.discard, "discarded")


def _change(
    options: Settings,
    seqs: tuple[int, ...],
    everything: bool,  # noqa: FBT001 - click's flag, handed on
    change: Callable[[Outbox, tuple[int, ...]], Awaitable[list[int]]],
    outcome: str,
) -> None:
    if everything == bool(seqs):
        raise click.UsageError("name the numbers of dead letters, or --all")
    path = _existing(options)

    async def work() -> list[int]:
        with closing(Outbox(path, options.outbox.max_bytes)) as opened:
            return await change(opened, seqs or tuple(letter.message.seq for letter in read_dead_letters(path)))

    done = asyncio.run(work())
    click.echo(f"{outcome}: {', '.join(map(str, done)) or 'none'}")
    missing = sorted(set(seqs) - set(done))
    if missing:
        numbers = ", ".join(map(str, missing))
        click.echo(f"edge-asr: not a sound dead letter: {numbers}; see `edge-asr outbox dead-letters`", err=True)
        raise SystemExit(EXIT_FOUND)


def _existing(options: Settings) -> Path:
    if not options.outbox_path.exists():
        click.echo(f"edge-asr: {options.outbox_path}: no outbox yet; the daemon makes it when it first runs", err=True)
        raise SystemExit(EXIT_NO_INPUT)
    return options.outbox_path
