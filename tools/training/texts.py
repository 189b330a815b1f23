"""What the synthesized speakers say.

Law: a sentence follows from the random generator and from the grammars, word lists and packaged corpora named here.
The labels and grammar of a benchmark that the model is measured on are never read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from random import Random

from wordfreq import top_n_list

from edge_asr import grammar
from edge_asr.numbers import spoken_forms
from edge_asr.wordgraph import WordGraph

GRAMMARS = Path(__file__).resolve().parents[2] / "examples" / "grammars"
FORTUNES = Path("/usr/share/games/fortunes")
"""Debian's `fortunes`: 400,000 words of quotations, proverbs and talk, the general English a package ships."""

HELD_OUT_EVERY = 20
"""One in so many general sentences is kept from training, to be read by the unseen voice in the evaluation."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, slots=True)
class Sentence:
    """One thing to say."""

    kind: str
    """factory, coffee, decoy, free, digits, letters, short or general."""
    text: str
    """The label: lower-case words of a-z and ', letters of an abbreviation one by one."""
    say: str
    """The same for a synthesizer, which spells capitals: ``R C C B``."""


def normal(text: str) -> str:
    """Lower-case words of a-z and '."""
    return re.sub(r"[^a-z']+", " ", text.lower()).strip()


def without_digits(text: str) -> str:
    """Numbers as they are said. Raises ValueError where one is too large to be."""

    def said(found: re.Match[str]) -> str:
        return f" {' '.join(spoken_forms(Decimal(found[0].replace(',', '')), 'en')[0])} "

    return re.sub(r"\d+(?:,\d{3}(?!\d))*(?:\.\d+)?", said, text)


def sentence(kind: str, words: str) -> Sentence:
    """Of written words; a word in capitals is spelled by its letters, digits are said as a number."""
    words = without_digits(words)
    words = re.sub(r"[-_/]", " ", words)
    spelled = [" ".join(word) if re.fullmatch("[A-Z]{2,}", word) else word for word in words.split()]
    return Sentence(kind, normal(" ".join(spelled)), " ".join(spelled))


# ---------------------------------------------------------------- words of the shop floor, beyond the grammars

_MACHINES = """line|press|conveyor|mixer|oven|furnace|filler|labeller|packer|palletizer|robot|pump|chiller|compressor|
extractor fan|extruder|lathe|milling machine|grinder|crane|hoist|forklift|gripper|hopper|silo|boiler|dryer|valve|
motor|spindle|drive|cutter|welder|station|cell|panel|cabinet|tank|turbine|generator|shredder|sorter|wrapper|capper|
dosing unit|shrink tunnel|bagging line|elevator|gearbox|hydraulic unit|cobot|depalletizer|laser|plotter|
injection machine|mould|die|autoclave|centrifuge|kiln|sieve|blower|vacuum pump|cooling tower|door|gate|hall|bay|dock|
zone"""
_ACTIONS = """start|stop|start up|shut down|switch on|switch off|turn on|turn off|open|close|lock|unlock|reset|pause|
resume|restart|clean|check|inspect|calibrate|lubricate|replace|repair|test|run|halt|hold|release|raise|lower|load|
unload|fill|drain|flush|purge|heat|cool|clear|enable|disable|tighten|loosen|measure|grease|weld|drill|cut|sort|pack|
label|scan"""
_PARTS = """bearing|belt|gearbox|seal|fuse|contactor|breaker|sensor|cable|filter|hose|nozzle|roller|chain|coupling|
shaft|bracket|housing|gear|screw|bolt|nut|washer|spring|piston|cylinder|relay|switch|button|lamp|encoder|solenoid|
thermostat|grommet|blade|tool|clamp|fixture|flange|gasket|impeller|rotor|stator|brake|clutch|guard|light curtain|
servo drive|RCCB|RCBO|MCB|PLC|HMI|UPS|VFD|PCB|LED|RFID tag|AGV|CNC"""
_FAULTS = """overheating|leaking|jammed|blocked|stuck|tripped|noisy|vibrating|cracked|worn|loose|broken|burnt|too hot|
too cold|not responding|offline|out of order|empty|full|misaligned|short circuited|without power|smoking|slipping|
bent"""
_PEOPLE = """maintenance|mechanic|electrician|supervisor|shift leader|quality|inspector|forklift driver|medic|
first aid|operator|engineer|safety officer|cleaner|driver|planner|team leader|programmer|logistics|security"""
_THINGS = """pieces|parts|boxes|pallets|cartons|bottles|caps|housings|brackets|shafts|gears|panels|bags|rolls|trays|
drums|crates|units|sheets|tubes|plates|cans|labels|samples"""
_DEFECTS = """scratches|dents|cracks|burrs|misprints|wrong labels|leaks|contamination|porosity|short shots|bad welds|
missing screws|colour mismatch|scale|rust|bubbles|warping"""
_QUANTITIES = """speed|temperature|pressure|level|flow|torque|voltage|current|power|humidity|weight|length|width|
height|count|rate|cycle time|feed|load|position|angle|frequency"""
_UNITS = """percent|degrees|degrees celsius|bar|RPM|PSI|volts|amps|kilowatts|hertz|millimetres|centimetres|metres|
litres|kilos|kilograms|tons|seconds|minutes|hours|revolutions per minute|newton metres|litres per minute|
degrees fahrenheit"""
_SHORT = """confirm|cancel|yes|no|stop|start|help|repeat|repeat that|undo|next|back|previous|emergency stop|all stop|
abort|stop everything|stop everything now|stand by|status|good morning|good night|thank you|thanks|hello|hi|okay|
go ahead|over|copy that|hold on|wait|wait a minute|continue|acknowledge|acknowledge alarm|silence alarm|end of shift|
log out|log in|mute|unmute|louder|quieter|left|right|up|down|faster|slower|yes please|no thanks|confirmed|cancelled|
yes confirm|no cancel|confirm that|cancel that|what time is it|how are you|say again|never mind|forget it|open|close|
on|off|please|sorry|bye|that is right|that is wrong|correct|wrong|done|ready|not ready|not yet|maybe|of course|
i do not know|come here|look out"""


def _list(words: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in words.split("|"))


MACHINES, ACTIONS, PARTS, FAULTS, PEOPLE, THINGS, DEFECTS, QUANTITIES, UNITS, SHORT = map(
    _list, (_MACHINES, _ACTIONS, _PARTS, _FAULTS, _PEOPLE, _THINGS, _DEFECTS, _QUANTITIES, _UNITS, _SHORT)
)

_TEMPLATES = """{action} the {machine}|{action} {machine} {id}|please {action} {machine} {id} now|
{machine} {id} is {fault}|the {part} on {machine} {id} is {fault}|{part} trip in panel {id}|
report {fault} {part} on {machine} {id}|set {machine} {id} {quantity} to {number} {unit}|
set the {quantity} of the {machine} to {number} {unit}|change {quantity} to {number}|scrap {number} {thing}|
log {number} {thing} with {defect}|{number} {thing} scrapped because of {defect}|call {person} to {machine} {id}|
we need {person} at the {machine}|what is the {quantity} of {machine} {id}|increase {quantity} by {number} {unit}|
reduce the {quantity} on {machine} {id} by {number} percent|move {number} {thing} to {machine} {id}|
replace the {part} on the {machine}|work order {number} is complete|show alarms for {machine} {id}|
{machine} {id} finished {number} {thing}|the {machine} needs a new {part}|do not {action} the {machine}|
somebody should {action} the {machine}|is the {machine} still {fault}|batch {letters} {number} is ready|
the {part} is {fault}|{person} to the {machine}|panel {id} {part} tripped|there is a {part} trip in panel {id}|
{quantity} {number} {unit}|the {machine} in hall {id} is {fault} again|{action} it|all {machine} alarms are clear"""
TEMPLATES = _list(_TEMPLATES)


def number(random: Random) -> str:
    """A number as somebody says it; each form of `numbers.spoken_forms` has its turn."""
    scale = random.choices((20, 100, 1000, 10000), (40, 35, 20, 5))[0]
    value = random.randrange(scale)
    if random.random() < 0.25:
        value -= value % 10
    forms = spoken_forms(value, "en")
    words = " ".join(forms[0] if random.random() < 0.6 else random.choice(forms))
    if random.random() < 0.08:
        words += " point " + random.choice(DIGITS)
    return "minus " + words if random.random() < 0.03 else words


def _letters(random: Random) -> str:
    return " ".join(random.choice(LETTERS).upper() for _ in range(random.choice((1, 2, 2, 3, 3, 4, 5))))


def free(random: Random) -> Sentence:
    """A sentence of the shop floor that no grammar holds."""
    template = random.choice(TEMPLATES)
    parts: Mapping[str, Callable[[], str]] = {
        "action": lambda: random.choice(ACTIONS),
        "machine": lambda: random.choice(MACHINES),
        "part": lambda: random.choice(PARTS),
        "fault": lambda: random.choice(FAULTS),
        "person": lambda: random.choice(PEOPLE),
        "thing": lambda: random.choice(THINGS),
        "defect": lambda: random.choice(DEFECTS),
        "quantity": lambda: random.choice(QUANTITIES),
        "unit": lambda: random.choice(UNITS),
        "number": lambda: number(random),
        "id": lambda: " ".join(spoken_forms(random.randint(1, random.choice((12, 60))), "en")[0]),
        "letters": lambda: _letters(random),
    }
    return sentence("free", re.sub(r"\{(\w+)\}", lambda field: parts[field[1]](), template))


@cache
def _graph(name: str) -> grammar.CommandGraph:
    return grammar.compile_graph({name: grammar.load(GRAMMARS / f"{name}.yaml")})


def abbreviations(of: grammar.Grammar) -> frozenset[str]:
    """What a grammar writes in capitals, and every synthesizer says letter by letter."""
    return frozenset(word for word in grammar.ids_of(of) if len(word) > 1)


@cache
def _abbreviations(name: str) -> frozenset[str]:
    return abbreviations(grammar.load(GRAMMARS / f"{name}.yaml"))


def walk(kind: str, graph: WordGraph, spelled: Collection[str], random: Random) -> Sentence:
    """A random walk through the words of a grammar; those ``spelled`` are said and labelled letter by letter."""
    steps, _ = graph.walk(random)
    words = [word.upper() if word in spelled else word for word in grammar.sentence(steps).split()]
    return sentence(kind, " ".join(words))


def of_grammar(random: Random, name: str) -> Sentence:
    """A random walk through one of the grammars that ship with the product."""
    return walk(name.split(".", maxsplit=1)[0], _graph(name).words, _abbreviations(name), random)


def fragment(random: Random, name: str) -> Sentence:
    """Part of a sentence of a grammar: what a cut beginning or a hesitation leaves."""
    words = of_grammar(random, name)
    pieces = words.say.split()
    start = random.randrange(len(pieces))
    piece = " ".join(pieces[start : start + random.randint(1, 5)])
    return Sentence(words.kind, normal(piece), piece)


def decoy(random: Random, name: str) -> Sentence:
    """A sentence of a grammar with one or two words exchanged for frequent ones, some of which begin alike.

    Without them the model learns what usually follows: after "make me" it heard "latte" where "laugh" was said.
    """
    words = of_grammar(random, name).say.split()
    if random.random() < 0.5:
        words = words[: random.randint(3, 8)]
    telling = [at for at, word in enumerate(words) if len(word) > 3] or range(len(words))
    for at in random.sample(telling, min(len(telling), random.choice((1, 1, 2)))):
        alike = [word for word in _words() if word[:2] == words[at][:2]] if random.random() < 0.8 else []
        words[at] = random.choice(alike or _words())
    return sentence("decoy", " ".join(words))


@cache
def general_sentences(*, held_out: bool) -> Sequence[str]:
    """Three to fourteen words each, from the quotations; the held-out ones are disjoint from the others."""
    found = set[str]()
    for path in sorted(FORTUNES.glob("*.u8")) + sorted(p for p in FORTUNES.iterdir() if not p.suffix):
        if path.is_symlink() or "ascii" in path.name:
            continue
        text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8", errors="ignore").replace("\n%\n", " . "))
        for part in re.split(r"[.!?;:,\"()\[\]\-]+ ?", text):
            words = part.strip().lower()
            if re.fullmatch(r"[a-z' ]+", words) and 3 <= len(words.split()) <= 14 and "''" not in words:
                found.add(words.strip("' "))
    ordered = sorted(found)
    Random(1).shuffle(ordered)
    return [words for at, words in enumerate(ordered) if (at % HELD_OUT_EVERY == 0) == held_out]


@cache
def _words() -> Sequence[str]:
    return [
        word for word in top_n_list("en", 9000) if re.fullmatch("[a-z]{2,13}", word) and re.search("[aeiouy]", word)
    ]


def general(random: Random) -> Sentence:
    """A quotation, or frequent words in no order, which no language model can guess."""
    if random.random() < 0.7:
        return sentence("general", random.choice(general_sentences(held_out=False)))
    words = [random.choice(_words()) for _ in range(random.randint(1, 7))]
    if random.random() < 0.3:
        words.insert(random.randint(0, len(words)), number(random))
    return sentence("general", " ".join(words))


def digits(random: Random) -> Sentence:
    """One to six digits, a code of digits and letters, or a number."""
    kind = random.random()
    if kind < 0.6:
        return sentence("digits", " ".join(random.choice(DIGITS) for _ in range(random.choice((1, 1, 1, 2, 3, 4, 6)))))
    if kind < 0.8:
        return sentence("digits", number(random))
    return sentence("letters", f"{_letters(random)} {number(random) if random.random() < 0.5 else ''}".strip())


SHARES: Mapping[str, tuple[float, Callable[[Random], Sentence]]] = {
    "factory": (0.08, lambda random: of_grammar(random, "factory.en")),
    "coffee": (0.08, lambda random: of_grammar(random, "coffee.en")),
    "fragment": (0.02, lambda random: fragment(random, random.choice(("factory.en", "coffee.en")))),
    "decoy": (0.10, lambda random: decoy(random, random.choice(("factory.en", "coffee.en")))),
    "free": (0.12, free),
    "digits": (0.05, digits),
    "short": (0.03, lambda random: sentence("short", random.choice(SHORT))),
    "general": (0.52, general),
}
"""Kind -> its share of the utterances, and how one is made."""


def draw(random: Random) -> Sentence:
    """One sentence, kinds by their shares."""
    shares = [share for share, _ in SHARES.values()]
    _, make = random.choices(list(SHARES.values()), shares)[0]
    return make(random)
