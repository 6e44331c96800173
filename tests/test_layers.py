"""Imports go only downwards (the table of the design); heavy libraries stay where they belong."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From the ground up; within a floor from left to right. A module imports only what stands before it.
FLOORS = {
    "": "ranges outages bucket lease storage whole files nearby config progress cluster",
    "tokens": "vocab tokenizer layout",
    "data": "records images digits totals sources.source sources.paths sources.rows sources.shards "
    "sources.arrayrecord sources.imagefolder sources.jsonl sources.llava sources.parquet sources.tfds "
    "sources.webdataset sources texts pipeline",
    "devices": "chips sharding distributed hlo",
    "kernels": "reference cpu tpu cached attention",
    "nets": "cache products int8 rope transformer lora vq clip blip lpips inception",
    "diffusion": "schedule loss corrupt rules cached denoise decode slots",
    "weights": "state lazy hub manifest arrays workdir checkpoint llada_keys magvit_keys clip_keys "
    "blip_keys judge_keys older quantized adapters folder inspect convert",
    "model": "results inputs vision model reading prepare actors",
    "serve": "tickets engine api replies requests meters guard endpoint canvas page",
    "measure": "held_out digits totals own report likelihood answers harness evaluation drawings pictured",
    "train": "optim board metrics runs own sweep tables running tune rows program pictures supervised "
    "rl.rewards.quantities "
    "rl.rewards.extract rl.rewards.answers rl.rewards.verifier rl.rewards.score_file rl.rewards.workers "
    "rl.rewards.own rl.rewards.pictures rl.rewards.functions "
    "rl.prompts rl.unigrpo rl.run rl.rollout rl.update rl.tasks rl.start rl.resume rl.report rl.loop "
    "rl.diagnose aot",
    "programs": "process configured train rl sweep sample serve page evaluate prepare convert aot command",
}
PLACES = [f"{floor}.{name}".strip(".") for floor, names in FLOORS.items() for name in names.split()]
PLACE = {name: number for number, name in enumerate(PLACES)}
NO_JAX = ("tokens", "data")
LEAN = (
    "kernels",
    "nets.transformer",
    "nets.rope",
    "nets.int8",
    "nets.lora",
    "diffusion",
)  # accelerator machines have little
SMALL = {"jax", "flax", "numpy", "mmada_jax"}
FOLDERS = ("mmada_jax", "launch", "configs", "tests")
SKLEARN = ("data.digits", "measure.digits", "measure.own", "train.rl.rewards.pictures")
RAY = ("cluster", "model.actors", "train.tune")
PYTORCH = ("torch", "safetensors", "transformers")
# They travel with checkpoints and are never imported.
EXPORTED = ("weights.modeling_mmada", "weights.modeling_magvitv2")


def imports(path, module):
    """(imported dotted name, whether inside a function) of every import in a file."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import, line {node.lineno}"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in inside


def read_modules():
    """Dotted name below mmada_jax -> its imports. A package is named like its folder."""
    files = {}
    for path in sorted((ROOT / "mmada_jax").rglob("*.py")):
        parts = path.relative_to(ROOT / "mmada_jax").with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: sorted(set(imports(path, name))) for name, path in files.items()}


MODULES = read_modules()
PACKAGES = {*FLOORS, "train.rl", "train.rl.rewards"} - {""}  # their __init__ holds a docstring at most


def ours(module):
    """The mmada_jax modules that `module` imports: the longest prefix that is a module."""
    for name, _ in MODULES[module]:
        parts = name.split(".")[1:] if name.split(".")[0] == "mmada_jax" else []
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        if parts:
            yield ".".join(parts)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"", *EXPORTED}))
def test_imports_go_downwards(module):
    if module in PACKAGES:
        assert not MODULES[module], f"mmada_jax/{module}/__init__.py must be empty"
        return
    assert module in PLACE, f"mmada_jax.{module} has no place; add it to its floor"
    names = {name for name in ours(module) if name not in PACKAGES}
    above = [name for name in names if PLACE[name] >= PLACE[module]]
    assert not above, f"mmada_jax.{module} imports {above}, which stand above it"


def test_every_place_is_taken():
    assert set(PLACES) <= set(MODULES)


@pytest.mark.parametrize("module", EXPORTED)
def test_exported_files_stand_alone(module):
    assert {name.split(".")[0] for name, _ in MODULES[module]} == {"torch", "transformers"}
    assert not [other for other in MODULES if module in ours(other)]


def lean(module):
    return any(module == name or module.startswith(f"{name}.") for name in LEAN)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_libraries_stay_where_they_belong(module):
    top = module.split(".")[0]
    for name, in_function in MODULES[module]:
        library = name.split(".")[0]
        where = f"mmada_jax.{module} imports {name}"
        if name.startswith("flax.linen"):
            assert module in ("nets.transformer", "nets.vq"), where
        if library in PYTORCH and module in EXPORTED:
            assert not in_function, where
        elif library in PYTORCH:
            assert top == "weights", where
            assert in_function, f"{where} outside of a function"
        if library == "sklearn":
            assert module in (
                "data.digits",
                "measure.digits",
                "measure.own",
                "train.rl.rewards.pictures",
            ), where
            assert in_function, f"{where} outside of a function"
        if library in ("math_verify", "reasoning_gym"):
            assert module == "train.rl.rewards.verifier" and in_function, where
        if library == "ray":
            assert module in RAY and in_function, where
        if library == "optuna":
            assert module == "train.tune" and in_function, where
        if library in ("jax", "jaxlib", "flax"):
            assert top not in NO_JAX, where
        if lean(module):
            assert library in SMALL or library in sys.stdlib_module_names, where


def libraries_below(module):
    """What a module imports, itself or through other modules, also inside functions."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += ours(name)
    return {name.split(".")[0] for m in seen for name, _ in MODULES[m]}


@pytest.mark.parametrize("module", [name for name in MODULES if lean(name)])
def test_lean_modules_lean_on_lean_modules(module):
    # Through other modules too: what an accelerator machine lacks may not come in by a detour.
    known = SMALL | sys.stdlib_module_names
    assert libraries_below(module) <= known, libraries_below(module) - known


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] in NO_JAX])
def test_rows_are_made_without_jax(module):
    # Processes that load would start it, and with it ask for devices.
    assert not libraries_below(module) & {"jax", "jaxlib", "flax"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_import_only_configuration(path):
    for name, _ in imports(path, path.name):
        allowed = name.startswith("mmada_jax.config.") or name == "mmada_jax.config"
        assert allowed or name.split(".")[0] == "ml_collections", f"{path.name} imports {name}"


def test_the_reader_sees_imports(tmp_path):
    source = "import a.b\nfrom mmada_jax.nets import vq\ndef f():\n    from torch import nn\n"
    (tmp_path / "m.py").write_text(source)
    found = set(imports(tmp_path / "m.py", "m"))
    assert found == {("a.b", False), ("mmada_jax.nets.vq", False), ("torch.nn", True)}


def jits(tree):
    """(line, keywords) of every use of jax.jit, also as a decorator or within partial."""

    def is_jit(node):
        return isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.jit"

    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = [node for node in calls if is_jit(node.func) or any(map(is_jit, node.args))]
    yield from ((node.lineno, {keyword.arg for keyword in node.keywords}) for node in called)
    within = {id(inner) for node in called for inner in ast.walk(node) if is_jit(inner)}
    yield from ((node.lineno, set()) for node in ast.walk(tree) if is_jit(node) and id(node) not in within)


def test_every_jit_says_where_its_arrays_lie():
    # What the compiler chooses may lie on the devices of other processes, where nothing can read it.
    bare = []
    for path in sorted((ROOT / "mmada_jax").rglob("*.py")):
        for line, keywords in jits(ast.parse(path.read_text())):
            if missing := {"in_shardings", "out_shardings"} - keywords:
                bare.append(f"{path.relative_to(ROOT)}:{line} lacks {', '.join(sorted(missing))}")
    assert not bare, "\n".join(bare)


def test_the_reader_sees_jits():
    source = (
        "@jax.jit\ndef f(): ...\ng = jax.jit(f, in_shardings=1)\n@partial(jax.jit, donate=0)\ndef h(): ..."
    )
    assert sorted(jits(ast.parse(source))) == [(1, set()), (3, {"in_shardings"}), (4, {"donate"})]


# Who may ask the operating system for files beside `storage`, which knows buckets too, and for what.
FILES = {
    "": "lease storage whole nearby cluster config",  # the ground; a configuration is code
    "of this program": "programs.process measure.report weights.convert train.running",
    "code that the user allows": "train.rl.rewards.own",
    "temporary files": "weights.hub model.prepare data.sources.tfds train.tune",
    "globs, kinds and numbers of files of a disk": "data.sources.paths data.sources.shards",
    "a part of a name": "data.sources.webdataset",
    "judges read the folder": "measure.answers",
}
_OF_OS = "replace rename remove unlink makedirs mkdir listdir scandir rmdir open stat"
# A library's functions by which files are asked for; None: all.
ASKS = dict.fromkeys(("shutil", "fcntl", "glob", "tempfile")) | {
    "os": set(_OF_OS.split()),
    "pathlib": {"Path"},
}


def asks_for_files(tree):
    """The calls of a module by which it opens, lists, renames or locks files itself."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        library, _, function = name.partition(".")
        known = ASKS.get(library, set())
        if name == "open" or (function and (known is None or function in known)):
            yield name


def test_storage_owns_all_files():
    allowed = {module for modules in FILES.values() for module in modules.split()}
    found = {
        name: calls
        for path in sorted((ROOT / "mmada_jax").rglob("*.py"))
        for name in [".".join(path.relative_to(ROOT / "mmada_jax").with_suffix("").parts)]
        if (calls := sorted(set(asks_for_files(ast.parse(path.read_text())))))
    }
    assert not {name: calls for name, calls in found.items() if name not in allowed}
    assert set(found) == allowed, "one of them asks no more"


def test_the_reader_sees_who_asks_for_files():
    source = "open(x)\nos.rename(a, b)\nx.open()\npathlib.Path(x)\npathlib.PurePath(x)\nshutil.move(a, b)"
    assert set(asks_for_files(ast.parse(source))) == {"open", "os.rename", "pathlib.Path", "shutil.move"}


LOOPS = {("train.supervised", "train"), ("train.rl.loop", "train")}  # written out, to be read from above


def test_files_and_functions_are_short():
    long = []
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        name = (
            path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removeprefix("mmada_jax.")
        )
        source = path.read_text()
        if (lines := source.count("\n")) > 450 and name not in EXPORTED:
            long.append(f"{path.relative_to(ROOT)} has {lines} lines; 450 are the most")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (name, node.name) not in LOOPS:
                lines = node.end_lineno - node.lineno + 1
                if lines > 80:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert not long, "\n".join(long)
