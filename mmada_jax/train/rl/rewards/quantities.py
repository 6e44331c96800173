r"""Numbers with their units, as people write them. Values are exact, so that two of them can be compared.

`1,234`, `1 234`, `3 1/2`, `\frac{7}{2}`, `1.2 x 10^3`, `50%`, `$18`, `18 square feet`, `three million`.
Texts are as `extract.plain` makes them. A text that says anything more is no quantity.
"""

import dataclasses
import re
from fractions import Fraction

# A decimal with at least this many digits after the point, and as many in all, counts as a rounded number.
ROUNDED = 6


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number with a unit: `value` is exact, 0.5 for 50% (`percent`). `places` is the number of digits
    after the point of a decimal, None for other numbers.

    `unit` holds all units that the text may mean, since a word may stand for several. It is empty where no
    unit is named. `name` is the variable in texts such as x = 5.
    """

    value: Fraction
    places: int | None = None
    percent: bool = False
    unit: frozenset[str] = frozenset()
    name: str = ""


def equal(a: Quantity, b: Quantity) -> bool:
    """Whether two quantities have the same number, and the same unit where both name one."""
    if a.name and b.name and a.name != b.name:
        return False
    if a.unit and b.unit:
        a, b = _in_whole_money(a), _in_whole_money(b)
        if not _may_be_one(a.unit, b.unit):
            return False
    if a.percent != b.percent:
        marked, bare = (a, b) if a.percent else (b, a)
        # "12.5" may say how many percent something is. A number below 1 is a share.
        if bare.unit or (abs(bare.value) >= 1 and 100 * marked.value == bare.value):
            return 100 * marked.value == bare.value and not bare.unit
    return a.value == b.value or _rounds_to(a, b) or _rounds_to(b, a)


def read(text: str) -> Quantity | None:
    """The quantity that a text states, None if it states anything else or more."""
    text = text.strip()
    name = _NAME.match(text)
    if name:
        text = text[name.end() :]
    text = _ABOUT.sub("", text)
    lead = _LEAD.match(text)
    number = _number(text, lead.end())
    if number is None:
        return None
    value, places, end = number
    if lead["minus"] or lead["inner"]:
        value = -value
    rest = text[end:].strip()
    if (
        (rest[:1] == "k" or (rest[:1] == "K" and lead["money"]))
        and not text[end:][:1].isspace()
        and not rest[1:2].isalpha()
    ):
        value, places, rest = value * 1000, None, rest[1:].strip()  # 70k
    while scale := _SCALE.match(rest):
        value, places, rest = value * _SCALES[scale[1].lower()], None, rest[scale.end() :].strip()
    if _BOUND.match(rest):
        return None
    cents = _CENTS.fullmatch(rest)
    if cents and (cents[1] or lead["money"]) and value.denominator == 1:  # 5 dollars and 25 cents
        part = Fraction(int(cents[2]), 100)
        value, places, rest = value - part if value < 0 else value + part, 2, cents[1] or ""
    percent = _PERCENT.match(rest)
    if percent:
        value, places = value / 100, None if places is None else places + 2
        unit = _unit(rest[percent.end() :])
        return None if unit is None else Quantity(value, places, True, name=name[1] if name else "")
    unit = _unit(rest)
    if unit is None:
        return None
    money = _named(lead["money"] or "")
    if money and not any("/" in one for one in unit):
        unit = money
    elif money:
        unit = frozenset(f"{one}/{per.partition('/')[2]}" for one in money for per in unit)
    return Quantity(value, places, False, unit, name[1] if name else "")


def numbers_in(text: str) -> list[int]:
    """The positions in a text at which its numbers begin, signs and currencies included."""
    starts, at = [], 0
    for found in _START.finditer(text):
        if found.start() >= at and (number := _number(text, found.end())):
            starts.append(found.start())
            at = number[2]
    return starts


# ---- Numbers -------------------------------------------------------------------------------------

_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, 2)}
_PARTS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7,
    "eighth": 8, "ninth": 9, "tenth": 10,
}  # fmt: skip
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12,
}  # fmt: skip
_ANY_WORD = "|".join(sorted({*_WORDS, "half"}, key=len, reverse=True))

_CURRENCY = "$€£¥₹₩₽₪₱₫฿₺"
_NAME = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?)\s*=\s*(?=\S)")
_ABOUT = re.compile(
    r"^(?:\\approx|~|about\b|approximately\b|roughly\b|around\b|exactly\b)\s*", re.IGNORECASE
)
_SIGNED = (
    r"(?:\+|(?P<minus>-|negative\s|minus\s))?\s*"
    rf"(?P<money>(?:US|AU?|CA?|HK|NZ|S|R)?\$|[{_CURRENCY}]|(?:USD|EUR|GBP|INR|CNY|RMB|JPY|CHF|Rs\.?)(?=\s*\d))?\s*(?P<inner>-)?\s*"
)
_LEAD = re.compile(_SIGNED, re.IGNORECASE)
_START = re.compile(
    rf"(?<![\w.^\\}}])(?:{re.sub('[?]P<.*?>', '', _SIGNED)})"
    rf"(?=\d|\.\d|\\frac|(?:{_ANY_WORD})\b)",
    re.IGNORECASE,
)
_SCALE = re.compile(r"-?(hundred|thousand|million|billion|trillion|dozen)s?\b", re.IGNORECASE)
_BOUND = re.compile(
    r"(?:or|and)\s+(?:more|less|fewer|above|below|over|under|higher|lower)\b", re.IGNORECASE
)
_CENTS = re.compile(
    r"(dollars?|bucks?|euros?)?\s*(?:,\s*|,?\s*and\s+)(\d{1,2})\s+cents?[\s.]*", re.IGNORECASE
)
_PERCENT = re.compile(r"%|per ?cent(?:age)?\b|pct\b", re.IGNORECASE)

_GROUPS = (
    r"\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?", r"\d{1,3}(?:\.\d{3})+,\d+", r"\d{1,3}(?:\.\d{3}){2,}",
    r"\d{1,3}(?:[ '_]\d{3})+(?:\.\d+)?",
)  # fmt: skip
_DIGITS = rf"(?:(?:{'|'.join(_GROUPS)}|\d+\.\d+|\d+\.?|\.\d+)(?!\.?\d))"
_DECIMAL = re.compile(_DIGITS)
_FRACTION = re.compile(
    rf"\\frac\s*(?:\{{\s*(-?\s*{_DIGITS})\s*\}}|(\d))\s*(?:\{{\s*(-?\s*{_DIGITS})\s*\}}|(\d))|"
    rf"({_DIGITS})\s*/\s*({_DIGITS})(?!\s*/)"
)
_POWER = re.compile(
    r"\s*(?:[eE](?=[-+\d])|(?:\\times|\\cdot|[x*])\s*10\s*(?:\^|\*\*)\s*)"
    r"(?:\{\s*([-+]?\d{1,3})\s*\}|\(?([-+]?\d{1,3})\)?(?![\d.]))"
)
_TEN = re.compile(r"10\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d{1,3})\s*\}|\(?([-+]?\d{1,3})\)?(?![\d.]))")
_PERIOD = re.compile(r"\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))")

Number = tuple[Fraction, int | None, int]


def _number(text: str, at: int) -> Number | None:
    """The number at a position: its value, the number of digits after its point if it is a decimal, and the
    position of its end."""
    if ten := _TEN.match(text, at):
        return Fraction(10) ** int(ten[1] or ten[2]), None, ten.end()
    if fraction := _FRACTION.match(text, at):
        value = _divided(fraction)
        return None if value is None else (value, None, fraction.end())
    decimal = _DECIMAL.match(text, at)
    if decimal is None:
        return _spelled(text, at)
    value, places, end = *_value(decimal[0]), decimal.end()
    if mixed := re.compile(r"\s*(?:and\s+|\+?\s*(?=\\frac)|\s)").match(text, end):
        part = _FRACTION.match(text, mixed.end())
        inner = part and _divided(part)
        if inner is not None and value.denominator == 1 and 0 < inner < 1:
            return value + inner, None, part.end()
    if half := re.compile(r"\s+and\s+(?:a|one)[\s-]+(half|third|quarter)\b").match(text, end):
        return value + Fraction(1, _PARTS[half[1]]), None, half.end()
    if period := _PERIOD.match(text, end):
        digits = period[1] or period[2]
        return value + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places), None, period.end()
    if power := _POWER.match(text, end):
        exponent = int(power[1] or power[2])
        return value * Fraction(10) ** exponent, max(0, places - exponent), power.end()
    return value, places, end


def _value(digits: str) -> tuple[Fraction, int]:
    """Digits with separators -> their value and the number of digits after the point."""
    if re.fullmatch(rf"{_GROUPS[1]}|{_GROUPS[2]}", digits):
        digits = digits.replace(".", "").replace(",", ".")
    digits = re.sub(r"[ ,'_]", "", digits)
    return Fraction(f"0{digits}0" if digits.endswith(".") else f"0{digits}"), len(digits.partition(".")[2])


def _divided(found: re.Match) -> Fraction | None:
    above, below = (part.replace(" ", "") for part in found.groups() if part)
    parts = [_value(part.lstrip("-"))[0] * (-1 if part[0] == "-" else 1) for part in (above, below)]
    return parts[0] / parts[1] if parts[1] else None


def _spelled(text: str, at: int) -> Number | None:
    """A number in English: `twenty-one`, `two hundred and one`, `two thirds`, `three and a half`."""
    total, current, end = Fraction(0), None, at
    while word := re.compile(r"[\s-]*(and\s+)?(an?[\s-]+)?([A-Za-z]+)").match(text, end):
        joined, article, name = word[1], word[2], word[3].lower()
        part = _PARTS.get(name.removesuffix("s"))
        if name in _WORDS and (not joined or (current or 0) >= 100 or total):
            current = (current or 0) + _WORDS[name]
        elif part and joined and current is not None:
            current += Fraction(1, part)
        elif part and (current is not None or name == "half"):
            current = (1 if current is None else current) / Fraction(part)
        elif name in _SCALES and name != "dozen" and current is not None and not joined:
            current *= _SCALES[name]
            if name != "hundred":
                total, current = total + current, Fraction(0)
        elif name in _SCALES and article and current is None:  # a dozen, a hundred and five
            current = Fraction(_SCALES[name])
            if name not in ("hundred", "dozen"):
                total, current = current, Fraction(0)
        else:
            break
        end = word.end()
    return None if current is None else (total + current, None, end)


def _rounds_to(long: Quantity, short: Quantity) -> bool:
    places = short.places
    if places is None or places < ROUNDED or (long.places is not None and long.places <= places):
        return False
    enough = abs(short.value) * 10**places >= 10 ** (ROUNDED - 1)
    return enough and abs(long.value - short.value) * 2 * 10**places <= 1


# ---- Units ---------------------------------------------------------------------------------------

_UNITS = {
    "$": "$ US$ A$ AU$ C$ CA$ HK$ NZ$ S$ dollar USD AUD CAD buck", "¢": "¢ cent", "€": "€ EUR euro",
    "R$": "R$ BRL reais", "£": "£ GBP pound sterling", "JPY": "¥ yen JPY 円", "CNY": "¥ yuan RMB CNY 元",
    "₹": "₹ Rs Rs. INR rupee", "CHF": "CHF franc", "₩": "₩ won KRW", "₽": "₽ ruble", "₪": "₪ shekel",
    "₱": "₱ peso", "₫": "₫ dong", "฿": "฿ baht", "₺": "₺ lira",
    "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "dm": "dm decimeter decimetre",
    "m": "m meter metre", "km": "km kilometer kilometre", "in": "in inch inche", "ft": "ft foot feet",
    "yd": "yd yard", "mi": "mi mile", "nm": "nm nanometer nanometre", "µm": "µm μm micrometer micron",
    "mg": "mg milligram", "g": "g gram gm", "kg": "kg kilogram", "t": "t ton tonne", "lb": "lb pound",
    "oz": "oz ounce", "ml": "ml mL milliliter millilitre", "l": "l L liter litre", "gal": "gal gallon",
    "qt": "qt quart", "pt": "pt pint", "cup": "cup", "ms": "ms millisecond", "s": "s sec second",
    "min": "min minute", "h": "h hr hour", "day": "day", "week": "week wk", "month": "month",
    "year": "year yr", "deg": "° degree deg", "C": "° degree °C Celsius centigrade C",
    "F": "° degree °F Fahrenheit F", "K": "K kelvin", "rad": "rad radian", "Hz": "Hz hertz",
    "kHz": "kHz kilohertz", "MHz": "MHz megahertz", "N": "N newton", "J": "J joule", "kJ": "kJ kilojoule",
    "cal": "cal calorie", "kcal": "kcal kilocalorie", "W": "W watt", "kW": "kW kilowatt", "kWh": "kWh",
    "V": "V volt", "A": "A amp ampere", "ohm": "ohm", "Pa": "Pa pascal", "kPa": "kPa", "atm": "atm",
    "mol": "mol mole", "bit": "bit", "byte": "byte", "KB": "KB kilobyte", "MB": "MB megabyte",
    "GB": "GB gigabyte", "ha": "ha hectare", "acre": "acre", "mi/h": "mph", "km/h": "kmh kph kmph",
}  # fmt: skip
_EXACT: dict[str, frozenset[str]] = {}
for _key, _names in _UNITS.items():
    for _one in _names.split():
        _EXACT[_one] = _EXACT.get(_one, frozenset()) | {_key}
_FOLDED = {name.lower(): units for name, units in _EXACT.items() if len(name) > 1}
_MONEY = frozenset([*_CURRENCY, "¢", "R$", "JPY", "CNY", "CHF"])

# Words after which no unit is named any more, and words that name no unit.
_LINKS = {
    "of", "in", "on", "at", "for", "from", "to", "than", "that", "which", "who", "when", "with", "by",
    "because", "since", "as", "is", "are", "was", "were", "and", "or", "left", "more", "total",
    "altogether", "remaining", "away", "long", "wide", "tall", "high", "deep", "old", "apart", "after",
    "before", "if", "so", "every", "each", "only", "just", "out",
}  # fmt: skip
_EMPTY = {"unit", "item", "time", "whole", "full", "the", "a", "an", "additional", "other"}
# Words of mathematics.
_MATHEMATICS = {
    "pi", "sqrt", "log", "ln", "sin", "cos", "tan", "exp", "inf", "infinity", "mod", "choose", "cot",
    "sec", "csc", "e", "i", "x", "y", "z", "n", "k",
}  # fmt: skip

_PER = re.compile(
    r"\s*/\s*|(?:^|\s+)per\s+|(?:^|\s+)an?\s+(?=(?:hour|minute|second|day|week|month|year)\b)",
    re.IGNORECASE,
)


def _named(word: str) -> frozenset[str]:
    """The units that a word may name."""
    lower = word.lower()
    plural = lower.removesuffix("s") if len(word) > 2 else lower
    return _EXACT.get(word) or _FOLDED.get(lower) or _FOLDED.get(plural) or frozenset()


def _unit(text: str) -> frozenset[str] | None:
    """The units that the text after a number may name, none if its words name no unit. None if the text has
    more in it than words."""
    text = re.sub(r"\s+\([^()\d\\=]*\)\s*$|[,;:]\s+[^\d\\=+<>^]{3,}$", "", re.sub(r"[{}]", "", text))
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text.strip(" .()-"), flags=re.IGNORECASE)
    if not text:
        return frozenset()
    if not re.fullmatch(r"(?:[^\W\d_](?:\^?[23]|\^-[123])?(?![\d^])|[\s/.'’·°&$€£¥₹¢-])+", text):
        return None
    parts = _PER.split(text)
    bases = [_base(part) for part in parts]
    if None in bases:
        return None
    if len(parts) == 1:
        return bases[0]
    return frozenset(f"{above}/{below}" for above in bases[0] or ("",) for below in bases[1] or ("",))


def _base(phrase: str) -> frozenset[str] | None:
    """The units of a phrase without its denominator: `square feet`, `cm^2`, `US dollars`, `red apples`."""
    power = re.search(
        r"\^?(-?[123])(?!\w)|\b(?:square[ds]?|sq)\b\.?|\b(?:cubic|cubed|cu)\b\.?", phrase, re.I
    )
    suffix = ""
    if power:
        suffix = "^" + (power[1] or ("2" if power[0].lower().startswith("sq") else "3"))
        phrase = f"{phrase[: power.start()]} {phrase[power.end() :]}"
    words = re.findall(r"°\s*[CF]\b|[°$€£¥₹¢]|[^\W\d_]+\$?\.?", phrase)
    words = [re.sub(r"\s|(?<!Rs)\.$", "", word) for word in words]
    if any(word.lower() in _MATHEMATICS for word in words):
        return None
    for i, word in enumerate(words):
        if word.lower() in _LINKS and (i or len(words) > 1 or not _named(word)):
            words = words[:i]
            break
    if any(word.isascii() and word.isalpha() and len(word) == 1 and not _named(word) for word in words):
        return None  # a variable
    known = [units for units in map(_named, words) if units]
    if known:
        narrower = [a & known[0] for a in known[1:] if a & known[0]]  # degrees Celsius
        return frozenset(unit + suffix for unit in (narrower[0] if narrower else known[0]))
    return frozenset(f"{_stem(word)} " for word in words if _stem(word) not in _EMPTY)


def _stem(word: str) -> str:
    word = word.lower()
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _in_whole_money(number: Quantity) -> Quantity:
    """A quantity of cents in dollars or euros; other quantities as they are."""
    if number.unit != {"¢"}:
        return number
    places = None if number.places is None else number.places + 2
    return dataclasses.replace(number, value=number.value / 100, places=places, unit=frozenset("$€"))


def _may_be_one(a: frozenset[str], b: frozenset[str]) -> bool:
    """Whether two units may be the same. Units that are nouns (`red balls`, marked by a space at the end of
    each word) are the same if all words of one are among the words of the other."""
    if all(unit.endswith(" ") for unit in a | b):
        return a <= b or b <= a
    if a & b:
        return True
    # Answers often leave out the denominator of a price: $3 for $3 per pound.
    money = {unit.partition("/")[0] for unit in a} & {unit.partition("/")[0] for unit in b} & _MONEY
    return bool(money) and any("/" in unit for unit in a) != any("/" in unit for unit in b)
