r"""Which part of a completion is its answer, and this part without the marks that only say how it looks.

Takes time linear in a text's length. Nothing is compared here.
"""

import functools
import re
import unicodedata

# ---- Which part of a text ------------------------------------------------------------------------


def answer_of(completion: str) -> str:
    r"""The answer in a completion.

    Only text after the last </think> counts, or all of it without one; in this text only the content of
    the last <answer>, if there is one. There the answer is the content of the last balanced \boxed{}, else
    a last line after ####, else all of it."""
    text = completion.rpartition("</think>")[2]
    text = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    box = _last_box(text)
    if box is not None:
        return box.strip()
    last = text.rpartition("\n")[2].strip()
    return last.lstrip("#").strip() if last.startswith("####") else text


def _last_box(text: str) -> str | None:
    r"""The content of the box that begins last among the boxes that end; \boxed5 is one too. Boxes with
    only a comma or "and" between them are a list."""
    opened: list[tuple[int, int, bool]] = []
    boxes: list[tuple[int, int, int, int]] = []  # begin and end of the box, begin and end of its content
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
# Commands that only say how text looks.
_LOOKS = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname|boldsymbol|bold|emph|"
    r"underline|boxed|fbox)\s*\{([^{}]*)\}"
)


def plain(text: str) -> str:
    """A text without markdown, quotes, emoji and the commands of LaTeX that only say how it looks. Digits
    and punctuation of all scripts become ASCII. Lines stay lines."""
    text = _TAGS.sub(" ", ascii_of(text))
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


def ascii_of(text: str) -> str:
    """A text with the digits, signs and letters of all scripts as ASCII or LaTeX has them."""
    raised = rf"[{''.join(_SUPERSCRIPTS)}]+"
    text = re.sub(raised, lambda m: f"^{{{''.join(_SUPERSCRIPTS[c] for c in m[0])}}}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3] or ''}}}", text)
    return "".join(c if c.isascii() else _symbol(c) for c in text).replace('"', "")
