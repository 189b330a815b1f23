"""What requests have set outlives a restart, stands over the settings, and is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_asr import doctor
from edge_asr.settings import Hotword, Settings, SettingsError
from edge_asr.standing import StandingOrders

OPTIONS = Settings.model_validate(
    {"hotwords": {"phrases": ["old"], "weight": 3}, "commands": {"grammars": ["factory.en", "a/b.yaml"]}}
)
PHRASES = (Hotword(phrase="RCCB"), Hotword(phrase="机器", weight=4.5, spoken=("ji qi",)))


@pytest.fixture
def orders(tmp_path: Path) -> StandingOrders:
    return StandingOrders(tmp_path)


def test_without_orders_the_settings_hold(orders: StandingOrders, tmp_path: Path) -> None:
    assert orders.over(OPTIONS) == OPTIONS
    assert orders.names(OPTIONS) == []
    assert not orders.muted
    assert list(tmp_path.iterdir()) == []


def test_orders_stand_over_the_settings_also_for_the_next_process(orders: StandingOrders, tmp_path: Path) -> None:
    orders.keep_hotwords(PHRASES)
    orders.keep_grammar("a/b.yaml", "language: en\n")
    orders.keep_muted()
    again = StandingOrders(tmp_path)
    effective = again.over(OPTIONS)
    assert effective.hotwords.phrases == PHRASES
    assert effective.hotwords.weight == 3
    name, path = effective.commands.grammars
    assert name == "factory.en"
    assert Path(path).read_text(encoding="utf-8") == "language: en\n"
    assert again.names(OPTIONS) == ["grammar a/b.yaml", "hotwords", "muted"]
    again.forget_hotwords()
    again.forget_grammar("a/b.yaml")
    again.forget_muted()
    assert again.over(OPTIONS) == OPTIONS
    assert not again.muted


def test_an_order_can_be_taken_back(orders: StandingOrders) -> None:
    take_back = orders.keep_hotwords(PHRASES)
    take_back_second = orders.keep_hotwords(PHRASES[:1])
    take_back_second()
    assert orders.over(OPTIONS).hotwords.phrases == PHRASES
    forgotten = orders.forget_hotwords()
    forgotten()
    assert orders.over(OPTIONS).hotwords.phrases == PHRASES
    take_back()
    assert orders.over(OPTIONS) == OPTIONS


def test_an_order_that_cannot_be_written_changes_nothing(orders: StandingOrders, tmp_path: Path) -> None:
    orders.keep_hotwords(PHRASES)
    (tmp_path / "standing" / ".hotwords.json.new").mkdir()  # in the way, as a full disk would be
    with pytest.raises(OSError, match="hotwords"):
        orders.keep_hotwords(())
    assert orders.over(OPTIONS).hotwords.phrases == PHRASES


@pytest.mark.parametrize("spoilt", ["[", '[{"phrase": ""}]', '{"a": 1}', "\0"])
def test_an_order_that_cannot_be_read_is_one_clear_line(orders: StandingOrders, tmp_path: Path, spoilt: str) -> None:
    orders.keep_hotwords(PHRASES)
    (tmp_path / "standing" / "hotwords.json").write_text(spoilt, encoding="utf-8")
    with pytest.raises(SettingsError, match=r"hotwords\.json.*req/hotwords") as caught:
        orders.over(OPTIONS)
    assert "\n" not in str(caught.value)


def test_the_doctor_tells_of_a_closed_ear(orders: StandingOrders, tmp_path: Path) -> None:
    orders.keep_muted()
    options = Settings.model_validate({"state_dir": str(tmp_path)})
    found = next(each for each in doctor.examine(options) if each.subject == "requests")
    assert (found.state, found.remedy) == ("warning", "send req/unmute")
