"""The verbs of `edge-asr settings`: what can be set, and what is."""

from __future__ import annotations

import json

import click
import yaml

from edge_asr import settings_reference
from edge_asr.command_line import ExamplesLast, example, with_settings
from edge_asr.settings import Settings


@click.group("settings", cls=ExamplesLast)
def settings_verbs() -> None:
    """What can be set, and what is."""


@settings_verbs.command("example", epilog=example("edge-asr settings example > settings.yaml"))
def settings_example() -> None:
    """Write a settings file with every key, its meaning and its default."""
    click.echo(settings_reference.example(), nl=False)


@settings_verbs.command("schema", epilog=example("edge-asr settings schema > settings.schema.json"))
def settings_schema() -> None:
    """Write the JSON Schema of the settings, for editors that complete and check YAML."""
    click.echo(json.dumps(settings_reference.schema(), indent=2, ensure_ascii=False))


@settings_verbs.command("show", epilog=example("edge-asr settings show --settings /etc/edge-asr/settings.yaml"))
@with_settings
def settings_show(options: Settings, **_: object) -> None:
    """Show what is really set: defaults, file, variables and --set together. Secrets stay in their files."""
    tree = options.model_dump(mode="json")
    click.echo(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), nl=False)
