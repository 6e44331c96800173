"""launch/tpu: commands as text, against stubs of gcloud and kubectl; worker.sh and its signals for real."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TPU = ROOT / "launch/tpu/tpu.py"
WORKER = ROOT / "launch/tpu/worker.sh"
# Records its argv and what comes on stdin, and answers what it was told to.
STUB = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\036'; } >>"$STUBS/calls"
[ "$1" != apply ] || cat >"$STUBS/stdin"
if [ -f "$STUBS/answers" ] && [[ " $* " == *" describe "* ]]; then
  head -n 1 "$STUBS/answers"
  sed -i 1d "$STUBS/answers"
fi
[ ! -f "$STUBS/message" ] || cat "$STUBS/message" >&2
exit "$(cat "$STUBS/status" 2>/dev/null || echo 0)"
"""
# A slice of one worker, which is this machine, with $STUBS for a home.
LOCAL_WORKER = """#!/bin/bash
cd "$STUBS"
case "$4" in
  scp) cp "${@:5:2}" home ;;
  ssh) for word; do [[ $word != --command=* ]] || (cd home && HOME=$PWD bash -c "${word#*=}"); done ;;
esac
"""
PLACE = ("--zone", "us-central1-a", "--project", "MY_PROJECT")
TRAIN = (
    "--",
    "python",
    "launch/train.py",
    "--config",
    "configs/pretrain.py:8b,phase=1",
    "--note",
    "it's $HOME",
)
JOBSET = ("jobset", "--topology", "16x16", "--image", "IMAGE", "--bucket", "my-bucket")
ACTIVE = '{"name": "mmada", "state": {"state": "ACTIVE"}}'
GCLOUD = "gcloud compute tpus queued-resources"
HERE = "--zone=us-central1-a --project=MY_PROJECT"


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A PATH that begins with stubs, and what they were called with."""

    def __init__(self, folder, programs):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for program in programs:
            write_script(folder / "bin" / program, STUB)
        self.path = f"{folder}/bin:{os.environ['PATH']}"

    def tell(self, **files):
        for name, text in files.items():
            (self.folder / name).write_text(str(text) + "\n")

    def run(self, *argv):
        env = os.environ | {"PATH": self.path, "STUBS": str(self.folder), "TMPDIR": str(self.folder)}
        return subprocess.run(
            [sys.executable, TPU, *argv], env=env, capture_output=True, text=True, timeout=60
        )

    def calls(self):
        record = self.folder / "calls"
        calls = record.read_text().split("\x1e")[:-1] if record.exists() else []
        return [call.split("\0")[:-1] for call in calls]


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud", ("gcloud", "kubectl", "bash", "rm"))
    cloud.tell(answers=ACTIVE)
    return cloud


@pytest.mark.parametrize(
    "argv",
    [
        ("create", *PLACE),
        ("create", *PLACE, "--slices", "4", "--spot", "--name", "big-1", "--accelerator", "v6e-256"),
        ("wait", *PLACE),
        ("status", *PLACE),
        ("copy", *PLACE),
        ("install", *PLACE),
        ("mount", *PLACE, "my-bucket"),
        ("start", *PLACE, *TRAIN),
        ("logs", *PLACE, "--slice", "1", "--worker", "3", "--lines", "7"),
        ("stop", *PLACE, "--grace", "30"),
        ("delete", *PLACE),
        ("delete", *PLACE, "--yes"),
        ("jobset-logs", "--slice", "1"),
        ("jobset-delete", "--name", "big-1"),
    ],
    ids=lambda argv: " ".join(argv[:1]),
)
def test_a_dry_run_prints_what_is_run_and_runs_nothing(cloud, argv):
    dry = cloud.run(argv[0], "--dry-run", *argv[1:])
    assert (dry.returncode, dry.stderr) == (0, "")
    assert cloud.calls() == []
    real = cloud.run(*argv)
    assert (real.returncode, real.stderr) == (0, "")
    assert cloud.calls() == [shlex.split(line) for line in dry.stdout.splitlines()]
    assert cloud.calls()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), "--accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --node-id=mmada"),
        (
            ("--accelerator", "v5p-128", "--reserved"),
            "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --node-id=mmada --reserved",
        ),
        (
            ("--accelerator", "v6e-64", "--slices", "2", "--spot"),
            "--accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --node-count=2 --spot",
        ),
        (
            ("--accelerator", "v9-8", "--runtime", "new"),
            "--accelerator-type=v9-8 --runtime-version=new --node-id=mmada",
        ),
    ],
)
def test_create(cloud, argv, expected):
    done = cloud.run("create", "--dry-run", *PLACE, *argv)
    assert done.stdout == f"{GCLOUD} create mmada {expected} {HERE}\n"


def test_zone_and_project_are_gcloud_s_own_unless_given(cloud):
    assert cloud.run("delete", "--dry-run").stdout == f"{GCLOUD} delete mmada --force\n"


def test_the_command_reaches_the_worker_s_shell_as_it_was_given(cloud):
    cloud.run("start", *TRAIN)
    (call,) = cloud.calls()
    assert call[5:-1] == ["mmada", "--node=all", "--worker=all", "--batch-size=all"]
    option, _, command = call[-1].partition("=")
    assert option == "--command"
    assert shlex.split(command) == ["bash", "worker.sh", "start", *TRAIN[1:]]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("create", "--accelerator", "v4-8"), ("v4-8", "v5litepod-N, v5p-N, v6e-N", "--runtime")),
        (("create", "--accelerator", "v5p"), ("--accelerator v5p:", "v5p-N")),
        (("create", "--slices", "0"), ("--slices 0", "least is 1")),
        (("create", "--name", "My_Slice"), ("My_Slice", "at most 40", "try mmada-1")),
        (("create", "--name", "a" * 41), ("at most 40",)),
        (("wait", "--poll", "0"), ("--poll 0", "least is 1")),
        (("stop", "--grace", "-1"), ("--grace -1", "least is 0")),
        (("mount", "gs://my-bucket"), ("gs://my-bucket", "without gs://")),
        ((*JOBSET, "--accelerator", "v5p", *TRAIN), ("--accelerator v5p:", "tpu-v5p-slice")),
        ((*JOBSET, "--topology", "16x16x4", *TRAIN), ("16x16x4", "2 dimensions", "4x4")),
        ((*JOBSET, "--topology", "0x4", *TRAIN), ("0x4", "4x4")),
        ((*JOBSET, "--topology", "3x3", *TRAIN), ("3x3", "9 chips", "multiple of 4")),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_is_right(cloud, argv, words):
    done = cloud.run(*argv)
    assert (done.returncode, done.stdout, cloud.calls()) == (1, "", [])
    assert re.fullmatch(r"error: .*\n", done.stderr)
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("launch",),
        ("create", "--spot", "--reserved"),
        ("create", "--slices", "two"),
        ("start",),
        ("start", "--"),
        ("start", "python"),
        ("wait", "--", "python"),
        ("jobset", *TRAIN),
    ],
)
def test_wrong_usage_ends_with_2(cloud, argv):
    done = cloud.run(*argv)
    assert (done.returncode, cloud.calls()) == (2, [])
    assert done.stderr.startswith("usage: tpu.py")


def test_help_has_examples_and_every_command_has_help(cloud):
    top = cloud.run("--help").stdout
    assert "tpu.py start -- python launch/train.py" in top
    verbs = re.findall(r"^    ([a-z-]+)\s", top, re.M)
    assert len(verbs) == 13
    for verb in verbs:
        assert "--dry-run" in cloud.run(verb, "--help").stdout


@pytest.mark.parametrize(("argv", "program"), [(("create",), "gcloud"), (("jobset-delete",), "kubectl")])
def test_a_missing_program_is_one_line_with_the_remedy(cloud, argv, program):
    cloud.path = str(cloud.folder)
    done = cloud.run(*argv)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {program} isn't on PATH; install .*\n", done.stderr)


@pytest.mark.parametrize("argv", [("create",), ("wait",), ("copy",), ("jobset-delete",), (*JOBSET, *TRAIN)])
def test_a_failing_program_s_status_and_message_are_passed_on(cloud, argv):
    cloud.tell(message="ERROR: Permission denied", status=3)
    done = cloud.run(*argv)
    assert (done.returncode, done.stderr) == (3, "ERROR: Permission denied\n")
    assert len(cloud.calls()) == 1


def state(name, **more):
    return f'{{"state": {{"state": "{name}"{"".join(more.values())}}}}}'


def test_wait_looks_until_active(cloud):
    cloud.tell(answers="\n".join([state("WAITING_FOR_RESOURCES"), state("PROVISIONING"), ACTIVE, "never"]))
    done = run_without_sleep(cloud, "wait")
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE",
    ]  # fmt: skip
    assert (done.returncode, len(cloud.calls())) == (0, 3)


def run_without_sleep(cloud, *argv):
    """As Cloud.run, but its pauses take no time."""
    code = (
        "import runpy, sys, time; time.sleep = lambda s: None; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    env = os.environ | {"PATH": cloud.path, "STUBS": str(cloud.folder)}
    argv = [sys.executable, "-c", code, TPU, *argv]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["FAILED", "SUSPENDING", "SUSPENDED", "DELETING"])
def test_wait_ends_when_the_slice_can_t_become_active(cloud, name):
    why = ', "failedData": {"error": {"message": "no capacity here"}}' if name == "FAILED" else ""
    cloud.tell(answers=state(name, why=why))
    done = cloud.run("wait")
    assert done.returncode == 1
    assert re.fullmatch(rf"error: mmada is {name} and won't become ACTIVE.*delete it and.*\n", done.stderr)
    assert ("no capacity here" in done.stderr) == (name == "FAILED")


def test_status_asks_the_workers_only_when_there_are_some(cloud):
    cloud.tell(answers=state("PROVISIONING"))
    assert cloud.run("status").stdout == "mmada: PROVISIONING\n"
    assert len(cloud.calls()) == 1


# JobSet


def load_jobset(cloud, *argv):
    yaml = pytest.importorskip("yaml")
    done = cloud.run(*JOBSET, "--dry-run", *argv, *TRAIN)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_a_jobset_s_manifest(cloud):
    jobset = load_jobset(cloud, "--slices", "2", "--name", "big-1", "--grace", "900", "--restarts", "3")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"] == {
        "name": "big-1",
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 3}
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (64, 64, 0)
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 900)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod["containers"]
    assert [port["containerPort"] for port in container["ports"]] == [8471, 8080]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert (container["image"], container["args"]) == ("IMAGE", list(TRAIN[1:]))
    assert container["volumeMounts"] == [{"name": "bucket", "mountPath": "/mnt/my-bucket"}]
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {
        "bucketName": "my-bucket",
        "mountOptions": "implicit-dirs,rename-dir-limit=100000,"
        "metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0",
    }


@pytest.mark.parametrize(
    ("accelerator", "topology", "hosts", "chips"),
    [
        ("tpu-v5-lite-podslice", "2x4", 2, 4),
        ("tpu-v5-lite-podslice", "1x1", 1, 1),
        ("tpu-v5p-slice", "2x2x1", 1, 4),
        ("tpu-v5p-slice", "4x4x8", 32, 4),
        ("tpu-v6e-slice", "8x16", 32, 4),
    ],
)
def test_hosts_and_chips_of_a_topology(cloud, accelerator, topology, hosts, chips):
    jobset = load_jobset(cloud, "--accelerator", accelerator, "--topology", topology)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (job["parallelism"], job["completions"], limits["google.com/tpu"]) == (hosts, hosts, chips)


def test_a_jobset_is_applied_as_it_is_printed(cloud):
    dry = cloud.run(*JOBSET, "--dry-run", *TRAIN)
    assert cloud.calls() == []
    assert cloud.run(*JOBSET, *TRAIN).returncode == 0
    assert cloud.calls() == [["kubectl", "apply", "-f", "-"]]
    assert (cloud.folder / "stdin").read_text() == dry.stdout


@pytest.mark.parametrize(("script", "ended"), [("exit 0", 0), ("exit 3", 3)])
def test_a_container_ends_as_its_command_does(cloud, script, ended):
    command = container_command(cloud)
    assert subprocess.run([*command, "bash", "-c", script], timeout=60).returncode == ended


def test_a_container_that_saved_after_sigterm_doesn_t_pass_for_finished(cloud):
    script = "trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    command = [*container_command(cloud), "bash", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 143


def container_command(cloud):
    jobset = load_jobset(cloud)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]["command"]


# worker.sh


@pytest.fixture
def worker(tmp_path):
    """Runs worker.sh in a folder of its own; what it started is gone after the test."""
    root = tmp_path / "worker"
    (root / "code").mkdir(parents=True)

    def run(*argv, path=os.environ["PATH"]):
        env = os.environ | {"MMADA_ROOT": str(run.root), "PATH": path}
        # Not through pipes: what it starts would hold them open, and this would wait for it.
        with open(tmp_path / "out", "w+") as out:
            argv = ["bash", str(WORKER), *argv]
            done = subprocess.run(argv, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=60)
            out.seek(0)
            return done.returncode, out.read()

    run.root = root
    yield run
    run("stop", "0")


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def log_of(worker):
    return (worker.root / "run.log").read_text()


def start_script(worker, script):
    """Starts a bash script and waits until it has printed `ready`."""
    assert worker("start", "bash", "-c", script)[0] == 0
    wait_for(lambda: log_of(worker).splitlines()[-1] == "ready")


def test_bash_can_read_the_script():
    subprocess.run(["bash", "-n", WORKER], check=True)


def test_usage_of_the_worker(worker):
    for argv in ((), ("begin",)):
        code, text = worker(*argv)
        assert code == 2
        assert "bash worker.sh start COMMAND" in text


def test_a_command_runs_in_the_code_s_folder_and_its_status_is_kept(worker):
    assert "nothing was started" in worker("status")[1]
    assert "nothing was started" in worker("logs")[1]
    (worker.root / "code" / "here").touch()
    (worker.root / "venv/bin").mkdir(parents=True)
    write_script(worker.root / "venv/bin/python", "#!/bin/bash\nls; printf '<%s>' \"$@\"; exit 7\n")
    code, text = worker("start", "python", "two words", "it's $HOME")
    assert (code, text.split()[-1]) == (0, "started")
    wait_for(lambda: "ended" in worker("status")[1])
    assert "ended with status 7" in worker("status")[1]
    assert "here\n<two words><it's $HOME>" in log_of(worker)
    assert "ended with status 7" in worker("logs", "1")[1]
    worker("start", "true")
    wait_for(lambda: "ended" in worker("status")[1])
    assert "ended with status 0" in worker("status")[1]
    assert log_of(worker).count("starts: ") == 2
    assert log_of(worker).index("status 7") < log_of(worker).index("status 0")


def test_a_second_start_is_refused_and_a_run_is_a_session_of_its_own(worker):
    start_script(worker, "echo ready; exec sleep 60")
    process = int((worker.root / "run.pid").read_text())
    assert os.getsid(process) == process
    assert f"running (process {process})" in worker("status")[1]
    code, text = worker("start", "true")
    assert code == 1
    assert re.fullmatch(rf"error: .*a run is going on \(process {process}\); stop it first\n", text)
    assert "running" in worker("status")[1]


def test_stop_lets_the_command_save(worker):
    start_script(
        worker, "trap 'sleep 0.3; echo saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    )
    code, text = worker("stop", "30")
    assert code == 0
    assert "ended with status 0" in text
    assert "saved" in log_of(worker)
    code, text = worker("stop", "30")
    assert code == 0
    assert "ended with status 0" in text


def test_stop_kills_what_doesn_t_end_in_time(worker):
    # The child of the child, too.
    start_script(worker, "trap '' TERM; (while :; do sleep 0.05; done) & echo ready; wait")
    code, text = worker("stop", "0")
    assert code == 0
    assert "ended with status 137" in text
    assert worker("start", "true")[0] == 0


def test_a_run_that_was_killed_is_not_running(worker):
    start_script(worker, "echo ready; exec sleep 60")
    os.killpg(int((worker.root / "run.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: "running" not in worker("status")[1])
    assert "ended without a status" in worker("status")[1]
    assert worker("start", "true")[0] == 0


def test_logs_follow_until_the_run_ends(worker):
    start_script(worker, "echo ready; until [ -f ../go ]; do sleep 0.05; done; echo later")
    env = os.environ | {"MMADA_ROOT": str(worker.root)}
    with subprocess.Popen(["bash", WORKER, "logs"], env=env, stdout=subprocess.PIPE, text=True) as logs:
        while logs.stdout.readline() != "ready\n":
            pass
        (worker.root / "go").touch()
        rest = logs.stdout.read()
    assert rest.startswith("later\n")
    assert "ended with status 0" in rest


def make_archive(path, **files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            file = path.parent / name
            file.write_text(text)
            archive.add(file, f"package/{name}")


def test_new_code_replaces_the_old_and_leaves_the_rest(worker, tmp_path):
    archive = tmp_path / "code.tar.gz"
    make_archive(archive, old="1", both="1")
    assert worker("unpack", str(archive))[0] == 0
    assert not archive.exists()
    package = worker.root / "code/package"
    (package / "checkpoint").write_text("precious")
    make_archive(archive, new="2", both="2")
    assert worker("unpack", str(archive)) == (0, "")
    assert {file.name: file.read_text() for file in package.iterdir()} == {
        "new": "2", "both": "2", "checkpoint": "precious",
    }  # fmt: skip
    assert "no archive" in worker("unpack", str(archive))[1]
    make_archive(archive, new="3")
    start_script(worker, "echo ready; exec sleep 60")
    code, text = worker("unpack", str(archive))
    assert code == 1
    assert "stop it" in text
    assert (package / "new").read_text() == "2"


def test_install_makes_an_environment_once(worker, tmp_path):
    (tmp_path / "bin").mkdir()
    pip = f'#!/bin/bash\\necho "$@" >>{tmp_path}/pip\\n'
    python = f"""#!/bin/bash
    case "$*" in
      "-c "*) exit 0 ;;
      "-m venv "*) mkdir -p "$3/bin"; printf '{pip}' >"$3/bin/python"; chmod +x "$3/bin/python" ;;
      *) exit 9 ;;
    esac
    """
    write_script(tmp_path / "bin/python3", python)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    for _ in range(2):
        code, text = worker("install", path=path)
        assert code == 0, text
    calls = (tmp_path / "pip").read_text().splitlines()
    assert (
        calls
        == ["-m pip install -q --upgrade pip", f"-m pip install -q -e {worker.root}/code jax[tpu]"] * 2
    )


def test_install_fetches_a_python_where_there_is_none_new_enough(worker, tmp_path):
    (tmp_path / "bin").mkdir()
    versions = ("python3", "python3.14", "python3.13", "python3.12", "python3.11")
    for python in versions:
        write_script(tmp_path / "bin" / python, "#!/bin/bash\nexit 1\n")
    write_script(tmp_path / "bin/sudo", f'#!/bin/bash\necho "$@" >>{tmp_path}/sudo\n')
    code, _ = worker("install", path=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert code != 0  # the stub has installed nothing
    assert "install -y -qq python3.11 python3.11-venv" in (tmp_path / "sudo").read_text()


def test_a_bucket_is_mounted_once(worker, tmp_path):
    (tmp_path / "bin").mkdir()
    for program in ("sudo", "gcsfuse"):
        write_script(tmp_path / "bin" / program, f'#!/bin/bash\necho "${{0##*/}} $*" >>{tmp_path}/calls\n')
    write_script(
        tmp_path / "bin/mountpoint", f"#!/bin/bash\ngrep -q ^gcsfuse {tmp_path}/calls 2>/dev/null\n"
    )
    for _ in range(2):
        code, text = worker("mount", "my-bucket", path=f"{tmp_path}/bin:{os.environ['PATH']}")
        assert code == 0
        assert text.endswith(": /mnt/my-bucket\n")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["sudo", "sudo", "gcsfuse"]
    assert calls[-1].endswith(" my-bucket /mnt/my-bucket")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="copies what git tracks")
def test_from_copy_to_stop_on_a_worker(worker, tmp_path):
    cloud = Cloud(tmp_path / "cloud", ())
    write_script(cloud.folder / "bin/gcloud", LOCAL_WORKER)
    (cloud.folder / "home").mkdir()
    worker.root = cloud.folder / "home/mmada_jax"
    done = cloud.run("copy")
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(cloud.folder.rglob("*.tar.gz"))
    for file in ("launch/train.py", "configs/pretrain.py", "mmada_jax/train/supervised.py", "setup.py"):
        assert (worker.root / "code" / file).read_bytes() == (ROOT / file).read_bytes()
    script = "trap 'echo saved; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    assert cloud.run("start", "--", "bash", "-c", script).stdout.endswith(": started\n")
    wait_for(lambda: log_of(worker).splitlines()[-1] == "ready")
    again = cloud.run("start", "--", "true")
    assert (again.returncode, "stop it first" in again.stderr) == (1, True)
    assert "ended with status 0" in cloud.run("stop").stdout
    assert "saved" in cloud.run("logs").stdout
