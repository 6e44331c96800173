r"""Whether an answer means the same as the expected one, as far as that needs no algebra.

Both are texts as models write them and data sets hold them. Everything takes time linear in a text's
length, and only the last LONGEST characters of a long answer count. Comparisons that need algebra are left
to `verifier`.
"""

import re

from mmada_jax.train.rl.rewards import quantities
from mmada_jax.train.rl.rewards.extract import answer_of, ascii_of, plain

LONGEST = 2000  # characters

# ---- Whether it is right -------------------------------------------------------------------------

# A letter that stands for a choice, alone or before its text.
_CHOICE = re.compile(r"(?:(?:option|choice|answer)\s+)?[(\[{]?\s*([A-Z])\s*[)\]}]?[.:]?", re.IGNORECASE)
_LETTER = r"(?:[Oo]ption|[Cc]hoice)?\s*(?:\(\s*([A-Za-z])\s*\)|([A-Z])(?![\w']))"
_CHOSEN = re.compile(
    rf"{_LETTER}(?:\s*[.:,)\n].*|\s*$|(?<=\))\s*.*|\s+(?:because|since|as|is|-)\s(?!\s*(?:not|wrong|false|in)).*)",
    re.DOTALL,
)
_PICKS = re.compile(r"^.{0,80}\b(?:choose|pick|select|go with)\b\s*:?\s*", re.IGNORECASE | re.DOTALL)
_LABELLED = re.compile(r"\(?([A-Z])(?:\)|\.|:)\s*(\S.*)", re.DOTALL)

_ANSWER = re.compile(
    r"\b(?:(?:final|correct|right|best)\s+)?(?:answer|ans|option|choice|solution|root)s?\b"
    r"(?:\s+(?:to|for)\s+[^.:\n]{0,80}?)?\s*(?:\s(?:is|are|was|would be|must be|should be|option)\b|[:=])"
    r"\s*[:=]?\s*",
    re.IGNORECASE,
)
# Where a reason or another remark begins.
_REMARK = re.compile(
    r"[.!?;](?:\s|$)|\n|\s\(|,?\s(?:because|since|as|which|so|i\.e|for|given)\b|,\s+(?=not\b)",
    re.IGNORECASE,
)
_STATES = re.compile(
    r"=|\b(?:is|are|was|were|be|has|have|had|gets?|equals?|makes?|takes?|costs?|needs?|earns?|sold|there|so|thus|"
    r"therefore|hence|total)\b",
    re.IGNORECASE,
)
# Words and signs before a number that isn't the answer: bounds, negations, arithmetic.
_BOUNDS = re.compile(
    r"(?:(?:\bnot|\bnever|n't)(?:\s+(?:be|equal|equal to|(?:think|believe)\s.{0,15}))?|"
    r"\b(?:or|than|least|most|up to|over|under|above|"
    r"below)|[+*/^<>]|\d\s*-)$",
    re.IGNORECASE,
)
# A sentence that only denies an answer.
_DENIAL = re.compile(
    r"[^!?\n]{0,80}(?:\b(?:is|are) (?:wrong|incorrect)|"
    r"(?:\b(?:is|are) not|n't) (?:the )?(?:right|correct|answer))"
    r"(?: answer)?",
    re.IGNORECASE,
)
# x = 2 and x = 5
_SEVERAL = re.compile(r"=[^=]*(?:,|\b(?:and|or)\b)[^=]*=", re.IGNORECASE)
_IS = re.compile(r"\b(?:is|are|was|were|be|(?:it|that)'s)\b", re.IGNORECASE)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}(?![A-Za-z({])")
_NO_PROSE = {
    "and", "or", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "mod",
    "inf", "infinity", "max", "min", "gcd", "lcm", "det", "all", "real",
}  # fmt: skip
_SHORT = {"no", "is", "it", "of", "to", "in", "at", "be", "on", "we", "so", "he", "by", "if", "an", "my"}
_ORDINALS = {
    "first": "1st", "second": "2nd", "third": "3rd", "fourth": "4th", "fifth": "5th", "sixth": "6th",
    "seventh": "7th", "eighth": "8th", "ninth": "9th", "tenth": "10th", "eleventh": "11th",
    "twelfth": "12th",
}  # fmt: skip
_MONTHS = {
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october",
    "november", "december",
}  # fmt: skip
_YES, _NO = {"yes", "true", "correct"}, {"no", "false", "incorrect"}


def verdict(wanted: str, completion: str) -> float | tuple[str, str]:
    """1 if the answer of a completion is right, 0 if it isn't. Where algebra is needed to say so: the
    expected answer and the answer as LaTeX."""
    wanted, found = (answer_of(text)[-LONGEST:] for text in (wanted, completion))
    if not found:
        return 0.0
    if wanted == found:
        return 1.0
    want, answer = plain(wanted), plain(found)
    if _DENIAL.fullmatch(answer) and not _DENIAL.fullmatch(f"it is {want}"):
        return 0.0
    if want == answer or (want.lower() == answer.lower() and not re.search(r"\d", want)):
        return 1.0
    if (time := _clock_time(want)) and time in map(_clock_time, _stated(answer)):
        return 1.0
    if formula := _formula(want):  # algebra would take it for a product
        return float(formula in map(_formula, _stated(answer)))
    if _CHOICE.fullmatch(want) and want.upper() == want:
        return float(_chosen(answer) == _CHOICE.fullmatch(want)[1])
    if labelled := _LABELLED.fullmatch(want):
        letter = _chosen(answer)
        return float(letter == labelled[1]) if letter else verdict(labelled[2], found)
    if re.fullmatch(r"\d+(\s*:\s*\d+)+", want):
        return float(_ratio(want) in [_ratio(part) for part in _stated(answer)])
    if re.fullmatch(r"\d+([-/])\d+\1\d+", want):  # a date
        return float(want in _stated(answer))
    if based := _BASED.fullmatch(want):  # 52_8, a number of base 8
        parts = [_BASED.fullmatch(part.replace(" ", "")) for part in _stated(answer)]
        numbers = [(part[1], _BASES.get(part[2], part[2])) for part in parts if part]
        return float(based.groups() in numbers or based[1] in _stated(answer))
    if re.fullmatch(r"-?\d[\d.]*(?:\s+-?\d[\d.]*)+", want) and quantities.read(want) is None:
        return float(want.split() in [re.split(r"[\s,;]+", part) for part in conclusions(answer)])
    quantity = quantities.read(want)
    if quantity is not None:
        if re.fullmatch(r"\d+(?:st|nd|rd|th)", want) and _same_words(want, answer):
            return 1.0
        return _same_quantity(quantity, answer, found)
    if _is_prose(_split(want)[0]) and "\\" not in want:
        return float(_same_words(want, answer))
    return _algebra(want, _tex(answer, found))


def conclusions(text: str) -> list[str]:
    """The parts of a text that may be its conclusion, the likeliest first; the text itself if it is no
    sentence."""
    text = text.strip()
    anchors = list(_ANSWER.finditer(text))
    if anchors:
        rest = text[anchors[-1].end() :].strip()
        first = _REMARK.split(rest, maxsplit=1)[0].strip()
        last = "" if _SEVERAL.search(first) else first.rpartition("=")[2].strip()
        return [part for part in (rest, first, last) if part] or [text]
    lines = text.split("\n")
    return [text] if len(lines) == 1 else [text, lines[-1], lines[0]]


# A number in a base, which may be spelled.
_BASED = re.compile(r"\(?([0-9A-Fa-f]+)\)?_\{?([0-9a-z]+)\}?")
_BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "twelve": "12", "sixteen": "16",
}  # fmt: skip


def _stated(text: str) -> list[str]:
    """The conclusions of a text, and the parts of them that follow `is`."""
    return [part.strip() for whole in conclusions(text) for part in (whole, _IS.split(whole)[-1])]


def _ratio(text: str) -> str:
    """A ratio, or a time of the day without its half, as 3:4."""
    text = re.sub(r"\s*[ap]\.?\s?m\.?$", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1:\2", text)
    return re.sub(r"(?<=\d)\s*(?:to|/|:)\s*(?=\d)", ":", text)


def _clock_time(text: str) -> str:
    """10 AM and 10:00 a.m. as 10:00 am; empty for other texts."""
    found = re.fullmatch(r"(\d{1,2})(?::(\d{2}))?\s*([ap])\.?\s?m\.?", text, re.IGNORECASE)
    return f"{int(found[1])}:{found[2] or '00'} {found[3].lower()}m" if found else ""


def _formula(text: str) -> str:
    """CO_2 and CO2 as CO2; empty for what isn't a chemical formula of two symbols or more with a number."""
    text = text.replace(" ", "")
    symbols = re.fullmatch(r"(?:[A-Z][a-z]?(?:_?\d+|_\{\d+\})?){2,}", text)
    return re.sub(r"[_{}]", "", text) if symbols and re.search(r"\d", text) else ""


def _same_quantity(quantity: quantities.Quantity, answer: str, found: str) -> float | tuple[str, str]:
    answer = re.sub(r"^A:\s+", "", answer)  # question and answer
    if re.match(r"\\(?:ne|neq|le|ge|leq|geq|lt|gt)(?![A-Za-z])|[<>]|\d+(?:\s*:\s*\d+)+$", answer):
        return 0.0  # what bounds a number, and a ratio, are none
    # 3,5 is a list, or where points part thousands, a number.
    comma = re.fullmatch(r"(\D*\d+),(\d{1,2}\b(?!\s*,).*)", answer, re.DOTALL)
    if comma and (number := quantities.read(f"{comma[1]}.{comma[2]}")):
        return float(quantities.equal(quantity, number))
    read = [quantities.read(part) for part in conclusions(answer)]
    number = next((one for one in read if one is not None), None)
    if number is None and _is_prose(answer):
        number = _last_number(answer)
        if number is None and not re.search(r"\\[a-z]|\^", answer):
            return 0.0
    if number is not None:
        return float(quantities.equal(quantity, number))
    if not re.search(r"\d|\\[A-Za-z]", answer):
        return 0.0
    above, below = quantity.value.numerator, quantity.value.denominator
    exact = str(above) if below == 1 else rf"\frac{{{above}}}{{{below}}}"
    if (places := quantity.places or 0) >= quantities.ROUNDED:  # compared as a rounded number
        digits = f"{abs(above) * 10**places // below:0{places + 1}d}"
        exact = f"{'-' * (above < 0)}{digits[:-places]}.{digits[-places:]}"
    return _algebra(exact, _tex(answer, found), quantity.unit)


def _last_number(text: str) -> quantities.Quantity | None:
    """The last quantity of a sentence; None if the sentence only lists several."""
    if _ANSWER.search(text):
        return None
    starts = quantities.numbers_in(text)
    if not starts or (len(starts) > 1 and not _STATES.search(text)):
        return None
    for start in starts[-2:]:  # 5 dollars and 25 cents are one quantity, else the last number counts
        last = re.split(r"[!?;\n]|\.(?=\s|$)", text[start:], maxsplit=1)[0]
        if start < starts[-1] and quantities.read(last) is not None:
            break
    if _BOUNDS.search(text[:start].rstrip()):
        return None
    return quantities.read(last) or quantities.read(re.split(r"[,()]", last, maxsplit=1)[0])


def _chosen(text: str) -> str | None:
    """The letter that a text chooses, None if it chooses none or several."""
    if whole := _CHOICE.fullmatch(text):
        return whole[1].upper()
    text = _PICKS.sub("", text)
    for part in conclusions(text)[:1]:
        if whole := _CHOICE.fullmatch(part):
            return whole[1].upper()
        if found := _CHOSEN.match(part):
            others = set(re.findall(r"(?:^|\bor|\band|,)\s*\(?([A-Z])\)?(?![\w'])", part)) - {
                found[1] or found[2]
            }
            if not others or re.search(r"\bnot\b|\bwrong\b|\bbecause\b|\bsince\b", part):
                return (found[1] or found[2]).upper()
    return None


def _same_words(want: str, answer: str) -> bool:
    wanted = _words(want)
    for part in conclusions(answer):
        first = _REMARK.split(part, maxsplit=1)[0]
        if wanted in [_words(text) for text in (part, first, _IS.split(first)[-1])]:
            return True
    for group, other in ((_YES, _NO), (_NO, _YES)):
        if set(wanted) <= group and len(wanted) == 1:
            said = [word for part in conclusions(answer) for word in _words(part)]
            return (
                bool(said) and said[0] in group and not ({"and", "or", *other} & set(said[1:2] + said[2:3]))
            )
    return False


def _words(text: str) -> list[str]:
    """Words, numbers and signs; without the article or the preposition that they begin with."""
    words = re.findall(
        r"\d+(?:st|nd|rd|th)\b|\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s.,;:()'-]|-(?=\d)", text.lower()
    )
    words = [_ORDINALS.get(word, word) for word in words]
    if any(word in _MONTHS for word in words):  # July 4, 1776 or 4 July 1776
        words = sorted(re.sub(r"(?<=\d)(?:st|nd|rd|th)$", "", word) for word in words if word != "of")
    beside = len(words) > 1 and words[0] in ("the", "a", "an", "on", "in", "at")
    return words[1:] if beside else words


def _is_prose(text: str) -> bool:
    """Whether a text has words. Words have vowels; products of variables such as xyz seldom do."""
    words = [word.lower() for word in _PROSE.findall(text)]
    return any(
        word in _SHORT or (len(word) > 2 and word not in _NO_PROSE and re.search("[aeiou]|(?<!x)y", word))
        for word in words
    )


# ---- What is left to algebra ---------------------------------------------------------------------

_TAIL = re.compile(r"(?<=[\d)}ieπ])\s+([A-Za-z°][A-Za-z°\s/.]*(?:\^?\{?[23]\}?)?)$")


def _algebra(want: str, answer: str, unit: frozenset[str] = frozenset()) -> float | tuple[str, str]:
    """The two texts for the library, or 0 where their units or the names of their coordinates differ."""
    if r"\boxed" in answer or "$" in answer:
        return _boxed(_split(want)[0]), answer
    (want, wanted_unit), (answer, found_unit) = _split(want), _split(answer)
    wanted_unit = wanted_unit or unit
    (names, point), (found_names, found_point) = _point(want), _point(answer)
    if names and found_names and names != found_names:
        return 0.0
    want, answer = point or want, found_point or answer
    if wanted_unit and found_unit and not wanted_unit & found_unit:
        return 0.0
    want, answer = _rising(want), _rising(answer)
    if (r"\cup" in want) != (r"\cup" in answer):
        want, answer = _union(want), _union(answer)
    return _boxed(want), _boxed(answer)


_RELATION = re.compile(r"(<=|>=|<|>|\\[lg]eq?(?![A-Za-z]))")
_TURNED = {"<": ">", "<=": ">=", r"\le": r"\ge", r"\leq": r"\geq"}
_TURNED |= {more: less for less, more in _TURNED.items()}


def _rising(text: str) -> str:
    """2>x>1 as 1<x<2; other texts as they are."""
    parts = [part.strip() for part in _RELATION.split(text)]
    if len(parts) != 5 or not all(part.startswith((">", r"\g")) for part in parts[1::2]):
        return text
    return " ".join(_TURNED.get(part, part) for part in reversed(parts))


def _union(text: str) -> str:
    """Intervals or inequalities in one variable that "or" parts as a union of intervals; other texts as
    they are."""
    intervals, variables = [], set()
    for part in re.split(r"\s+or\s+", text):
        within = re.fullmatch(r"(?:([A-Za-z])\s*\\in\s*)?([(\[][^()\[\]]+,[^()\[\]]+[)\]])", part.strip())
        parts = [side.strip() for side in _RELATION.split(_rising(part))]
        if within:
            name, interval = within[1] or "", within[2]
        elif len(parts) == 3:
            low, relation, high = parts
            if re.fullmatch("[A-Za-z]", high):
                low, relation, high = high, _TURNED[relation], low
            name, end = low, "" if relation in "<>" else "="
            if relation.startswith(("<", r"\l")):
                interval = rf"(-\infty,{high}{']' if end else ')'}"
            else:
                interval = rf"{'[' if end else '('}{high},\infty)"
        elif len(parts) == 5 and all(one.startswith(("<", r"\l")) for one in parts[1::2]):
            low, first, name, second, high = parts
            interval = f"{'(' if first == '<' else '['}{low},{high}{')' if second == '<' else ']'}"
        else:
            return text
        if name and not re.fullmatch("[A-Za-z]", name):
            return text
        variables.add(name)
        intervals.append(interval)
    return r" \cup ".join(intervals) if len(intervals) > 1 and len(variables - {""}) <= 1 else text


def _point(text: str) -> tuple[list[str], str]:
    """x=1, y=2 as its names and (1,2), both in the order of the names; nothing for other texts."""
    parts = [re.fullmatch(r"\s*([A-Za-z])\s*=([^=<>]+)", part) for part in re.split(r",|;|\band\b", text)]
    if len(parts) < 2 or None in parts or len({part[1] for part in parts}) < len(parts):
        return [], ""
    parts.sort(key=lambda part: part[1])
    return [part[1] for part in parts], f"({','.join(part[2].strip() for part in parts)})"


def _split(text: str) -> tuple[str, frozenset[str]]:
    """A text of mathematics without its unit, and the units that it may mean."""
    tail = _TAIL.search(text)
    named = tail and quantities.read(f"1 {tail[1]}")
    if named and (named.unit or "unit" in tail[1]):
        return text[: tail.start()].strip(), named.unit
    return text, frozenset()


def _boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"


def _tex(answer: str, found: str) -> str:
    """The part of an answer that the library reads best: the mathematics in a sentence, else all of it."""
    if not _is_prose(_split(answer)[0]):
        return answer.replace("\n", " ")
    marked = ascii_of(found)
    if re.search(r"(?<!\\)(?:\$|\\[(\[])", marked):
        return marked
    last = conclusions(answer)[-1]
    said = [last, _IS.split(last)[-1].strip(), last.rpartition("=")[2].strip()]
    return next((text for text in said if text and not _is_prose(text)), said[-1] or answer)
