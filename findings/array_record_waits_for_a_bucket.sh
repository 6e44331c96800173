#!/usr/bin/env bash
# array_record 0.8.6 reads gs:// by itself, and has no way to say how long it may wait. A request that gets no
# answer, or a 503, is repeated for a quarter of an hour, in opening and in reading; only then there is an error.
# (Seen: "Retry policy exhausted" after 946 seconds with a server that accepts and never answers, and no end after
# 1,000 seconds with a port that refuses and with one that answers 503.) Other threads run meanwhile,
# so a thread with a deadline is a way out, and if it is a daemon it doesn't keep a program from its end.
#
# Three more things of the same reader. A shard that can't be opened, for a 403, has 0 records and raises nothing; only
# reading a record raises. What comes after a # in a name is taken for the generation of an object, so
# that gs://bkt/x#y/a opens with 0 records and without an error (reading raises "Invalid generation number"). With the
# generation written behind it, gs://bkt/x#y/a#GENERATION, the name is right. And a record is asked for with an open
# end, "bytes=START-": the server begins to send all the rest of the file.
#
# Output seen:
#   503: no answer after 20 s, 4 requests
#   403: 0 records
#   x#y/a: 0 records, no request
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet array_record==0.8.6
cat >"$folder/show.py" <<'PYTHON'
import http.server
import os
import sys
import threading
import time

status, asked = 503, []


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from array_record.python.array_record_module import ArrayRecordReader

found = []


def count(path):
    try:
        found.append(ArrayRecordReader(path).num_records())
    except RuntimeError as error:
        found.append(str(error).partition(",")[0])


thread = threading.Thread(target=count, args=["gs://bkt/a"], daemon=True)
thread.start()
thread.join(20)
waits = thread.is_alive()
print("503:", f"no answer after 20 s, {len(asked)} requests" if waits else found, flush=True)
status = 403
found.clear()
count("gs://bkt/c")
refused = found.pop()
print(f"403: {refused} records")
before = len(asked)
count("gs://bkt/x#y/a")
print(f"x#y/a: {found[0]} records, {'a' if len(asked) > before else 'no'} request", flush=True)
os._exit(not (waits and refused == 0 and found == [0]))
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
