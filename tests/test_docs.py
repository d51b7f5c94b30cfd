"""README and docs/ name files, flags, functions and tests: all exist, and every page is in the README's list."""

import ast
import dataclasses
import fnmatch
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import config
import data

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = {
    "rerule.py": "config.Config",
    "evaluate.py": "evaluate.Options",
    "engine.page": "engine.page.Options",
    "build_data": "build_data.__main__.Options",
    "reproduce": "reproduce.__main__.Options",
    "reproduce.attacks": "reproduce.attacks.Options",
    "scale.speed": "scale.speed.Options",
    "reproduce.targets": "reproduce.targets.Options",
    "tests/scale/check.py": "check.Options",
    "tests/scale/peer.py": "peer.Options",
}
FOREIGN = {"index-url", "nproc-per-node", "logdir", "help"}  # pip's, torchrun's, TensorBoard's, every command's


def text(path):
    return path.read_text(encoding="utf-8")


def found(name):
    """`folder.module.function` → the object. Raises ImportError or AttributeError where there is none."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def flags(command):
    return {field.name for field in dataclasses.fields(found(COMMANDS[command]))}


def named(words):
    """The flags in a text, without their dashes."""
    return set(re.findall(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)", words)) - FOREIGN


def outside_code(words):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", words, flags=re.DOTALL))


def anchors(path):
    """The names by which a link reaches a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", text(path), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page_and_says_what_was_not_run():
    assert len(text(README).splitlines()) <= 200
    status = text(README).split("\n## Status\n")[1].split("\n## ")[0]
    assert "No full-size run has been made" in " ".join(status.split())
    assert sum(line.startswith("- ") for line in status.splitlines()) == 3


def test_every_page_is_in_the_readmes_list():
    listed = text(README).split("\n## All pages\n")[1].split("\n## ")[0]
    assert set(re.findall(r"\]\((docs/[^)#]+)\)", listed)) == {
        f"docs/{page.name}" for page in [*PAGES, *(ROOT / "docs").glob("*.ipynb")]
    }


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_code(text(page))):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            path = (page.parent / name) if name else page
            assert path.exists(), f"{target}: no such file"
            assert not anchor or anchor in anchors(path), f"{target}: no such heading"


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_flags_exist(page):
    unknown = named(text(page)) - set().union(*map(flags, COMMANDS))
    assert not unknown, f"no command has {', '.join(sorted(unknown))}"
    for block in re.findall(r"```bash\n(.*?)```", text(page), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in [name for name in COMMANDS if re.search(rf"(?:python|-m|\d) {re.escape(name)} ", line)]:
                assert named(line) <= flags(command), line


def rows(page, columns):
    """The cells of a page's tables with so many columns, their headings left out."""
    lines = [line for line in text(page).splitlines() if line.startswith("|") and not line.startswith("|---")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if len(row) == columns]


def test_every_function_and_test_of_the_equations_exists():
    checked = 0
    for equation, functions, tests in rows(ROOT / "docs" / "equations.md", 3)[1:]:
        for name in re.findall(r"`(\w+(?:\.\w+)+)`", functions):
            found(name)
            checked += 1
        for path, pattern in re.findall(r"`(tests/[\w/]+\.py)(?:::([\w*]+))?`", tests):
            names = re.findall(r"^def (test_\w+)", text(ROOT / path), re.MULTILINE)
            assert fnmatch.filter(names, pattern or "test_*"), f"{equation}: {path} has no {pattern}"
            checked += 1
        assert not functions.startswith("`") or "`tests/" in tests, f"{equation}: a function without a test"
    assert checked > 80


def test_the_equations_in_the_readme_are_those_of_the_code():
    code = {line.strip() for name in ("grpo.py", "replay.py") for line in text(ROOT / name).splitlines()}
    (block,) = re.findall(r"```python\n(.*?)```", text(README), flags=re.DOTALL)
    assert set(block.splitlines()) <= code


def test_every_open_choice_and_every_field_of_a_benchmark_is_told():
    choices = text(ROOT / "docs" / "choices.md")
    assert {field.name for field in dataclasses.fields(config.Choices)} <= named(choices)
    fields = {row[0].strip("`") for row in rows(ROOT / "docs" / "benchmarks.md", 3)}
    assert {field.name for field in dataclasses.fields(data.Benchmark)} <= fields


def test_every_module_with_deviations_is_in_the_table_of_them():
    modules = {
        path for folder in ("", "*/", "*/*/") for path in ROOT.glob(f"{folder}*.py") if "tests" not in path.parts
    }
    with_some = {path for path in modules if "\nDeviations" in (ast.get_docstring(ast.parse(text(path))) or "")}
    listed = re.findall(r"^\| \[([\w/]+\.py)\]", text(ROOT / "docs" / "choices.md"), re.MULTILINE)
    assert {ROOT / name for name in listed} == with_some


def test_the_example_of_a_benchmark_is_one(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", text(ROOT / "docs" / "benchmarks.md"), flags=re.DOTALL)
    exec(block, module := {})
    rows = [{"question": q, "answer": q.lower(), "forget": q < "C"} for q in ("A?", "B?", "C?")]
    (tmp_path / "trivia.json").write_text(json.dumps(rows))
    found, o = module["BENCHMARK"], SimpleNamespace(data_dir=str(tmp_path), seed=0)
    assert [query.kind for query in found.train(o).queries] == ["forget", "forget", "boundary"]
    assert len(found.train(o).refusals) == 2 and [probe.forget for probe in found.probes(o)] == [True, True, False]
