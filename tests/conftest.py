"""Strict promotion and eight fake devices for every test; the goldens' loader."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import signal
import socket
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling: LLVM optimises nothing, and jax 0.10 has a quicker emitter of loops.
HURRY = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    HURRY += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a program under test that sees so many devices."""
    return f"{HURRY} --xla_force_host_platform_device_count={devices}"


os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
# What was compiled once is kept for this session: workers of pytest-xdist and programs under test inherit
# the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="mmada_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts its background jobs with Ctrl-C ignored, and the programs under test would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).parent.parent
# Mark of a test -> the packages that it needs beside those of the default test command.
EXTRAS = {"torch": ("torch", "transformers"), "aot": ("libtpu",), "gym": ("reasoning_gym",),
          "cluster": ("ray",)}  # fmt: skip


# The files that take longest, in this order: the workers of pytest-xdist then end together.
LONGEST = (
    "test_bucket_runs", "test_rl_resume", "test_train", "test_distributed", "test_prepare_ray",
    "test_sweep_ray", "test_rl", "test_engine",
    "test_aot", "test_adapters", "test_rl_adapters", "test_pictures", "test_own", "test_own_reward",
    "test_rl_update", "test_model", "test_denoise", "test_runs_training", "test_masks", "test_unigrpo",
    "test_benchmark_decode", "test_goldens", "test_api", "test_ml_cache", "test_wino", "test_cached",
    "test_transformer", "test_sample", "test_folder", "test_attention",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
    )
    for mark, packages in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            reason = f"needs {' and '.join(missing)}: bash launch/test.sh --all"
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """A compiled program holds some twelve maps of memory until it is cleared, and Linux gives a process
    65,530 of them: at more XLA aborts."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def proxy():
    """A fake of Google's storage behind a proxy (buckets.py); this process's environment is for it."""
    from buckets import behind_proxy

    with behind_proxy() as proxy:
        yield proxy


@pytest.fixture
def folder(proxy, tmp_path):
    """A folder of the fake's bucket. After the test it is removed, and the storage serves all again."""
    from buckets import BUCKET

    from mmada_jax import storage

    where = storage.path(f"gs://{BUCKET}/{tmp_path.name}")
    yield where
    proxy.fails, proxy.delay = lambda request: None, 0.0
    where.rmtree()


@pytest.fixture(scope="session", autouse=True)
def no_folder_is_named_after_a_storage():
    """A path of gs:// that is taken for one of a disk makes a folder gs: without an error."""
    yield
    for folder in {ROOT, pathlib.Path.cwd()}:
        assert not [path for path in folder.glob("*:") if path.is_dir()]


GOLDENS = pathlib.Path(os.environ.get("MMADA_GOLDENS", pathlib.Path(__file__).parent / "goldens"))


def load_golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """NAME.json and the arrays of NAME.npz."""
    settings = json.loads((GOLDENS / f"{name}.json").read_text())
    arrays = GOLDENS / f"{name}.npz"
    return settings, dict(np.load(arrays)) if arrays.exists() else {}


def golden_weights(settings: dict) -> dict[str, np.ndarray]:
    """The random PyTorch state dict that the goldens were made with (see goldens/README.md)."""
    rng = np.random.default_rng(settings["weights"]["seed"])
    state = {}
    for key in sorted(settings["state_dict_shapes"]):
        w = rng.standard_normal(settings["state_dict_shapes"][key]).astype(np.float32)
        is_norm = key.endswith("norm.weight") or "ln_f" in key or (
            "norm" in key and key.endswith("weight"))  # fmt: skip
        state[key] = 1 + np.float32(0.1) * w if is_norm else w * np.float32(settings["weights"]["scale"])
    return state


CLIP_WORDS = ["a", "handwritten", "seven", "two", "three", "and"]


def clip_tokenizer(eos):
    """Of whole words, for a tiny CLIP."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"<s>": 8, "</s>": eos, "[u]": 10, **{word: i for i, word in enumerate(CLIP_WORDS)}}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[u]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 8), ("</s>", eos)])
    return made


def write_clip(settings, folder):
    """A tiny CLIP of the goldens (`models` of clip.json) as a folder of Hugging Face's; its state dict."""
    from safetensors.numpy import save_file

    state = {key: np.asarray(value) for key, value in golden_weights(settings).items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings["config"]))
    clip_tokenizer(9).save(str(folder / "tokenizer.json"))
    return state


@pytest.fixture(scope="session")
def smoke_config():
    """configs/pretrain.py:digits,smoke as a plain dict; on 8 devices."""
    from configs import pretrain

    return pretrain.get_config("digits,smoke").to_dict()


def save_params(workdir, config, params, opt_state=None, texts=None):
    """A workdir as training leaves it, but with these params."""
    from mmada_jax.config import to_dict
    from mmada_jax.train.pictures import codec_of
    from mmada_jax.train.runs import (
        ModelRun,
        describe,
        image_tokenizer_path,
        parse,
        plan,
    )
    from mmada_jax.weights.checkpoint import Checkpoints
    from mmada_jax.weights.folder import keep_image_tokenizer, open_image_tokenizer
    from mmada_jax.weights.state import TrainState
    from mmada_jax.weights.workdir import claim_workdir

    run = parse(config)
    of_model = isinstance(run, ModelRun)
    what = plan(run, workdir) if of_model else codec_of(run, workdir)
    if of_model:
        keep_image_tokenizer(workdir, open_image_tokenizer(image_tokenizer_path(run, workdir)))
    claim_workdir(workdir, to_dict(run), texts, describe(run, what))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(TrainState(np.int32(1), params, opt_state or {"count": np.int32(0)}))


def vq_params(config):
    """Params of an untrained image tokenizer. To compile vq.init_params takes longer than most tests do."""
    from mmada_jax.nets import vq

    rng = np.random.default_rng(0)

    def draw(path, shape):
        if len(shape) == 1:
            return np.full(shape, path[-1].key.endswith("_scale"), np.float32)
        return rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape).astype(np.float32)

    shapes = jax.eval_shape(lambda: vq.init_params(jax.random.key(0), config))
    return jax.tree.map_with_path(lambda path, x: draw(path, x.shape), shapes)


@pytest.fixture(scope="session")
def image_tokenizer(tmp_path_factory):
    """Workdir of an untrained image tokenizer."""
    from configs import vq as vq_config
    from mmada_jax.nets import vq

    workdir = tmp_path_factory.mktemp("image_tokenizer")
    config = vq_config.get_config("digits,smoke").to_dict()
    save_params(workdir, config, vq_params(vq.PRESETS["digits"]))
    return workdir


@pytest.fixture(scope="session")
def model_workdir(smoke_config, image_tokenizer, tmp_path_factory):
    """Workdir of an untrained model."""
    from mmada_jax.nets import transformer
    from mmada_jax.train import runs

    workdir = tmp_path_factory.mktemp("model")
    config = smoke_config | {"image_tokenizer": str(image_tokenizer)}
    plan = runs.plan(runs.parse(config), workdir)
    texts = {"tokenizer.json": plan.tokenizer.to_json()}
    params = jax.jit(lambda key: transformer.init_params(key, plan.model))(jax.random.key(0))
    save_params(workdir, config, params, texts=texts)
    return workdir


@pytest.fixture
def free_port():
    """A port of this machine that nothing listens on."""

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def tfds_folder(tmp_path_factory):
    """Folder of a small data set that TFDS prepared."""
    from data_files import write_tfds

    return write_tfds(tmp_path_factory.mktemp("tfds"))
