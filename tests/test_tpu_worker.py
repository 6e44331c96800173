"""launch/tpu/worker.sh and its signals, for real, on this machine."""

import os
import re
import signal
import subprocess
import tarfile
import time

import pytest
from tpu_cloud import ROOT, Cloud, write_script

WORKER = ROOT / "launch/tpu/worker.sh"
# A slice of one worker, which is this machine, with $STUBS for a home.
LOCAL_WORKER = """#!/bin/bash
cd "$STUBS"
case "$4" in
  scp) cp "${@:5:2}" home ;;
  ssh) for word; do [[ $word != --command=* ]] || (cd home && HOME=$PWD bash -c "${word#*=}"); done ;;
esac
"""


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
        == ["-m pip install -q --upgrade pip", f"-m pip install -q -e {worker.root}/code[gcp] jax[tpu]"] * 2
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
