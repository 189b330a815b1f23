"""What every verb of the command line shares: --settings and --set, examples in its help, errors as one line each.

The exit codes are documented in ``cli``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from edge_asr import settings
from edge_asr.audio import AudioFileError
from edge_asr.audit import AuditError
from edge_asr.broker import BrokerError
from edge_asr.download import DownloadError
from edge_asr.evaluation import ManifestError
from edge_asr.gateway import GatewayError
from edge_asr.grammar import GrammarError
from edge_asr.hotwords import HotwordError
from edge_asr.link import LinkError
from edge_asr.model_store import ModelError
from edge_asr.outbox import OutboxError
from edge_asr.recorder import RecorderError
from edge_asr.service import ServiceError
from edge_asr.settings import Settings
from edge_asr.sources import SourceError
from edge_asr.subscriber import SubscriberError
from edge_asr.worker import WorkerError

EXIT_FOUND = 1
EXIT_NO_INPUT = 66
EXIT_UNAVAILABLE = 69
EXIT_SOFTWARE = 70
EXIT_IO = 74
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130


class ExamplesLast(click.Group):
    """A group whose commands keep the line breaks of their examples and are listed in the order of this file."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """In the order of definition."""
        return list(self.commands)


def example(*lines: str) -> str:
    """The end of a verb's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Every expected error is one clear line and a documented exit code; a bug keeps its traceback."""
    codes: dict[type[Exception], int] = {
        settings.SettingsError: EXIT_CONFIG,
        ModelError: EXIT_CONFIG,
        GrammarError: EXIT_CONFIG,
        HotwordError: EXIT_CONFIG,
        AudioFileError: EXIT_NO_INPUT,
        ManifestError: EXIT_NO_INPUT,
        SourceError: EXIT_UNAVAILABLE,
        BrokerError: EXIT_UNAVAILABLE,
        DownloadError: EXIT_UNAVAILABLE,
        SubscriberError: EXIT_UNAVAILABLE,
        LinkError: EXIT_UNAVAILABLE,
        ServiceError: EXIT_UNAVAILABLE,
        WorkerError: EXIT_SOFTWARE,
        GatewayError: EXIT_UNAVAILABLE,
        AuditError: EXIT_IO,
        OutboxError: EXIT_IO,
        RecorderError: EXIT_NO_INPUT,
    }
    try:
        yield
    except tuple(codes) as error:
        for line in str(error).splitlines():
            click.echo(f"edge-asr: {line}", err=True)
        raise SystemExit(codes[type(error)]) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # our reader has seen enough
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --settings and --set, and hand the command its ``options: Settings``."""

    @click.option("--settings", "-s", "path", type=click.Path(path_type=Path), help="YAML settings file.")
    @click.option(
        "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Override one setting, e.g. mqtt.host=mes."
    )
    def wrapped(path: Path | None, changes: tuple[str, ...], **rest: Any) -> Any:  # noqa: ANN401 - click's arguments
        with one_line_errors():
            return command(options=load_settings(path, changes), path=path, changes=changes, **rest)

    wrapped.__name__ = command.__name__
    wrapped.__doc__ = command.__doc__
    wrapped.__click_params__ = wrapped.__click_params__ + getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    return wrapped


def load_settings(path: Path | None, changes: tuple[str, ...]) -> Settings:
    """The settings of a file with KEY=VALUE changes on top. Raises SettingsError."""
    overrides: dict[str, Any] = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise settings.SettingsError(f"--set {change}: expected KEY=VALUE")
        try:
            overrides[key] = settings.parse_yaml(value)
        except ValueError:
            raise settings.SettingsError(f"--set {key}: {value!r} is not a YAML value") from None
    return settings.load(path, overrides)
