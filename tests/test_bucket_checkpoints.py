"""Checkpoints in a bucket keep the promises of those on a disk: whole or not there, verified, survived."""

import contextlib
import pathlib
import random
import re
import signal
import time

import jax
import numpy as np
import pytest
from buckets import skip_without_server, upload, variables
from programs import Program
from states import flip, payload, restore_tiny, steps_in, tiny

from mmada_jax import storage
from mmada_jax.nets import lora, transformer
from mmada_jax.weights.adapters import Adapter, read_peft, write_peft
from mmada_jax.weights.checkpoint import Checkpoints, newest_params, trust
from mmada_jax.weights.manifest import COMMITTED, MANIFEST, find_damage, write_manifest
from mmada_jax.weights.workdir import newest_step, steps

skip_without_server()


@pytest.fixture
def workdir(folder):
    return folder


def save(workdir, *numbers, keep=3):
    with Checkpoints(workdir, keep=keep) as checkpoints:
        for number in numbers:
            checkpoints.save(tiny(number))


def test_steps_come_back_and_the_oldest_go(workdir):
    save(workdir, 1, 2, 3, keep=2)
    assert steps(workdir) == [2, 3]
    with Checkpoints(workdir, keep=2) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, restore_tiny(checkpoints), tiny(3))
    params, step = newest_params(workdir)
    assert step == 3
    np.testing.assert_array_equal(np.asarray(params["w"]), tiny(3).params["w"])
    assert not (workdir / ".lock").exists()


def test_a_manifest_costs_a_listing_and_reads_no_array(workdir, proxy):
    save(workdir, 1)
    step = newest_step(workdir)
    before = len(proxy.requests)
    assert find_damage(step) == []
    asked = [request for request in proxy.requests[before:] if request.method == "GET"]
    assert len(asked) == 2, asked  # the manifest and a listing
    before = len(proxy.requests)
    write_manifest(step)
    assert [request.method for request in proxy.requests[before:]] == ["GET", "POST"]


def test_damaged_steps_are_set_aside_and_the_one_before_is_taken(workdir, capsys):
    save(workdir, 1, 2, 3)
    damaged = {step: payload(workdir / "checkpoints" / step) for step in ("2", "3")}
    flip(damaged["2"])
    damaged["3"].unlink()
    with pytest.raises(ValueError, match=rf"3 is damaged.*{damaged['3'].name} is missing"):
        newest_params(workdir)
    with Checkpoints(workdir, keep=3) as checkpoints:
        back = restore_tiny(checkpoints)
        assert checkpoints.latest() == int(back.step) == 1
        jax.tree.map(np.testing.assert_array_equal, back, tiny(1))
        checkpoints.save(tiny(2))
    assert steps_in(workdir) == ["1", "2", "2.damaged", "3.damaged"]
    first, second = capsys.readouterr().err.splitlines()
    assert "step 3 is damaged" in first and "is missing" in first and first.endswith("from step 1")
    assert (
        "step 2 is damaged" in second
        and f"{damaged['2'].name} has changed: its crc32c is another" in second
    )
    assert (workdir / "checkpoints/2.damaged" / MANIFEST).is_file()
    with Checkpoints(workdir, keep=3) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, restore_tiny(checkpoints), tiny(2))


def test_an_unfinished_step_is_no_step(workdir):
    save(workdir, 1, 2)
    (workdir / "checkpoints/2" / COMMITTED).unlink()
    (workdir / "checkpoints/2" / MANIFEST).unlink()  # it comes before the mark
    assert steps(workdir) == [1] and newest_step(workdir).name == "1"
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == 1
        jax.tree.map(np.testing.assert_array_equal, restore_tiny(checkpoints), tiny(1))
    assert steps_in(workdir) == ["1"]


def test_a_whole_step_that_lacks_its_mark_is_marked_and_not_removed(workdir):
    # It was copied from a disk, or its writer was killed between the manifest and the mark.
    save(workdir, 1, 2)
    for step in ("1", "2"):
        (workdir / "checkpoints" / step / COMMITTED).unlink()
    flip(payload(workdir / "checkpoints/2"))
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == 1
        jax.tree.map(np.testing.assert_array_equal, restore_tiny(checkpoints), tiny(1))


def served(request):
    return None


@pytest.mark.parametrize("what", ["manifest", "params/manifest.ocdbt", "params/_METADATA", "d%2F"])
def test_a_step_that_is_not_served_is_not_damaged(workdir, proxy, what, capsys):
    save(workdir, 1, 2)
    what = what.replace("/", "%2F")
    proxy.fails = lambda request: 403 if what in request.target and request.method == "GET" else None
    with (
        pytest.raises(OSError, match=r"permission is denied") as error,
        Checkpoints(workdir) as checkpoints,
    ):
        restore_tiny(checkpoints)
    assert "\n" not in str(error.value) and str(workdir) in str(error.value)
    proxy.fails = served
    assert "damaged" not in capsys.readouterr().err
    assert steps(workdir) == [1, 2] and steps_in(workdir) == ["1", "2"]


def test_a_run_that_has_lost_its_workdir_leaves_the_next_ones_save_alone(workdir):
    checkpoints = Checkpoints(workdir)
    with checkpoints:
        checkpoints._lock.lost = True
        (workdir / "checkpoints/7/params/d/abc").write_bytes(b"of another run")
        with pytest.raises(OSError, match="another process has taken"):
            storage.Growing(workdir / "metrics.jsonl", lambda: [], pause=0).flush()
    assert (workdir / "checkpoints/7/params/d/abc").exists()


def test_a_save_that_the_network_refuses_costs_that_save_alone(workdir, proxy, monkeypatch, capsys):
    with Checkpoints(workdir, keep=3) as checkpoints:
        checkpoints.save(tiny(1))
        checkpoints.latest()
        proxy.fails = lambda request: 403 if request.method == "POST" else None
        checkpoints.save(tiny(2))
        assert checkpoints.latest() == 1
        assert checkpoints.failed == 1
        proxy.fails = lambda request: None
        checkpoints.save(tiny(3))
    error = capsys.readouterr().err
    assert "the checkpoint of step 2 could not be saved" in error and "Traceback" not in error
    assert steps(workdir) == [1, 3] and steps_in(workdir) == ["1", "3"]


@pytest.mark.slow
def test_a_storage_that_is_overloaded_holds_a_run_up_for_less_than_a_minute(workdir, proxy, capsys):
    with Checkpoints(workdir, keep=3) as checkpoints:
        checkpoints.save(tiny(1))
        checkpoints.latest()
        left = [None] * 4  # the fault begins in the middle of a save, when TensorStore writes
        proxy.fails = lambda request: request.method == "POST" and (left.pop() if left else 503)
        began = time.monotonic()
        checkpoints.save(tiny(2))
        assert checkpoints.latest() == 1 and checkpoints.failed == 1
        assert time.monotonic() - began < 60
        proxy.fails = lambda request: None
        checkpoints.save(tiny(3))
    error = capsys.readouterr().err
    # TensorStore and gcsfs write side by side. The reason is in the words of the one that gave up first.
    assert re.search(r"the checkpoint of step 2 could not be saved \([^\n]*(retry|503)", error)
    assert steps(workdir) == [1, 3]


def test_a_last_save_that_fails_is_an_error(workdir, proxy):
    checkpoints = Checkpoints(workdir)

    def fail():
        with checkpoints:
            proxy.fails = lambda request: 403 if request.method == "POST" else None
            checkpoints.save(tiny(1))

    with pytest.raises(OSError, match=r"step 1 could not be saved.*newest complete step is none"):
        fail()


def test_a_run_that_has_lost_its_workdir_saves_nothing(workdir):
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(tiny(1))
        (workdir / ".lock").write_bytes(b"of another run")
        with pytest.raises(OSError, match="another process has taken"):
            checkpoints.save(tiny(2))
    assert steps(workdir) == [1]


def test_steps_copied_from_a_disk_are_used_or_trusted_when_they_are_whole(workdir, tmp_path):
    save(tmp_path / "run", 1, 2)
    (tmp_path / "run/config.json").write_text("{}")
    upload(tmp_path / "run", workdir.name)
    assert steps(workdir) == [1, 2]
    for step in ("1", "2"):  # as from a version of Orbax that wrote no such mark on disks
        (workdir / "checkpoints" / step / COMMITTED).unlink()
    assert steps(workdir) == []
    flip(payload(workdir / "checkpoints/2"))
    trust(workdir)
    assert steps(workdir) == [1]
    with Checkpoints(workdir) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, restore_tiny(checkpoints), tiny(1))


def test_a_step_of_a_bucket_is_verified_on_a_disk(workdir, tmp_path):
    save(workdir, 1)
    for name, file in storage.files_below(workdir).items():
        storage.write_whole(tmp_path / "run" / name, file.path.read_bytes())
    params, _ = newest_params(tmp_path / "run")
    np.testing.assert_array_equal(np.asarray(params["w"]), tiny(1).params["w"])
    flip(payload(tmp_path / "run/checkpoints/1/params"))
    with pytest.raises(ValueError, match="has changed: its crc32c is another"):
        newest_params(tmp_path / "run")


def test_adapters_of_peft_are_read_as_from_a_disk(folder, tmp_path):
    config = transformer.ModelConfig(d_model=8, n_layers=2, n_heads=2, n_kv_heads=2, d_mlp=16, vocab=32)
    with_ranks = lora.LoraConfig(rank=2, targets="q_proj+ff_out")
    arrays = lora.init_adapters(jax.random.key(0), config, with_ranks)
    for where in (folder, tmp_path / "peft"):
        write_peft(where, Adapter(with_ranks, arrays, "00ff"), "base")
        found = read_peft(where, config)
        assert (found.lora, found.base_sha256) == (with_ranks, "00ff")
        jax.tree.map(np.testing.assert_array_equal, found.arrays, dict(arrays))


SAVES = """
import sys
sys.path.insert(0, {tests!r})
from states import restore_tiny, tiny
from mmada_jax.weights.checkpoint import Checkpoints
with Checkpoints({workdir!r}) as checkpoints:
    first = checkpoints.latest() or 0
    if first:
        restore_tiny(checkpoints)
    print("begins at", first, flush=True)
    for step in range(first + 1, first + 100):
        checkpoints.save(tiny(step))
        print("saving", step, flush=True)
"""


@pytest.mark.slow
def test_kills_at_ten_moments_lose_no_step_that_was_whole(workdir, proxy, tmp_path):
    script, chance = tmp_path / "saves.py", random.Random(0)
    script.write_text(SAVES.format(tests=str(pathlib.Path(__file__).parent), workdir=str(workdir)))
    complete = 0
    for _ in range(10):
        with Program([script], variables(proxy.port)) as process:
            began, last = None, 0
            for line in process.stdout:
                if line.startswith("begins at"):
                    began = last = int(line.split()[-1])
                    assert began >= complete, "a whole step was lost"
                    assert {int(name) for name in steps_in(workdir)} == set(steps(workdir)), "leftovers"
                elif line.startswith("saving"):
                    last = int(line.split()[-1])
                    # A save begins when the one before has ended.
                    if last >= began + 2:
                        time.sleep(chance.uniform(0, 0.6))
                        process.kill()
                        break
                elif "google_auth_provider" not in line:  # TensorStore looks for credentials
                    pytest.fail(line + process.stdout.read())
            with contextlib.suppress(ValueError):
                process.stdout.read()
            assert process.wait() == -signal.SIGKILL
        complete = last - 1
        for step in steps(workdir):
            assert find_damage(workdir / "checkpoints" / str(step)) == []
        assert steps(workdir)[-1] >= complete
