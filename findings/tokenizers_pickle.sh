#!/usr/bin/env bash
# tokenizers 0.23.3 (Python): Tokenizer.encode_special_tokens is lost where a tokenizer is pickled or copied.
#
# The property makes `encode` read the strings of special tokens as ordinary text, which is what text of
# unknown origin needs. It isn't part of the tokenizer's JSON, and pickle and copy.deepcopy go by the JSON.
# So a tokenizer that is sent to a worker process reads the same text in another way there: the special
# tokens are back, without an error or a warning. (TextTokenizer sets the property anew where it is
# unpickled.)
#
# Output seen:
#   here:             True ['<', '|', 'e', 'n', 'd', '|', '>']
#   pickled:          False ['<|end|>']
#   copy.deepcopy:    False ['<|end|>']
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import pickle
import sys

from tokenizers import Tokenizer, models

letters = {letter: i for i, letter in enumerate("<|end>")}
tokenizer = Tokenizer(models.BPE(letters, []))
tokenizer.add_special_tokens(["<|end|>"])
tokenizer.encode_special_tokens = True
copies = {
    "here:": tokenizer,
    "pickled:": pickle.loads(pickle.dumps(tokenizer)),
    "copy.deepcopy:": copy.deepcopy(tokenizer),
}
for name, one in copies.items():
    print(f"{name:17}", one.encode_special_tokens, one.encode("<|end|>").tokens)
sys.exit([one.encode_special_tokens for one in copies.values()] != [True, False, False])
PYTHON
