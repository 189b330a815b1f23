"""How names sound in five languages, held to what others say of the same words."""

from __future__ import annotations

import itertools
import unicodedata
from typing import get_args

import jaconv
import jellyfish
import pypinyin
import pytest
import ToJyutping
from hypothesis import assume, given
from hypothesis import strategies as st

from edge_asr.numbers import Language, spoken_digits, spoken_forms
from edge_asr.phonetics import Name, likeness, name_of, sounds
from edge_asr.text_matching import NEAR

HAN = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5), min_size=1, max_size=4)
KATAKANA = st.text(st.sampled_from([chr(c) for c in range(ord("ァ"), ord("ヴ") + 1)] + ["ー"]), min_size=1, max_size=8)
PLAIN_KANA = (
    *"カキクケコサシスセソタチツテトナニヌネノハヒフヘホ",
    *"マミムメモヤユヨラリルレロワガギグゲゴザジズゼゾダデドバビブベボパピプペポ",
)
HANGUL = st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3), min_size=1, max_size=5)
LATIN = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=1, max_size=10)
WRITTEN: dict[Language, st.SearchStrategy[str]] = {
    "en": LATIN,
    "zh": HAN,
    "yue": HAN,
    "ja": st.one_of(KATAKANA, HAN),
    "ko": HANGUL,
}


def words(text: str, language: Language) -> tuple[str, ...]:
    return tuple(text.split()) if language == "en" else tuple(text)


def name(text: str, language: Language) -> Name:
    return name_of(words(text, language), language)


def alike(one: str, other: str, language: Language) -> float:
    return likeness(name(one, language), name(other, language))


# ---------------------------------------------------------------- alike, and not


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        *(("en", "conveyer", "conveyor"), ("en", "kowalski", "kovalsky"), ("en", "night", "knight")),
        *(("en", "pallet iser", "palletizer"), ("en", "stephen", "steven"), ("en", "catherine", "kathryn")),
        *(("en", "lion three", "line three"), ("en", "müller", "muller"), ("en", "philips", "filips")),
        *(("zh", "张伟", "章伟"), ("zh", "张伟", "張偉"), ("zh", "刘洋", "牛羊"), ("zh", "传送带", "船送带")),
        *(("yue", "張偉", "章偉"), ("yue", "梁朝偉", "涼朝偉"), ("yue", "李偉", "你偉")),
        *(("ja", "コンベア", "コンベヤ"), ("ja", "コンベア", "こんべあー"), ("ja", "ヴァルブ", "バルブ")),
        *(("ja", "ティーム", "チーム"), ("ja", "サーボ", "サボ"), ("ja", "ﾐｷｻｰ", "ミキサー")),
        *(("ko", "국물", "궁물"), ("ko", "신라", "실라"), ("ko", "찌개", "찌게"), ("ko", "믹서", "믹써")),
    ],
)
def test_spellings_of_one_name_sound_alike(language: Language, one: str, other: str) -> None:
    assert alike(one, other, language) >= NEAR


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        *(("en", "miller", "molar"), ("en", "filler", "chiller"), ("en", "kowalski", "kowalczyk")),
        *(("en", "line free", "line three"), ("en", "press to", "press two"), ("en", "pump b", "pump d")),
        *(("en", "left robot", "right robot"), ("en", "unloader", "loader"), ("en", "not mixer", "mixer")),
        *(("zh", "张伟", "张薇"), ("zh", "四号", "十号"), ("zh", "是号", "十号"), ("zh", "加速泵", "减速泵")),
        *(("zh", "上料机", "下料机"), ("zh", "启动", "停止"), ("zh", "不搅拌机", "搅拌机"), ("zh", "甲", "B")),
        *(("yue", "四號", "十號"), ("yue", "張偉", "陳偉"), ("ja", "三号", "四号"), ("ja", "加速", "減速")),
        *(("ja", "田中", "中田"), ("ja", "ファン", "フアン"), ("ko", "가속", "감속"), ("ko", "삼호", "사호")),
    ],
)
def test_different_things_do_not(language: Language, one: str, other: str) -> None:
    assert alike(one, other, language) < NEAR


# ---------------------------------------------------------------- laws


@given(st.data(), st.sampled_from(get_args(Language)))
def test_likeness_is_a_similarity(data: st.DataObject, language: Language) -> None:
    one, other = (name(data.draw(WRITTEN[language]), language) for _ in range(2))
    assert likeness(one, one) == 1
    assert likeness(one, other) == likeness(other, one)
    assert 0 <= likeness(one, other) <= 1


@given(st.data(), st.sampled_from(get_args(Language)), st.integers(0, 9999), st.integers(0, 9999))
def test_no_number_ever_sounds_like_another(data: st.DataObject, language: Language, a: int, b: int) -> None:
    assume(a != b)
    around = words(data.draw(WRITTEN[language]), language)
    one = data.draw(st.sampled_from(spoken_forms(a, language) + spoken_digits(f"{a:04d}", language)))
    other = data.draw(st.sampled_from(spoken_forms(b, language) + spoken_digits(f"{b:04d}", language)))
    assume(one != other)
    here, there = name_of((*around, *one), language), name_of((*around, *other), language)
    assert likeness(here, there) == 0


# ---------------------------------------------------------------- what others say


@given(HAN, HAN)
def test_equal_pinyin_with_tones_sounds_equal_and_no_other(one: str, other: str) -> None:
    def pinyin(text: str) -> list[str]:
        return pypinyin.lazy_pinyin(text, style=pypinyin.Style.TONE3, neutral_tone_with_five=True)

    for text in (one, other):
        assume(all(syllable[-1].isdigit() for syllable in pinyin(text)))
    same = sounds(tuple(one), "zh") == sounds(tuple(other), "zh")
    assert same == (pinyin(one) == pinyin(other))


@pytest.mark.parametrize("phrase", ["张 章 彰", "伟 尾 委", "十 石 食", "四 肆 泗"])
def test_homophones_of_a_dictionary_sound_equal_in_mandarin(phrase: str) -> None:
    assert len({sounds((char,), "zh") for char in phrase.split()}) == 1


@given(HAN, HAN)
def test_equal_jyutping_sounds_equal_and_no_other(one: str, other: str) -> None:
    def jyutping(text: str) -> list[str | None]:
        return [reading for _, reading in ToJyutping.get_jyutping_list(text)]

    assume(all(jyutping(one)) and all(jyutping(other)))
    same = sounds(tuple(one), "yue") == sounds(tuple(other), "yue")
    assert same == (jyutping(one) == jyutping(other))


@given(KATAKANA)
def test_katakana_and_hiragana_sound_the_same(text: str) -> None:
    assert sounds(tuple(text), "ja") == sounds(tuple(jaconv.kata2hira(text)), "ja")


@given(st.lists(st.sampled_from(PLAIN_KANA), min_size=1))
def test_kana_have_the_vowels_of_their_romaji(kana: list[str]) -> None:
    assume(all(a[-1] != b[-1] for a, b in itertools.pairwise(map(jaconv.kata2alphabet, kana))))
    units = sounds(tuple(kana), "ja")
    vowels = [unit for family, unit in zip(units[::2], units[1::2], strict=True) if family == "V"]
    assert vowels == [char for char in jaconv.kata2alphabet("".join(kana)) if char in "aeiou"]


@given(HANGUL)
def test_syllables_have_the_vowels_that_unicode_says(text: str) -> None:
    merged = str.maketrans("ㅐㅒㅚㅞ", "ㅔㅖㅙㅙ")
    jamo = map(ord, unicodedata.normalize("NFD", text))
    medials = [chr(0x314F + each - 0x1161) for each in jamo if 0x1161 <= each < 0x1176]
    units = sounds(tuple(text), "ko")
    heard = [unit for unit, family in zip(units[1:], units, strict=False) if family == "V"]
    assert heard == [medial.translate(merged) for medial in medials]


@given(HANGUL)
def test_hangul_sounds_the_same_composed_and_decomposed(text: str) -> None:
    assert sounds((text,), "ko") == sounds((unicodedata.normalize("NFD", text),), "ko")


@pytest.mark.parametrize(
    "pair", ["smith smyth", "johnson jonson", "clark clarke", "philip phillip", "carl karl", "allan alan"]
)
def test_names_that_metaphone_holds_for_one_are_near(pair: str) -> None:
    one, other = pair.split()
    assert jellyfish.metaphone(one) == jellyfish.metaphone(other)
    assert alike(one, other, "en") >= NEAR


@given(LATIN)
def test_every_english_word_has_sounds_or_silent_letters_only(word: str) -> None:
    units = sounds((word,), "en")
    assert len(units) % 2 == 0
    assert units or set(word) <= set("ehw")
