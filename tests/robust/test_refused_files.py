"""Models, logs and states that are none: each attack by its number, as in `test_refused.py`."""

import json
import os
import shutil
import zlib

import pytest
import torch
from attacked import called, ended, evaluate, rerule, short
from made import byte_tokenizer, make_model, tofu, tree
from transformers import BertConfig, BertForMaskedLM

from engine.model import Pair

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_model(context=2048).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def spoilt(good, tmp_path):
    """A copy of a good model's folder, to be spoilt."""
    return shutil.copytree(good, tmp_path / "model")


def refused(folders, model, *more):
    """The line of both commands on a model; nothing is written."""
    folder = model.parent if hasattr(model, "parent") else folders["tofu"].parent
    before = tree(folder)
    line = ended(evaluate, *tofu(folders, *more), "--model", model, "--output", folder / "out.json").line()
    assert (
        ended(rerule, *tofu(folders, *more), "--model", model, "--output_dir", folder / "run").line()[:30] == line[:30]
    )
    assert tree(folder) == before
    return line


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- E10: templates --------------------------------------------------------------------------------------------------

TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "raises later": "{% if messages[0]['content'] | length > 9 %}{{ raise_exception('no') }}{% endif %}x",
    "is none": "{% if",
    "divides": "{{ 1 // (messages[0]['content'] | length - 4) }}",
    "asks for a system turn": "{{ messages[1]['content'] + 'x' }}",
    "counts for ever": "{% for i in range(10 ** 12) %}x{% endfor %}",
    "runs code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_E10_a_chat_template_that_fails_is_told(folders, spoilt, name):
    (spoilt / "chat_template.jinja").write_text(TEMPLATES[name])
    assert "template" in refused(folders, spoilt) or name not in ("raises", "raises later")


# --- E19, E23, E24, E25, E26: folders of models ----------------------------------------------------------------------


def test_E19_a_damaged_phase_of_a_run_is_named_itself(interrupted):
    os.truncate(interrupted / "rej_steer" / "model.safetensors", 500)
    line = ended(short, "--output_dir", interrupted, "--resume").last(2)
    assert f"error: {interrupted / 'rej_steer'}: " in line and "--model" not in line


@pytest.mark.parametrize("damage", ["config.json", "tokenizer.json", "generation_config.json"])
def test_E19_whatever_file_of_it_is_damaged(interrupted, damage):
    (interrupted / "rej_steer" / damage).write_text("{" * 100_000)
    done = ended(short, "--output_dir", interrupted, "--resume")
    assert (done.code == 0 and damage == "generation_config.json") or "rej_steer" in done.last(2)


def test_E23_a_model_of_another_kind_is_told_in_one_line_without_a_librarys(folders, tmp_path):
    """In a process of its own: libraries warn through what they have found as they were imported."""
    sizes = dict(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    argv = tofu(folders, "--model", tmp_path / "bert", "--output_dir", tmp_path / "run")
    assert "bert" in called("rerule.py", *argv).line() and not (tmp_path / "run").exists()


def test_E24_a_folder_without_a_model_says_what_is_missing(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(folders, tmp_path / "empty").endswith("(the folder holds no config.json)")


EOS = ["x", 1.5, [2, "x"], True, {"a": 2}, -1, 10**9, [], [[2]]]


@pytest.mark.parametrize("eos", EOS, ids=repr)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_E25_an_eos_id_that_is_none_is_refused(folders, spoilt, eos, file):
    edit(spoilt / file, eos_token_id=eos)
    if file == "config.json" or eos in ([], -1, 10**9):  # the other file's is read, or it never comes: no harm
        done = ended(evaluate, *tofu(folders), "--model", spoilt, "--output", spoilt.parent / "o.json")
        assert "Traceback" not in done.err and (done.code == 0 or done.line())
    else:
        assert "eos_token_id" in refused(folders, spoilt)


@pytest.mark.parametrize(
    "text",
    [
        '{"alpha": "NaN"}',
        '{"alpha": NaN}',
        '{"alpha": Infinity}',
        '{"alpha": null}',
        "[]",
        '{"alpha": [1]}',
        "{}",
        "",
        "[" * 10**5,
        '{"alpha": "1"}',
        '{"alpha": true}',
        '{"alpha": 1e400}',
        '{"alpha": ' + "9" * 400 + "}",
    ],
    ids=lambda t: t[:20],
)
def test_E25_a_strength_of_whp_that_is_none_is_refused(folders, spoilt, good, text):
    folder = spoilt.parent / "pair"
    Pair(make_model(0, 2048), make_model(1, 2048), 1.0).save_pretrained(folder)
    for path in good.glob("tokenizer*"):
        shutil.copy(path, folder)
    (folder / "whp.json").write_text(text)
    refused(folders, folder)


SPOIL = {
    "config.json": ["", "[]", "{}", "[" * 10**5, '{"model_type": 7}', "\xff", "null"],
    "tokenizer.json": ["", "[]", "{}", "[" * 10**5, "null"],
    "tokenizer_config.json": ["", "[]", "[" * 10**5, '{"tokenizer_class": "os.system"}', "7"],
    "generation_config.json": ["", "[]", "[" * 10**5, "7", '{"temperature": "hot", "eos_token_id": 2}'],
    "model.safetensors": ["", "x" * 9, "\xff" * 100, '{"a": 1}', "\x08\0\0\0\0\0\0\0{       "],
    "adapter_config.json": ["", "[]", "{}", '{"peft_type": "LORA", "base_model_name_or_path": "/nowhere"}'],
    "chat_template.jinja": ["{%", "{{ x.y.z }}"],
}


@pytest.mark.parametrize(("file", "text"), [(f, t) for f in SPOIL for t in SPOIL[f]], ids=lambda part: part[:24])
def test_E24_a_damaged_file_of_a_model_is_told_in_a_line_or_not_needed(folders, spoilt, file, text):
    (spoilt / file).write_bytes(text.encode("latin-1"))
    done = ended(evaluate, *tofu(folders), "--model", spoilt, "--output", spoilt.parent / "out.json")
    assert done.code == 0 or str(spoilt) in done.line()


# --- E15: logs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(good, tmp_path_factory):
    """A result of evaluation on TOFU, and the folder of its files."""
    from made import make_tofu

    place = tmp_path_factory.mktemp("log")
    make_tofu(place / "tofu")
    argv = ["--benchmark", "tofu", "--data_dir", place / "tofu", "--model", good, "--max_new_tokens", 2]
    assert ended(evaluate, *argv, "--output", place / "log.json").code == 0
    return json.loads((place / "log.json").read_text())


WRONG = {
    "split": [None, 7, ["forget"]],
    "target": [7, []],
    "forget": [None, 1, "yes"],
    "truncated": [3, "no"],
    "rouge_l_recall": ["0.5", float("nan"), float("inf"), -1, 2, [], True],
    "rouge_l_f1": ["x", float("nan")],
    "refusal": [1, "x"],
    "leak": [{}],
    "named": [0.5],
    "answer_loss": ["x", [], True],
    "perturbed_losses": [None, "abc", [], {"a": 1}, ["x"], [[1]], 7],
    "paraphrased_loss": [{}, "1"],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f in WRONG for v in WRONG[f]], ids=repr)
def test_E15_a_log_of_other_types_is_refused(log, tmp_path, field, value):
    at = next(i for i, row in enumerate(log["per_example"]) if row["split"] == "forget")
    rows = [row | ({field: value} if i == at else {}) for i, row in enumerate(log["per_example"])]
    path, out = tmp_path / "log.json", tmp_path / "out.json"
    path.write_text(json.dumps(log | {"per_example": rows}))
    done = ended(evaluate, "--benchmark", "tofu", "--from_log", path, "--output", out)
    assert str(path) in done.line() and not out.exists()


@pytest.mark.parametrize("rows", [[], {}, None, "x", [[]], [None], [{"split": "other"}], 7])
def test_E15_a_log_without_rows_that_count_is_refused(log, tmp_path, rows):
    if rows and isinstance(rows, list) and isinstance(rows[0], dict):
        rows = [row | rows[0] for row in log["per_example"]]
    (tmp_path / "log.json").write_text(json.dumps(log | {"per_example": rows}))
    argv = ["--benchmark", "tofu", "--from_log", tmp_path / "log.json", "--output", tmp_path / "out.json"]
    assert "log.json" in ended(evaluate, *argv).line() and not (tmp_path / "out.json").exists()


# --- E16, E17: a run's own files -------------------------------------------------------------------------------------

STATES = {
    "no payload": lambda s: s.update(payload=None),
    "no phase": lambda s: s.update(phase=None),
    "a phase of another name": lambda s: s.update(phase="other"),
    "a phase that is over": lambda s: s.update(phase="rej_steer"),
    "no step": lambda s: s.pop("step"),
    "a step of 0": lambda s: s.update(step=0),
    "a step in text": lambda s: s.update(step="2"),
    "half a step": lambda s: s.update(step=1.5),
    "a step beyond all": lambda s: s.update(step=10**9),
    "done as a list": lambda s: s.update(done=[]),
    "done without columns": lambda s: s["done"].update({"original scored": {}}),
    "done with text": lambda s: s["done"].update({"original": "x"}),
    "sizes in text": lambda s: s["sizes"].update(metrics=("a", "b")),
    "one size": lambda s: s["sizes"].pop("samples"),
    "negative sizes": lambda s: s["sizes"].update(metrics=(-5, 0)),
    "no weights": lambda s: s["payload"].update(model={}, optimizer={}),
    "other weights": lambda s: s["payload"].update(model={"x": torch.zeros(3)}),
    "a weight of another shape": lambda s: s["payload"]["model"].update({"model.norm.weight": torch.zeros(3)}),
    "weights as text": lambda s: s["payload"].update(model="x"),
    "moments as a list": lambda s: s["payload"].update(optimizer=[1]),
    "moments of another model": lambda s: s["payload"]["optimizer"]["param_groups"][0].update(params=[0]),
    "seconds as text": lambda s: s["payload"].update(seconds="x"),
    "over as a list": lambda s: s["payload"].update(over=[1]),
    "no buffer": lambda s: [
        s["payload"].pop(k) for k in list(s["payload"]) if k not in ("model", "optimizer", "seconds", "over")
    ],  # noqa: E501
    "a buffer of text": lambda s: s["payload"].update(
        {k: "x" for k in s["payload"] if k not in ("model", "optimizer", "seconds", "over")}
    ),  # noqa: E501
    "a list of nothing": lambda s: s["payload"].update(
        {k: [None] for k in s["payload"] if k not in ("model", "optimizer", "seconds", "over")}
    ),  # noqa: E501
}


@pytest.mark.parametrize("name", STATES)
def test_E16_a_state_of_another_form_is_refused(interrupted, name):
    state = torch.load(interrupted / "state.pt", weights_only=True)
    STATES[name](state)
    torch.save(state, interrupted / "state.pt")
    line = ended(short, "--output_dir", interrupted, "--resume").last(2)
    assert "state.pt" in line


def test_E17_a_log_of_equal_length_is_not_the_log(interrupted):
    path = interrupted / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": 9', 1))
    before = tree(interrupted)
    line = ended(short, "--output_dir", interrupted, "--resume").line()
    assert line.startswith(f"{path}: is not the log of") and tree(interrupted) == before
    assert zlib.crc32(path.read_bytes())


def test_E17_settings_may_open_with_a_byte_order_mark(stopped, interrupted, tmp_path):
    path = interrupted / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert ended(short, "--output_dir", interrupted, "--resume").code == 0
    (tmp_path / "mine.json").write_bytes(b"\xef\xbb\xbf" + (stopped / "config.json").read_bytes())
    assert "another run" not in ended(rerule, tmp_path / "mine.json", "--tau", "7").line()
