"""The scripts that a stranger and CI type, on a fresh clone and on machines that lack something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.sysbox import CHECKOUT, INSTALLED, booted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def call(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script as CI does: no standard input, output and errors in one stream."""
    return subprocess.run(
        [str(folder / command[0]), *command[1:]],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "CI": "true", **variables},
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone at a path with a space, for people have such paths."""
    folder = tmp_path_factory.mktemp("fresh") / "a clone"
    subprocess.run(["git", "clone", "--quiet", str(CHECKOUT), str(folder)], check=True)
    return folder


def test_a_machine_without_a_fitting_python_is_told_which_ones_fit(clone: Path) -> None:
    done = call(clone, "tools/setup", "check", PYTHON="/bin/false")
    assert done.returncode != 0
    assert "needs Python 3.10 to 3.13" in done.stdout
    assert not (clone / ".venv").exists()


def test_who_may_not_install_packages_is_told_what_to_type(tmp_path: Path) -> None:
    with booted(tmp_path) as machine:  # knows of no installed package
        script = f"{INSTALLED}/checkout/tools/setup run 2>&1 || echo exited $?"
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        output = machine.run(*nobody, "bash", "-c", script)
    assert "type 'sudo apt-get install -y --no-install-recommends mosquitto libportaudio2'" in output
    assert output.endswith("exited 1\n")


def test_an_unknown_purpose_is_refused(clone: Path) -> None:
    assert "'walk' is not run, check or test" in call(clone, "tools/setup", "walk").stdout


@pytest.fixture(scope="module")
def ready(clone: Path) -> Path:
    """The clone, set up with the interpreter of this test run."""
    done = call(clone, "tools/setup", "check", PYTHON=f"{sys.base_prefix}/bin/python3")
    assert done.returncode == 0, done.stdout
    return clone


@pytest.mark.timeout(600)
def test_a_fresh_clone_sets_itself_up_and_the_second_time_touches_nothing(ready: Path) -> None:
    imported = call(ready, ".venv/bin/python", "-c", "import edge_asr; print(edge_asr.__file__)").stdout.strip()
    assert imported == str(ready / "edge_asr/__init__.py")
    written = (ready / ".venv").stat().st_mtime_ns
    again = call(ready, "tools/setup", "check")
    assert (again.returncode, again.stdout) == (0, "")
    assert (ready / ".venv").stat().st_mtime_ns == written


@pytest.mark.timeout(600)
def test_a_wheel_carries_models_grammars_recordings_and_units(ready: Path, tmp_path: Path) -> None:
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}")
    done = call(ready, ".venv/bin/python", *build, str(ready))
    assert done.returncode == 0, done.stdout
    (wheel,) = tmp_path.glob("edge_asr-*-py3-none-any.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    bundled = installed / "edge_asr/bundled"
    assert sorted(folder.name for folder in bundled.iterdir()) == ["grammars", "models", "recordings", "systemd"]
    verify = ("-m", "edge_asr.cli", "models", "verify", "micro-en")
    done = call(ready, ".venv/bin/python", *verify, PYTHONPATH=str(installed))
    version = json.loads((bundled / "models/micro-en/manifest.json").read_text(encoding="utf-8"))["version"]
    assert done.stdout.startswith(f"micro-en {version}: sound"), done.stdout


@pytest.mark.timeout(600)
def test_ci_reports_every_kind_of_complaint_and_fails(ready: Path) -> None:
    for test in (ready / "tests").glob("test_*.py"):
        test.unlink()
    home = Path("/", "home", "someone")
    planted = f"import os\nCOUNT: int = '{home}'\n\n\ndef test_it() -> None:\n    assert not COUNT\n"
    (ready / "tests/test_planted.py").write_text(planted, encoding="utf-8")
    subprocess.run(["git", "-C", str(ready), "add", "--all"], check=True)
    done = call(ready, ".ci/run")
    assert done.returncode != 0
    assert "F401" in done.stdout
    assert "unformatted: File would be reformatted\n --> tests/test_planted.py" in done.stdout
    assert "tests/test_planted.py:2: error: Incompatible types in assignment" in done.stdout
    assert f"tests/test_planted.py:2:COUNT: int = '{home}'" in done.stdout
    assert re.search(r"^=+ 1 failed in .*=+$", done.stdout, re.MULTILINE)


def requirements(name: str) -> list[Requirement]:
    """The pins of a lock file; every one must carry a hash."""
    text = (CHECKOUT / name).read_text(encoding="utf-8")
    hashed = re.findall(r"^(\S+==.*?)\\\n(?:    --hash=sha256:[0-9a-f]{64}.*\n)+", text, re.MULTILINE)
    assert len(hashed) == len(re.findall(r"^\w", text, re.MULTILINE))
    return [Requirement(pin) for pin in hashed]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize(("lock", "extra"), [("requirements.lock", "gateway"), ("requirements-dev.lock", "dev")])
def test_every_dependency_is_pinned_once_for_every_python_and_machine(
    lock: str, extra: str, python: str, machine: str
) -> None:
    place = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine, "extra": ""}
    pins: dict[str, Requirement] = {}
    for pin in requirements(lock):
        if pin.marker is None or pin.marker.evaluate({**place, "sys_platform": "linux"}):
            assert pin.name not in pins
            pins[pin.name] = pin
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else []), "hatchling"]
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate(place):
            continue
        pinned = pins.get(requirement.name.lower())
        version = str(pinned.specifier).removeprefix("==") if pinned else "0"
        assert version in requirement.specifier, f"{requirement}: {lock} pins {version}; run tools/lock"


def test_both_locks_agree_so_that_tests_run_what_is_shipped() -> None:
    runtime = {str(pin) for pin in requirements("requirements.lock")}
    assert runtime <= {str(pin) for pin in requirements("requirements-dev.lock")}
