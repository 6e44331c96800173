"""mmada prepare --engine ray: the bytes of the plain loop, whatever dies on the way."""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

import pytest
from conftest import ROOT, xla_flags
from prepare_run import encode, picture, preparer, published
from programs import end_heirs, heirs

from launch import bench
from mmada_jax import cluster
from mmada_jax.data import sources
from mmada_jax.model import prepare as module
from mmada_jax.model.actors import TRIES, OnRay

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),  # of jax; Ray's children don't use it
]
prepare = pytest.fixture(preparer)
tokenizer = pytest.fixture(scope="module")(published)
RECORDS, SHARDS, MARK = 144, 6, "MMADA_TEST_MARK"
# A shard takes half a second, so that a worker can be killed within it.
SETTINGS = {"records_per_shard": RECORDS // SHARDS, "image_size": 64, "max_skipped": 0.1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Pictures with captions in a tar; some are no pictures."""
    path = tmp_path_factory.mktemp("source") / "pictures.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(RECORDS):
            data = encode(picture(i))
            for suffix, file in (("png", data[:99] if i % 40 == 5 else data), ("txt", b"caption %d" % i)):
                member = tarfile.TarInfo(f"{i:05}.{suffix}")
                member.size = len(file)
                tar.addfile(member, io.BytesIO(file))
    return sources.SourceConfig(str(path), "webdataset")


@pytest.fixture(scope="module")
def plain(config, tokenizer, tmp_path_factory):
    """What the plain loop makes of it, on one device as the workers."""
    out = tmp_path_factory.mktemp("plain") / "out"
    done = subprocess.run(
        command(config, tokenizer, out), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return content(out)


def command(config, tokenizer, out, *words):
    options = {name: value for name, value in SETTINGS.items()}
    options |= {"format": config.format, "path": config.path, "image_tokenizer": tokenizer, "out": out}
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "launch" / "prepare.py"), *given, *map(str, words)]


def environment(**more):
    left_out = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return left_out | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(1)} | more


def content(out):
    """Name -> bytes of all that a user may use; nothing else may lie beside it."""
    assert {path.suffix for path in out.iterdir()} <= {".array_record", ".json", ".lock"}
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".lock"}


class Run:
    """A call of the program with --engine ray, with a home and a temporary folder of its own."""

    def __init__(self, config, tokenizer, out, folder, *words):
        mark = f"{folder}/{time.monotonic_ns()}"
        self.out, self.mark = out, f"{MARK}={mark}"
        self.process = subprocess.Popen(
            command(config, tokenizer, out, "--engine", "ray", *words),
            env=environment(HOME=folder, TMPDIR=folder, **{MARK: mark}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def writer_of(self, shard, besides=(), seconds=60):
        """The worker that writes the shard of this number, as soon as one has begun with it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            for path in self.out.glob(f"shard-{shard:05}*.array_record.*.tmp"):
                worker = int(path.name.split(".")[2].partition("-")[0])
                if worker not in besides:
                    return worker
            time.sleep(0.01)
        return None

    def end(self):
        """What it printed on stderr; its processes must be gone."""
        _, error = self.process.communicate(timeout=120)
        until(lambda: not heirs(self.mark))
        return error


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def start(config, tokenizer, tmp_path):
    """Starts runs, and kills what is left of them."""
    folder = tempfile.mkdtemp(prefix="m", dir="/tmp")  # Ray's sockets take short paths only
    runs = []

    def call(*words):
        runs.append(Run(config, tokenizer, tmp_path / "out", folder, *words))
        return runs[-1]

    yield call
    left = [path.name for path in pathlib.Path(folder).iterdir() if path.name != ".cache"]
    for run in runs:
        end_heirs(run.mark)
        run.process.communicate()
    shutil.rmtree(folder)
    assert not left, "Ray's session, or a token in the home"


def listening(processes):
    """Addresses on which processes listen, as /proc/net/tcp and tcp6 write them."""
    sockets = set()
    for process in processes:
        for path in pathlib.Path(f"/proc/{process}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(path)))
    tables = [pathlib.Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_worker_that_is_killed_costs_nothing_but_time(start, plain):
    run = start("--workers", 2)
    worker = run.writer_of(2)
    addresses = listening(heirs(run.mark))
    time.sleep(0.2)
    os.kill(worker, signal.SIGKILL)
    error = run.end()
    assert run.process.returncode == 0, error
    assert content(run.out) == plain
    assert addresses and addresses <= LOOPBACK
    (line,) = [line for line in error.splitlines() if "records/s" not in line]
    assert re.fullmatch(r"a worker has died while it wrote shard-0000[2-5]-of-00006.array_record "
                        r"\(1 of 3 times\); again by another", line)  # fmt: skip


def test_a_driver_that_is_killed_goes_on_with_the_same_command(start, plain):
    run = start()
    run.writer_of(2)
    time.sleep(0.2)
    os.kill(run.process.pid, signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in run.out.glob("*.array_record")}
    assert 2 <= len(kept) < SHARDS
    again = start()
    error = (
        again.end()
    )  # two agents of the first cluster look for it for a minute, and are killed by `start`
    assert again.process.returncode == 0, error
    assert content(again.out) == plain
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


@pytest.mark.slow
def test_a_shard_that_always_kills_its_worker_is_named(start, plain):
    run, killed = start("--workers", 1), set()
    while (worker := run.writer_of(4, besides=killed)) is not None:
        os.kill(worker, signal.SIGKILL)
        killed.add(worker)
    error = run.end()
    assert run.process.returncode == 1
    assert len(killed) == TRIES
    (line,) = [line for line in error.splitlines() if line.startswith("error")]
    assert f"{TRIES} workers have died while they wrote {run.out}/shard-00004-of-00006.array_record" in line
    assert "records 96 to 119 of the source" in line
    assert "Traceback" not in error
    done = content(run.out)
    assert {name: plain[name] for name in done} == done
    assert sum(name.endswith(".array_record") for name in done) == SHARDS - 1


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_ends_the_workers_and_keeps_what_is_finished(start, plain, number):
    run = start()
    run.writer_of(1)
    # A terminal tells all processes of the command, others tell the command.
    (os.killpg if number == signal.SIGINT else os.kill)(run.process.pid, number)
    error = run.end()
    assert run.process.returncode == 128 + number
    last = error.splitlines()[-1]
    assert re.fullmatch("stopped: [1-5] of 6 shards are finished; the same command goes on", last)
    assert "Traceback" not in error
    done = content(run.out)
    assert {name: plain[name] for name in done} == done


TWO_NODES = """
import sys, threading, time
import ray
from ray.cluster_utils import Cluster
from mmada_jax.data.sources import SourceConfig
from mmada_jax.model.actors import OnRay
from mmada_jax.model.prepare import prepare
import json, pathlib

path, tokenizer, out, settings = sys.argv[1:]
head = {"num_cpus": 1, "node_ip_address": "127.0.0.2", "include_dashboard": False,
        "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args=head)
second = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3", object_store_memory=100 << 20)
ray.init(cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False, logging_level="ERROR")
workers = set()

def lose():
    while not list(pathlib.Path(out).glob("shard-00003*.tmp")):
        time.sleep(0.01)
    for path in pathlib.Path(out).glob("*.array_record.*.tmp"):
        workers.add(path.name.split(".")[2].partition("-")[0])
    cluster.remove_node(second, allow_graceful=False)

thread = threading.Thread(target=lose)
thread.start()
config, settings = SourceConfig(path, "webdataset"), json.loads(settings)
prepare(config, out, image_tokenizer=tokenizer, engine=OnRay(), **settings)
thread.join()
ray.shutdown()
cluster.shutdown()
print(len(workers), "workers")
"""


@pytest.mark.slow
def test_a_node_that_is_lost_costs_nothing_but_time(start, plain, config, tokenizer, tmp_path):
    words = (config.path, tokenizer, tmp_path / "out", json.dumps(SETTINGS))
    folder = tempfile.mkdtemp(prefix="m", dir="/tmp")
    of_ray = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", TWO_NODES, *words], env=environment(HOME=folder, **of_ray),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    assert "2 workers" in done.stdout, "one on each node"
    assert "a worker has died while it wrote" in done.stderr
    assert content(tmp_path / "out") == plain


# ---- Options ---------------------------------------------------------------------------------------


def test_options_that_make_no_sense(prepare, tmp_path):
    args = ("--format", "jsonl", "--path", tmp_path / "nothing")
    for words, told in (
        (("--workers", 2), "--workers: only for --engine ray"),
        (("--engine", "ray", "--workers", 0), "--workers is 0; it must be at least 1"),
        (("--engine", "ray", "--worker_gpus", -1), "--worker_gpus is -1.0 for each worker"),
        (("--engine", "ray", "--worker_resources", "TPU"), 2),
    ):
        error = prepare(*args, *words)[1]
        assert error == told or told in str(error)


def test_without_ray_it_says_what_to_install(prepare, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    args = ("--format", "jsonl", "--path", tmp_path / "nothing")
    error = prepare(*args, "--engine", "ray")[1]
    assert error == "error: --engine ray needs Ray: pip install 'mmada_jax[cluster]'"


def test_an_address_at_which_nothing_is(prepare, free_port, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "t"}) + "\n")
    args = ("--format", "jsonl", "--path", tmp_path / "texts.jsonl", "--engine", "ray", "--address")
    for address, told in (
        (f"127.0.0.1:{free_port}", "no Ray cluster answers at 127.0.0.1"),
        ("head", "no Ray cluster answers at head"),
        ("ray://head:10001", "is of Ray's client; give the command on a host of the cluster"),
    ):
        error = prepare(*args, address)[1]
        assert told in error and "--address" in error


@pytest.mark.slow
def test_the_benchmark_measures_both_engines(capsys):
    report = bench.main(["prepare", "--pictures", "16", "--shards", "2", "--side", "64", "--repeats", "1"])
    assert report["ratio"] == report["records_per_second"]["ray"] / report["records_per_second"]["plain"]
    assert 0 < report["start"]["plain"] < report["start"]["ray"]
    assert "ray / plain: " in capsys.readouterr().out


# ---- In this process -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session():
    """A cluster of this machine for several calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", xla_flags(1))
        with cluster.connected("local"):
            yield


@pytest.fixture
def call(config, tokenizer, tmp_path, session):
    def call(**options):
        settings = SETTINGS | {"image_tokenizer": str(tokenizer), "engine": OnRay(workers=2)} | options
        return module.prepare(config, tmp_path / "out", **settings)

    return call


def test_what_was_finished_is_kept(call, plain, tmp_path):
    report, skips = call()
    assert content(tmp_path / "out") == plain
    assert [skip.index for skip in skips.all] == list(range(5, RECORDS, 40))
    shards = sorted((tmp_path / "out").glob("*.array_record"))
    os.truncate(shards[2], 1000)
    shards[4].with_suffix(".json").unlink()
    (tmp_path / "out" / "dataset.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in shards}
    assert call()[0] == report
    assert content(tmp_path / "out") == plain
    written = [i for i, path in enumerate(shards) if path.stat().st_mtime_ns != before[path]]
    assert written == [2, 4]


def test_what_is_left_out_counts_over_all_shards(call, tmp_path):
    with pytest.raises(ValueError, match=r"3 of the first .* of 144 --max_skipped allows 2: record"):
        call(max_skipped=2 / RECORDS)
    assert "dataset.json" not in content(tmp_path / "out")


def test_errors_of_workers_end_it_as_they_would_here(call, tmp_path, monkeypatch):
    open_source = module.Writer.__init__

    def other(self, job):
        open_source(self, job)
        self.settings["fingerprint"] = "f"

    monkeypatch.setattr(module.Writer, "__init__", other)
    with pytest.raises(ValueError, match=r"a worker on .* has other data \(fingerprint is .* and 'f' here"):
        call(engine=OnRay(workers=1))


def test_a_machine_without_room(session):
    cpus = os.cpu_count()
    for engine, told in (
        (OnRay(workers=1, cpus=cpus + 1), f"0 of 1 workers with {cpus + 1} CPU each"),
        (OnRay(workers=cpus + 1), f"{cpus} of {cpus + 1} workers with 1 CPU each"),
        (OnRay(resources={"TPU": 4}), "0 of 1 workers with 1 CPU, 4 TPU each"),
    ):
        with pytest.raises(ValueError, match=rf"room for {told}: the cluster has {cpus} CPU"):
            engine._count(True)
    assert OnRay()._count(True) == 1
    assert OnRay(cpus=1)._count(True) == cpus
