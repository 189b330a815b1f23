"""Writes an evaluation as one HTML page: table, plots, and the worst utterances to listen to. Needs no network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from edge_asr.evaluation import Condition, Outcome

WORST = 40
"""Utterances on the page, at most."""

COLUMNS = {
    "snr": "SNR dB",
    "n": "n",
    "accepted": "accepted",
    "acceptance": "rate",
    "wrong_commands": "wrong",
    "wrong_numbers": "wrong no.",
    "false_accepts_per_hour": "false/h",
    "wer": "WER",
    "rtf": "RTF",
}
"""Keys of a condition's summary that are shown, with their headings."""

_LEGEND = (
    "accepted: exactly the labelled command came; rate: of the recordings with a command; wrong: another command came; "
    "wrong no.: commands with another number than was said; false/h: commands per hour of recordings without one; "
    "WER: word error rate of the text (characters in CJK); RTF: CPU time over duration."
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 280, 50, 12, 40
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --mark: #06c }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #181818; --line: #444; --mark: #6bf } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
body { color: var(--ink); background: var(--paper) }
.wide { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .25em .8em; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
.text { text-align: left } td.words { white-space: normal; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif }
svg text { fill: var(--ink) } .grid { stroke: var(--line) } .dots { fill: var(--mark) }
.curve { stroke: var(--mark); stroke-width: 2; fill: none } audio { height: 2.5em; max-width: 16em; min-width: 10em }
@media (max-width: 50em) {
  .worst tr, .worst td { display: block; text-align: left; border: 0; padding: .1em 0 } .worst th { display: none }
  .worst tr { border-bottom: 1px solid var(--line); padding: .6em 0 } audio { width: 100% } svg text { font-size: 20px }
}
"""


def text_of(value: object, *, clean: str = "clean") -> str:
    """A figure for people."""
    if value is None:
        return clean
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def row_of(summary: Mapping[str, Any]) -> list[str]:
    """The figures of :data:`COLUMNS`; a dash where there is nothing to measure."""
    return [text_of(summary[key], clean="clean" if key == "snr" else "-") for key in COLUMNS]


def page(result: Mapping[str, Any], conditions: Sequence[Condition], folder: Path) -> str:
    """The whole page; ``folder`` is where it will lie, for the links to the recordings."""
    summaries = result["conditions"]
    parts = [
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">',
        f"<title>edge-asr eval</title><style>{_STYLE}</style>",
        f"<h1>Evaluation</h1><p>Model {escape(result['model'])}, grammar {escape(result['grammar'])}.</p>",
        _table(list(COLUMNS.values()), [row_of(summary) for summary in summaries]),
        f"<p>{_LEGEND}</p>",
        *_languages(summaries),
        *_acceptance(summaries),
        "<h2>Rejections</h2>",
        _rejections(summaries),
        *_calibration(summaries),
        f"<h2>Worst utterances</h2><p>At most {WORST}, wrong commands first; to hear: as recorded, no noise added.</p>",
        *_worst(conditions, folder),
    ]
    return "\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _languages(summaries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    spoken = sorted({language for summary in summaries for language in summary["wer_by_language"]})
    if spoken:
        rates = [[text_of(s["wer_by_language"][each], clean="-") for each in spoken] for s in summaries]
        rows = [[text_of(s["snr"]), *each] for s, each in zip(summaries, rates, strict=True)]
        yield "<h2>Word errors by language</h2>"
        yield _table([COLUMNS["snr"], *spoken], rows)


def _acceptance(summaries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    measured = sorted(
        (s for s in summaries if s["acceptance"] is not None), key=lambda s: (s["snr"] is None, s["snr"] or 0)
    )
    if measured:
        low = min(0.9, *(s["acceptance"] for s in measured)) // 0.1 / 10
        names = [text_of(s["snr"]) for s in measured]
        points = [((i + 0.5) / len(measured), (s["acceptance"] - low) / (1 - low)) for i, s in enumerate(measured)]
        yield "<h2>Acceptance by signal-to-noise ratio</h2>"
        yield _plot(points, names, [low, (1 + low) / 2, 1.0], "dB")


def _calibration(summaries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    bands: dict[float, list[float]] = {}
    for band in (band for summary in summaries for band in summary["calibration"]):
        n, confidence, right = bands.get(band["from"], [0, 0, 0])
        bands[band["from"]] = [n + band["n"], confidence + band["confidence"] * band["n"], right + band["right"]]
    if bands:
        points = [(confidence / n, right / n) for _, (n, confidence, right) in sorted(bands.items())]
        rows = [
            [f"{low:.1f}", text_of(c / n), text_of(right / n), str(n)] for low, (n, c, right) in sorted(bands.items())
        ]
        yield "<h2>Calibration</h2><p>Commands' confidence, and how often they were right; all conditions together.</p>"
        yield _plot(points, ["0", "", "0.5", "", "1"], [0.0, 0.5, 1.0], "confidence", diagonal=True)
        yield _table(["from", "mean confidence", "right", "commands"], rows)


def _plot(
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    levels: Sequence[float],
    axis: str,
    *,
    diagonal: bool = False,
) -> str:
    """A line through points in the unit square, as inline SVG; ``names`` are spread along the horizontal axis."""
    width, height = _WIDTH - _LEFT - 20, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        return f"{_LEFT + x * width:.1f},{_TOP + (1 - y) * height:.1f}"

    low, span = levels[0], levels[-1] - levels[0]
    lines = []
    for level in levels:
        y = _TOP + (1 - (level - low) / span) * height
        lines.append(
            f'<path class="grid" d="M{_LEFT},{y:.1f} h{width}"/><text x="8" y="{y + 4:.1f}">{level:.2f}</text>'
        )
    for i, name in enumerate(names):
        x = _LEFT + width * (i / (len(names) - 1) if diagonal else (i + 0.5) / len(names))
        lines.append(f'<text x="{x:.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{escape(name)}</text>')
    if diagonal:
        lines.append(f'<path class="grid" d="M{place(0, 0)} L{place(1, 1)}" stroke-dasharray="4"/>')
    lines.append(f'<text x="{_LEFT + width / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(axis)}</text>')
    lines.append(f'<path class="curve" d="M{" L".join(place(x, y) for x, y in points)}"/>')
    for x, y in points:
        cx, cy = place(x, y).split(",")
        lines.append(f'<circle cx="{cx}" cy="{cy}" r="4" class="dots"/>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{"".join(lines)}</svg>'


def _rejections(summaries: Sequence[Mapping[str, Any]]) -> str:
    reasons = sorted({reason for summary in summaries for reason in summary["rejections"]})
    rows = [[text_of(s["snr"]), *(str(s["rejections"].get(reason, 0)) for reason in reasons)] for s in summaries]
    return _table([COLUMNS["snr"], *reasons], rows)


def _worst(conditions: Sequence[Condition], folder: Path) -> Iterator[str]:
    failed = [(condition.snr_db, o) for condition in conditions for o in condition.outcomes if _has_failed(o)]
    failed.sort(key=lambda pair: -max((command.confidence for command in pair[1].commands), default=0.0))
    if not failed:
        yield "<p>None: every recording came to what its label says.</p>"
        return
    heads = "".join(f"<th class=text>{head}</th>" for head in ("noise", "label", "outcome", "heard", "listen"))
    yield f'<div class="wide"><table class="worst"><tr>{heads}</tr>'
    for snr_db, outcome in failed[:WORST]:
        label = f"{outcome.item.intent} {dict(outcome.item.slots)}" if outcome.item.intent else "no command"
        link = quote(Path(os.path.relpath(outcome.item.audio, folder)).as_posix())
        said = f"{label}: “{outcome.item.text}”" if outcome.item.text else label
        cells = "".join(f'<td class="text words">{escape(each)}</td>' for each in (said, _came(outcome), outcome.text))
        noise = "clean" if snr_db is None else f"{snr_db:g} dB"
        audio = f'<audio controls preload="none" src="{link}"></audio>'
        yield f"<tr><td class=text>{noise}</td>{cells}<td>{audio}</td></tr>"
    yield "</table></div>"


def _has_failed(outcome: Outcome) -> bool:
    return not outcome.accepted if outcome.item.intent is not None else bool(outcome.commands)


def _came(outcome: Outcome) -> str:
    """What came of a recording, in words."""
    commands = [f"{c.intent} {dict(c.slots)} ({c.confidence:.2f})" for c in outcome.commands]
    rejections = [f"rejected: {r.reason} ({r.confidence:.2f})" for r in outcome.rejections]
    return "; ".join(commands + rejections) or "nothing heard"
