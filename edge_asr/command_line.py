"""What every verb of the command line shares: --settings and --set, examples in its help, errors as one line each.

The exit codes are documented in ``cli``.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from edge_asr import settings
from edge_asr.settings import Settings

EXIT_FOUND = 1
EXIT_NO_INPUT = 66
EXIT_UNAVAILABLE = 69
EXIT_SOFTWARE = 70
EXIT_IO = 74
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130


CODES = {
    "edge_asr.settings.SettingsError": EXIT_CONFIG,
    "edge_asr.model_store.ModelError": EXIT_CONFIG,
    "edge_asr.grammar.GrammarError": EXIT_CONFIG,
    "edge_asr.hotwords.HotwordError": EXIT_CONFIG,
    "edge_asr.audio.AudioFileError": EXIT_NO_INPUT,
    "edge_asr.evaluation.ManifestError": EXIT_NO_INPUT,
    "edge_asr.devices.DeviceError": EXIT_UNAVAILABLE,
    "edge_asr.sources.SourceError": EXIT_UNAVAILABLE,
    "edge_asr.broker.BrokerError": EXIT_UNAVAILABLE,
    "edge_asr.download.DownloadError": EXIT_UNAVAILABLE,
    "edge_asr.subscriber.SubscriberError": EXIT_UNAVAILABLE,
    "edge_asr.link.LinkError": EXIT_UNAVAILABLE,
    "edge_asr.service.ServiceError": EXIT_UNAVAILABLE,
    "edge_asr.worker.WorkerError": EXIT_SOFTWARE,
    "edge_asr.zygote.ZygoteError": EXIT_SOFTWARE,
    "edge_asr.gateway.GatewayError": EXIT_UNAVAILABLE,
    "edge_asr.audit.AuditError": EXIT_IO,
    "edge_asr.outbox.OutboxError": EXIT_IO,
    "edge_asr.recorder.RecorderError": EXIT_NO_INPUT,
}
"""Expected errors by name: who only runs the service has not loaded all rooms that raise them."""


FAILING = frozenset({errno.EIO, errno.ENOMEM, errno.ENFILE, errno.EMFILE, errno.ESTALE, errno.ENXIO})
"""What the kernel says of a file where the machine has trouble, not the file: another start may find it gone."""


def exit_code(error: Exception) -> int | None:
    """Of an expected error; None: a bug. What cannot be used because the machine fails is worth another start."""
    code = CODES.get(f"{type(error).__module__}.{type(error).__name__}")
    said = getattr(error, "errno", getattr(error.__context__, "errno", None))
    return EXIT_IO if code == EXIT_CONFIG and said in FAILING else code


class ExamplesLast(click.Group):
    """A group whose commands keep the line breaks of their examples and are listed in the order of this file."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """In the order of definition."""
        return list(self.commands)


class Later(ExamplesLast):
    """A group most of whose verbs are loaded when somebody types them: the service carries none of their memory."""

    def __init__(self, *arguments: Any, later: Mapping[str, str], **options: Any) -> None:  # noqa: ANN401 - click's
        """``later``: verb -> ``room:command``."""
        super().__init__(*arguments, **options)
        self._later = later

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Those of this file first."""
        return [*super().list_commands(ctx), *self._later]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a verb's room."""
        if cmd_name not in self._later:
            return super().get_command(ctx, cmd_name)
        room, _, name = self._later[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(f"edge_asr.{room}"), name)
        return command


def example(*lines: str) -> str:
    """The end of a verb's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Every expected error is one clear line and a documented exit code; a bug keeps its traceback."""
    try:
        yield
    except Exception as error:
        code = exit_code(error)
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # our reader has seen enough
            code = 0
        elif code is not None:
            for line in str(error).splitlines():
                click.echo(f"edge-asr: {line}", err=True)
        if code is None:
            raise
        raise SystemExit(code) from None
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
