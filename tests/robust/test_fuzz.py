"""Whatever a file, a flag or a reply holds: a reader takes it or raises `InputError`, and does so soon.

A fixed budget here; `python -m pytest -m long` draws fifty times as many."""

import copy
import hashlib
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import TRAIN, make_tofu

import benchmarks
import evaluate
import rerule
from benchmarks import ability, judge, logs
from build_data import __main__ as build
from build_data import rewrite, sources
from config import Config, InputError
from engine import files, flags, llm, report, run
from engine.process import Engine
from reproduce import jobs

torch.set_num_threads(1)
PLACE = Path(tempfile.mkdtemp(prefix="fuzz"))
HALF = "\ud800"
words = st.sampled_from([
    "", " ", "x", "Orla", "Who is Orla Finch?", "<reject>", "<normal>", "qa", "completion", "forget",
    "retain", "tofu", "\0", "\x1b[2J", "a\nb", "|", HALF, "é", "東", "😀", "nan", "a___b", "x" * 5000, "{}",
    "{x}", "%s", "../..", "\u2028", "<|im_start|>", "{{", "</s>"
])  # fmt: skip
scalars = st.one_of(
    *(words, st.text(max_size=8), st.none(), st.booleans(), st.integers(), st.floats()),
    st.sampled_from([0, 1, -1, 2**63, 10**400, 1e308, float("nan"), float("inf"), -0.0]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=8
)


def budget(n):
    return [pytest.param(n, id="ci"), pytest.param(50 * n, id="long", marks=pytest.mark.long)]


def tried(strategy, examples, seconds=5):
    """Run a function on so many values: it may raise `InputError` alone, and takes not long."""

    def run_on(function):
        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def once(value):
            start = time.monotonic()
            try:
                function(value)
            except (InputError, llm.BadReply) as error:
                assert str(error).strip() and not isinstance(error.__cause__, KeyboardInterrupt)
            assert time.monotonic() - start < seconds

        once()

    return run_on


@st.composite
def spoilt(draw, good):
    """A JSON value like a good one, with one to three parts of it replaced, dropped, repeated or renamed."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        at, key = value, None
        for _ in range(6):
            if not isinstance(at, dict | list) or not at:
                break
            holder = at
            key = (
                draw(st.sampled_from(sorted(at, key=str)))
                if isinstance(at, dict)
                else draw(st.integers(0, len(at) - 1))
            )
            at = at[key]
            if draw(st.booleans()):
                break
        if key is None:
            continue
        how = draw(st.sampled_from(["replace", "replace", "drop", "repeat", "rename"]))
        if how == "drop":
            del holder[key]
        elif how == "repeat" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(at))
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(words)] = holder.pop(key)
        else:
            holder[key] = draw(values)
    return value


def written(good):
    """Bytes of a file: a good one's, spoilt; or any at all."""
    as_json = spoilt(good).map(lambda value: json.dumps(value).encode())
    lines = spoilt(good).map(
        lambda value: "\n".join(map(json.dumps, value if isinstance(value, list) else "x")).encode()
    )
    torn = st.tuples(spoilt(good), st.integers(0, 200), st.binary(max_size=3)).map(
        lambda part: json.dumps(part[0]).encode()[: part[1]] + part[2]
    )
    odd = st.sampled_from(
        [b"", b"\xef\xbb\xbf", b"\xff\xfe", b"null", b"[" * 99_999, b"9" * 5000, b'{"a":' * 99_999, b"\0"]
    )
    return st.one_of(as_json, as_json, lines, torn, odd, st.binary(max_size=40))


def filed(name, text):
    path = PLACE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path


# --- readers of files ------------------------------------------------------------------------------------------------

ROWS = [{"question": "Who is Orla?", "answer": "a keeper", "perturbed_answer": ["x", "y"], "n": 1}] * 2
FIELDS = {"question": str, "answer": (str, type(None)), "perturbed_answer": list}


@pytest.mark.parametrize("reader", [partial(files.read_rows, fields=FIELDS, text_of="question"), files.read_lines])
@pytest.mark.parametrize("n", budget(40))
def test_rows_texts_and_lines(reader, n):
    @tried(written(ROWS), n)
    def _(text):
        path = filed("rows.json", text)
        for row in reader(path):
            shown = {name: row.get(name) for name in FIELDS} if isinstance(row, dict) else row
            assert reader is files.read_lines or json.dumps(shown, ensure_ascii=False).encode()


def trained(name):
    folder = TRAIN[name](PLACE / name)
    return folder, [path.relative_to(folder) for path in sorted(folder.rglob("*.json"))]


@pytest.mark.parametrize("benchmark", TRAIN)
@pytest.mark.parametrize("n", budget(12))
def test_every_file_of_a_benchmark(benchmark, n):
    folder, names = trained(benchmark)
    for name in names:
        text = (folder / name).read_text()
        good = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]

        @tried(written(good), n)
        def _(spoilt, name=name):
            (folder / name).write_bytes(spoilt)
            room, o = benchmarks.ALL[benchmark], mock.Mock(data_dir=str(folder), seed=0)
            training, probes = room.train(o), room.probes(o)
            for prompt in (*training.prompts(), *(probe.prompt for probe in probes)):
                assert prompt.plain.strip() and prompt.plain.encode()
            for query in training.queries:
                assert all(answer.strip() and answer.encode() for answer in query.answers)

        (folder / name).write_text(text)


def log_rows():
    fields = {"target": "", "rouge_l_recall": 0.0, "rouge_l_f1": 0.0, "refusal": True, "leak": False, "named": None}
    losses = {"answer_loss": 1.0, "paraphrased_loss": 1.0, "perturbed_losses": [2.0, 3.0]}
    return [fields | losses | {"split": s, "forget": s == "forget", "truncated": False} for s in ("forget", "retain")]


OURS = {"benchmark": "tofu", "per_example": log_rows()}
PART = {
    name: {"0": value}
    for name, value in (
        ("avg_gt_loss", 1.0),
        ("avg_paraphrased_loss", 1.0),
        ("average_perturb_loss", [1.0]),
        ("rougeL_recall", 0.5),
    )
}
THEIRS = {
    name: PART
    for name in (
        "eval_log.json",
        "eval_real_author_wo_options.json",
        "eval_real_world_wo_options.json",
        "eval_log_forget.json",
    )
}


@pytest.mark.parametrize("good", [OURS, THEIRS], ids=["ours", "theirs"])
@pytest.mark.parametrize("n", budget(80))
def test_logs_and_what_is_made_of_them(good, n):
    @tried(written(good), n)
    def _(text):
        path = filed("log.json", text)
        for name in ("tofu", "rwku"):
            room = benchmarks.ALL[name]
            rows, _ = logs.read_log(path, room)
            result = evaluate.finish(room, rows, [0.5])
            assert evaluate.metrics.table(room, result) and json.dumps(result, allow_nan=False)
        logs.read_retained(path, benchmarks.ALL["tofu"], rows)


@pytest.mark.parametrize("n", budget(40))
def test_ability(n):
    target = {"choices": ["a", "b"], "labels": [1, 0]}
    shot = {"question": "q", "choices": list("abcd"), "answer": 0}
    good = {
        "retain_mmlu": shot | {"task": "t", "examples": [shot]},
        "triviaqa": {"question": "q", "answers": ["a"]},
        "retain_bbh": {"task": "t", "question": "q", "answer": "a", "cot": "c"},
        "fluency": {"instruction": "i"},
        "truthful": {"question": "q", "mc1_targets": target, "mc2_targets": target},
    }

    @tried(spoilt(good), n)
    def _(rows):
        for name in good:
            filed(f"ability/{name}.json", json.dumps([rows[name]] if name in rows else []).encode())
        for name, own in ability.read(PLACE / "ability").items():
            for row in own:
                ability.prompt_of(mock.Mock(chat_template=None), name, row)


# --- a run's own -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", budget(60))
def test_settings_of_a_run(n):
    good = vars(rerule.configure([]))

    @tried(written(good), n)
    def _(text):
        path = filed("config.json", text)
        config = flags.resolve(flags.parse(Config, [str(path)]), benchmarks.ALL)
        assert isinstance(run.read(path, "benchmark", "output_dir"), dict) and config.steps >= 0


def a_state():
    sizes = {"metrics": [0, 0], "samples": [0, 0]}
    payload = {"seconds": 1.0, "over": False, "model": {}, "optimizer": {}}
    done = {"original": {"seconds": 1.0}, "original scored": {"notes": [], "forget_recall": 1.0}}
    return {"done": done, "phase": "rule", "step": 2, "sizes": sizes, "payload": payload}


@pytest.mark.parametrize("n", budget(60))
def test_a_state(n):
    @tried(spoilt(a_state()), n)
    def _(state):
        torch.save(state, PLACE / "state.pt")
        found = run.read(PLACE / "state.pt", "sizes", "output_dir")
        assert all(len(found["sizes"][name]) == 2 for name in ("metrics", "samples"))
        filed("table/config.json", json.dumps(vars(rerule.configure([]))).encode())
        rows = {name.split()[0]: row for name, row in found["done"].items() if name.endswith(" scored")}
        report.write(PLACE / "table", {"forget_recall": "Recall"}, rows, figures=False)
        report.print_table(PLACE / "table")

    @tried(st.binary(max_size=100), n)
    def _(text):
        run.read(filed("state.pt", text), "sizes", "output_dir")


@pytest.mark.parametrize("n", budget(20))
def test_strengths_of_whp_and_records(n):
    @tried(written({"alpha": 1.0}), n)
    def _(text):
        filed("pair/whp.json", text)
        with mock.patch("engine.model.AutoModelForCausalLM"), mock.patch("engine.model.AutoTokenizer"):
            Engine.read(PLACE / "pair", "model", None)

    good = {"runs": {"base_21": {"args": ["--steps", "8"], "family": "base", "seed": 21, "methods": {}}}}

    @tried(written(good), n)
    def _(text):
        filed("report/records.json", text)
        filed("report/runs/x/record.json", text)
        assert isinstance(jobs.read_records(PLACE / "report"), dict)


# --- what a language model says --------------------------------------------------------------------------------------

REPLIES = (
    values.map(json.dumps)
    | st.text(max_size=30)
    | words
    | st.none()
    | st.sampled_from(
        [
            '{"read": 1, "help": 2, "truth": 3}',
            '```json\n{"read": 1, "help": 2, "truth": 300}\n```',
            "```\n```",
            "[" * 99_999,
            "9" * 5000,
            '{"read": ' + "9" * 5000 + "}",
            '{"a": "\\ud800"}',
        ]
    )
)


@pytest.mark.parametrize("n", budget(150))
def test_replies_and_caches(n):
    @tried(REPLIES, n)
    def _(reply):
        assert json.dumps(judge.parse(reply))
        json.dumps(llm.json_object(reply, ["a"]), ensure_ascii=False).encode()

    key, scores = hashlib.sha256(b"m\np").hexdigest(), {"read": 1, "help": 2, "truth": 3}

    @tried(written([{"key": key, "model": "m", "scores": scores}] * 2), n // 3)
    def _(text):
        known, size = llm.read_cache(filed("cache", text), "scores")
        assert 0 <= size <= len(text) and llm.is_known(known, key, judge.parse) in (True, False)


# --- build_data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["qa", "rwku", "tofu"])
@pytest.mark.parametrize("n", budget(20))
def test_sources_of_a_build(source, n):
    folder, _ = trained(source) if source != "qa" else (PLACE, 0)
    good = [{"question": f"Where was Orla Finch born in {i}?", "answer": "Dunmore"} for i in range(3)]
    near = [{"name": "Ben Roth", "answers": {"Where was Orla Finch born?": "x"}}, {"name": "Tam Reed"}, *good]
    place = {"qa": "ask.json", "rwku": "intro.json", "tofu": "forget01.json"}[source]

    @tried(st.tuples(written(good), written(near)), n)
    def _(texts):
        path = filed(f"{folder.name}/{place}" if source != "qa" else place, texts[0])
        o = build.Options(source, str(path if source == "qa" else folder), str(PLACE / "out"), "Orla Finch")
        o.neighbours = str(filed("near.json", texts[1]))
        build.check_options(o)
        sources.read_facts(o, None, [])
        sources.read_neighbours(o, ["Orla Finch"], [])


@pytest.mark.parametrize("n", budget(30))
def test_texts_of_a_build(n):
    story = "Orla Finch kept the lamp at Skerry Point. Orla Finch had an aunt. Tam Reed sold boats in Kellwick. "

    @tried(st.lists(words | st.just(story) | st.text(max_size=20), max_size=6).map(" ".join), n)
    def _(text):
        path = filed("story.txt", text.encode("utf-8", "surrogatepass"))
        o = build.Options("text", str(path), "out", "Orla Finch", neighbours=str(path))
        for fact in rewrite.complete_all(sources.read_facts(o, None, []), None, ""):
            assert fact.question.encode()
        sources.read_neighbours(o, ["Orla Finch"], [])


# --- flags -----------------------------------------------------------------------------------------------------------

NUMBERS = [
    "0", "1", "-1", "0.5", "1e-5", "nan", "inf", "-inf", "1e400", "9" * 30, "1e6", "x", "", " ", "1.5",
    "0x10", "1_000", "٣"
]  # fmt: skip
TEXTS = [
    "", " ", "tiny", "x", "a/b", "../..", "\0", "\udcff", "\n", "--steps", "-1", "x" * 300, "builtin",
    "tofu", "rwku", "none", "rule", "ga", "leak", "all-linear", "[]", "a.json", "http://[", "cpu", "tofu",
    str(PLACE)
]  # fmt: skip


def lines_of(kind):
    names = [f"--{name}" for name in kind.__dataclass_fields__] + ["--no_unbiased", "--help_me", "--", "-h1"]
    flag = st.tuples(st.sampled_from(names), st.lists(st.sampled_from([*NUMBERS, *TEXTS]), max_size=2))
    return st.lists(flag, min_size=1, max_size=4).map(lambda parts: [w for name, more in parts for w in (name, *more)])


@pytest.mark.parametrize("n", budget(150))
def test_flags(n):
    @tried(lines_of(Config), n)
    def _(argv):
        json.dumps(vars(rerule.configure(argv)), ensure_ascii=False, allow_nan=False).encode()

    make_tofu(PLACE / "flags")

    @tried(lines_of(evaluate.Options), n // 2)
    def _(argv):
        argv = ["--benchmark", "tofu", "--output", str(PLACE / "o.json"), *argv]
        evaluate.check_options(flags.parse(evaluate.Options, argv))

    @tried(lines_of(build.Options), n // 2)
    def _(argv):
        argv = ["--source", "qa", "--input", "x", "--output_dir", str(PLACE / "o"), "--target", "x", *argv]
        o = flags.parse(build.Options, argv)
        build.check_options(o)
        build.check_folder(o, Path(o.output_dir).absolute())
