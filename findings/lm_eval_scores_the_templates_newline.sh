#!/usr/bin/env bash
# lm-eval 0.4.13: with a chat template, the template's own last newline is scored as a part of the answer.
#
# For a choice or a likelihood the harness splits context and continuation, and moves white space at the end of
# the context to the continuation. That is meant for prompts that people write ("Answer: "). A rendered
# conversation ends with white space too where its template does, as those of Llama 3 ("...<|end_header_id|>\n\n")
# and of MMaDA ("...<|end_header_id|>\n"). So the model is shown a header without its newline, and is asked how
# likely the newline and the answer are. For a left-to-right model that adds the same number to all choices,
# unless the tokenizer joins the newline with what follows. For a masked diffusion model it doesn't: the newline
# is hidden and revealed together with the answer, and a choice of one token becomes one of two.
# (`mmada evaluate --chat` splits behind the whole template; a test looks at the ids.)
#
# Output seen:
#   context      '<|user|>\n2+2?<|assistant|>'
#   continuation '\n4'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet lm-eval==0.4.13
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import types

from lm_eval.api.model import TemplateLM


class Characters(TemplateLM):
    """A model whose tokens are characters, and that notes what it is asked."""

    eot_token_id = 0
    tokenizer_name = "characters"

    def tok_encode(self, string, add_special_tokens=None, **_):
        return [ord(letter) for letter in string]

    def _loglikelihood_tokens(self, requests, **_):
        self.asked = [["".join(map(chr, ids)) for ids in (context, more)] for _, context, more in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        turns = "".join(f"<|{turn['role']}|>\n{turn['content']}" for turn in chat_history)
        return turns + "<|assistant|>\n"


model = Characters()
context = model.apply_chat_template([{"role": "user", "content": "2+2?"}])
model.loglikelihood([types.SimpleNamespace(args=(context, "4"))], disable_tqdm=True)
[[shown, scored]] = model.asked
print(f"context      {shown!r}\ncontinuation {scored!r}")
if (shown, scored) != (context.rstrip("\n"), "\n4"):
    sys.exit("the behaviour has changed")
PYTHON
