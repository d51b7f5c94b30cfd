"""Attacks from both commands on a small built-in world: every column and row, beside two other models, and resumed."""

import json

import huggingface_hub.constants
import pytest
from loopback import Loopback
from made import SMALL, byte_tokenizer, command, make_model, make_tofu, published_tofu, tree
from miniature import FLAGS

import rerule
from benchmarks import attacks, builtin, tiny, tofu
from config import InputError

ALL_SIX = list(attacks.ATTACKS)
PHASES = {"retained": "Retained", "original": "Original", "rej_steer": "Rej. Steer", "rule": "RULE"}
COLUMNS = (
    "leak_1 leak_4 leak_16 leak_64 answer_probability membership_auc membership_auc_loss membership_auc_mink "
    "membership_auc_minkpp membership_auc_zlib privleak extraction_strength exact_memorisation relearn_forget_0 "
    "relearn_forget_5 relearn_forget_10 relearn_forget_20 relearn_forget_50 relearn_half_50 relearn_neighbours_50 "
    "forget_recall_4bit retain_recall_4bit forget_recall_8bit prefix_recall"
).split()
PEOPLE, TARGETS = 6, 2
FORGET = TARGETS * 6 * 6  # probes


def drive(*argv):
    rerule.main(rerule.configure([str(flag) for flag in (*FLAGS, "--device", "cpu", *argv)]), figures=False)


def stored(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        for name, size in dict(N_TARGETS=TARGETS, N_HARD=2, N_EASY=2, N_UNKNOWN=2).items():
            patch.setattr(builtin, name, size)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of RULE with every model attacked in all six ways."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    drive("--output_dir", folder, "--method", "rule", "--attack", *ALL_SIX)
    return folder


@pytest.fixture
def attacked(monkeypatch):
    """The names of each model's attacks that are made from here on."""
    made, attack = [], attacks.attack

    def spy(names, case):
        made.append(names)
        return attack(names, case)

    monkeypatch.setattr(attacks, "attack", spy)
    return made


# --- the driver ------------------------------------------------------------------------------------------------------


def test_the_table_has_every_column_of_every_model(whole):
    table = stored(whole / "table.json")
    assert sorted(table) == sorted(PHASES.values())
    for phase, title in PHASES.items():
        missing = [column for column in COLUMNS if table[title].get(column) is None]
        assert missing == (["privleak"] if phase == "retained" else []), phase
        assert ("relearn_r" in table[title]) == (phase != "retained")  # it is scored before the others
    heading = (whole / "table.md").read_text(encoding="utf-8").splitlines()[0]
    for name in ALL_SIX:
        assert all(title in heading for title in attacks.TITLES[name].values())


def test_rows_and_draws_of_every_model_are_kept(whole):
    table = stored(whole / "table.json")
    assert {path.name for path in (whole / "attacks").iterdir()} == {f"{phase}.json" for phase in PHASES}
    for phase, title in PHASES.items():
        kept = stored(whole / "attacks" / f"{phase}.json")
        assert list(kept) == ["summary", "notes", "rows"] and list(kept["rows"]) == ALL_SIX
        assert kept["summary"].items() <= table[title].items() and set(kept["notes"]) <= set(table[title]["notes"])
        leak, texts = kept["rows"]["leak"], kept["rows"]["membership"]
        assert len(leak) == FORGET and all(len(row["draws"]) == 64 for row in leak)
        assert [row["side"] for row in texts] == ["forget"] * 12 + ["holdout"] * 12
        assert len(kept["rows"]["quantize"]) % (PEOPLE * 36) == 0 and len(kept["rows"]["extract"]) == FORGET
        missing = [note for note in kept["notes"] if note.startswith("privleak is missing")]
        assert bool(missing) == (phase == "retained")


def test_figures_of_the_table_follow_from_the_rows(whole):
    kept = stored(whole / "attacks" / "original.json")
    draws = [draw["recall"] for row in kept["rows"]["leak"] for draw in row["draws"]]
    assert kept["summary"]["leak_1"] == pytest.approx(100 * sum(draws) / len(draws)) and any(draws)
    best = [max(draw["recall"] for draw in row["draws"]) for row in kept["rows"]["leak"]]
    assert kept["summary"]["leak_64"] == pytest.approx(100 * sum(best) / len(best))
    retained = stored(whole / "attacks" / "retained.json")["summary"]["membership_auc_mink"]
    own = kept["summary"]["membership_auc_mink"]
    assert kept["summary"]["privleak"] == pytest.approx((retained - own) / (1 - retained) * 100)


def test_a_run_stopped_in_an_attack_goes_on_and_another_starts_from_it(whole, attacked, monkeypatch, tmp_path):
    """Neither the stop, nor fewer attacks, nor models taken from elsewhere change a figure or a weight."""
    some = ("--attack", "extract", "membership")
    spy = attacks.attack

    def stopping(names, case):
        if attacked:  # the second model's
            raise KeyboardInterrupt
        return spy(names, case)

    monkeypatch.setattr(attacks, "attack", stopping)
    with pytest.raises(KeyboardInterrupt):
        drive("--output_dir", tmp_path / "a", "--method", "rej_steer", *some)
    assert [path.name for path in (tmp_path / "a" / "attacks").iterdir()] == ["retained.json"]
    monkeypatch.setattr(attacks, "attack", spy)
    drive("--output_dir", tmp_path / "a", "--method", "rej_steer", *some, "--resume")
    assert len(attacked) == 3  # retained once, and once each of the others
    drive("--output_dir", tmp_path / "b", "--method", "rule", *some, "--start_from", tmp_path / "a")
    assert len(attacked) == 4
    for phase in ("retained", "original", "rej_steer"):
        one, other = ((tmp_path / name / "attacks" / f"{phase}.json").read_bytes() for name in "ab")
        assert one == other
    wanted, found = (stored(folder / "table.json") for folder in (whole, tmp_path / "b"))
    for title in PHASES.values():
        for column in ("answer_probability", "membership_auc", "privleak", "forget_recall"):
            assert found[title][column] == wanted[title][column], (title, column)
        assert "leak_1" not in found[title]
    assert (tmp_path / "b/rule/model.safetensors").read_bytes() == (whole / "rule/model.safetensors").read_bytes()


def test_tofu_with_a_retained_model_has_forget_quality(tmp_path, monkeypatch):
    taught, lessons = {}, tiny.lessons

    def spy(*args, **how):
        taught[len(taught)] = found = lessons(*args, **how)
        return found

    monkeypatch.setattr(tiny, "lessons", spy)
    published_tofu(tmp_path / "tofu")
    argv = ["--benchmark", "tofu", "--data_dir", tmp_path / "tofu", "--output_dir", tmp_path / "run", *SMALL]
    argv = [str(flag) for flag in (*argv, "--method", "retained", "rule", "--attack", "extract", "--device", "cpu")]
    rerule.main(rerule.configure(argv), figures=False)
    table = stored(tmp_path / "run" / "table.json")
    assert set(table) == set(PHASES.values())
    assert table["Retained"]["forget_quality"] is None and "forget_tokens" not in table["Retained"]
    for title in ("Original", "Rej. Steer", "RULE"):
        assert 0 < table[title]["forget_quality"] <= 1 and table[title]["forget_quality_m"] == 6
        assert table[title]["answer_probability"] is not None
    config = rerule.configure(argv)
    forget = [p for p in tofu.probes(config) if p.forget]
    original, retained = taught.values()
    for probe in forget:
        assert (probe.prompt, probe.answer) in original
        assert all(probe.prompt != prompt and probe.answer != answer for prompt, answer in retained)
    assert {(p.prompt, p.answer) for p in tofu.probes(config) if not p.forget} <= set(retained) < set(original)


# --- evaluate.py -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(whole, tmp_path_factory):
    """(what evaluate.py writes and prints of RULE's model beside the two others, whether it left their folders)."""
    folders = [whole / name for name in ("rule", "original", "retained")]
    before, output = [tree(folder) for folder in folders], tmp_path_factory.mktemp("evaluated") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.extend(map(str, texts)))
        found = command(
            "--benchmark", "builtin", "--model", folders[0], "--original_model", folders[1], "--retain_model",
            folders[2], "--attack", *ALL_SIX, "--attack_samples", 64, "--device", "cpu", "--output", output,
        )  # fmt: skip
    return found, "\n".join(printed), before == [tree(folder) for folder in folders]


def test_the_command_has_every_column_and_row_and_leaves_the_checkpoints(evaluated):
    found, _, left = evaluated
    assert left and [column for column in COLUMNS if found["summary"].get(column) is None] == []
    assert list(found["attacks"]) == ALL_SIX and all(found["attacks"].values())
    assert {len(row["draws"]) for row in found["attacks"]["leak"]} == {64}
    assert {(row["taught"], row["step"]) for row in found["attacks"]["relearn"]} == {
        (name, step) for name in ("forget", "half", "neighbours") for step in (0, 5, 10, 20, 50)
    }
    assert set(found["beside"]) == {"original", "retained"} and "forget_recall" in found["summary"]
    for title, columns in found["beside"].items():
        missing = [column for column in COLUMNS if columns.get(column) is None]
        assert missing == (["privleak"] if title == "retained" else [])


def test_the_command_finds_what_the_driver_finds(evaluated, whole):
    """The same draws, the same relearning: every figure of three models."""
    found, _, _ = evaluated
    table = stored(whole / "table.json")
    for title, columns in (("RULE", found["summary"]), *((t.capitalize(), c) for t, c in found["beside"].items())):
        theirs = {column: value for column, value in table[title].items() if column in columns}
        assert {*COLUMNS, "relearn_lr", "quantize_q_4bit", "membership_auc_low"} <= set(theirs)
        for column, value in theirs.items():
            expected = value if value is None else pytest.approx(value, rel=1e-3, abs=1e-4)
            assert columns[column] == expected, (title, column)


def test_the_table_has_a_line_for_each_column_and_three_models(evaluated):
    found, printed, _ = evaluated
    lines = [line.strip() for line in printed.splitlines()]
    for name in ALL_SIX:
        for column, title in attacks.TITLES[name].items():
            *_, own, original, retained = next(line for line in lines if line.startswith(f"{title}  ")).split()
            digits = 2 if column in ("membership_auc", "extraction_strength", "exact_memorisation") else 1
            assert own == f"{found['summary'][column]:.{digits}f}"
            assert original == f"{found['beside']['original'][column]:.{digits}f}"
            value = found["beside"]["retained"][column]
            assert retained == ("–" if value is None else f"{value:.{digits}f}")
    assert next(line.split() for line in lines if "This model" in line) == ["This", "model", "Original", "Retained"]
    assert "add --original_model" not in printed


def test_one_model_alone_gets_its_columns_and_a_word_on_what_they_lack(whole, tmp_path, capsys, monkeypatch):
    """With a judge too, which makes the summary again."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with Loopback(reply=lambda prompt: {"read": 90, "help": 40, "truth": 80}) as server:
        found = command(
            "--benchmark", "builtin", "--model", whole / "rule", "--attack", "extract", "membership", "--device", "cpu",
            "--output", tmp_path / "o.json", "--judge_url", server.url, "--judge_model", "m",
        )  # fmt: skip
    assert (found["summary"]["read"], found["summary"]["naturalness_all"]) == (90, 70)
    kept = stored(whole / "attacks" / "rule.json")
    for column in ("answer_probability", "answer_rank", "membership_auc", "membership_auc_low"):
        assert found["summary"][column] == pytest.approx(kept["summary"][column], rel=1e-3)
    assert found["summary"]["privleak"] is None and any("--retain_model" in note for note in found["notes"])
    assert len(found["attacks"]["extract"]) == FORGET and found["beside"] == {}
    printed = capsys.readouterr().out
    assert "add --original_model and --retain_model" in printed and "Answer's probability" in printed
    assert any("ratings" in note or "judge" in note for note in found["notes"])


def test_without_attacks_nothing_is_asked_that_only_they_need(tmp_path, attacked):
    """A limit of the user's own may fit a context that the benchmark's does not."""
    make_model(context=110).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    make_tofu(tmp_path / "tofu")
    argv = ["--benchmark", "tofu", "--data_dir", tmp_path / "tofu", "--model", tmp_path / "model", "--device", "cpu"]
    argv += ["--retain_model", tmp_path / "model", "--max_new_tokens", 2, "--output", tmp_path / "o.json"]
    found = command(*argv)
    assert attacked == [] and "attacks" not in found and "beside" not in found
    assert found["summary"]["forget_quality"] == pytest.approx(1)
    with pytest.raises(InputError, match="exceed the model's context of 110"):
        command(*argv, "--attack", "extract")
