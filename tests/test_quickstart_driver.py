"""The quickstart's driver: killed at any moment, or out of disk, it goes on where it was when run again."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

# Forks, so that the driver is imported once. The stages are loops that count; no device is asked for.
DRIVER = """
import itertools, json, os, pathlib, resource, signal, sys, types
from PIL import Image
from launch import quickstart_stages as quickstart
from mmada_jax.programs.process import fail

root = pathlib.Path(sys.argv[1])
form = quickstart.form("digits,smoke", quickstart.Cases(1, 1), {})
for stage, n in (("image_tokenizer", 2), ("pretrain", 3), ("cot", 3)):
    form.stages[stage].steps = n
write_whole = quickstart.write_whole


def start(workdir, dies=None, full=False):
    "The driver, killed at an event, or on a disk that fills before the report; its exit status and output."
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        with os.fdopen(read) as file:
            out = file.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out
    os.dup2(write, 1), os.dup2(write, 2)
    events = itertools.count()

    def event():
        if next(events) == dies:
            os.kill(os.getpid(), signal.SIGKILL)

    def train(config, folder):
        "Saves after every second step."
        n = config.steps if "steps" in config else config.iterations * config.objective.mu
        saved, rows = folder / "saved", quickstart.metrics.read(folder / "metrics.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        for step in range(int(saved.read_text()) + 1 if saved.is_file() else 1, n + 1):
            event()
            rows.append({"step": step, "wall_seconds": len(rows) + 1.0, "data_wait": 0.0})
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(rows[-1]) + "\\n")
            event()
            if step % 2 == 0 or step == n:
                write_whole(saved, str(step))
        return types.SimpleNamespace(step=n)

    def measure_stages(workdir, form):
        event()
        return {"stages": {}}, {}

    def write(path, data):
        event()
        write_whole(path, data)
        event()

    def page(*_):
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return "<p>" * 100_000

    quickstart.train, quickstart.rl = train, types.SimpleNamespace(train=train)
    quickstart.measure_stages, quickstart.page, quickstart.write_whole = measure_stages, page, write
    quickstart.results, quickstart.curves = lambda pictures: Image.new("L", (8, 8)), lambda histories: []
    quickstart.table = lambda result: []
    status = 0
    try:
        quickstart.complete(workdir, "default", 0, {"default": form})
    except Exception as error:
        try:
            fail(error)
        except SystemExit as ended:
            print(ended)
            status = 1
    sys.stdout.flush()
    os._exit(status)


def kept(workdir):
    "What a finished run has: its report but for the seconds, and the steps of each stage with their rows."
    report = json.loads((workdir / "report.json").read_text())
    rows = {stage: quickstart.metrics.read(workdir / stage / "metrics.jsonl") for stage in form.stages}
    for stage, of_stage in rows.items():  # with the parts that a kill has cut off
        assert report["seconds"][stage] == of_stage[-1]["wall_seconds"] == len(of_stage)
    del report["seconds"]
    assert (workdir / "report.html").read_text() == "<p>" * 100_000
    assert Image.open(workdir / "results.png").size == (8, 8)
    assert not list(workdir.rglob("*.tmp"))
    return report, {stage: [row["step"] for row in of_stage] for stage, of_stage in rows.items()}


assert start(root / "whole")[0] == 0
report, steps = kept(root / "whole")
for n in itertools.count():
    workdir = root / str(n)
    status, out = start(workdir, dies=n)
    if status == 0:
        break
    assert status == -signal.SIGKILL, out
    status, out = start(workdir)
    assert status == 0, out
    again, repeated = kept(workdir)
    assert again == report
    for stage in steps:  # what was not saved is done again, nothing else
        assert sorted(set(repeated[stage])) == steps[stage]
    assert sum(map(len, repeated.values())) <= sum(map(len, steps.values())) + 2
    status, out = start(workdir)
    assert status == 0 and "everything is done already" in out, out
assert n > 2 * sum(map(len, steps.values())), (n, steps)

status, out = start(root / "full", full=True)
assert status == 1, out
*_, line = out.splitlines()
assert line.startswith("error: ") and line.endswith("report.html'; make room, and run it again"), out
assert "Traceback" not in out
assert not (root / "full/report.json").exists()
trained = start(root / "full")
assert trained[0] == 0, trained[1]
assert kept(root / "full") == (report, steps)
"""


def test_a_kill_at_any_moment_and_a_full_disk_cost_nothing_that_is_done(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
