"""Numbers, ids and units as people say them in English, Mandarin, Cantonese, Japanese and Korean, and back.

Law: within one language no sequence of words is a form of two values. Where people's speech breaks that (七八 is
"seven or eight" before it is 78) the looser form is left out: a number that was not understood is asked for again, a
wrong one stops a line. :func:`value_of` and :func:`digits_of` guess, and then look whether the guess is said that way,
so they cannot disagree with :func:`spoken_forms` and :func:`spoken_digits`.

A form is a tuple of words, the most common form first. English words are lower case; in the other languages every
character is a word of its own, because recognizers space them as they like.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Literal, NamedTuple

Language = Literal["en", "zh", "yue", "ja", "ko"]
Form = tuple[str, ...]

LIMIT = 100_000_000
"""Values lie strictly between -LIMIT and LIMIT."""

MAX_DECIMALS = 6

_MAX_READ_OUT = 6
"""Digits of the longest value that people read digit by digit; what is longer is an id."""

# ---------------------------------------------------------------- tables

# fmt: off
_ENGLISH = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_ENGLISH_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
_ENGLISH_SCALES = ((1_000_000, "million"), (1_000, "thousand"), (100, "hundred"))
_HALF = ("half", "a half", "one half")

# Chinese, Japanese and Korean numbers are composed in simplified Chinese characters and respelled at the end.
_HAN_DIGITS = "零一二三四五六七八九"
_HAN_PLACES = ((3, "千"), (2, "百"), (1, "十"), (0, ""))
_HAN_UNITS = {"十": 10, "百": 100, "千": 1_000, "万": 10_000}
_MYRIAD = 10_000

_Respelling = Mapping[int, str]


def _respelling(old: str, new: str) -> _Respelling:
    return {ord(a): b for a, b in zip(old, new, strict=True)}


_TRADITIONAL = _respelling("两万点转钟摄华个时头只吨兹顿", "兩萬點轉鐘攝華個時頭隻噸茲頓")
_SIMPLIFIED = _respelling("兩萬點轉鐘攝華個時頭隻噸茲頓", "两万点转钟摄华个时头只吨兹顿")
_HANGUL = _respelling("零一二三四五六七八九十百千万点", "영일이삼사오육칠팔구십백천만점")
_ROUND_ZERO = _respelling("零", "\u3007")

# How a whole form is written; a variant changes all of it, so that no form mixes two spellings of one character.
_STANDARD: Mapping[Language, _Respelling] = {"zh": {}, "yue": _TRADITIONAL, "ja": {}, "ko": _HANGUL}
_VARIANTS: Mapping[Language, tuple[_Respelling, ...]] = {
    "zh": (_TRADITIONAL, _ROUND_ZERO),
    "yue": (_SIMPLIFIED, _ROUND_ZERO),
    "ja": ({ord("零"): "ゼロ"}, _ROUND_ZERO),
    "ko": (_respelling("영", "공"),),
}
# Digit by digit Mandarin says yao for one (yi sounds like seven); Japanese says yon and nana, which some write in kana.
_DIGIT_VARIANTS: Mapping[Language, tuple[_Respelling, ...]] = {
    "zh": (_respelling("一", "幺"),),
    "ja": ({ord("四"): "よん"}, {ord("七"): "なな"}),
}
_FROM_KANA = {"ゼロ": "零", "よん": "四", "なな": "七"}
_TO_HAN: _Respelling = {
    **_SIMPLIFIED,
    **_respelling("\u3007幺两兩공", "零一二二零"),
    ord("廿"): "二十",
    ord("卅"): "三十",
    **{ord(hangul): chr(han) for han, hangul in _HANGUL.items()},
}

_MINUS: Mapping[Language, tuple[str, ...]] = {
    "en": ("minus ", "negative "),
    "zh": ("负", "負", "零下"),
    "yue": ("負", "负", "零下"),
    "ja": ("マイナス",),
    "ko": ("마이너스", "영하"),
}

# Korean counts things in words of its own up to 99, the last of which may be shorter before a counter (스무 개).
_KOREAN_ONES = ("", "하나", "둘", "셋", "넷", "다섯", "여섯", "일곱", "여덟", "아홉")
_KOREAN_TENS = ("", "열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔")
_KOREAN_SHORT = {"하나": "한", "둘": "두", "셋": "세", "넷": "네", "스물": "스무"}
_JAPANESE_TSU = ("", "ひとつ", "ふたつ", "みっつ", "よっつ", "いつつ", "むっつ", "ななつ", "やっつ", "ここのつ")


def _korean_counts(n: int) -> tuple[str, ...]:
    full = _KOREAN_TENS[n // 10] + _KOREAN_ONES[n % 10]
    last = _KOREAN_ONES[n % 10] or _KOREAN_TENS[n // 10]
    return (full, full.removesuffix(last) + _KOREAN_SHORT[last]) if last in _KOREAN_SHORT else (full,)


_COUNTS: Mapping[Language, Mapping[int, tuple[str, ...]]] = {
    "ko": {n: _korean_counts(n) for n in range(1, 100)},
    "ja": {n: (_HAN_DIGITS[n] + "つ", _JAPANESE_TSU[n]) for n in range(1, 10)},
}
_VALUES_OF_COUNTS: Mapping[Language, Mapping[str, int]] = {
    language: {form: n for n, forms in counts.items() for form in forms} for language, counts in _COUNTS.items()
}

# Unit as payloads carry it: English, Chinese (Cantonese is its traditional spelling), Japanese, Korean. The number
# stands at ~, or in front where there is none.
UNITS: Mapping[str, tuple[str, str, str, str]] = {
    "%": ("percent / per cent", "百分之~", "パーセント", "퍼센트 / 프로"),
    "degC": (
        "degrees / degrees celsius / degrees centigrade / celsius / degree / degree celsius",
        "度 / 摄氏度 / 摄氏~度",
        "度 / 摂氏~度",
        "도 / 섭씨~도",
    ),
    "degF": ("degrees fahrenheit / fahrenheit", "华氏度 / 华氏~度", "華氏~度", "화씨~도"),
    "rpm": (
        "rpm / r p m / revolutions per minute / revs per minute",
        "转 / 转每分钟 / 每分钟~转",
        "回転 / 回転毎分 / 毎分~回転",
        "알피엠 / 회전 / 분당~회전",
    ),
    "Pa": ("pascal / pascals", "帕 / 帕斯卡", "パスカル", "파스칼"),
    "kPa": ("kilopascal / kilopascals / k p a", "千帕", "キロパスカル", "킬로파스칼"),
    "MPa": ("megapascal / megapascals / m p a", "兆帕", "メガパスカル", "메가파스칼"),
    "bar": ("bar / bars", "巴", "バール", "바"),
    "mbar": ("millibar / millibars", "毫巴", "ミリバール", "밀리바"),
    "psi": ("psi / p s i / pounds per square inch", "磅 / 磅每平方英寸", "ピーエスアイ", "피에스아이"),
    "um": (
        "microns / micrometers / micrometres / micron / micrometer / micrometre",
        "微米",
        "ミクロン / マイクロメートル",
        "미크론 / 마이크로미터",
    ),
    "mm": ("millimeters / millimetres / millimeter / millimetre", "毫米", "ミリ / ミリメートル", "밀리 / 밀리미터"),
    "cm": (
        "centimeters / centimetres / centimeter / centimetre",
        "厘米 / 公分",
        "センチ / センチメートル",
        "센티 / 센티미터",
    ),
    "m": ("meters / metres / meter / metre", "米", "メートル", "미터"),
    "in": ("inches / inch", "英寸", "インチ", "인치"),
    "mm/s": ("millimeters per second / millimetres per second", "毫米每秒 / 每秒~毫米", "毎秒~ミリ", "초당~밀리"),
    "mm/min": (
        "millimeters per minute / millimetres per minute",
        "毫米每分钟 / 每分钟~毫米",
        "毎分~ミリ",
        "분당~밀리",
    ),
    "m/min": ("meters per minute / metres per minute", "米每分钟 / 每分钟~米", "毎分~メートル", "분당~미터"),
    "mL": ("milliliters / millilitres / milliliter / millilitre", "毫升", "ミリリットル", "밀리리터"),
    "L": ("liters / litres / liter / litre", "升", "リットル", "리터"),
    "L/min": ("liters per minute / litres per minute", "升每分钟 / 每分钟~升", "毎分~リットル", "분당~리터"),
    "m3/h": (
        "cubic meters per hour / cubic metres per hour",
        "立方米每小时 / 每小时~立方米 / 立方每小时",
        "毎時~立方メートル",
        "시간당~세제곱미터",
    ),
    "g": ("grams / gram", "克", "グラム", "그램"),
    "kg": ("kilograms / kilos / kilogram / kilo", "公斤 / 千克", "キロ / キログラム", "킬로 / 킬로그램"),
    "t": ("tons / tonnes / ton / tonne", "吨", "トン", "톤"),
    "ms": ("milliseconds / millisecond", "毫秒", "ミリ秒", "밀리초"),
    "s": ("seconds / second", "秒 / 秒钟", "秒", "초"),
    "min": ("minutes / minute", "分钟 / 分", "分 / 分間", "분"),
    "h": ("hours / hour", "小时 / 个小时 / 个钟头", "時間", "시간"),
    "Hz": ("hertz", "赫兹 / 赫", "ヘルツ", "헤르츠"),
    "kHz": ("kilohertz", "千赫 / 千赫兹", "キロヘルツ", "킬로헤르츠"),
    "mV": ("millivolts / millivolt", "毫伏", "ミリボルト", "밀리볼트"),
    "V": ("volts / volt", "伏 / 伏特", "ボルト", "볼트"),
    "mA": ("milliamps / milliamp / milliamperes", "毫安", "ミリアンペア", "밀리암페어"),
    "A": ("amps / amp / amperes / ampere", "安 / 安培", "アンペア", "암페어"),
    "W": ("watts / watt", "瓦 / 瓦特", "ワット", "와트"),
    "kW": ("kilowatts / kilowatt", "千瓦", "キロワット", "킬로와트"),
    "kWh": ("kilowatt hours / kilowatt hour", "千瓦时", "キロワット時", "킬로와트시"),
    "N": ("newtons / newton", "牛 / 牛顿", "ニュートン", "뉴턴"),
    "kN": ("kilonewtons / kilonewton", "千牛", "キロニュートン", "킬로뉴턴"),
    "Nm": ("newton meters / newton metres / newton meter / newton metre", "牛米", "ニュートンメートル", "뉴턴미터"),
    "pcs": ("pieces / piece / units / unit / parts / part", "件 / 个 / 只", "個 / 本", "개"),
}
_COLUMN: Mapping[Language, int] = {"en": 0, "zh": 1, "yue": 1, "ja": 2, "ko": 3}

_WRITTEN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"


# ---------------------------------------------------------------- what the room offers


def spoken_forms(value: int | Decimal, language: Language) -> tuple[Form, ...]:
    """Every way people say the value.

    A Decimal is said with its trailing zeros too: ``Decimal("3.0")`` is "three" and "three point zero". Raises
    ValueError beyond :data:`LIMIT` or :data:`MAX_DECIMALS`.
    """
    number = Decimal(value)
    if not _sayable(number):
        raise ValueError(f"{value} is not said: numbers lie below {LIMIT} and have at most {MAX_DECIMALS} decimals")
    size = abs(number)
    whole = int(size)
    forms = _whole_forms(whole, language) if size == whole else _decimal_forms(size.normalize(), language)
    if number == whole:
        forms += _COUNTS.get(language, {}).get(whole, ())
    if _decimals(size) > max(_decimals(size.normalize()), 0):
        forms += _decimal_forms(size, language)
    if number < 0:
        forms = [minus + form for minus in _MINUS[language] for form in forms]
    return _as_words(forms, language)


def value_of(words: Sequence[str], language: Language) -> Decimal | None:
    """The value that exactly these words say, or write in digits ("120", "3.5", "1,200"); None for anything else.

    The decimals that were said are kept: "three point zero" is ``Decimal("3.0")``.
    """
    text = _joined(words, language)
    if re.fullmatch("-?" + _WRITTEN, text):
        return None if re.match("-?0[0-9,]", text) else Decimal(text.replace(",", ""))
    minus = next((m for m in _MINUS[language] if text.startswith(m)), "")
    guess = _guess(text.removeprefix(minus), language)
    if guess is None or not _sayable(guess):
        return None
    value = -guess if minus else guess
    return value if _as_words([text], language)[0] in spoken_forms(value, language) else None


def spoken_digits(digits: str, language: Language) -> tuple[Form, ...]:
    """Every way people read an id digit by digit, leading zeros kept; in English also with "double" and "triple".

    One form says the same digit the same way throughout. Raises ValueError for anything but 0-9.
    """
    if not re.fullmatch("[0-9]+", digits):
        raise ValueError(f"{digits!r} is no id that can be read out: only the digits 0-9 can")
    forms = _read_out(digits, language)
    if language == "en":
        runs = [(_ENGLISH[int(digit)], len(list(run))) for digit, run in itertools.groupby(digits)]
        said = map(" ".join, itertools.product(*(_english_run(word, length) for word, length in runs)))
        forms += [form for zeros in said for form in (zeros, _with_oh(zeros))]
    return _as_words(forms, language)


def digits_of(words: Sequence[str], language: Language) -> str | None:
    """The id that exactly these words read out, or write in digits; None for anything else."""
    text = _joined(words, language)
    if re.fullmatch("[0-9]+", text):
        return text
    guess = _guess_english_digits(text) if language == "en" else _guess_han_digits(_in_han(text))
    return guess if guess and _as_words([text], language)[0] in spoken_digits(guess, language) else None


class UnitForm(NamedTuple):
    """A way to say a unit: its words before and after the number, as in 百分之八十 (80 %) or 每分钟八十转 (80 rpm)."""

    before: Form
    after: Form

    def around(self, number: Form) -> Form:
        """The words of the quantity."""
        return self.before + number + self.after


def spoken_unit(unit: str, language: Language) -> tuple[UnitForm, ...]:
    """Every way people say a unit of :data:`UNITS`, the most common first. Raises ValueError for another one."""
    if unit not in UNITS:
        raise ValueError(f"{unit!r} is not a known unit; known are {', '.join(UNITS)}")
    templates = UNITS[unit][_COLUMN[language]].split(" / ")
    if language in {"zh", "yue"}:
        templates = _spellings(templates, language)
    parts = (template.rpartition("~")[::2] for template in templates)
    return tuple(UnitForm(*(_as_words([part], language)[0] for part in pair)) for pair in parts)


def respell(text: str, language: Language) -> str:
    """The text with its written numbers in their most common words: "set 3.5 %" becomes "set three point five percent".

    What is no quantity (a leading zero, more digits than people say) is read digit by digit.
    """
    space = " " if language == "en" else ""

    def said(match: re.Match[str]) -> str:
        value = value_of([match["number"]], language)
        if value is not None and _sayable(value):
            form = spoken_forms(value, language)[0]
        else:
            form = spoken_digits(re.sub("[^0-9]", "", match["number"]), language)[0]
        if match["percent"]:
            form = spoken_unit("%", language)[0].around(form)
        return space + space.join(form) + space

    # A minus sign follows a space or a character of the East; after a letter or digit it is a hyphen.
    pattern = rf"(?P<number>(?:(?<![0-9A-Za-z])-)?{_WRITTEN})(?P<percent>\s*[%\uff05])?"
    spelled = re.sub(pattern, said, text)
    return re.sub(r" +", " ", spelled).strip() if language == "en" else spelled


def is_clear(text: str) -> bool:
    """Whether digits stand together only where they write one number: "1,5", "12:30" and "20-25" are not respelled."""
    runs = re.findall(r"[0-9]+(?:[^\w\s]+[0-9]+)+", text)
    return all(re.fullmatch(_WRITTEN, run) for run in runs)


# ---------------------------------------------------------------- what all languages share


def _sayable(number: Decimal) -> bool:
    return number.is_finite() and abs(number) < LIMIT and _decimals(number) <= MAX_DECIMALS


def _decimals(number: Decimal) -> int:
    return -int(number.as_tuple().exponent)


def _as_words(forms: Iterable[str], language: Language) -> tuple[Form, ...]:
    return tuple(dict.fromkeys(tuple(form.split()) if language == "en" else tuple(form) for form in forms))


def _joined(words: Sequence[str], language: Language) -> str:
    if language == "en":
        return " ".join(re.sub(r"(?<=[a-z])-(?=[a-z])", " ", " ".join(words).lower()).split())
    return "".join("".join(words).split())


def _whole_forms(n: int, language: Language) -> list[str]:
    if language == "en":
        forms = _english(n) + _english_with_a(n) + _english_pairs(n)
    else:
        forms = _spellings(_han(n, language) + _shortened(n, language), language)
    return forms + (_read_out(str(n), language) if _is_read_out(n) else [])


def _is_read_out(n: int) -> bool:
    """Two digits that follow each other are an approximate count: 七八个, "two three days"."""
    digits = str(n)
    approximate = len(digits) == 2 and int(digits[1]) == int(digits[0]) + 1
    return 2 <= len(digits) <= _MAX_READ_OUT and not approximate


def _read_out(digits: str, language: Language) -> list[str]:
    if language == "en":
        zeros = " ".join(_ENGLISH[int(digit)] for digit in digits)
        return [zeros, _with_oh(zeros)]
    return _spellings([_in_han_digits(digits)], language, _DIGIT_VARIANTS.get(language, ()))


def _decimal_forms(number: Decimal, language: Language) -> list[str]:
    """The digits after the point are read one by one; their zeros as in the whole part."""
    whole, fraction = f"{number:f}".split(".")
    if language != "en":
        digits = _in_han_digits(fraction)
        return _spellings([f"{head}点{digits}" for head in _han(int(whole), language)], language)
    heads = _english(int(whole)) + _english_with_a(int(whole)) + _english_pairs(int(whole))
    points = [f"point {tail}" for tail in _read_out(fraction, "en")]
    forms = [f"{head} {point}" for point in points for head in (heads if int(whole) else ["zero", "", "oh"])]
    if fraction == "5":
        forms += [f"{head} and a half" for head in heads] if int(whole) else _HALF
    return forms


def _guess(text: str, language: Language) -> Decimal | None:
    """The only value that the text could say; whether it really does is seen by saying it."""
    if text in _VALUES_OF_COUNTS.get(language, {}):
        return Decimal(_VALUES_OF_COUNTS[language][text])
    if language == "en":
        if text in _HALF:
            return Decimal("0.5")
        text = re.sub(" and a half$", " point five", text)
        whole, point, fraction = (part.strip() for part in f" {text} ".partition(" point "))
        value, decimals = _guess_english(whole.split()), _guess_english_digits(fraction)
    else:
        whole, point, fraction = _in_han(text).partition("点")
        value, decimals = _guess_han(whole, language), _guess_han_digits(fraction)
    if point:
        in_whole = "0" if language == "en" and whole in {"", "oh"} else value
        return Decimal(f"{in_whole}.{decimals}") if in_whole is not None and decimals else None
    return None if value is None else Decimal(value)


# ---------------------------------------------------------------- English


def _below_hundred(n: int) -> str:
    tens, ones = divmod(n, 10)
    if n < len(_ENGLISH):
        return _ENGLISH[n]
    return f"{_ENGLISH_TENS[tens]} {_ENGLISH[ones]}" if ones else _ENGLISH_TENS[tens]


def _english(n: int) -> list[str]:
    """The full forms, with and without "and" in front of what is below a hundred."""
    for scale, name in _ENGLISH_SCALES:
        if n >= scale:
            high, low = divmod(n, scale)
            return [head + tail for head in _english(high) for tail in _english_tails(name, low)]
    return [_below_hundred(n)]


def _english_tails(name: str, low: int) -> list[str]:
    """`` hundred``, `` hundred five``, `` hundred and five``."""
    if not low:
        return [f" {name}"]
    tails = _english(low)
    return [f" {name} {tail}" for tail in tails] + [f" {name} and {tail}" for tail in tails if low < 100]


def _english_with_a(n: int) -> list[str]:
    """``a hundred and five``."""
    return [f"a{form.removeprefix('one')}" for form in _english(n) if form.startswith("one ")]


def _english_pairs(n: int) -> list[str]:
    """``twelve hundred``, ``twelve fifty``, ``one eighty``, ``one oh five``."""
    high, low = divmod(n, 100)
    if not 1 <= high <= 99:
        return []
    head = _below_hundred(high)
    forms = [head + tail for tail in _english_tails("hundred", low)] if high > 10 and high % 10 else []
    if low:
        forms.append(f"{head} {_below_hundred(low)}" if low >= 10 else f"{head} oh {_ENGLISH[low]}")
    return forms


def _with_oh(form: str) -> str:
    return form.replace("zero", "oh")


def _english_run(word: str, length: int) -> list[str]:
    """A digit said ``length`` times in a row, also by twos and threes."""
    one_by_one = " ".join([word] * length)
    if length == 1:
        return [one_by_one]
    triples = length % 2
    return [one_by_one, " ".join([f"triple {word}"] * triples + [f"double {word}"] * ((length - 3 * triples) // 2))]


def _guess_english(words: Sequence[str]) -> int | None:
    """Scales multiply what stands before them; what is left of a number are pieces to be written side by side."""
    for scale, name in _ENGLISH_SCALES:
        if name in words:
            at = words.index(name)
            high = _guess_english(words[:at])
            low = _guess_english(words[at + 1 :]) if words[at + 1 :] else 0
            return None if high is None or low is None else high * scale + low
    digits = ""
    ones_fit = False
    for word in words:
        number = {"a": "one", "oh": "zero"}.get(word, word)
        if number in _ENGLISH_TENS[2:]:
            digits += f"{_ENGLISH_TENS.index(number)}0"
        elif number in _ENGLISH:
            ones = _ENGLISH.index(number)
            digits = f"{digits[:-1]}{ones}" if ones_fit and 1 <= ones <= 9 else f"{digits}{ones}"
        elif number != "and":
            return None
        ones_fit = number in _ENGLISH_TENS[2:]
    return int(digits) if 1 <= len(digits) <= _MAX_READ_OUT else None


def _guess_english_digits(text: str) -> str:
    digits = ""
    times = 1
    for word in text.replace("oh", "zero").split():
        if word in {"double", "triple"}:
            times = 2 if word == "double" else 3
        elif word in _ENGLISH[:10]:
            digits += str(_ENGLISH.index(word)) * times
            times = 1
        else:
            return ""
    return digits


# ---------------------------------------------------------------- Chinese, Japanese, Korean


def _spellings(forms: list[str], language: Language, more: tuple[_Respelling, ...] = ()) -> list[str]:
    spelled = [form.translate(_STANDARD[language]) for form in forms]
    for variant in (*_VARIANTS[language], *more):
        spelled += [form.translate(variant) for form in spelled]
    return list(dict.fromkeys(spelled))


def _in_han_digits(digits: str) -> str:
    return "".join(_HAN_DIGITS[int(digit)] for digit in digits)


def _in_han(text: str) -> str:
    for kana, han in _FROM_KANA.items():
        text = text.replace(kana, han)
    return text.translate(_TO_HAN)


def _han(n: int, language: Language) -> list[str]:
    """The full forms, not yet spelled."""
    if not n:
        return ["零"]
    if language in {"zh", "yue"}:
        forms = _chinese(n)
        # Cantonese contracts twenty and thirty.
        short = [form.replace("二十", "廿").replace("三十", "卅") for form in forms] if language == "yue" else []
        return forms + short
    high, low = divmod(n, _MYRIAD)
    form = (_eastern_section(high) + "万" if high else "") + _eastern_section(low)
    if language == "ja":
        return [form]
    form = form.removeprefix("一") if high == 1 else form
    return [form, "一" + form] if form[0] in "百千万" else [form]


def _eastern_section(n: int) -> str:
    """Below ten thousand in Japanese and Korean: no one in front of ten, hundred and thousand."""
    form = ""
    for place, unit in _HAN_PLACES:
        digit = n // 10**place % 10
        if digit:
            form += unit if unit and digit == 1 else _HAN_DIGITS[digit] + unit
    return form


def _chinese(n: int) -> list[str]:
    high, low = divmod(n, _MYRIAD)
    if not high:
        return [*_chinese_section(n), *(["两"] if n == 2 else [])]
    heads = ["两", "二"] if high == 2 else _chinese_section(high)
    zero = "零" if low < _MYRIAD // 10 else ""
    tails = [zero + tail for tail in _chinese_section(low, leads=False)] if low else [""]
    return [f"{head}万{tail}" for head in heads for tail in tails]


def _chinese_section(n: int, *, leads: bool = True) -> list[str]:
    """Below ten thousand; ``leads``: nothing is said before it. A gap of any length is one zero."""
    forms = [""]
    last_place = 4
    for place, unit in _HAN_PLACES:
        digit = n // 10**place % 10
        if not digit:
            continue
        zero = "零" if forms[0] and last_place > place + 1 else ""
        ways = _chinese_digit(digit, unit, leads=leads and not forms[0])
        forms = [form + zero + way for form in forms for way in ways]
        last_place = place
    return forms


def _chinese_digit(digit: int, unit: str, *, leads: bool) -> list[str]:
    if digit == 1 and unit == "十":
        return ["十", "一十"] if leads else ["一十", "十"]
    if digit == 2 and unit in {"百", "千"}:
        return ["两千", "二千"] if leads and unit == "千" else [f"二{unit}", f"两{unit}"]
    return [_HAN_DIGITS[digit] + unit]


def _shortened(n: int, language: Language) -> list[str]:
    """Chinese drops the last unit where it is the next smaller one: 一百二 is 120 (102 is 一百零二)."""
    if language not in {"zh", "yue"} or not n:
        return []
    place = len(str(n)) - len(str(n).rstrip("0"))
    if not 1 <= place <= 3 or not n // 10 ** (place + 1) % 10:
        return []
    forms = [form[:-1] for form in _chinese(n) if form[-2] in _HAN_DIGITS]
    # Cantonese drops a leading one as well: 百二.
    return forms + [form[1:] for form in forms if language == "yue" and form[0] == "一" and len(form) == 3]


def _guess_han(text: str, language: Language) -> int | None:
    if digits := _guess_han_digits(text):
        return int(digits) if len(digits) <= _MAX_READ_OUT else None
    total = section = digit = 0
    for char in text:
        if char in _HAN_DIGITS:
            digit = _HAN_DIGITS.index(char)
        elif char == "万":
            total += (section + digit or 1) * _MYRIAD
            section = digit = 0
        elif char in _HAN_UNITS:
            section += (digit or 1) * _HAN_UNITS[char]
            digit = 0
        else:
            return None
    unit = _HAN_UNITS.get(text[-2:-1], 0)
    if language in {"zh", "yue"} and digit and unit >= 100:
        digit *= unit // 10
    return total + section + digit if text else None


def _guess_han_digits(text: str) -> str:
    return "".join(str(_HAN_DIGITS.index(char)) for char in text) if all(char in _HAN_DIGITS for char in text) else ""
