"""Times attention: what is chosen against what else there is, forward and backward, at the model's shapes.

    mmada bench attention                        on the devices of this machine
    mmada bench attention --schedule v5p:2x2x1   for a TPU that isn't there

On a TPU our kernel against splash attention, on a GPU cuDNN's against XLA's products.

With --schedule nothing is timed: libtpu compiles the kernels of TPUs, and what is compared is the length of
their final schedules, in instruction bundles (one per cycle, if nothing stalls) of all grid steps of
one head. A bundle knows nothing of waiting for memory, so this is a comparison of two kernels'
arithmetic and not a time. Needs jax, flax and numpy; --schedule also libtpu (the extra `aot`).
"""

import functools
import glob
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter

import jax
import jax.numpy as jnp

from launch.benchmarks import timing
from mmada_jax.kernels.attention import attention

# Rows, queries, keys, query heads, key heads: the three lengths of pretraining, grouped queries, and a
# block of a decoding against a cache.
SHAPES = {
    "256 px, phase 1": (8, 387, 387, 32, 32),
    "256 px, phase 2": (8, 515, 515, 32, 32),
    "512 px": (4, 1539, 1539, 32, 32),
    "512 px, grouped": (4, 1539, 1539, 32, 8),
    "block of 32": (8, 32, 1280, 32, 32),
    "block of 128": (1, 128, 4096, 32, 32),
}
SMALL = {"small": (2, 129, 129, 4, 2), "small block": (2, 32, 256, 4, 4)}
D_HEAD = 128


def measure(args):
    """A row for each shape and direction: times in ms, or bundles."""
    return schedules(args.schedule) if args.schedule else times(args.repeats)


def as_text(rows):
    """A line for each row."""
    if "bundles" in rows[0]:
        lines = [f"{rows[0]['topology']}: instruction bundles of one head in the compiler's final schedule"]
        for row in rows:
            for direction in ("forward", "backward"):
                ours, theirs = (row["bundles"][side][direction] for side in ("tpu", "splash"))
                lines.append(
                    f"{row['name']:18} {direction:8} ours {ours}  splash {theirs}  "
                    f"splash / ours {theirs / ours:.2f}"
                )
        return "\n".join(lines)
    lines = [
        f"{rows[0]['device']}, bfloat16, heads of {D_HEAD}, medians of {rows[0]['repeats']} (quartiles) "
        "in ms"
    ]
    for row in rows:
        shown = "  ".join(f"{name} {timing.as_text(ms, 3)}" for name, ms in row["ms"].items())
        compared = f"{' / '.join(row['compared'])} {row['ratio']:.2f}"
        lines.append(f"{row['name']:18} {row['direction']:8} {shown}  {compared}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ times


def times(n):
    """Medians in ms of each implementation, in turns, and the other's over the chosen one's."""
    device = jax.devices()[0]
    chosen, other = {"tpu": ("tpu", "splash"), "gpu": ("cudnn", "xla")}.get(device.platform, ("cpu", "xla"))
    rows = []
    for name, shape in (SMALL if device.platform == "cpu" else SHAPES).items():
        for direction in ("forward", "backward") if shape[1] == shape[2] else ("forward",):
            runs = {}
            for implementation in dict.fromkeys((chosen, other, "xla")):
                runs[implementation] = prepare(implementation, shape, direction)
            sides = timing.in_ms(timing.take_turns(runs, n))
            row = {
                "device": device.device_kind, "name": name, "shape": shape, "direction": direction,
                "repeats": n, "ms": sides, "compared": (other, chosen),
                "ratio": sides[other]["median"] / sides[chosen]["median"],
            }  # fmt: skip
            rows.append(row)
    return rows


def prepare(implementation, shape, direction):
    """A call without arguments that runs once and waits."""
    B, S, T, H, G = shape
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        jax.random.normal(key, size, jnp.bfloat16)
        for key, size in zip(
            keys[:3], [(B, H, S, D_HEAD), (B, G, T, D_HEAD), (B, T, G * D_HEAD)], strict=True
        )
    )
    valid = jnp.arange(T)[None] >= (jnp.arange(B) * T // (4 * B))[:, None]  # padding on the left
    q_valid = jnp.ones((B, S), bool) if S != T else valid
    forward = jax.jit(functools.partial(run_one, implementation))
    if direction == "forward":
        return lambda: jax.block_until_ready(forward(q, k, v, valid, q_valid))
    # The pull-back is an argument of what is timed: its arrays would be constants of it otherwise.
    linear = jax.jit(lambda *x: jax.vjp(lambda *y: run_one(implementation, *y, valid, q_valid), *x))
    _, residuals = linear(q, k, v)
    pull, cotangent = (
        jax.jit(lambda pull, ct: pull(ct)),
        jax.random.normal(keys[3], (B, S, H * D_HEAD), jnp.bfloat16),
    )
    return lambda: jax.block_until_ready(pull(residuals, cotangent))


def run_one(implementation, q_BHSK, k_BGTK, v_BTM, valid_BT, q_valid_BS):
    """An implementation of ours by its name, or "splash"; [B, S, H * K]."""
    if implementation == "splash":
        return splash(q_BHSK, k_BGTK, v_BTM, valid_BT, q_valid_BS)
    return attention(q_BHSK, k_BGTK, v_BTM, valid_BT, q_valid_BS, implementation=implementation)


def splash(q_BHSK, k_BGTK, v_BTM, valid_BT, q_valid_BS):
    """JAX's own kernel. It takes whole blocks only: rows are padded to a multiple of 128, blocks are
    the largest divisor of that up to 512."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    H, S, T = *q_BHSK.shape[1:3], k_BGTK.shape[2]
    more_S, more_T = -S % 128, -T % 128
    s, t = (next(b for b in (512, 384, 256, 128) if n % b == 0) for n in (S + more_S, T + more_T))
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((S + more_S, T + more_T))] * H),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernel.BlockSizes(
            block_q=s, block_kv=T + more_T, block_kv_compute=t, block_q_dkv=s, block_kv_dkv=T + more_T,
            block_kv_dkv_compute=t, block_q_dq=s, block_kv_dq=T + more_T,
        ),
    )  # fmt: skip
    wide = [
        jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
        for x, more in (
            (q_BHSK * q_BHSK.dtype.type(D_HEAD**-0.5), more_S),
            (k_BGTK, more_T),
            (jnp.moveaxis(v_BTM.reshape(*v_BTM.shape[:2], -1, D_HEAD), 1, 2), more_T),
        )
    ]
    segments = kernel.SegmentIds(
        *(
            jnp.pad(x, ((0, 0), (0, m))).astype(jnp.int32)
            for x, m in ((q_valid_BS, more_S), (valid_BT, more_T))
        )
    )
    out_BHSK = jax.vmap(run)(*wide, segments)[:, :, :S]
    return jnp.moveaxis(out_BHSK, 1, 2).reshape(len(out_BHSK), S, -1)


# -------------------------------------------------------------------------------------- schedules


def schedules(topology):
    """Bundles of one head, forward and backward, of our kernel and of splash."""
    rows = []
    for name, shape in SHAPES.items():
        if shape[1] != shape[2] or shape[3] != shape[4]:
            continue
        sides = {}
        for implementation in ("tpu", "splash"):
            with tempfile.TemporaryDirectory() as folder:
                dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_debug_level=2"
                command = [sys.executable, __file__, name, implementation, topology]
                environment = os.environ | {"LIBTPU_INIT_ARGS": dump, "JAX_PLATFORMS": "cpu"}
                environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # as this process has it
                run = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
                if run.returncode:
                    sys.exit(f"error: {run.stderr.strip().splitlines()[-1]}")
                sides[implementation] = count_bundles(folder, implementation, shape[1])
        row = {"topology": topology, "name": name, "shape": shape, "bundles": sides}
        rows.append(row)
    return rows


def compile_one(shape, implementation, topology):
    """Compiles forward and backward of one head for a TPU; the compiler leaves its schedules."""
    from mmada_jax.devices import chips, sharding
    from mmada_jax.train import aot

    mesh = sharding.make_mesh(devices=aot.devices(chips.topology(topology)))
    B, (_, S, T, _, _), H = mesh.size, shape, 8
    rows = sharding.batch_sharding(mesh)
    heads = jax.ShapeDtypeStruct((B, H, S, D_HEAD), jnp.bfloat16, sharding=rows)
    values = jax.ShapeDtypeStruct((B, T, H * D_HEAD), jnp.bfloat16, sharding=rows)
    valid = jax.ShapeDtypeStruct((B, T), bool, sharding=rows)

    def gradients(q, k, v, valid):
        run = functools.partial(run_one, implementation)
        if implementation == "splash":
            run = sharding.on_each_device(run, sharding.USE.spec("batch"), sharding.USE.spec("batch"))
        return jax.grad(lambda *x: run(*x, valid, valid).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
            q, k, v
        )

    with jax.set_mesh(mesh):
        jax.jit(gradients).lower(heads, heads, values, valid).compile()


def count_bundles(folder, implementation, S):
    """{"forward", "backward"}: bundles of a head, loops within a kernel and grid steps counted out."""
    totals = Counter()
    for path in glob.glob(f"{folder}/*final_bundles.txt"):
        kernel = re.search(r"(mmada_attention|splash_mha)_(forward|backward|fwd|dq|dkv)", path)
        if not kernel or "schedule" in path:
            continue
        depths = Counter()
        with open(path) as file:
            for line in file:
                if match := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(>*)", line):
                    depths[len(match[1])] += 1
        direction = "forward" if kernel[2] in ("forward", "fwd") else "backward"
        if implementation == "tpu":  # a grid step is a head, the loop within it its blocks of queries
            totals[direction] += depths[1] + depths[2] * (S // 512)
        else:  # a grid step is a block of queries
            padded = S + -S % 128
            totals[direction] += depths[1] * (
                padded // next(b for b in (512, 384, 256, 128) if padded % b == 0)
            )
    return dict(totals)


if __name__ == "__main__":  # a process of `schedules`
    compile_one(SHAPES[sys.argv[1]], *sys.argv[2:])
