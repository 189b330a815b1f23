"""The command line: every verb of `edge-asr`; the service's own is here, the others in rooms loaded when typed.

Only this room and its `cli_*` neighbours print or exit.

Exit codes (sysexits.h): 0 done; 1 a test, a check or the demo found something wrong; 2 wrong usage; 66 an input file
cannot be read, or there is no outbox; 69 a microphone, broker or other service is not there; 70 the recognizer cannot
be kept running; 74 the outbox cannot be written, or a disk fails; 78 settings, model or grammar cannot be used (systemd
does not restart on this one); 130 interrupted.
"""

from __future__ import annotations

import asyncio
import faulthandler
from pathlib import Path

import click

import edge_asr
from edge_asr import logs
from edge_asr.command_line import Later, example, load_settings, with_settings
from edge_asr.daemon import Daemon, plan
from edge_asr.settings import Settings

_EPILOG = 'Shell completion:  eval "$(_EDGE_ASR_COMPLETE=bash_source edge-asr)"   (zsh_source, fish_source)'


@click.group(
    cls=Later,
    later={
        "demo": "cli_tools:play",
        "transcribe": "cli_tools:transcribe",
        "listen": "cli_tools:listen",
        "devices": "cli_tools:devices",
        "check": "cli_tools:check",
        "bench": "cli_tools:measure_costs",
        "eval": "cli_tools:evaluate",
        "grammar": "cli_tools:grammar",
        "models": "cli_models:models",
        "settings": "cli_settings:settings_verbs",
        "recordings": "cli_privacy:recordings",
        "audit": "cli_privacy:audit",
        "outbox": "cli_outbox:outbox",
        "service": "cli_service:service",
        "gateway": "cli_gateway:gateway",
    },
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)
@click.version_option(edge_asr.__version__, prog_name="edge-asr")
def main() -> None:
    """Offline-first speech recognition and voice commands, published over MQTT."""


@main.command(epilog=example("edge-asr run --settings /etc/edge-asr/settings.yaml", "edge-asr run --watch"))
@with_settings
@click.option("--watch", is_flag=True, help="Show what a subscriber sees; starts a private broker where none is set.")
@click.option("--dry-run", is_flag=True, help="Check and load everything, say what would be done, and do nothing.")
def run(options: Settings, path: Path | None, changes: tuple[str, ...], *, watch: bool, dry_run: bool) -> None:
    """Listen and publish until stopped: the service."""
    if dry_run:
        for line in plan(options):
            click.echo(line)
        return
    if watch:
        from edge_asr import cli_tools  # noqa: PLC0415 - 12 MB that the service does not need

        cli_tools.watch(options)
        return
    logs.configure(options.log)
    faulthandler.enable()  # what the watchdog or a native library ends leaves every thread's stack

    async def serve() -> None:
        await Daemon(options, reload=lambda: load_settings(path, changes)).run()

    asyncio.run(serve())


if __name__ == "__main__":
    main(prog_name="edge-asr")
