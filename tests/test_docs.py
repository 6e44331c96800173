"""Pages for users: links lead somewhere; commands name programs, options, configurations that exist."""

import ast
import contextlib
import functools
import importlib
import io
import pathlib
import re
import shlex

import pytest

from mmada_jax.programs import command

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch/tpu/README.md",
         ROOT / "mmada_jax/kernels/README.md"]  # fmt: skip
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page, language):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page):
    """The calls of our programs on a page, as lists of words without comments: first the name of a
    program of `mmada`, or the path of a file."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] in (["python"], ["mmada"]):
                yield words[1:]


@functools.cache
def options(program):
    """The options that the help of a program of `mmada` lists, or that a file declares in its text."""
    name = pathlib.Path(program).stem
    module, _ = command.PROGRAMS.get(name, (program.removesuffix(".py"), ""))
    if module.startswith("launch"):
        path = ROOT / f"{module.replace('.', '/')}.py"
        found = re.findall(r'"--([\w-]+)"', path.read_text())
    else:
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            command.main([name, "--help"])
        found = re.findall(r"--([\w-]+)", shown.getvalue())
    return {name.replace("_", "-") for name in found}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", path):
            continue
        there = (page.parent / path) if path else page
        if not there.exists():
            wrong.append(target)
        elif anchor:
            heads = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            known = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            wrong += [target] * (anchor not in known)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_name_what_exists(page):
    wrong = []
    for program, *words in commands(page):
        if program not in command.PROGRAMS and not (ROOT / program).is_file():
            wrong.append(program)
            continue
        known = options(program) | {"help"}
        for word, after in zip(words, [*words[1:], ""], strict=True):
            name = word[2:].partition("=")[0]
            if word.startswith("--config."):
                continue
            if word == "--config":
                file, _, arg = after.partition(":")
                module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
                module.get_config(arg)
            if word.startswith("--") and name.replace("_", "-") not in known:
                wrong.append(f"{program} --{name}")
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_names_what_exists(page):
    import mmada_jax.serve.api

    for block in blocks(page, "python"):
        if block.lstrip().startswith('"'):
            block = "{" + block + "}"
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("mmada_jax"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
            of_model = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if of_model and node.value.id == "model":
                assert hasattr(mmada_jax.serve.api.MMaDA, node.attr), f"there is no model.{node.attr}"


def test_readme_is_read_in_ten_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_what_a_contributor_is_sent_to_exists():
    page = (ROOT / "docs/contributing.md").read_text()
    paths = re.findall(r"`((?:mmada_jax|launch|tests|configs|docs)/[\w./]*)`", page)
    assert len(paths) > 25
    assert not [path for path in paths if not (ROOT / path).exists()]
    # A name in capitals or a function belongs to the file before it.
    for path, name in re.findall(r"`(\S+\.py)`[^`]*?`([A-Z]{4,}|choose)`", page):
        assert re.search(rf"^(?:def )?{name}\b", (ROOT / path).read_text(), re.M), f"{path} has no {name}"
