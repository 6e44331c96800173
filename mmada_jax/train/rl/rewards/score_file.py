"""A program that runs a reward of the user's own: a function in a file that the user has named.

It reads JSON lines [limit in seconds, "load" or "score", arguments...] and answers each with a line
{"value": ...} or {"error": ...}. A call that takes longer than its limit ends the process (SIGALRM), and so
does the end of the input. It imports nothing of this project. The file is the user's code and runs with the
user's rights: nothing here guards against it.
"""

import base64
import importlib.util
import io
import json
import os
import signal
import sys

_score = None


def load(path: str, name: str) -> list[str]:
    """Runs the file and takes its function of that name."""
    global _score
    spec = importlib.util.spec_from_file_location("reward_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(path))  # what lies beside it may be imported
    spec.loader.exec_module(module)
    _score = getattr(module, name)
    return [name]


def score(prompt: str, completion: str, answer: object, png: str | None) -> float:
    """The score of one completion; an image comes as a PNG in base64, and the function gets Pillow's."""
    image = None
    if png is not None:
        from PIL import Image

        image = Image.open(io.BytesIO(base64.b64decode(png)))
    return float(_score(prompt, completion, answer, image))


def main() -> None:
    """Answers requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the file may print, and replies have a file of their own
    functions = {"load": load, "score": score}
    for line in sys.stdin:
        limit, name, *arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            reply = {"value": functions[name](*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
