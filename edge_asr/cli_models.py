"""The verbs of `edge-asr models`: what a person does with the models on a box. Only `pull` uses the network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from edge_asr import download, installation, model_store, prepared, trial
from edge_asr.command_line import ExamplesLast, example, with_settings
from edge_asr.installation import Store
from edge_asr.model_store import PUBLIC_RELEASES, RELEASE_ARCHIVES, Manifest, ModelError
from edge_asr.settings import Settings

RELEASES = "https://github.com/k2-fsa/sherpa-onnx/releases/download/asr-models"
"""Where the public releases are; a site's own mirror has the same file names."""


@click.group(cls=ExamplesLast)
def models() -> None:
    """The models on this box: look, import, check, choose."""


@models.command("list", epilog=example("edge-asr models list"))
@with_settings
@click.option("--json", "as_json", is_flag=True, help="One JSON object per model.")
def models_list(options: Settings, *, as_json: bool, **_: object) -> None:
    """List the models there are, which one is in use, and the public releases that can be pulled."""
    in_use = installation.chosen(options)
    rows = list(_rows(Store(options.models_directory), in_use))
    for row in rows:
        if as_json:
            click.echo(json.dumps(row))
            continue
        star = "*" if row["in_use"] else " "
        languages = ", ".join(row["languages"]) or "any language"
        click.echo(f"{star} {row['name']:14s} {row['version']:10s} {row['place']:9s} {languages}; {row['licence']}")
    if not as_json and not any(row["in_use"] for row in rows):
        click.echo(f"* {in_use}")


def _rows(store: Store, in_use: str) -> Iterator[dict[str, Any]]:
    imported = store.manifests()
    have = {manifest.name for manifest in imported}
    releases = [release for release in PUBLIC_RELEASES if release.name not in have]
    for place, manifests in (
        ("bundled", model_store.bundled_manifests()),
        ("imported", imported),
        ("to pull", releases),
    ):
        for manifest in manifests:
            about = manifest.model_dump(mode="json", include={"name", "version", "kind", "languages", "licence"})
            yield {**about, "place": place, "in_use": manifest.name == in_use}


@models.command("pull", epilog=example("edge-asr models pull 2024-07-17", "edge-asr models pull DATE --mirror URL"))
@click.argument("release")
@with_settings
@click.option("--mirror", default=RELEASES, show_default=True, help="Folder on a web server that has the archive.")
@click.option("--sha256", help="Of an archive that is no public release; RELEASE is then its file name.")
def models_pull(options: Settings, release: str, mirror: str, sha256: str | None, **_: object) -> None:
    """Download a public release by its date, check it and import it; broken off, it continues where it was.

    The only verb that uses the network.
    """
    archive, expected = _wanted(release, sha256)
    folder = options.models_directory / ".downloads"
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(archive)

        def show(have: int, total: int | None) -> None:
            progress.update(task, completed=have, total=total)

        address = f"{mirror.rstrip('/')}/{archive}"
        download.fetch(address, folder / archive, *expected, progress=show, spare_bytes=installation.SPARE_BYTES)
    manifest = Store(options.models_directory).add(folder / archive, options.model.signed_by)
    (folder / archive).unlink()
    _tell_imported(manifest)


def _wanted(release: str, sha256: str | None) -> tuple[str, tuple[str, int | None]]:
    """Name of the archive, and its SHA-256 and size as far as they are known."""
    if sha256 is not None:
        if Path(release).name != release or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise click.UsageError("with --sha256 (64 hexadecimal digits) RELEASE is the file name of an archive")
        return release, (sha256, None)
    found = [name for name in RELEASE_ARCHIVES if name.removesuffix(".tar.bz2").endswith(release)]
    if len(found) != 1:
        dates = ", ".join(manifest.version for manifest in PUBLIC_RELEASES)
        raise click.UsageError(f"{release!r} is none of the public releases ({dates}); of others give --sha256")
    return found[0], (RELEASE_ARCHIVES[found[0]].sha256, RELEASE_ARCHIVES[found[0]].size)


@models.command("import", epilog=example("edge-asr models import sense-voice.tar.bz2", "edge-asr models import DIR"))
@click.argument("what", metavar="PATH", type=click.Path(path_type=Path, exists=True))
@with_settings
def models_import(options: Settings, what: Path, **_: object) -> None:
    """Import a model from an archive or a folder, a USB stick's for instance, and check every file of it."""
    _tell_imported(Store(options.models_directory).add(what, options.model.signed_by))


def _tell_imported(manifest: Manifest) -> None:
    known = "" if manifest.verified else "; nobody vouches for it"
    click.echo(f"{manifest.name} {manifest.version}: imported{known}; use it with `edge-asr models activate`")


@models.command("verify", epilog=example("edge-asr models verify", "edge-asr models verify NAME"))
@click.argument("names", nargs=-1)
@with_settings
def models_verify(options: Settings, names: tuple[str, ...], **_: object) -> None:
    """Check every file of models, load them and let them hear their golden recording; without a name all models.

    A name is that of a bundled or imported model, or a directory. Exit code 78 if one is not sound.
    """
    store = Store(options.models_directory)
    everything = [*model_store.bundled_manifests(), *store.manifests()]
    failed = []
    for name in names or [manifest.name for manifest in everything]:
        try:
            click.echo(_verified(name, store, options))
        except ModelError as error:
            failed.append(str(error))
    if failed:
        raise ModelError("\n".join(failed))


def _verified(name: str, store: Store, options: Settings) -> str:
    if any(manifest.name == name and manifest.kind == "vad" for manifest in model_store.bundled_manifests()):
        model_store.locate_vad(name)
        return f"{name}: sound"
    files = model_store.locate(name, store.folder)
    heard = trial.run(name, store.folder, options.model).heard
    golden = f"hears {heard!r}" if heard else "has no golden recording in a language of the settings"
    return f"{files.name} {files.manifest.version}: sound, SHA-256 {files.sha256}, {golden}"


@models.command("activate", epilog=example("edge-asr models activate NAME && systemctl reload edge-asr"))
@click.argument("name")
@with_settings
def models_activate(options: Settings, name: str, **_: object) -> None:
    """Try a model in a process of its own and, if it hears its golden recording right, use it from the next reload on.

    A model that later cannot be loaded, or ends the daemon, makes way for the one before it by itself.
    """
    store = Store(options.models_directory)
    files = model_store.locate(name, store.folder)
    if files.name != name:
        raise ModelError(f"{name}: is not imported; type `edge-asr models import {name}` first")
    if name in {manifest.name for manifest in store.manifests()}:
        installation.check_signature(files.model.parent, options.model.signed_by)
    verdict = trial.run(name, store.folder, options.model)
    store.activate(name)
    tested = f"it hears {verdict.heard!r}" if verdict.heard else "its contract holds (no golden recording was heard)"
    click.echo(f"{name}: {tested}; active from the next reload on: `systemctl reload edge-asr`")
    _warn_of_settings(options)
    if options.model.optimized:
        try:
            click.echo(f"{name}: {_optimized(name, store)}")
        except ModelError as error:  # it is active all the same
            click.echo(f"not optimized: {error}", err=True)


@models.command("optimize", epilog=example("edge-asr models optimize && systemctl reload edge-asr"))
@click.argument("name", required=False)
@with_settings
def models_optimize(options: Settings, name: str | None, **_: object) -> None:
    """Make a faster graph of a model for this CPU, prove that it hears the same, and use it from the next reload on.

    Without a name the model in use. `activate` does it by itself, and the daemon a minute after a start without such
    a graph.
    """
    name = name or installation.chosen(options)
    click.echo(f"{name}: {_optimized(name, Store(options.models_directory))}")


def _optimized(name: str, store: Store) -> str:
    record = prepared.prepare(name, store.folder)
    why = "".join(f"; {reason}" for reason in record.refused)
    if record.variant == "own":
        return f"its own graph stays{why}"
    close = f"{record.agreement:.1%} of the tokens the same, posteriors {record.distance:.4f} apart"
    same = "every bit the same" if record.variant == "exact" else close
    return f"optimized for this CPU, {record.cpu_ratio:.2f} of the CPU time, {same}{why}"


@models.command("rollback", epilog=example("edge-asr models rollback && systemctl reload edge-asr"))
@with_settings
def models_rollback(options: Settings, **_: object) -> None:
    """Use the model again that was active before the present one."""
    name = Store(options.models_directory).roll_back()
    click.echo(f"{name}: active from the next reload on: `systemctl reload edge-asr`")
    _warn_of_settings(options)


@models.command("remove", epilog=example("edge-asr models remove NAME"))
@click.argument("name")
@with_settings
def models_remove(options: Settings, name: str, **_: object) -> None:
    """Delete an imported model that is not in use."""
    if options.model.name == name:
        raise ModelError(f"{name}: is named by the settings; take model.name out of them first")
    store = Store(options.models_directory)
    sha256 = {manifest.name: manifest.files[manifest.model_file].sha256 for manifest in store.manifests()}.get(name)
    store.remove(name)
    if sha256 is not None:
        prepared.forget(sha256, store.folder)
    click.echo(f"{name}: removed")


def _warn_of_settings(options: Settings) -> None:
    if options.model.name is not None:
        click.echo(f"but the settings name {options.model.name}: take model.name out of them", err=True)
