"""The verbs of `edge-asr service`: make a systemd service of this installation, look at it, take it away."""

from __future__ import annotations

import json

import click

from edge_asr import service as services
from edge_asr.command_line import EXIT_FOUND, ExamplesLast, example, one_line_errors


@click.group(cls=ExamplesLast)
def service() -> None:
    """This installation as a systemd service."""


@service.command(
    "install", epilog=example("sudo edge-asr service install", "sudo edge-asr service install --with mqtt-password")
)
@click.option(
    "--with",
    "wanted",
    multiple=True,
    type=click.Choice(services.drop_ins()),
    help="Add a drop-in; its file says what for.",
)
def service_install(wanted: tuple[str, ...]) -> None:
    """Write the unit, enable it and start it; settings that are there already stay."""
    with one_line_errors():
        for path in services.install(wanted):
            click.echo(f"wrote {path}")
        click.echo("the service runs; follow it with `journalctl -u edge-asr -f`")


@service.command("uninstall", epilog=example("sudo edge-asr service uninstall"))
@click.option("--purge", is_flag=True, help="Delete settings, outbox and imported models too.")
def service_uninstall(*, purge: bool) -> None:
    """Stop and remove the service; settings and outbox stay unless --purge is given."""
    with one_line_errors():
        for path in services.uninstall(purge=purge):
            click.echo(f"removed {path}")


@service.command("status", epilog=example("edge-asr service status", "edge-asr service status --json"))
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def service_status(*, as_json: bool) -> None:
    """Show what systemd knows of the service and how exposed it is; exit code 1 unless it is active."""
    with one_line_errors():
        found = services.status()
        if as_json:
            click.echo(json.dumps(found))
        else:
            for name, value in found.items():
                click.echo(f"{name:22s} {value or 'none'}")
    raise SystemExit(0 if found["ActiveState"] == "active" else EXIT_FOUND)
