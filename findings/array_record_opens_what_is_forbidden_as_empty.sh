#!/usr/bin/env bash
# array_record 0.8.6 reads gs:// by itself. A shard that can't be opened, since the storage answers 403, has 0 records
# and raises nothing; only reading a record raises. A program that counts what it has takes it for an empty data set.
#
# What comes after a # in a name is taken for the generation of an object, so that gs://bkt/x#y/a opens with 0 records,
# without an error and without a request (reading raises "Invalid generation number"). With the generation written behind
# it, gs://bkt/x#y/a#GENERATION, the name is right.
#
# Two more things, which this doesn't show. There is no way to say how long the reader may wait: where the storage gives no
# answer, opening and reading go on for a quarter of an hour (946 seconds were seen) before there is an error. And a
# record is asked for with an open end, "bytes=START-": the server begins to send all the rest of the file.
#
# Output seen:
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

asked = []


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(403)
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


count("gs://bkt/c")
refused = found.pop()
print(f"403: {refused} records")
before = len(asked)
count("gs://bkt/x#y/a")
print(f"x#y/a: {found[0]} records, {'a' if len(asked) > before else 'no'} request", flush=True)
os._exit(not (refused == 0 and found == [0] and len(asked) == before))
PYTHON
"$folder/venv/bin/python" "$folder/show.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
