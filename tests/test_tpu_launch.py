"""launch/tpu: commands as text, against stubs of gcloud and kubectl."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from tpu_cloud import TPU, Cloud

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
JOBSET = ("jobset", "--topology", "16x16", "--image", "IMAGE")
SIZE = ("--accelerator", "v5litepod-64")
ACTIVE = '{"name": "mmada", "state": {"state": "ACTIVE"}}'
GCLOUD = "gcloud compute tpus queued-resources"
HERE = "--zone=us-central1-a --project=MY_PROJECT"


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud", ("gcloud", "kubectl", "bash", "rm"))
    cloud.tell(answers=ACTIVE)
    return cloud


@pytest.mark.parametrize(
    "argv",
    [
        ("create", *PLACE, *SIZE),
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
        (SIZE, "--accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --node-id=mmada"),
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
        (("create", *SIZE, "--slices", "0"), ("--slices 0", "least is 1")),
        (("create", *SIZE, "--name", "My_Slice"), ("My_Slice", "at most 40", "try mmada-1")),
        (("create", *SIZE, "--name", "a" * 41), ("at most 40",)),
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
        ("create", "--spot"),
        ("watch", *TRAIN),
        ("create", *SIZE, "--spot", "--reserved"),
        ("create", *SIZE, "--slices", "two"),
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
    assert len(verbs) == 14
    for verb in verbs:
        assert "--dry-run" in cloud.run(verb, "--help").stdout


@pytest.mark.parametrize(
    ("argv", "program"), [(("create", *SIZE), "gcloud"), (("jobset-delete",), "kubectl")]
)
def test_a_missing_program_is_one_line_with_the_remedy(cloud, argv, program):
    cloud.path = str(cloud.folder)
    done = cloud.run(*argv)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {program} isn't on PATH; install .*\n", done.stderr)


@pytest.mark.parametrize(
    "argv", [("create", *SIZE), ("wait",), ("copy",), ("jobset-delete",), (*JOBSET, *TRAIN)]
)
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
        "import os, runpy, sys, time; time.sleep = lambda s: None; sys.argv = sys.argv[1:]; "
        "sys.path[0] = os.path.dirname(sys.argv[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
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


WATCH = ("watch", *SIZE, "--spot", "--poll", "1")


def verbs_of(cloud):
    """What was called, in short."""
    found = []
    for call in cloud.calls():
        worker = re.search(r"worker\.sh (\w+)", call[-1])
        found.append(worker[1] if worker else call[4] if call[0] == "gcloud" else call[0])
    return [verb for verb in found if verb not in ("bash", "rm", "scp", "unpack")]


def test_watch_brings_back_a_slice_that_was_taken_away(cloud):
    states = ["ACTIVE", "ACTIVE", "SUSPENDED", "PROVISIONING", "ACTIVE", "ACTIVE", "ACTIVE"]
    cloud.tell(
        answers="\n".join(map(state, states)),
        workers="\n".join(["a: running (process 1)", "a: running (process 1);b: ended with status 1",
                           "a: ended with status 0;b: ended with status 0"]),
    )  # fmt: skip
    done = cloud.run(*WATCH, *TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verbs_of(cloud) == [
        "describe", "install", "start", "describe", "status", "describe", "delete", "create", "describe",
        "describe", "install", "start", "describe", "status", "describe", "status",
    ]  # fmt: skip
    (created,) = [call for call in cloud.calls() if call[4:5] == ["create"]]
    assert "--accelerator-type=v5litepod-64" in created and "--spot" in created
    assert "costs money until it is deleted" in done.stdout


def test_watch_ends_when_its_tries_are_used_up(cloud):
    cloud.tell(answers="\n".join([state("ACTIVE")] * 9), workers="\n".join(["a: ended with status 1"] * 9))
    done = cloud.run(*WATCH, "--tries", "2", *TRAIN)
    assert done.returncode == 1
    assert re.fullmatch(r"error: mmada is ACTIVE, and 2 tries .* used up.*\n", done.stderr)
    assert verbs_of(cloud).count("start") == 2


def test_watch_does_not_take_a_run_that_sigterm_stopped_for_finished(cloud):
    cloud.tell(
        answers="\n".join([state("ACTIVE")] * 9),
        workers="\n".join(["a: ended with status 0, stopped by SIGTERM", "a: ended with status 0"]),
    )
    done = cloud.run(*WATCH, *TRAIN)
    assert done.returncode == 0 and verbs_of(cloud).count("start") == 2


def test_watch_survives_looks_that_fail_and_not_for_ever(cloud):
    cloud.tell(status=1, answers="")
    done = cloud.run(*WATCH, *TRAIN)
    assert done.returncode == 1 and verbs_of(cloud) == ["describe"] * 5


def test_watch_says_before_what_it_would_run(cloud):
    done = cloud.run(*WATCH, "--dry-run", *TRAIN)
    words = [line.split()[4] for line in done.stdout.splitlines() if line.startswith("gcloud")]
    assert (
        words == ["describe", "ssh", "delete", "create", "scp", "ssh", "ssh", "ssh"] and not cloud.calls()
    )


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
    assert "volumeMounts" not in container and "volumes" not in pod
    mounted = load_jobset(cloud, "--bucket", "my-bucket")
    template = mounted["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert template["metadata"] == {"annotations": {"gke-gcsfuse/volumes": "true"}}
    pod, (container,) = template["spec"], template["spec"]["containers"]
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
