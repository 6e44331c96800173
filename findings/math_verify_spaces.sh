#!/usr/bin/env bash
# math-verify 0.9.0 with latex2sympy2-extended 1.11.0: a space within a number is read as a sum, inside a box.
#
# \boxed{1 234}, as the SI, French and many data sets write one thousand two hundred and thirty-four, is
# 1 + 234 = 235, and \boxed{12 345} is 357. So `verify` calls the answer 235 equal to the truth 1 234, and the
# answer 1234 wrong. Outside of a box the same text is 1234. The mixed number 3 1/2 is 2 in a box and 1
# outside of it, while \frac makes 7/2 of it as it should. No error or warning says so. (The reward `correct`
# reads such numbers itself before the library sees them.)
#
# Output seen:
#   \boxed{1 234}    235
#   1 234            1234
#   \boxed{12 345}   357
#   \boxed{3 1/2}    2
#   235 for \boxed{1 234}:  True
#   1234 for \boxed{1 234}: False
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 latex2sympy2-extended==1.11.0 sympy==1.14.0 \
  antlr4-python3-runtime==4.13.2
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from math_verify import parse, verify

texts = [r"\boxed{1 234}", "1 234", r"\boxed{12 345}", r"\boxed{3 1/2}"]
values = [parse(text)[0] for text in texts]
for text, value in zip(texts, values):
    print(f"{text:16} {value}")
taken = [verify(parse(r"\boxed{1 234}"), parse(answer)) for answer in ("235", "1234")]
print(rf"235 for \boxed{{1 234}}:  {taken[0]}", rf"1234 for \boxed{{1 234}}: {taken[1]}", sep="\n")
sys.exit(values != [235, 1234, 357, 2] or taken != [True, False])
PYTHON
