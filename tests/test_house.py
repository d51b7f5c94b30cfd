"""The layout's rules: the paper's modules stand alone, nothing small needs anything large, a benchmark is one room."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAPER = ("grpo", "replay", "reward", "refusal", "sft", "data")
FOLDERS = ("benchmarks", "baselines", "engine", "scale", "build_data", "reproduce")
LARGE = ("scale", "build_data", "reproduce")
FILES = sorted(p for p in [*ROOT.glob("*.py"), *(f for d in FOLDERS for f in (ROOT / d).rglob("*.py"))])
NAMES = ("builtin", "rwku", "muse", "tofu", "town")


def module(path):
    """grpo, engine.fast, engine (its __init__)."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def imported(source, top_only=True):
    """Modules of ours that a source imports; at the top alone, or anywhere in it."""
    tree, found = ast.parse(source), set()
    nested = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)} if top_only else set()
    for node in ast.walk(tree):
        if node in nested:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES) or {node.module}
    return {name for name in found if name in MODULES}


def folder(name):
    return name.split(".")[0] if name.split(".")[0] in FOLDERS else ""


# --- each rule as a function of sources, so that it can be seen to fail ----------------------------------------------


def paper_alone(sources):
    return [f"{m} imports {x}" for m in PAPER for x in imported(sources[m], top_only=False) if folder(x)]


def nothing_large_at_the_top(sources):
    return [
        f"{name} imports {x}"
        for name, source in sources.items()
        for x in imported(source)
        if folder(x) in LARGE and folder(x) != folder(name)
    ]


def no_circle(sources):
    edges, done, found = {name: imported(s, top_only=False) for name, s in sources.items()}, set(), []

    def walk(name, path):
        if name in path:
            found.append(" → ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(edges[name] - {name}):
                walk(other, [*path, name])
            done.add(name)

    for name in sources:
        walk(name, [])
    return found


def no_private_names_of_other_folders(sources):
    found = []
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and folder(node.module or "") not in ("", folder(name)):
                found += [f"{name} imports {a.name}" for a in node.names if a.name.startswith("_")]
    return found


def benchmarks_at_home(sources):
    """A benchmark's name as a string: in its room, in the list of all, in `reproduce`. A flag's default, the lengths of
    a timing and the kinds of `build_data`'s sources are words of their own."""
    own = {"config": {"builtin"}, "scale.speed": {"rwku"}}
    found = []
    for name, source in sources.items():
        if folder(name) in ("reproduce", "build_data") or name == "benchmarks":
            continue
        allowed = own.get(name, set()) | {name.removeprefix("benchmarks.")}
        strings = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)} & set(NAMES)
        found += [f"{name} says {word!r}" for word in strings - allowed]
    return found


def paper_without_machinery(sources):
    words = re.compile(r"\branks?\b|fsdp|checkpoint|fully_shard|torchrun|try_out", re.IGNORECASE)
    return [f"{m}: {found.group()}" for m in PAPER for found in words.finditer(sources[m])]


RULES = {
    paper_alone: ("grpo", "from engine.files import write_json"),
    nothing_large_at_the_top: ("engine.run", "import scale.ranks"),
    no_circle: ("engine.files", "from engine.run import Run"),
    no_private_names_of_other_folders: ("engine.run", "from baselines.train import _secret"),
    benchmarks_at_home: ("rerule", "if config.benchmark == 'tofu': pass"),
    paper_without_machinery: ("replay", "# what each rank does"),
}


@pytest.fixture(scope="module")
def sources():
    return {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_of_the_house_holds_and_would_fail_where_it_is_broken(rule, sources):
    assert rule(sources) == []
    name, line = RULES[rule]
    assert rule(sources | {name: f"{sources[name]}\n{line}\n"})


def test_a_large_folder_in_a_function_is_no_import_at_the_top(sources):
    assert "scale.ranks" in imported(sources["engine.run"], top_only=False)
    assert "scale.ranks" not in imported(sources["engine.run"])


def test_sizes():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert (
        len([p for p in ROOT.iterdir() if not p.name.startswith((".", "__")) and p.name not in ("runs", "data")]) <= 23
    )
    assert sum(n for name, n in lines.items() if not folder(name)) <= 1900
    assert sum(lines[name] for name in ("rerule", "grpo", "replay", "reward")) <= 750
    assert max(lines.values()) <= 400 and sum(lines.values()) < 10_000
    assert max(len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "tests").rglob("*.py")) <= 400


def test_every_folder_says_what_it_is_for():
    for name in FOLDERS:
        assert ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text(encoding="utf-8")))


def test_stage_2_is_forty_lines_with_its_six_steps_numbered(sources):
    (stage2,) = [n for n in ast.parse(sources["rerule"]).body if getattr(n, "name", "") == "stage2"]
    assert stage2.end_lineno - stage2.lineno + 1 <= 40
    body = sources["rerule"].splitlines()[stage2.lineno - 1 : stage2.end_lineno]
    numbers = [int(found[1]) for line in body if (found := re.search(r"#\s+(\d)\s", line))]
    assert numbers == [1, 2, 3, 4, 5, 6]
    assert sum('== "rerule"' in line for line in body) == 1  # what ReRULE adds to RULE
