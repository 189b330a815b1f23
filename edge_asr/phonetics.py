"""How names sound, so that one is known however it is spelled: pinyin, jyutping, kana, jamo, English letters.

Law: a sound is two units, its family and which of the family it is. So v and w, zh and z, plain and tense consonants
differ in one unit, and n and r in two: :func:`likeness`, the share of units that two names have in common, is lenient
where ears are. Words that tell one thing from its neighbour (numbers, letters, left and right, not) are never alike:
they must be equal, one by one, and only what stands between them is compared.

Chinese names are read with their tones by pypinyin, Cantonese ones by ToJyutping. Japanese ones are compared in kana
only: Chinese characters do not say how Japanese reads them, and count as themselves.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

from edge_asr.numbers import Language, value_of

Sounds = tuple[str, ...]
"""Two units per sound."""

_LONGEST_NUMBER = 4
"""Characters of the longest Eastern number word: 마이너스."""

_NUMERALS: Mapping[Language, str] = {
    "en": "oh|nought|double|triple|dozen|hundred|thousand|million|point|half|minus|negative|"
    "first|second|third|fourth|fifth",
    "zh": "[零〇一二三四五六七八九十百千万萬亿億两兩幺点點半负負第]",
    "ja": "[零〇一二三四五六七八九十百千万億点半第]|ゼロ|よん|なな|マイナス",
    "ko": "[영공일이삼사오육륙칠팔구십백천만억점반]|마이너스",
}
"""Parts of numbers that are no number by themselves, or that may also be read otherwise; a pattern per language."""

_OPPOSITES: Mapping[Language, str] = {
    "en": "on|off|up|down|open|opened|close|closed|start|stop|left|right|in|out|inner|outer|inside|outside|front|back|"
    "rear|forwards?|backwards?|upper|lower|top|bottom|north|south|east|west|high|low|fast|slow|faster|slower|more|"
    "less|hot|cold|old|new|increase|decrease|raise|(?:un)?load(?:er|ing)?|(?:un)?lock(?:er|ing)?|last|next|not?|"
    "never|without|(?:do|does|is|are|ca|wo)n'?t",
    "zh": "[上下左右前后後里裏內内外开開关關启啟停进進出升降高低快慢大小冷热熱东南西北東新旧舊不别別没沒勿无無未非]|"
    "加速|[减減]速|增加|[减減]少|正转|反转|正轉|反轉",
    "ja": "[上下左右前後内外開閉入出高低速遅大小冷熱東西南北新旧不未無非]|"
    "加速|減速|始動|停止|正転|逆転|増加|減少|ない|ません",
    "ko": "[앞뒤안밖위못]|왼쪽|오른쪽|아래|상부|하부|좌측|우측|시작|시동|정지|가동|가속|감속|증가|감소|"
    "열림|닫힘|켜짐|꺼짐|열기|닫기",
}
"""Words that tell a thing from its opposite, and those that say no, as a pattern."""


@dataclass(frozen=True, slots=True)
class Name:
    """A phrase as the ear has it: words that must be equal, and the sounds before, between and after them."""

    exact: tuple[str, ...]
    between: tuple[Sounds, ...]


def missing_package(language: Language) -> str:
    """What is to be installed before :func:`sounds` knows the language; empty if nothing is."""
    library = _LIBRARIES.get(language)
    return "" if library is None or importlib.util.find_spec(library.module) else library.package


def likeness(one: Name, other: Name) -> float:
    """The share of units in common, 0..1; 0 where any word that must be equal differs."""
    if one.exact != other.exact:
        return 0.0
    pairs = list(zip(one.between, other.between, strict=True))
    units = sum(max(len(a), len(b)) for a, b in pairs)
    return 1.0 - sum(Levenshtein.distance(a, b) for a, b in pairs) / units if units else 1.0


def name_of(words: Sequence[str], language: Language, fixed: frozenset[str] = frozenset()) -> Name:
    """How words of the graph sound; those in ``fixed`` must be equal, too."""
    exact = _exact_words(tuple(words), language)
    kept: list[str] = []
    between: list[list[str]] = [[]]
    for word, is_exact in zip(words, exact, strict=True):
        if is_exact or word in fixed:
            kept.append(word)
            between.append([])
        else:
            between[-1].append(word)
    return Name(tuple(kept), tuple(sounds(tuple(part), language) for part in between))


@lru_cache(maxsize=1 << 12)
def _exact_words(words: tuple[str, ...], language: Language) -> tuple[bool, ...]:
    """Which words are numbers, letters, one of two opposites, or a no."""
    if language == "en":
        pattern = rf"{_NUMERALS[language]}|{_OPPOSITES[language]}|.*\d.*|[a-z]"
        return tuple(bool(re.fullmatch(pattern, word)) or value_of([word], language) is not None for word in words)
    table: Language = "zh" if language == "yue" else language
    pattern = rf"{_NUMERALS[table]}|{_OPPOSITES[table]}|[\da-z]+"
    places = [index for index, word in enumerate(words) for _ in word]
    found = {places[at] for match in re.finditer(pattern, "".join(words)) for at in range(*match.span())}
    for start in range(len(words)):
        for end in range(start + 1, min(len(words), start + _LONGEST_NUMBER) + 1):
            if value_of(words[start:end], language) is not None:
                found.update(range(start, end))
    return tuple(index in found for index in range(len(words)))


@lru_cache(maxsize=1 << 12)
def sounds(words: tuple[str, ...], language: Language) -> Sounds:
    """The units of some words; where one word ends does not matter."""
    if language == "en":
        return tuple(unit for word in words for unit in _english(word))
    return tuple(_EASTERN_SOUNDS[language]("".join(words)))


def _units(table: str) -> dict[str, Sounds]:
    """``zh:zh`` stands for the units Z and h; without a colon a sound is a family of its own."""
    pairs = (entry.partition(":")[::2] for entry in table.split())
    return {sound: (units[0].upper(), units[1:]) if units else (sound.upper(), sound) for sound, units in pairs}


# ---------------------------------------------------------------- English

_ENGLISH_SOUNDS = _units(
    "b:pb p:pp d:td t:tt th:th g:kg k:kk f:ff v:fv w:fw s:ss z:sz sh:cs ch:cc j:cj m:nm n:nn l r h y"
)
_ENGLISH_VOWELS = {
    **dict.fromkeys(("ee", "ea", "ie", "ei", "ey", "y"), "i"),
    **dict.fromkeys(("oo", "ou", "ew", "ue"), "u"),
    **dict.fromkeys(("ai", "ay"), "e"),
    **dict.fromkeys(("au", "aw"), "o"),
}
"""Sounds of written vowels; of any other run it is the first letter."""

_ENGLISH_RULES = tuple(
    (re.compile(letters), said.split())
    for letters, said in (
        (r"\b[kgp]n", "n"),
        (r"\bwr", "r"),
        (r"\bps", "s"),
        (r"\bx", "z"),
        (r"mb\b", "m"),
        (r"(?<=[aeiou])gh(?=t|\b)", ""),
        (r"gh", "g"),
        (r"sch", "sh"),
        (r"t?ch", "ch"),
        (r"[tsc]i(?=on|an|ous)", "sh"),
        (r"dg(?=[eiy])", "j"),
        (r"s?c(?=[eiy])", "s"),
        (r"sh", "sh"),
        (r"th", "th"),
        (r"ph", "f"),
        (r"qu", "k w"),
        (r"ck|[cq]+", "k"),
        (r"x+", "k s"),
        (r"w(?=[aeiouy])|wh", "w"),
        (r"\by(?=[aeiou])", "y"),
        (r"h(?=[aeiouy])", "h"),
        (r"(?:(?<=[aeiouy][^aeiouy])|(?<=[aeiouy][^aeiouy]{2})|(?<=[aeiouy][^aeiouy]{3}))e\b", ""),
        *((f"{letter}+", letter) for letter in "bdfgjklmnprstvz"),
    )
)
"""Letters and the consonants they stand for; the first rule that fits is taken."""

_VOWELS = re.compile(r"[aeiouy]+(?:w(?![aeiouy]))?")


def _english(word: str) -> Iterator[str]:
    """Roughly, as one who has never seen the word: names are in no dictionary."""
    letters = "".join(char for char in unicodedata.normalize("NFD", word) if not unicodedata.combining(char))
    at = 0
    while at < len(letters):
        for rule, said in _ENGLISH_RULES:
            if match := rule.match(letters, at):
                yield from (unit for sound in said for unit in _ENGLISH_SOUNDS[sound])
                break
        else:
            match = _VOWELS.match(letters, at)
            if match:
                yield from ("V", _ENGLISH_VOWELS.get(match[0]) or match[0][0].replace("y", "i"))
        at = match.end() if match else at + 1


# ---------------------------------------------------------------- Mandarin and Cantonese


class _Library(NamedTuple):
    module: str
    package: str

    def load(self) -> Any:  # noqa: ANN401 - neither library has types
        """Only where a grammar asks for its language: pypinyin's dictionary takes 57 MB and 0.3 s."""
        return importlib.import_module(self.module)


_LIBRARIES: Mapping[Language, _Library] = {
    "zh": _Library("pypinyin", "pypinyin"),
    "yue": _Library("ToJyutping", "edge-asr[cantonese]"),
}

_CHINESE_INITIALS = _units(
    "b:pb p:pp d:td t:tt g:kg k:kk gw:kgw kw:kkw f:hf h:hh z:zz zh:zzh c:cc ch:cch s:ss sh:ssh j q x m n:ln l:ll r w y "
    "ng"
)
_CHINESE_CODAS = {"ng": "n", "n": "n", "k": "t", "t": "t", "p": "p", "m": "m"}


def _mandarin(text: str) -> Iterator[str]:
    pinyin = _LIBRARIES["zh"].load()
    initials = pinyin.lazy_pinyin(text, style=pinyin.Style.INITIALS, strict=True, errors=list)
    finals = pinyin.lazy_pinyin(
        text, style=pinyin.Style.FINALS_TONE3, strict=True, neutral_tone_with_five=True, errors=list
    )
    for initial, final in zip(initials, finals, strict=True):
        yield from _syllable("" if initial == final else initial, final)


def _cantonese(text: str) -> Iterator[str]:
    for char, jyutping in _LIBRARIES["yue"].load().get_jyutping_list(text):
        match = re.match(r"(ng|gw|kw|[bpmfdtnlgkhwzcsj])?(.+)", (jyutping or char).split()[0])
        if match:
            yield from _syllable(match[1] or "", match[2])


def _syllable(initial: str, final: str) -> Iterator[str]:
    """Initial, final and tone; an and ang, n and l, zh and z are halves of a sound apart."""
    match = re.fullmatch(r"(.*?)(ng|[nmptk])?([1-6])", final)
    if not match:
        yield from (final, final)
        return
    nucleus, coda, tone = match[1], match[2] or "", match[3]
    yield from _CHINESE_INITIALS.get(initial, ("-", initial))
    yield from (nucleus + _CHINESE_CODAS.get(coda, ""), coda)
    yield from ("tone" + tone, tone)


# ---------------------------------------------------------------- Japanese

_JAPANESE_SOUNDS = _units(
    "b:bb v:bv p:bp k:kk g:kg s:ss sh:ss z:sz j:sz t:tt ch:tc ts:tc d:td m:nm n:nn r h:hh f:hf w y"
)
_KANA = re.compile(r"(?:HIRAGANA|KATAKANA) LETTER (SMALL )?([B-Z]?[AEIOU]|N)")
_HEPBURN = {
    "si": "shi",
    "ti": "chi",
    "tu": "tsu",
    "hu": "fu",
    "zi": "ji",
    "di": "ji",
    "du": "zu",
    "wo": "o",
    "~tu": "Q",
}
_TOGETHER = (
    (r"(sh|ch|j)i ~y?", r"\1"),
    (r"i ~y", "y"),
    (r"(?<![^ ])u ~(?=[aeio])", "w"),
    (r"[aeiou] ~(?=[aeiou])", ""),
    (r"[ ~]", ""),
    (r"(?<=a)a|(?<=i)i|(?<=u)u|(?<=e)[ei]|(?<=o)[ou]", ":"),
)
"""Small kana change the one before; the second half of a long vowel is a length mark, which is half a sound."""


def _japanese(text: str) -> Iterator[str]:
    """By the names that Unicode gives kana."""
    moras: list[str] = []
    for char in unicodedata.normalize("NFKC", text):
        match = _KANA.fullmatch(unicodedata.name(char, ""))
        if match:
            mora = ("~" if match[1] else "") + match[2].lower()
            moras.append("N" if mora == "n" else _HEPBURN.get(mora, mora))
        else:
            moras.append(":" if char == "ー" else char)
    romaji = " ".join(moras)
    for pattern, sound in _TOGETHER:
        romaji = re.sub(pattern, sound, romaji)
    for sound in re.findall(r"sh|ch|ts|.", romaji):
        if sound in {":", "Q"}:
            yield sound
        elif sound in "aeiou":
            yield from ("V", sound)
        else:
            yield from _JAPANESE_SOUNDS.get(sound, (sound, sound))


# ---------------------------------------------------------------- Korean

_JAMO_FAMILIES = _units(
    "ㄱ:kk ㄲ:kK ㅋ:kx ㄷ:tt ㄸ:tT ㅌ:tx ㅂ:pp ㅃ:pP ㅍ:px ㅈ:cc ㅉ:cC ㅊ:cx ㅅ:ss ㅆ:sS ㄴ:nn ㅁ:nm ㅇ:ng ㄹ ㅎ"
)
_INITIALS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
_MEDIALS = "ㅏㅔㅑㅖㅓㅔㅕㅖㅗㅘㅙㅙㅛㅜㅝㅙㅟㅠㅡㅢㅣ"
"""As they sound today: ㅐ like ㅔ, ㅒ like ㅖ, ㅚ and ㅞ like ㅙ."""
# fmt: off
_FINALS = (
    "", "ㄱ", "ㄲ", "ㄱㅅ", "ㄴ", "ㄴㅈ", "ㄴㅎ", "ㄷ", "ㄹ", "ㄹㄱ", "ㄹㅁ", "ㄹㅂ", "ㄹㅅ", "ㄹㅌ", "ㄹㅍ", "ㄹㅎ",
    "ㅁ", "ㅂ", "ㅂㅅ", "ㅅ", "ㅆ", "ㅇ", "ㅈ", "ㅊ", "ㅋ", "ㅌ", "ㅍ", "ㅎ",
)
# fmt: on
_AT_THE_END = {
    **dict.fromkeys(("ㄱ", "ㄲ", "ㅋ", "ㄱㅅ", "ㄹㄱ"), "ㄱ"),
    **dict.fromkeys(("ㄷ", "ㅅ", "ㅆ", "ㅈ", "ㅊ", "ㅌ"), "ㄷ"),
    **dict.fromkeys(("ㅂ", "ㅍ", "ㅂㅅ", "ㄹㅍ"), "ㅂ"),
    **dict.fromkeys(("ㄴ", "ㄴㅈ", "ㄴㅎ"), "ㄴ"),
    **dict.fromkeys(("ㄹ", "ㄹㅂ", "ㄹㅅ", "ㄹㅌ", "ㄹㅎ"), "ㄹ"),
    **dict.fromkeys(("ㅁ", "ㄹㅁ"), "ㅁ"),
    "ㅇ": "ㅇ",
}
"""A closed syllable ends in one of seven sounds; ㅎ is not heard there."""
_BEFORE_NASALS = {"ㄱ": "ㅇ", "ㄷ": "ㄴ", "ㅂ": "ㅁ"}


def _korean(text: str) -> Iterator[str]:
    """Jamo by Unicode's arithmetic, then as they are said: 국물 as 궁물, 신라 as 실라, 밥이 as 바비."""
    syllables = [_jamo(char) for char in unicodedata.normalize("NFC", text)]
    for here, after in itertools.pairwise([*syllables, ["", "", ""]]):
        if after[0] == "ㅇ" and here[2] not in {"", "ㅇ"}:
            after[0] = here[2][-1].replace("ㅎ", "ㅇ")
            here[2] = here[2][:-1]
        here[2] = _AT_THE_END.get(here[2], "")
        if after[0] and after[0] in "ㄴㅁ":
            here[2] = _BEFORE_NASALS.get(here[2], here[2])
        if {here[2], after[0]} == {"ㄴ", "ㄹ"}:
            here[2] = after[0] = "ㄹ"
    for initial, medial, final in syllables:
        if initial != "ㅇ":
            yield from _JAMO_FAMILIES.get(initial, (initial, initial))
        if medial:
            yield from ("V", medial)
        if final:
            yield from _JAMO_FAMILIES[final]


def _jamo(char: str) -> list[str]:
    """Initial, medial and final of a syllable; of another character itself alone."""
    place = ord(char) - ord("가")
    if not 0 <= place < 19 * 21 * 28:
        return [char, "", ""]
    return [_INITIALS[place // 588], _MEDIALS[place % 588 // 28], _FINALS[place % 28]]


_EASTERN_SOUNDS: Mapping[Language, Callable[[str], Iterator[str]]] = {
    "zh": _mandarin,
    "yue": _cantonese,
    "ja": _japanese,
    "ko": _korean,
}
