"""The grammar language: every template against its naive expansion, and every mistake in one line with a place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from edge_asr import commands, grammar, model_store
from edge_asr.events import SlotValue
from edge_asr.grammar import CommandGraph, Grammar, GrammarError, compile_graph, words_of
from edge_asr.numbers import spoken_digits, spoken_forms
from edge_asr.wordgraph import Meaning, Number, Step
from tests.test_wordgraph import language

BUNDLED = sorted(model_store.bundled("grammars").glob("*.yaml"))

Words = tuple[str, ...]
Filled = tuple[tuple[str, SlotValue], ...]
Said = tuple[Words, Filled]
"""A sentence: its words, and the slots it fills in the order in which it fills them."""

SLOTS: dict[str, Any] = {
    "machine": {"values": ["press", {"oven": ["oven", "[big] furnace"]}, {"停": "停"}]},
    "n": {"range": [1, 3], "unit": "bar"},
    "id": {"digits": 1},
}
RULES = {"polite": "(please | 请)"}
MACHINES: list[tuple[Words, str]] = [
    *(
        (("press",), "press"),
        (("oven",), "oven"),
        (("furnace",), "oven"),
        (("big", "furnace"), "oven"),
        (("停",), "停"),
    ),
]


# ---------------------------------------------------------------- templates as trees, written and expanded naively

Tree = tuple[Any, ...]

LEAVES = st.sampled_from([
    *(("word", "start", (("start",),)), ("word", "stop,", (("stop",),)), ("word", "停止", (("停", "止"),))),
    *(("word", "MCB", (("mcb",), ("m", "c", "b"))), ("word", "<polite>", (("please",), ("请",)))),
    *(("slot", "{machine}", "machine"), ("slot", "{machine:other}", "other"), ("slot", "{ n }", "n")),
    *(("slot", "{id}", "id"), ("slot", "{n:other}", "other")),
])  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda below: st.one_of(
        st.tuples(st.just("sequence"), st.lists(below, min_size=1, max_size=3)),
        st.tuples(st.just("optional"), below),
        st.tuples(st.just("choice"), st.lists(below, min_size=2, max_size=3)),
        st.tuples(st.just("any order"), st.lists(below, min_size=2, max_size=3)),
    ),
    max_leaves=5,
)


def written(tree: Tree) -> str:
    kind, inside = tree[:2]
    if kind == "sequence":
        return " ".join(map(written, inside))
    if kind == "optional":
        return f"[{written(inside)}]"
    if kind in {"choice", "any order"}:
        return f"({(' | ' if kind == 'choice' else ';').join(map(written, inside))})"
    return str(inside)


def joined(parts: Iterable[Said]) -> Said:
    words, filled = zip(*parts, strict=True)
    return tuple(itertools.chain(*words)), tuple(itertools.chain(*filled))


def expanded(tree: Tree) -> set[Said]:
    kind, inside = tree[:2]
    if kind == "word":
        return {(words, ()) for words in tree[2]}
    if kind == "slot":
        return {(words, ((tree[2], value),)) for words, value in values_of(str(inside))}
    if kind == "optional":
        return expanded(inside) | {((), ())}
    if kind == "choice":
        return set[Said]().union(*map(expanded, inside))
    orders = itertools.permutations(inside) if kind == "any order" else [inside]
    return {joined(parts) for order in orders for parts in itertools.product(*map(expanded, order))}


def values_of(written_slot: str) -> Iterator[tuple[Words, SlotValue]]:
    if "machine" in written_slot:
        yield from MACHINES
    elif "id" in written_slot:
        yield from ((form, str(n)) for n in range(10) for form in spoken_digits(str(n), "en"))
    else:
        yield from ((form, n) for n in (1, 2, 3) for form in spoken_forms(n, "en"))


def compiled(sentences: Sequence[str], **parts: Any) -> CommandGraph:
    tree = {"language": "en", "intents": {"Do": {"sentences": sentences}}, "slots": SLOTS, "rules": RULES, **parts}
    return compile_graph({"site.yaml": Grammar.model_validate(tree)})


def meant(graph: CommandGraph) -> set[tuple[Words, Filled]]:
    readings = ((steps, grammar.read(steps, ending)) for steps, ending in language(graph.words))
    return {(tuple(step.word for step in steps), reading.slots) for steps, reading in readings}


@given(st.lists(TREES, min_size=1, max_size=3))
@example(
    [("any order", [("slot", "{machine}", "machine"), ("optional", ("slot", "{n}", "n")), ("slot", "{id}", "id")])]
)
def test_a_template_means_what_its_naive_expansion_means(trees: list[Tree]) -> None:
    said = set[Said]().union(*map(expanded, trees))
    flaws = []
    if any(not words for words, _ in said):
        flaws.append("can be said without a word; something must stay")
    if any(len(dict(filled)) < len(filled) for _, filled in said):
        flaws.append(r"can fill \w+ twice")
    if flaws:  # of several sentences with a flaw the first is named
        with pytest.raises(GrammarError, match="|".join(flaws)):
            compiled([written(tree) for tree in trees])
    else:
        graph = compiled([written(tree) for tree in trees])
        assert meant(graph) == {(words, tuple(sorted(filled))) for words, filled in said}


@given(TREES)
def test_expansions_are_sentences_as_people_write_them(tree: Tree) -> None:
    said = {words for words, _ in expanded(tree) if words}
    template = written(tree)
    loaded = Grammar.model_validate(
        {"language": "en", "intents": {"Do": {"sentences": ["x"]}}, "slots": SLOTS, "rules": RULES}
    )
    assert {tuple(words_of(text)) for text in grammar.expansions(template, loaded, limit=10**7)} == said


def test_any_order_is_all_permutations_in_a_graph_of_subsets() -> None:
    graph = compiled(["(a;b;c;d;e)"])
    assert {words for words, _ in meant(graph)} == set(itertools.permutations("abcde"))
    assert len(graph.words.arcs) == 5 * 2**4


def test_a_slot_holds_what_was_said_in_its_own_type() -> None:
    parts = {
        "slots": {
            "count": {"range": [0, 20]},
            "bar": {"range": [0, 1], "step": 0.1, "unit": "bar"},
            "id": {"digits": 2},
        }
    }
    graph = compiled(["count {count}", "pressure {bar}", "id {id}", "count {count} id {id:box}"], **parts)
    said = {" ".join(words): dict(filled) for words, filled in meant(graph)}
    assert said["count twelve"] == {"count": 12}
    assert said["pressure zero point three"] == {"bar": 0.3}
    assert [type(said[text]["bar"]) for text in ("pressure one", "pressure zero")] == [float, float]
    assert said["id zero seven"] == {"id": "07"}
    assert said["count seven id double oh"] == {"count": 7, "box": "00"}
    assert {len(said[text]) for text in said if text.startswith("count")} == {1, 2}


def test_units_belong_to_the_number_that_was_said() -> None:
    graph = compiled(["({n} | {machine})"])
    readings = {r.slots: r.units for r in (grammar.read(*sentence) for sentence in language(graph.words))}
    assert readings[(("n", 2),)] == (("n", "bar"),)
    assert readings[(("machine", "press"),)] == ()


def test_a_reading_is_written_with_its_units() -> None:
    reading = grammar.Reading("SetSpeed", "en", (("machine", "press"), ("speed", 1200)), (("speed", "rpm"),))
    assert str(reading) == "SetSpeed(machine=press, speed=1200 rpm)"


def test_a_number_that_is_none_is_a_bug_and_not_a_value() -> None:
    steps = [Step("three", Number("n", "en", "integer")), Step("banana", Number("n", "en", "integer"))]
    with pytest.raises(ValueError, match="'three banana' stands in the graph for n and is no number"):
        grammar.read(steps, [Meaning("Do", "en")])


def test_sentences_of_chinese_are_written_without_spaces() -> None:
    said = [Step(word) for word in ("把", "RCCB", "set", "停", "止")]
    assert grammar.sentence(said) == "把RCCB set停止"


@given(st.text())
def test_words_are_lower_case_without_punctuation_and_stay_what_they_are(text: str) -> None:
    words = words_of(text)
    assert words_of(" ".join(words)) == words
    assert words_of(text.upper().lower()) == words_of(text.upper())


def test_words_keep_apostrophes_inside_and_split_every_character_of_the_east() -> None:
    assert words_of("Don't stop LINE-1, 'now'!") == ["don't", "stop", "line", "1", "now"]
    assert words_of("启动3号线 now") == ["启", "动", "3", "号", "线", "now"]
    assert words_of("タスクー々 한국") == ["タ", "ス", "ク", "ー", "々", "한", "국"]


def test_texts_are_the_same_from_every_keyboard() -> None:
    assert words_of("I\u2019d like \uff32\uff23\uff23\uff22\uff0c \uff11") == ["i'd", "like", "rccb", "1"]
    loaded = Grammar.model_validate({"language": "zh", "intents": {"A": {"sentences": ["停"]}}})
    written = "\uff08启动\uff5c开启\uff09\uff3b一下\uff3d机"
    assert set(grammar.expansions(written, loaded)) == {"启动机", "开启机", "启动一下机", "开启一下机"}


def test_capitals_are_heard_letter_by_letter_within_chinese_and_before_a_comma_too() -> None:
    loaded = Grammar.model_validate({"language": "zh", "intents": {"A": {"sentences": ["停"]}}})
    for written in ("复位RCCB机", "复位 RCCB, 机"):
        assert set(grammar.expansions(written, loaded)) == {"复位rccb机", "复位r c c b机"}


# ---------------------------------------------------------------- several files


def test_languages_stand_side_by_side_and_one_language_defines_an_intent_once() -> None:
    def named(language: str, word: str) -> Grammar:
        return Grammar.model_validate({"language": language, "intents": {"Stop": {"sentences": [word]}}})

    graph = compile_graph({"a.yaml": named("en", "stop"), "b.yaml": named("zh", "停")})
    assert set(graph.intents) == {("Stop", "en"), ("Stop", "zh")}
    assert {words for words, _ in meant(graph)} == {("stop",), ("停",)}
    with pytest.raises(GrammarError, match=r"b\.yaml: intents\.Stop: defined twice for language en"):
        compile_graph({"a.yaml": named("en", "stop"), "b.yaml": named("en", "halt")})


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_what_a_shipped_grammar_says_of_itself_holds(path: Path) -> None:
    loaded = grammar.load(path)
    assert len(loaded.tests) >= 10
    assert commands.failed_expectations(commands.load_graph([path]), loaded.tests) == {}


def test_the_factory_speaks_of_the_same_things_in_both_languages() -> None:
    contracts = []
    for path in (path for path in BUNDLED if path.stem.startswith("factory")):
        graph = commands.load_graph([path])
        intents = {(name, i.risk, i.ttl_s, i.min_confidence, i.answer) for (name, _), i in graph.intents.items()}
        values = {
            name: sorted({value for value, _ in slot.phrases()}) if isinstance(slot, grammar.Enumeration) else slot
            for name, slot in grammar.load(path).slots.items()
        }
        contracts.append((intents, values))
    assert len(contracts) >= 2
    assert all(contract == contracts[0] for contract in contracts)


# ---------------------------------------------------------------- mistakes


def site(sentence: str, slots: str = "", rules: str = "") -> str:
    parts = ["language: en", f"intents: {{Do: {{sentences: [{sentence!r}]}}}}"]
    return "\n".join([*parts, *([f"slots: {slots}"] if slots else []), *([f"rules: {rules}"] if rules else [])])


WRONG = {
    # templates
    site("start {press}"): "intents.Do: {press}: no such slot; define slots.press",
    site("start <it>"): "intents.Do: <it>: no such rule; define rules.it",
    site("<a>", rules="{a: 'x <b>', b: '[<a>]'}"): "<a> contains itself; rules must end",
    site("{a}", "{a: {values: [{x: 'very {a}'}]}}"): "slots.a: 'very {a}': a slot's value cannot hold the slot {a}",
    site("{a}", "{a: {values: [{x: '<r>'}]}}", "{r: '{a}'}"): "slots.a: '<r>': a slot's value cannot hold the slot {a}",
    site("(start"): "intents.Do: '(start': `)` is missing",
    site("[start"): "'[start': `]` is missing",
    site("start)"): "'start)': unpaired ')'",
    site("(start]"): "'(start]': unpaired ']'",
    site("{start"): "'{start': unpaired '{'",
    site("start>"): "'start>': unpaired '>'",
    site("(a|b;c)"): "`|` and `;` in one bracket; add brackets",
    site("(a;b;c;d;e;f)"): "at most 5 parts in any order",
    site(""): "'' can be said without a word; something must stay",
    site("[please] ..."): "'[please] ...' can be said without a word",
    site("{a}", "{a: {values: ['-']}}"): "slots.a: '-' can be said without a word",
    site("{n} to {n}", "{n: {range: [1, 9]}}"): "'{n} to {n}' can fill n twice",
    site("{n:}", "{n: {range: [1, 9]}}"): "{n:}: a name holds letters, digits, _ and -",
    site("{n:a.b}", "{n: {range: [1, 9]}}"): "{n:a.b}: a name holds letters",
    site("(" * 5000 + "a" + ")" * 5000): "nested too deeply",
    # slots
    site("a", "{a b: {range: [1, 2]}}"): "slots.a b: a name holds letters, digits, _ and -; it becomes a key",
    site("a", "{n: 5}"): "slots.n: expected `values: [...]`, `range: [low, high]` or `digits: n`",
    site("a", "{n: {range: [5, 1]}}"): "slots.n.range: 5..1 is not two numbers below 100000000, the lower one first",
    site("a", "{n: {range: [0, 1000000000]}}"): "slots.n.range: 0..1000000000 is not two numbers below",
    site("a", "{n: {range: [0, '1e999999']}}"): "slots.n.range: 0..1E+999999 is not two numbers below",
    site("a", "{n: {range: [.nan, 1]}}"): "slots.n.range.0: nan is wrong: input should be a finite number",
    site("a", "{n: {range: [1]}}"): "slots.n.range.1: missing",
    site("a", "{n: {range: [0, 1000000]}}"): "slots.n.range: 0..1000000 by 1 has more than 100000 values; widen the",
    site("a", "{n: {range: [0, 1], step: 0}}"): "slots.n.step: 0 is not above 0",
    site("a", "{n: {range: [0, 1], step: '1e-999999'}}"): "slots.n.range: nobody says more than 6 decimals",
    site("a", "{n: {range: [0, 9], uint: rpm}}"): "slots.n.uint: unknown key; did you mean `unit`?",
    site("a", "{n: {digits: 9}}"): "slots.n.digits: 9 is not 1..4",
    site("a", "{n: {values: []}}"): "slots.n.values: [] is wrong: needs at least one entry",
    site("a", "{n: {values: [{a: []}]}}"): "slots.n.values.0.1: [] is wrong: needs at least one entry",
    site("a", "{n: {values: [on, off]}}"): "slots.n.values: True is no text; put it in quotes",
    site("a", "{n: {values: [{state: [on]}]}}"): "slots.n.values: True is no text; put it in quotes",
    site("a", "{n: {values: [1.5]}}"): "slots.n.values: 1.5 is no text; put it in quotes",
    site("a", "{n: {values: [[a]]}}"): "slots.n.values: ['a'] is no text; put it in quotes",
    site("a", "{n: {values: oven}}"): "slots.n.values: 'oven' is wrong: expected a list",
    # files
    "": "holds None, expected `key: value` lines",
    "- a": "expected `key: value` lines",
    "language: en": "intents: missing",
    "language: de\nintents: {Do: {sentences: [a]}}": "language: 'de' is wrong: input should be 'en', 'zh', 'yue'",
    "language: en\nintents: {}": "intents: {} is wrong: needs at least one entry",
    "language: en\nintents: {Do: {}}": "intents.Do.sentences: missing",
    "language: en\nintents: {Do: {sentences: stop}}": "intents.Do.sentences: 'stop' is wrong: expected a list",
    "language: en\nintents: {Do: {sentences: [yes]}}": "intents.Do.sentences.0: True is wrong: input should be a valid",
    "language: en\nintents: {Do: {sentences: [a], ttl: 3}}": "intents.Do.ttl: unknown key; did you mean `ttl_s`?",
    "language: en\nintents: {Do: {sentences: [a], files: 3}}": "intents.Do.files: unknown key",
    "language: en\nintents: {Do: {sentences: [a], risk: high}}": "intents.Do.risk: 'high' is wrong: input should be",
    "language: en\nintents: {Do: {sentences: [a], ttl_s: 0}}": "intents.Do.ttl_s: 0 is not 3..86400",
    "language: en\nintents: {Do: {sentences: [a]}, Do: {sentences: [b]}}": "'Do' stands here twice",
    "language: en\nintents: {Do: {sentences: [a]}}\ntests: [{say: a}]": "tests.0.intent: missing",
    "language: en\nintents: [": "line 2, column 11: expected the node content",
    "language: 2026-99-99": "line 1, column 11: '2026-99-99' cannot be read as timestamp; put it in quotes",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: repr(text)[:60])
def test_every_mistake_is_one_line_with_the_file_the_place_and_what_to_do(text: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(GrammarError) as caught:
        commands.load_graph([file])
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert WRONG[text] in message
    assert "\n" not in message
    assert len(message.replace(str(file), "")) < 220 or "nested" in message


def test_all_mistakes_of_a_file_come_at_once(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("language: fr\nintents: {A: {sentences: [a], risk: x}, B: {}}\n")
    with pytest.raises(GrammarError) as caught:
        grammar.load(file)
    places = [line.removeprefix(f"{file}: ").split(":")[0] for line in str(caught.value).splitlines()]
    assert sorted(places) == ["intents.A.risk", "intents.B.sentences", "language"]


def test_a_missing_file_and_a_binary_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        grammar.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(GrammarError, match=r"binary\.yaml: cannot be read \(not UTF-8 text\)"):
        grammar.load(tmp_path / "binary.yaml")


def test_whole_numbers_may_be_names_and_words() -> None:
    graph = compiled(["{n}"], slots={"n": {"values": [1, {2: ["two", 2]}]}})
    assert meant(graph) == {(("1",), (("n", "1"),)), (("two",), (("n", "2"),)), (("2",), (("n", "2"),))}


KEYS = st.sampled_from([
    *("language", "intents", "slots", "rules", "tests", "sentences", "values", "range", "step", "unit", "digits"),
    *("say", "intent", "risk", "answer", "ttl_s"),
])  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["en", "a", "{a}", "<a>"]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(KEYS | st.sampled_from(["a", "b"]), below, max_size=4),
    max_leaves=10,
)
NEARLY = st.fixed_dictionaries(
    {"language": st.just("en"), "intents": st.just({"Do": {"sentences": ["go {a}", "<b>"]}})},
    optional={
        "slots": st.dictionaries(st.sampled_from(["a", "b"]), st.dictionaries(KEYS, ANYTHING, max_size=3)),
        "rules": st.dictionaries(st.sampled_from(["a", "b"]), st.text(alphabet="ab[](){}<>|; ", max_size=8)),
    },
)


@given(ANYTHING | NEARLY)
def test_no_tree_whatsoever_does_anything_but_compile_or_be_refused(
    tmp_path_factory: pytest.TempPathFactory, tree: object
) -> None:
    file = tmp_path_factory.getbasetemp() / "random.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    message = ""
    try:
        commands.load_graph([file])
    except GrammarError as error:
        message = str(error)
    assert all(line.startswith(f"{file}: ") for line in message.splitlines())
