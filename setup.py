from setuptools import find_packages, setup

setup(
    name="mmada_jax",
    version="0.1.0",
    description="MMaDA in JAX: one masked-diffusion transformer that reads, reasons and draws.",
    license="Apache-2.0",
    packages=find_packages(include=["mmada_jax", "mmada_jax.*"]),
    package_data={"mmada_jax.measure": ["*.html"]},
    entry_points={
        "console_scripts": ["mmada = mmada_jax.programs.command:main"],
        "lmms_eval.models": ["mmada_jax = mmada_jax.measure.pictured:manifest"],
    },
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12,<1",
        "grain",
        "tensorflow-datasets",
        "ml-collections",
        "chex",
        "numpy>=2",
        "pillow",
        "safetensors",
        "tokenizers>=0.20",  # encode_special_tokens
        "tensorboardX",
        "tqdm",
        "dm-pix",
    ],
    extras_require={
        # The quickstart: real scans and their judge (scikit-learn), its report.
        "digits": ["scikit-learn", "matplotlib", "jinja2"],
        # The endpoint of `mmada serve`, and the client that tests call it with.
        "serve": ["fastapi", "uvicorn", "python-multipart", "prometheus-client", "openai"],
        # The page of `mmada page`, and the browser's driver that its test drives Chromium with.
        "page": ["gradio>=6", "playwright"],
        # Evaluation: lm-evaluation-harness.
        "eval": ["lm-eval==0.4.13"],
        # Rewards: comparison of mathematical answers.
        "rl": ["math-verify"],
        # Tasks with verifiers. Its pycosat is compiled where there is no wheel of it (Python 3.13).
        "gym": ["reasoning-gym"],
        # pytorch_model*.bin; what benchmarks and tests compare against: the PyTorch twin, adapters in PEFT.
        "torch": ["torch", "transformers>=4.46", "peft"],
        # Reports of compilation for TPUs; libtpu fits one version of jax only, so this extra alone pins it.
        "aot": ["jax==0.10.2", "libtpu==0.0.42.1"],
        # Many machines: `mmada prepare --engine ray`, sweeps.
        "cluster": ["ray[data,tune]>=2.60,<3", "optuna"],
        "test": ["pytest", "pytest-xdist", "pytest-timeout", "ruff"],
    },
)
