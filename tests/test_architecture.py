"""The house plan: rooms in reading order, each importing only rooms above it, no function a room of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import edge_asr

ORDER = (
    *(
        "events",
        "clock",
        "whole_file",
        "settings",
        "audio",
        "speech",
        "posteriors",
        "numbers",
        "phonetics",
        "wordgraph",
        "grammar",
        "biasing",
    ),
    *(
        "text_matching",
        "commands",
        "brevity",
        "linter",
        "confirmation",
        "outbox_file",
        "ledger",
        "retention",
        "file_retention",
        "reserve",
        "outbox",
        "audit",
        "model_store",
        "language_model",
        "hotwords",
        "text_decoding",
        "archive",
        "download",
        "signature",
        "installation",
        "onnx_file",
        "optimization",
        "inference",
        "child",
        "trial",
        "prepared",
        "process_state",
        "zygote",
        "devices",
        "capture",
        "sources",
        "contract",
    ),
    *(
        "requests",
        "asyncapi",
        "mailbox",
        "link",
        "refusals",
        "delivery",
        "publisher",
        "sparkplug",
        "home_assistant",
        "systemd",
        "spool",
        "logs",
        "alarms",
        "hearing",
        "thermal",
    ),
    *(
        "health",
        "capacity",
        "turns",
        "pipeline",
        "metrics",
        "traces",
        "monitor",
        "recorder",
        "gateway",
        "engine",
        "worker",
        "watchdog",
    ),
    *("standing", "attendant", "caretaker", "daemon"),
    *("subscriber", "broker", "demo", "service", "doctor", "bench", "evaluation", "report"),
    *(
        "command_line",
        "settings_reference",
        "cli_gateway",
        "cli_models",
        "cli_settings",
        "labelling",
        "cli_privacy",
        "cli_outbox",
        "cli_service",
        "cli_tools",
        "cli",
    ),
)
PACKAGE = Path(edge_asr.__file__).parent
ROOMS = sorted(PACKAGE.glob("[!_]*.py"))
LONGEST_FUNCTION = 60
"""Lines, docstring included; beyond 40 one stops and looks, beyond this one is stopped."""


def imported_rooms(tree: ast.Module) -> set[str]:
    """Names of the rooms that a module imports anywhere, type-checking blocks and functions included."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "edge_asr":
            names |= {f"edge_asr.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module if node.level == 0 and node.module else "edge_asr.<relative import>")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("edge_asr.")} - {"__version__"}


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.stem)
def test_a_room_imports_only_rooms_above_it(room: Path) -> None:
    assert room.stem in ORDER, "a new room: give it its place"
    above = ORDER[: ORDER.index(room.stem)]
    assert imported_rooms(ast.parse(room.read_text(encoding="utf-8"))) <= set(above)


@pytest.mark.parametrize("room", ROOMS, ids=lambda path: path.stem)
def test_every_function_fits_a_screen(room: Path) -> None:
    tree = ast.parse(room.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    too_long = [f.name for f in functions if f.end_lineno and f.end_lineno - f.lineno >= LONGEST_FUNCTION]
    assert too_long == []


def test_the_package_says_what_it_is_and_every_room_what_it_decides_or_carries() -> None:
    for room in [*ROOMS, PACKAGE / "__init__.py"]:
        assert ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))), room
