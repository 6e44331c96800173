"""Creates a TPU slice on Google Cloud, trains on all of its workers, and deletes it again."""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

from manifest import DIMENSIONS, write_manifest

EXAMPLES = """\
A slice of TPU VMs, from nothing to nothing (README.md, beside this file, has the steps before and after):

  python launch/tpu/tpu.py create --accelerator v5litepod-64 --spot
  python launch/tpu/tpu.py wait
  python launch/tpu/tpu.py copy
  python launch/tpu/tpu.py install
  python launch/tpu/tpu.py start -- python launch/train.py --config configs/pretrain.py:8b,phase=1 \\
      --workdir gs://my-bucket/runs/phase1 --distributed
  python launch/tpu/tpu.py logs
  python launch/tpu/tpu.py watch --accelerator v5litepod-64 --spot --tries 10 -- python launch/train.py ...
  python launch/tpu/tpu.py stop
  python launch/tpu/tpu.py delete

The same on a GKE cluster that has the node pools:

  python launch/tpu/tpu.py jobset --accelerator tpu-v5-lite-podslice --topology 8x8 --slices 2 \\
      --image IMAGE -- python launch/train.py --config configs/pretrain.py:8b,phase=1 \\
      --workdir gs://my-bucket/runs/phase1 --distributed
  python launch/tpu/tpu.py jobset-logs
  python launch/tpu/tpu.py jobset-delete

Every command takes --name, and those before jobset --zone and --project, which are gcloud's own settings
unless given. With --dry-run a command prints what it would run, a line for each, and runs nothing (jobset
prints its manifest).
"""

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RUNTIMES = {"v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
OVER = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
INSTALL = {
    "gcloud": "install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install",
    "kubectl": "install it: gcloud components install kubectl gke-gcloud-auth-plugin",
}


class Failed(Exception):
    """A program ended with a status that isn't 0, and has said why."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def execute(argv: list[str], dry_run: bool, stdin: str | None = None) -> None:
    """Runs a command, or prints it; raises Failed with its status."""
    if dry_run:
        print(shlex.join(argv))
    else:
        _run(argv, input=stdin)


def ask(argv: list[str]) -> str:
    """What a command prints."""
    return _run(argv, stdout=subprocess.PIPE).stdout


def _run(argv: list[str], **options) -> subprocess.CompletedProcess:
    try:
        done = subprocess.run(argv, text=True, **options)
    except FileNotFoundError:
        remedy = INSTALL.get(argv[0], "install it")
        raise ValueError(f"{argv[0]} isn't on PATH; {remedy}") from None
    if done.returncode:
        raise Failed(done.returncode)
    return done


def queued_resources(verb: str, *words: str, args: argparse.Namespace) -> list[str]:
    """The gcloud command for a verb on queued resources."""
    place = [f"--{key}={value}" for key in ("zone", "project") if (value := getattr(args, key))]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *words, *place]


def on_workers(args: argparse.Namespace, *words: object, node="all", worker="all") -> list[str]:
    """The gcloud command that runs worker.sh on workers: on all at once, for a save needs all of them."""
    where = [f"--node={node}", f"--worker={worker}", *(["--batch-size=all"] if worker == "all" else [])]
    command = shlex.join(["bash", "worker.sh", *map(str, words)])
    return queued_resources("ssh", args.name, *where, f"--command={command}", args=args)


def create(args: argparse.Namespace) -> None:
    """Asks for the slice or slices."""
    runtime = args.runtime or choose_runtime(args.accelerator)
    nodes = f"--node-id={args.name}" if args.slices == 1 else f"--node-count={args.slices}"
    capacity = [f"--{args.capacity}"] if args.capacity else []
    kind = [f"--accelerator-type={args.accelerator}", f"--runtime-version={runtime}"]
    execute(queued_resources("create", args.name, *kind, nodes, *capacity, args=args), args.dry_run)
    if not args.dry_run:
        print(f"{args.name} costs money from ACTIVE until it is deleted. Next: wait")


def choose_runtime(accelerator: str) -> str:
    """The software of an accelerator's machines."""
    family, _, size = accelerator.partition("-")
    if family not in RUNTIMES or not size.isdecimal():
        known = ", ".join(f"{family}-N" for family in RUNTIMES)
        raise ValueError(
            f"--accelerator {accelerator}: known are {known}; for another one give --runtime as well"
        )
    return RUNTIMES[family]


def describe(args: argparse.Namespace) -> list[str]:
    """The gcloud command that tells the state."""
    return queued_resources("describe", args.name, "--format=json", args=args)


def read_state(described: str) -> tuple[str, str]:
    """The state, and why if it failed, from what `describe` printed."""
    state = json.loads(described).get("state", {})
    reason = state.get("failedData", {}).get("error", {}).get("message", "")
    return state.get("state", "UNKNOWN"), reason


def wait(args: argparse.Namespace) -> None:
    """Waits until the slice is ACTIVE; a line for each look."""
    if args.dry_run:
        execute(describe(args), dry_run=True)
        return
    start = time.monotonic()
    while True:
        state, reason = read_state(ask(describe(args)))
        print(time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - start)), state, flush=True)
        if state == "ACTIVE":
            return
        if state in OVER:
            raise ValueError(
                f"{args.name} is {state} and won't become ACTIVE{': ' * bool(reason)}{reason}; "
                "delete it and create it again, in another --zone or another size if capacity was lacking"
            )
        time.sleep(args.poll)


def status(args: argparse.Namespace) -> None:
    """The state of the slice; if it is ACTIVE, what each worker is doing."""
    state = "ACTIVE"
    if args.dry_run:
        execute(describe(args), dry_run=True)
    else:
        state, reason = read_state(ask(describe(args)))
        print(f"{args.name}: {state} {reason}".rstrip(), flush=True)
    if state == "ACTIVE":
        execute(on_workers(args, "status"), args.dry_run)


def copy(args: argparse.Namespace) -> None:
    """Copies the files that git tracks, as they are now, to every worker."""
    archive = f"{tempfile.gettempdir()}/mmada_jax-{args.name}.tar.gz"
    root = shlex.quote(str(ROOT))
    pack = f"git -C {root} ls-files -z | tar -C {root} --null -T - -czf {shlex.quote(archive)}"
    sources = [archive, str(ROOT / "launch/tpu/worker.sh")]
    everywhere = ["--node=all", "--worker=all"]
    execute(["bash", "-o", "pipefail", "-c", pack], args.dry_run)
    execute(queued_resources("scp", *sources, f"{args.name}:", *everywhere, args=args), args.dry_run)
    execute(on_workers(args, "unpack", pathlib.Path(archive).name), args.dry_run)
    execute(["rm", archive], args.dry_run)


def install(args: argparse.Namespace) -> None:
    """Installs the project and jax[tpu] on every worker."""
    execute(on_workers(args, "install"), args.dry_run)


def mount(args: argparse.Namespace) -> None:
    """Mounts a bucket on every worker."""
    execute(on_workers(args, "mount", args.bucket), args.dry_run)


def start(args: argparse.Namespace) -> None:
    """Starts the command on every worker."""
    execute(on_workers(args, "start", *args.command), args.dry_run)


def logs(args: argparse.Namespace) -> None:
    """Shows what a worker has written, and follows it while it runs."""
    execute(on_workers(args, "logs", args.lines, node=args.slice, worker=args.worker), args.dry_run)


def watch(args: argparse.Namespace) -> None:
    """Keeps the command going until it ends with status 0 on all workers: a slice that was taken away is
    deleted and asked for again, and a command that isn't there is started. Each of that is a try."""
    tries, missed, set_up = args.tries, 0, False
    if args.dry_run:
        execute(describe(args), dry_run=True)
        execute(on_workers(args, "status"), dry_run=True)
    while not args.dry_run:
        try:
            state, reason = read_state(ask(describe(args)))
            doing = work_of(ask(on_workers(args, "status"))) if state == "ACTIVE" and set_up else ""
            missed = 0
        except Failed:
            # The network, or a slice that is just being taken away.
            missed += 1
            if missed == MISSES:
                raise
            state, reason, doing = "UNKNOWN", "", ""
        print(time.strftime("%F %T"), f"{args.name}: {state} {doing or reason}".rstrip(), flush=True)
        if doing == "done":
            print(f"{args.name} costs money until it is deleted. Next: delete")
            return
        try:
            if state in OVER or (state == "ACTIVE" and doing in ("", "idle")):
                tries, set_up = _try(args, tries, state), state == "ACTIVE"
        except Failed as failed:
            print(f"that failed with status {failed.status}", flush=True)
        time.sleep(args.poll)
    _try(args, 1, "SUSPENDED")
    _try(args, 1, "ACTIVE")


MISSES = 5  # looks in a row that may fail


def _try(args: argparse.Namespace, tries: int, state: str) -> int:
    """Asks for a slice again, or starts the command on one that is ACTIVE. Returns how many tries are left;
    raises ValueError if there was none."""
    if not tries:
        raise ValueError(
            f"{args.name} is {state}, and {args.tries} tries (--tries) are used up; see by `status` and "
            "`logs` why, and give the command again to go on from its last save"
        )
    if state == "ACTIVE":
        copy(args)
        install(args)
        start(args)
        return tries - 1
    execute(queued_resources("delete", args.name, "--force", "--quiet", args=args), args.dry_run)
    create(args)
    return tries - 1


def work_of(printed: str) -> str:
    """What `status` on all workers printed, in a word: running, done (all ended with 0) or idle."""
    lines = [line for line in printed.splitlines() if line.strip()]
    if any(": running" in line for line in lines):
        return "running"
    return "done" if lines and all(line.endswith("ended with status 0") for line in lines) else "idle"


def stop(args: argparse.Namespace) -> None:
    """Stops the command on every worker; SIGTERM lets it save."""
    execute(on_workers(args, "stop", args.grace), args.dry_run)


def delete(args: argparse.Namespace) -> None:
    """Deletes the slice, whatever runs on it."""
    sure = ["--quiet"] if args.yes else []
    execute(queued_resources("delete", args.name, "--force", *sure, args=args), args.dry_run)


def jobset(args: argparse.Namespace) -> None:
    """Applies a JobSet, or prints it."""
    manifest = write_manifest(args)
    if args.dry_run:
        print(manifest, end="")
    else:
        execute(["kubectl", "apply", "-f", "-"], dry_run=False, stdin=manifest)


def jobset_logs(args: argparse.Namespace) -> None:
    """Follows what a host of a JobSet writes."""
    labels = {
        "jobset.sigs.k8s.io/jobset-name": args.name,
        "jobset.sigs.k8s.io/job-index": args.slice,
        "batch.kubernetes.io/job-completion-index": args.worker,
    }
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    options = ["--container=train", f"--tail={args.lines}", "--follow"]
    execute(["kubectl", "logs", f"--selector={selector}", *options], args.dry_run)


def jobset_delete(args: argparse.Namespace) -> None:
    """Deletes a JobSet; its pods get SIGTERM and their time to save."""
    execute(["kubectl", "delete", "jobset", args.name], args.dry_run)


def number(low: int, flag: str):
    """A type for argparse: an integer from `low` on, whose error isn't one of usage."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise Invalid(f"{flag} {value}: the least is {low}")
        return value

    parse.__name__ = "int"
    return parse


class Invalid(Exception):
    """A value out of its range (a ValueError would be argparse's own)."""


def name(text: str) -> str:
    """A type for argparse: what both gcloud and Kubernetes take for a name."""
    if len(text) > 40 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text):
        raise Invalid(
            f"--name {text}: at most 40 of a-z, 0-9 and -, with a letter first and no - last; try mmada-1"
        )
    return text


def bucket(text: str) -> str:
    """A type for argparse: a bucket's name."""
    if not re.fullmatch(r"[a-z0-9][-._a-z0-9]{1,61}[a-z0-9]", text):
        raise Invalid(
            f"bucket {text}: 3 to 63 of a-z, 0-9, -, _ and .; give the name alone, without gs:// or folders"
        )
    return text


def add_slices(verb: argparse.ArgumentParser) -> None:
    """Adds the number of slices."""
    verb.add_argument("--slices", type=number(1, "--slices"), default=1, metavar="N",
                      help="as many slices, joined by the network (default: 1)")  # fmt: skip


def add_size(verb: argparse.ArgumentParser) -> None:
    """Adds the options that say what is paid for. They have no default: what costs money is named."""
    verb.add_argument("--accelerator", required=True, metavar="TYPE",
                      help="v5litepod-N, v5p-N or v6e-N, as v5litepod-64")  # fmt: skip
    verb.add_argument("--runtime", help="the machines' software version (default: by the accelerator)")
    add_slices(verb)
    capacity = verb.add_mutually_exclusive_group()
    for kind, help in (("spot", "cheaper, may be taken away"), ("reserved", "from your reservation")):
        capacity.add_argument(f"--{kind}", dest="capacity", action="store_const", const=kind, help=help)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(function, help, on_gke=False):
        verb = verbs.add_parser(
            function.__name__.replace("_", "-"), help=help, description=help[0].upper() + help[1:] + "."
        )
        verb.set_defaults(function=function, command=None)
        verb.add_argument("--name", type=name, default="mmada", help="what it is called (default: mmada)")
        if not on_gke:
            verb.add_argument("--zone", help="default: gcloud's own setting, compute/zone")
            verb.add_argument("--project", help="default: gcloud's own setting, core/project")
        verb.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
        return verb

    def add_grace(verb):
        verb.add_argument("--grace", type=number(0, "--grace"), default=600, metavar="SECONDS",
                          help="from SIGTERM to SIGKILL, for the save (default: 600)")  # fmt: skip

    def add_place(verb):
        verb.add_argument("--slice", type=number(0, "--slice"), default=0, metavar="N", help="default: 0")
        verb.add_argument("--worker", type=number(0, "--worker"), default=0, metavar="N", help="default: 0")
        verb.add_argument("--lines", type=number(0, "--lines"), default=100, metavar="N",
                          help="as many of the past (default: 100)")  # fmt: skip

    def add_command(verb, options="[options]"):
        verb.usage = f"%(prog)s {options} -- COMMAND..."
        verb.set_defaults(command=())

    def add_poll(verb, seconds):
        verb.add_argument("--poll", type=number(1, "--poll"), default=seconds, metavar="SECONDS",
                          help=f"between two looks (default: {seconds})")  # fmt: skip

    add_size(add(create, "ask for a TPU slice; it costs money from ACTIVE on"))
    add_poll(add(wait, "wait until the slice is ACTIVE"), 30)
    add(status, "the slice's state, and what each worker is doing")
    add(copy, "copy the files that git tracks, as they are now, to every worker")
    add(install, "install the project and jax[tpu] on every worker")
    verb = add(mount, "mount a Cloud Storage bucket at /mnt/BUCKET on every worker")
    verb.add_argument("bucket", type=bucket, metavar="BUCKET", help="its name, without gs://")
    add_command(add(start, "start one command on every worker, in the background"))
    verb = add(watch, "keep one command going: ask again for a slice that was taken away, and start again")
    add_size(verb)
    add_poll(verb, 60)
    verb.add_argument("--tries", type=number(1, "--tries"), default=10, metavar="N",
                      help="as many slices asked for and commands started (default: 10)")  # fmt: skip
    add_command(verb, "--accelerator TYPE [options]")
    add_place(add(logs, "show what a worker has written, and follow it while it runs"))
    add_grace(add(stop, "stop the command on every worker, with time to save"))
    verb = add(delete, "delete the slice; nothing costs money any more")
    verb.add_argument("--yes", action="store_true", help="don't ask")
    verb = add(jobset, "start one command on every host of TPU slices in a GKE cluster", on_gke=True)
    verb.add_argument("--accelerator", default="tpu-v5-lite-podslice", metavar="TYPE",
                      help=f"{', '.join(DIMENSIONS)} (default: the first)")  # fmt: skip
    verb.add_argument("--topology", required=True, help="chips of one slice, as 16x16, or 4x4x8 of v5p")
    verb.add_argument("--image", required=True, help="container image with the project and jax[tpu]")
    verb.add_argument("--bucket", type=bucket, help="mount it at /mnt/BUCKET; gs:// needs no mount")
    verb.add_argument("--restarts", type=number(0, "--restarts"), default=10, metavar="N",
                      help="of all hosts, when one fails or is taken away (default: 10)")  # fmt: skip
    add_slices(verb)
    add_grace(verb)
    add_command(verb, "--topology TOPOLOGY --image IMAGE [options]")
    add_place(add(jobset_logs, "follow what a host of a JobSet writes", on_gke=True))
    add(jobset_delete, "delete a JobSet", on_gke=True)
    return top


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the arguments, and the command behind -- for the verbs that take one."""
    split = argv.index("--") if "--" in argv else len(argv)
    top = parser()
    args, command = top.parse_args(argv[:split]), argv[split + 1 :]
    if args.command is None and split < len(argv):
        top.error(f"{args.verb} takes no command after --")
    if args.command is not None and not command:
        top.error(f"{args.verb} needs a command after --")
    args.command = command
    return args


def main() -> None:
    """Does what the command line says."""
    args = parse(sys.argv[1:])
    args.function(args)


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        sys.exit(failed.status)
    except (ValueError, Invalid, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
