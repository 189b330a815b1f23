"""The verbs of `edge-asr recordings` and `edge-asr audit`: what is kept of what people said, and who may see it."""

from __future__ import annotations

from pathlib import Path

import click

from edge_asr import audit as audit_log
from edge_asr import file_retention, recorder, service
from edge_asr.command_line import ExamplesLast, example, one_line_errors, with_settings
from edge_asr.labelling import LabelServer
from edge_asr.settings import Settings


@click.group(cls=ExamplesLast)
def recordings() -> None:
    """Doubtful utterances that were kept for labelling (the setting recorder.public_key)."""


@recordings.command("status", epilog=example("edge-asr recordings status"))
@with_settings
def recordings_status(options: Settings, **_: object) -> None:
    """Show how many are kept; what is in them nobody sees without the private key."""
    options = service.seen_by_administrator(options)
    kept = sorted(options.recordings_directory.glob(f"*{file_retention.SEALED}"))
    size = sum(path.stat().st_size for path in kept)
    rule = f"at most {options.recorder.max_bytes >> 20} MiB and {options.recorder.days:g} days"
    state = rule if options.recorder.public_key is not None else "nothing is recorded"
    click.echo(f"{options.recordings_directory}: {len(kept)} recordings, {size >> 10} KiB; {state}")


@recordings.command("export", epilog=example("edge-asr recordings export --key recorder.pem labels"))
@click.argument("target", type=click.Path(path_type=Path, file_okay=False))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="The private key (PEM).")
@click.option("--from", "folder", type=click.Path(path_type=Path), help="Another folder, copied from a box.")
@with_settings
def recordings_export(options: Settings, target: Path, key: Path, folder: Path | None, **_: object) -> None:
    """Open the recordings and write them with a manifest for `edge-asr eval` into a folder."""
    count = recorder.export(folder or service.seen_by_administrator(options).recordings_directory, key, target)
    click.echo(f"{target}: {count} recordings; label them with `edge-asr recordings label {target}`")


@recordings.command("label", epilog=example("edge-asr recordings label labels"))
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--port", default=0, help="Of the page; 0: any that is free.")
def recordings_label(folder: Path, port: int) -> None:
    """Serve a page on this machine to listen to exported recordings and to say what was said; ends with Ctrl-C."""
    with one_line_errors(), LabelServer(folder, port) as server:
        click.echo(f"open {server.address}")
        server.serve_forever()


@recordings.command("clear", epilog=example("edge-asr recordings clear"))
@with_settings
def recordings_clear(options: Settings, **_: object) -> None:
    """Delete every recording on this box."""
    folder = service.seen_by_administrator(options).recordings_directory
    click.echo(f"{recorder.tidy(folder, 0)} recordings deleted")


@click.group(cls=ExamplesLast)
def audit() -> None:
    """The hash-chained log of what was said, understood, sent and done (the setting audit.enabled)."""


@audit.command("verify", epilog=example("edge-asr audit verify", "edge-asr audit verify --known 4711:8c0f..."))
@with_settings
@click.option("--known", metavar="NUMBER:HASH", help="One that you know from elsewhere: `audit_newest` of a health.")
def audit_verify(options: Settings, known: str | None, **_: object) -> None:
    """Recompute the whole chain; exit code 74 and the place if anything was changed, left out or put in between."""
    verdict = audit_log.verify(service.seen_by_administrator(options).audit_directory, known)
    click.echo(f"{verdict.records} records from number {verdict.first} on are whole; newest {verdict.newest}")
    if verdict.missing:
        click.echo(f"no record tells of the messages {', '.join(map(str, verdict.missing))}: a crash, or a full disk")
    for place in verdict.left:
        click.echo(f"{place}: what a failed write left, as the record behind it says; no tampering")
