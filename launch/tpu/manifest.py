"""The JobSet that runs one command on every host of TPU slices in a GKE cluster, as YAML."""

import argparse
import json
import math
import re

# Accelerator -> dimensions of its topologies.
DIMENSIONS = {"tpu-v5-lite-podslice": 2, "tpu-v5p-slice": 3, "tpu-v6e-slice": 2}
# Of every accelerator, in a slice of more than one host.
CHIPS_PER_HOST = 4
MANIFEST = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations:
    # One slice, one node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {restarts}
  replicatedJobs:
  - name: slice
    replicas: {slices}
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        backoffLimit: 0
        template:
{annotations}          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {grace}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {accelerator}
              cloud.google.com/gke-tpu-topology: {topology}
            containers:
            - name: train
              image: {image}
              ports:
              - containerPort: 8471
              - containerPort: 8080
              command:
              - bash
              - -c
              # Training that SIGTERM stopped has saved and ends with 0, which would pass for finished.
              - |
                trap 'stopped=143; if [ -n "$child" ]; then kill -TERM $child; fi' TERM
                "$@" & child=$!
                if [ -n "$stopped" ]; then kill -TERM $child; fi
                wait $child; ended=$?
                if [ -n "$stopped" ]; then wait $child; fi
                exit ${{stopped:-$ended}}
              - train
              args: {command}
              env:
              - name: PYTHONUNBUFFERED
                value: "1"
              resources:
                requests:
                  google.com/tpu: {chips}
                limits:
                  google.com/tpu: {chips}
{volumes}"""

# What mounts a bucket, for programs that don't read gs://.
ANNOTATIONS = """\
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
"""
VOLUMES = """\
              volumeMounts:
              - name: bucket
                mountPath: /mnt/{bucket}
            volumes:
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: {bucket}
                  # A checkpoint is written as a folder and then renamed; all hosts must see that at once.
                  mountOptions: "implicit-dirs,rename-dir-limit=100000,\\
                    metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
"""


def write_manifest(args: argparse.Namespace) -> str:
    """The JobSet's YAML."""
    chips = count_chips(args.accelerator, args.topology)
    per_host = min(CHIPS_PER_HOST, chips)
    return MANIFEST.format(
        name=args.name,
        restarts=args.restarts,
        slices=args.slices,
        hosts=chips // per_host,
        chips=per_host,
        grace=args.grace,
        accelerator=args.accelerator,
        topology=args.topology,
        image=json.dumps(args.image),
        command=json.dumps(args.command),
        annotations=ANNOTATIONS if args.bucket else "",
        volumes=VOLUMES.format(bucket=args.bucket) if args.bucket else "",
    )


def count_chips(accelerator: str, topology: str) -> int:
    """How many chips a slice of a topology has."""
    if accelerator not in DIMENSIONS:
        raise ValueError(f"--accelerator {accelerator}: known are {', '.join(DIMENSIONS)}")
    dimensions = DIMENSIONS[accelerator]
    example = "x".join(["4"] * dimensions)
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{dimensions - 1}}}", topology):
        raise ValueError(
            f"--topology {topology}: {accelerator} has {dimensions} dimensions; write it like {example}"
        )
    chips = math.prod(map(int, topology.split("x")))
    if chips > 1 and chips % CHIPS_PER_HOST:
        raise ValueError(
            f"--topology {topology}: {chips} chips don't fill hosts of {CHIPS_PER_HOST}; "
            f"take 1 or a multiple of {CHIPS_PER_HOST}, like {example}"
        )
    return chips
