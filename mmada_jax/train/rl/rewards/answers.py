r"""Answers as models write them and data sets hold them: which part of a text is the answer, and whether
it means the same as the expected one, as far as that needs no algebra.

All of it takes time linear in a text's length, and of a long answer the last LONGEST characters count.
"""

import functools
import re
import unicodedata

from mmada_jax.train.rl.rewards import quantities

LONGEST = 2000

# ---- Which part of a text ------------------------------------------------------------------------


def answer_of(completion: str) -> str:
    r"""The answer in a completion: of what follows the last </think> (of all, if there is none) the
    content of the last <answer>; in it that of the last balanced \boxed{}, or a last line after ####."""
    text = completion.rpartition("</think>")[2]
    text = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    box = _last_box(text)
    if box is not None:
        return box.strip()
    last = text.rpartition("\n")[2].strip()
    return last.lstrip("#").strip() if last.startswith("####") else text


def _last_box(text: str) -> str | None:
    r"""The content of the box that begins last, of those that end; \boxed5 is one too. Boxes that only a
    comma or "and" parts are a list."""
    opened: list[tuple[int, int, bool]] = []
    boxes: list[tuple[int, int, int, int]] = []  # begin and end, those of the content
    for token in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{)?|\\.|[{}]", text, re.DOTALL):
        if token[0] == "}" and opened:
            begun, inside, is_box = opened.pop()
            if is_box:
                boxes.append((begun, token.end(), inside, token.start()))
        elif token[0] == "{" or token[1]:
            opened.append((token.start(), token.end(), token[0] != "{"))
        elif token[0].startswith((r"\boxed", r"\fbox")):
            bare = re.compile(r"[^\s{}$]+").match(text, token.end())
            if bare:
                end = bare.start() + len(bare[0].rstrip(".,"))
                boxes.append((token.start(), end, bare.start(), end))
    if not boxes:
        return None
    boxes.sort()
    start, _, inside, end = boxes.pop()
    found = [text[inside:end].strip()]
    while boxes and _JOINS.fullmatch(text[boxes[-1][1] : start].replace("$", " ").strip()):
        start, _, inside, end = boxes.pop()
        found.append(text[inside:end].strip())
    return ", ".join(reversed(found))


_JOINS = re.compile(r",|,?\s*(?:and|\\text\s*\{\s*and\s*\})")


# ---- Without marks -------------------------------------------------------------------------------

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SYMBOLS = {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "≈": r"\approx ", "−": "-", "‒": "-", "–": "-",
    "—": "-", "‐": "-", "‑": "-", "。": ".", "、": ",", "٫": ".", "٬": ",", "،": ",", "؛": ";", "।": ".",
    "۔": ".", "…": "...", "∶": ":", "㎡": "m^2", "㎠": "cm^2", "㎢": "km^2", "㎥": "m^3", "㎤": "cm^3",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}",
    "٪": "%", "′": "'", "’": "'", "‘": "'", "°": "°", "℃": "°C", "℉": "°F", "∙": r"\cdot ",
}  # fmt: skip
_QUOTES = '"“”„«»「」『』〈〉《》'
_GREEK = "GREEK SMALL LETTER "
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\w+))")

_TAGS = re.compile(
    r"</?(?:answer|final|result|b|i|u|p|em|strong|code|pre|span|div|br)\s*/?>", re.IGNORECASE
)
_DOLLARS = re.compile(r"\$\$([^$]+)\$\$|(?<![\\\d])\$(?!\s)((?:[^$\n\\]|\\.)+?)(?<!\s)\$(?!\d)")
_MARKDOWN = (
    (re.compile(r"```[a-z]*\n?([^`]*)```"), r"\1"),
    (re.compile(r"`([^`\n]*)`"), r"\1"),
    (re.compile(r"(?<![\w)*])(\*{1,3}|__?|~~)(?=[^\s*_])([^*\n]{0,300}?[^\s*])\1(?![\w(*])"), r"\2"),
    (re.compile(r"^\s*(?:#{1,6}|>|[*•])\s+", re.MULTILINE), ""),
)
_LATEX = (
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|tiny|large)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"(?<!\\)\\!\s*"), ""),
    (re.compile(r"\\\\\s*\[[\d.]+\s*(?:pt|em|ex|mm|cm)\]"), r"\\\\"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"(?<=[\w)])\s?\*\*\s?(?=[\w({-])"), "^"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<!\\)\\[,;:() \[\]](?!\[)|\\q?quad(?![A-Za-z])|\\thinspace|~"), " "),
    (re.compile(r"\{\s*([,.])\s*\}"), r"\1"),
    (re.compile(r"\\([%&#])"), r"\1"),
    (re.compile(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?|\\textdegree|(?<=\d)\s*\\circ"), "°"),
)
# What only says how words look.
_LOOKS = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname|boldsymbol|bold|emph|"
    r"underline|boxed|fbox)\s*\{([^{}]*)\}"
)


def plain(text: str) -> str:
    """A text without markdown, quotes, emoji and the commands of LaTeX that only say how it looks; the
    digits and the punctuation of all scripts as ASCII has them. Lines stay lines."""
    text = _TAGS.sub(" ", _ascii(text))
    for pattern, replacement in _MARKDOWN:
        text = pattern.sub(replacement, text)
    text = _DOLLARS.sub(lambda found: f" {found[1] or found[2]} ", text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    for _ in range(4):  # as deep as they are nested
        text = _LOOKS.sub(r" \1 ", text)
    text = re.sub(r"[^\S\n]+", " ", text.replace(r"\$", "$")).replace(" ^", "^")
    text = re.sub(r"\s*\n\s*", "\n", text).strip()
    text = re.sub(r"(?<=[\w)}%°])\s+!+$|(?<=[A-Za-z])!+$", "", text)
    text = re.sub(r"[\s.;,:\\]+$", "", text)
    quoted = re.fullmatch(r"'([^']*)'", text)
    return quoted[1].strip() if quoted else text


@functools.lru_cache(4096)
def _symbol(char: str) -> str:
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    name, category = unicodedata.name(char, ""), unicodedata.category(char)
    folded = unicodedata.normalize("NFKC", char)
    if category == "Nd":
        return str(unicodedata.decimal(char))
    if category == "No" and "⁄" in folded:
        return " " + folded.replace("⁄", "/")
    if name.startswith(_GREEK) and char not in "µμ":
        return f"\\{name.removeprefix(_GREEK).lower()} "
    if char in _QUOTES or category in ("Cf", "Mn", "Sk") or (category == "So" and folded == char):
        return ""
    return "".join(_SYMBOLS.get(c, c) for c in folded)


def _ascii(text: str) -> str:
    raised = rf"[{''.join(_SUPERSCRIPTS)}]+"
    text = re.sub(raised, lambda m: f"^{{{''.join(_SUPERSCRIPTS[c] for c in m[0])}}}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3] or ''}}}", text)
    return "".join(c if c.isascii() else _symbol(c) for c in text).replace('"', "")


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
# What stands before a number that isn't the answer.
_BOUNDS = re.compile(
    r"(?:(?:\bnot|\bnever|n't)(?:\s+(?:be|equal|equal to|(?:think|believe)\s.{0,15}))?|"
    r"\b(?:or|than|least|most|up to|over|under|above|"
    r"below)|[+*/^<>]|\d\s*-)$",
    re.IGNORECASE,
)
# A sentence that only says what isn't right.
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
    """1 or 0, or where it takes algebra to say: the two texts to compare, as LaTeX."""
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
    """What a text says in the end, the likeliest first: itself if it is no sentence."""
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
    """What a text says in the end, and what it says that something is."""
    return [part.strip() for whole in conclusions(text) for part in (whole, _IS.split(whole)[-1])]


def _ratio(text: str) -> str:
    """A ratio, or a time of the day without its half, as 3:4."""
    text = re.sub(r"\s*[ap]\.?\s?m\.?$", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1:\2", text)
    return re.sub(r"(?<=\d)\s*(?:to|/|:)\s*(?=\d)", ":", text)


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
    """The quantity that a sentence ends with, None if it lists several and says nothing of them."""
    if _ANSWER.search(text):
        return None
    starts = quantities.numbers_in(text)
    if not starts or (len(starts) > 1 and not _STATES.search(text)):
        return None
    last = re.split(r"[!?;\n]|\.(?=\s|$)", text[starts[-1] :], maxsplit=1)[0]
    before = text[: starts[-1]].rstrip()
    if _BOUNDS.search(before):
        return None
    return quantities.read(last) or quantities.read(re.split(r"[,()]", last, maxsplit=1)[0])


def _chosen(text: str) -> str | None:
    """The letter of the choice that a text makes, if it makes one."""
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
    """Whether a text has words: they have vowels, products of variables such as xyz seldom do."""
    words = [word.lower() for word in _PROSE.findall(text)]
    return any(
        word in _SHORT or (len(word) > 2 and word not in _NO_PROSE and re.search("[aeiou]|(?<!x)y", word))
        for word in words
    )


# ---- What is left to algebra ---------------------------------------------------------------------

_TAIL = re.compile(r"(?<=[\d)}ieπ])\s+([A-Za-z°][A-Za-z°\s/.]*(?:\^?\{?[23]\}?)?)$")


def _algebra(want: str, answer: str, unit: frozenset[str] = frozenset()) -> float | tuple[str, str]:
    """Two texts for a library, or 0 where they have different units."""
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
    return _boxed(want), _boxed(answer)


def _point(text: str) -> tuple[list[str], str]:
    """Of x=1, y=2 the names and (1,2), in the order of the names."""
    parts = [re.fullmatch(r"\s*([A-Za-z])\s*=([^=<>]+)", part) for part in re.split(r",|;|\band\b", text)]
    if len(parts) < 2 or None in parts or len({part[1] for part in parts}) < len(parts):
        return [], ""
    parts.sort(key=lambda part: part[1])
    return [part[1] for part in parts], f"({','.join(part[2].strip() for part in parts)})"


def _split(text: str) -> tuple[str, frozenset[str]]:
    """A text of mathematics without its unit, and that."""
    tail = _TAIL.search(text)
    named = tail and quantities.read(f"1 {tail[1]}")
    if named and (named.unit or "unit" in tail[1]):
        return text[: tail.start()].strip(), named.unit
    return text, frozenset()


def _boxed(text: str) -> str:
    return rf"\boxed{{{text}}}"


def _tex(answer: str, found: str) -> str:
    """An answer as a library reads it best: the mathematics in a sentence, else the whole."""
    if not _is_prose(_split(answer)[0]):
        return answer.replace("\n", " ")
    marked = _ascii(found)
    if re.search(r"(?<!\\)(?:\$|\\[(\[])", marked):
        return marked
    last = conclusions(answer)[-1]
    said = [last, _IS.split(last)[-1].strip(), last.rpartition("=")[2].strip()]
    return next((text for text in said if text and not _is_prose(text)), said[-1] or answer)
