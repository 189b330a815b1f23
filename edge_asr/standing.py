"""Standing orders: what requests have set and what outlives a restart: the site's words, its grammars, a closed ear.

Law: each order is a file of its own in the state directory, replaced in one step (written beside it, synced, renamed).
Where an order stands, the settings' word does not count; where none does, it does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from pydantic import ValidationError

from edge_asr.settings import Hotword, Hotwords, Settings, SettingsError, explain, problems
from edge_asr.whole_file import replace_file, sync

Undo = Callable[[], None]


class StandingOrders:
    """The orders of one device."""

    def __init__(self, state_directory: Path) -> None:
        self._folder = state_directory / "standing"
        self._hotwords = self._folder / "hotwords.json"
        self._muted = self._folder / "muted"

    @property
    def muted(self) -> bool:
        """Whether the ear is to be closed."""
        return self._muted.exists()

    def names(self, options: Settings) -> list[str]:
        """What stands, for people."""
        found = [f"grammar {name}" for name in options.commands.grammars if self._grammar(name).exists()]
        found += ["hotwords"] if self._hotwords.exists() else []
        return found + (["muted"] if self.muted else [])

    def over(self, options: Settings) -> Settings:
        """The settings with the orders put over them. Raises SettingsError for an order that cannot be read."""
        grammars = [str(path) if (path := self._grammar(name)).exists() else name for name in options.commands.grammars]
        hotwords = options.hotwords
        if self._hotwords.exists():
            hotwords = hotwords.model_copy(update={"phrases": self._read_hotwords(), "file": None})
        commands = options.commands.model_copy(update={"grammars": tuple(grammars)})
        return options.model_copy(update={"hotwords": hotwords, "commands": commands})

    def keep_muted(self) -> Undo:
        """Raises OSError, as all that write."""
        return self._replace(self._muted, "")

    def forget_muted(self) -> Undo:
        """The ear may be open."""
        return self._replace(self._muted, None)

    def keep_hotwords(self, phrases: Sequence[Hotword]) -> Undo:
        """These and no others."""
        listed = [phrase.model_dump(exclude_defaults=True) for phrase in phrases]
        return self._replace(self._hotwords, json.dumps(listed, ensure_ascii=False, indent=0))

    def forget_hotwords(self) -> Undo:
        """Those of the settings."""
        return self._replace(self._hotwords, None)

    def draft_grammar(self, name: str, text: str) -> Path:
        """Write a grammar that is to be looked at before it counts."""
        draft = self._grammar(name).with_suffix(".draft.yaml")
        self._folder.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        return draft

    def keep_grammar(self, name: str, text: str) -> Undo:
        """This one."""
        return self._replace(self._grammar(name), text)

    def forget_grammar(self, name: str) -> Undo:
        """That of the settings."""
        return self._replace(self._grammar(name), None)

    def _grammar(self, name: str) -> Path:
        return self._folder / f"grammar-{quote(name, safe='')}.yaml"

    def _read_hotwords(self) -> tuple[Hotword, ...]:
        remedy = "delete it, or send req/hotwords again"
        try:
            listed = json.loads(self._hotwords.read_text(encoding="utf-8"))
            return Hotwords.model_validate({"phrases": listed}).phrases
        except ValidationError as error:
            raise SettingsError(f"{self._hotwords}: {explain(problems(error)[0], Hotwords)}; {remedy}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not JSON"
            raise SettingsError(f"{self._hotwords}: cannot be read ({reason}); {remedy}") from None

    def _replace(self, path: Path, text: str | None) -> Undo:
        """Write or, without a text, delete; how to undo it."""
        before = path.read_text(encoding="utf-8") if path.exists() else None
        if text is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, text)
        elif before is not None:
            path.unlink()
            sync(self._folder)
        return lambda: self._undo(path, before)

    def _undo(self, path: Path, before: str | None) -> None:
        self._replace(path, before)
