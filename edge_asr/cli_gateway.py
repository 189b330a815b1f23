"""The verbs `edge-asr gateway ...`: certificates and tokens, before the first browser can come."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from edge_asr.command_line import ExamplesLast, example, with_settings
from edge_asr.gateway import certificates
from edge_asr.gateway.tokens import ROLES, Role, Tokens
from edge_asr.settings import Gateway, Settings


@click.group(cls=ExamplesLast)
def gateway() -> None:
    """Browsers, phones and headsets of the plant network as microphones."""


@gateway.command(
    epilog=example("edge-asr gateway cert", "edge-asr gateway cert voice.hall-2.plant 10.3.7.20 -s settings.yaml")
)
@click.argument("names", nargs=-1)
@click.option(
    "--if-due",
    is_flag=True,
    help=f"Only where there is none, or one that lacks a name or has less than {certificates.DUE_DAYS} days left.",
)
@with_settings
def cert(options: Settings, names: tuple[str, ...], *, if_due: bool, **_: object) -> None:
    """Make a private authority and a server certificate for this machine's names, addresses and NAMES; or renew it."""
    files = certificates.Files(options.gateway_directory)
    try:
        if if_due and not certificates.is_due(options.gateway_directory, names):
            click.echo(f"{files.server}: good for {certificates.days_left(files.server):.0f} days more")
            return
        held = certificates.make(options.gateway_directory, names)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    port = (options.gateway or Gateway()).port
    click.echo(f"{files.server}: good for {', '.join(held)} and {certificates.SERVER_DAYS} days; run again to renew")
    click.echo(f"{files.authority}: install it once on each device; SHA-256")
    click.echo(f"  {certificates.fingerprint(files.authority)}")
    click.echo(f"Devices can load it from https://{held[0]}:{port}/ca.crt while the gateway runs.")


@gateway.group(cls=ExamplesLast)
def token() -> None:
    """Who may come in: one token per station."""


@token.command(
    "add", epilog=example("edge-asr gateway token add tablet-3", "edge-asr gateway token add tv --role watch")
)
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(ROLES),
    default="talk",
    show_default=True,
    help="talk: speak and see the own results; watch: the dashboard, with what every station says.",
)
@with_settings
def token_add(options: Settings, name: str, role: Role, **_: object) -> None:
    """Make a station's token; it is shown this once. NAME becomes the source in every payload."""
    try:
        made = _tokens(options).add(name, role)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    section = options.gateway or Gateway()
    scheme = "https" if section.tls else "http"
    click.echo(made)
    click.echo(f"Open {scheme}://HOST:{section.port}/#token={made} once on that device.", err=True)


@token.command("list", epilog=example("edge-asr gateway token list --json"))
@click.option("--json", "as_json", is_flag=True, help="One JSON object per token.")
@with_settings
def token_list(options: Settings, *, as_json: bool, **_: object) -> None:
    """List the stations; the tokens themselves are nowhere."""
    for station in _tokens(options).stations():
        shown = asdict(station)
        del shown["sha256"]
        click.echo(json.dumps(shown) if as_json else f"{station.name:24s} {station.role:6s} {station.created}")


@token.command("revoke", epilog=example("edge-asr gateway token revoke tablet-3"))
@click.argument("name")
@with_settings
def token_revoke(options: Settings, name: str, **_: object) -> None:
    """Forget a station's token; its sessions end within a second or two."""
    _tokens(options).revoke(name)


def _tokens(options: Settings) -> Tokens:
    return Tokens(options.gateway_directory / "tokens.json")
