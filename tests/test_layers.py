"""Imports go only downwards (the table of the design); heavy libraries stay where they belong."""

import ast
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = (
    "files disk board ranges vocab schedule config chips hlo kernels.* rl.verifier rl.workers "
    "rl.quantities",
    "attention sharding distributed layout data.records data.tokenizer data.texts data.images "
    "data.sources.* data.digits",
    "transformer vq clip rl.answers results",
    "corrupt loss denoise vision",
    "state optim manifest workdir arrays checkpoint metrics run decode inputs convert.* data.pipeline "
    "rl.prompts rl.unigrpo rl.rewards",
    "train rl.train rl.rollout rl.diagnose evaluate api aot",
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
NO_JAX = ("vocab", "layout", "data")  # and everything in data, but for data.pipeline
LEAN = ("kernels", "attention", "transformer", "loss", "denoise")  # accelerator machines have little
PYTORCH = ("torch", "safetensors", "transformers")
EXPORTED = (
    "convert.modeling_mmada",
    "convert.modeling_magvitv2",
)  # travel with checkpoints, never imported


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
PACKAGES = {"data", "rl"}  # whose __init__ is empty; kernels and convert have content


def layer(module):
    package = module if f"{module}.*" in LAYER else module.rpartition(".")[0]
    return LAYER.get(module, LAYER.get(f"{package}.*"))


def ours(module):
    """The mmada_jax modules that `module` imports: the longest prefix that is a module."""
    for name, _ in MODULES[module]:
        parts = name.split(".")[1:] if name.split(".")[0] == "mmada_jax" else []
        while parts and ".".join(parts) not in MODULES:
            parts.pop()
        if parts:
            yield ".".join(parts)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_imports_go_downwards(module):
    if module in PACKAGES:
        assert not MODULES[module], f"mmada_jax/{module}/__init__.py must be empty"
        return
    assert layer(module) is not None, f"mmada_jax.{module} has no layer; add it to the table"
    above = [name for name in ours(module) if name in PACKAGES or layer(name) > layer(module)]
    assert not above, f"mmada_jax.{module} (layer {layer(module)}) imports {above}"


@pytest.mark.parametrize("module", EXPORTED)
def test_exported_files_stand_alone(module):
    assert {name.split(".")[0] for name, _ in MODULES[module]} == {"torch", "transformers"}
    assert not [other for other in MODULES if module in ours(other)]


def test_no_circles():
    graphlib.TopologicalSorter({module: set(ours(module)) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_libraries_stay_where_they_belong(module):
    top = module.split(".")[0]
    for name, in_function in MODULES[module]:
        library = name.split(".")[0]
        where = f"mmada_jax.{module} imports {name}"
        if name.startswith("flax.linen"):
            assert module in ("transformer", "vq"), where
        if library in PYTORCH and module in EXPORTED:
            assert not in_function, where
        elif library in PYTORCH:
            assert top == "convert", where
            assert in_function, f"{where} outside of a function"
        if library == "sklearn":
            assert module in ("data.digits", "evaluate", "rl.rewards") and in_function, where
        if library in ("math_verify", "reasoning_gym"):
            assert module == "rl.verifier" and in_function, where
        if library in ("jax", "jaxlib", "flax") and top in NO_JAX:
            assert module == "data.pipeline", where
        if top in LEAN:
            lean = {"jax", "flax", "numpy", "mmada_jax"}
            assert library in lean or library in sys.stdlib_module_names, where


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] in LEAN])
def test_lean_modules_lean_on_lean_modules(module):
    # Through other modules too: what an accelerator machine lacks may not come in by a detour.
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += ours(name)
    libraries = {name.split(".")[0] for m in seen for name, in_function in MODULES[m]}
    lean = {"jax", "flax", "numpy", "mmada_jax"} | sys.stdlib_module_names
    assert libraries <= lean, libraries - lean


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_import_only_configuration(path):
    for name, _ in imports(path, path.name):
        allowed = name.startswith("mmada_jax.config.") or name == "mmada_jax.config"
        assert allowed or name.split(".")[0] == "ml_collections", f"{path.name} imports {name}"


def test_the_reader_sees_imports(tmp_path):
    source = "import a.b\nfrom mmada_jax import vq\ndef f():\n    from torch import nn\n"
    (tmp_path / "m.py").write_text(source)
    found = set(imports(tmp_path / "m.py", "m"))
    assert found == {("a.b", False), ("mmada_jax.vq", False), ("torch.nn", True)}


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
