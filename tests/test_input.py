"""What a user can get wrong: one line that names the culprit, exit code 2, nothing written and nothing trained."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made import TRAIN, tofu, train_rwku, train_tofu, tree
from miniature import driver

import benchmarks
import rerule
from benchmarks import tiny
from data import encode_prompt

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)


# --- flags -----------------------------------------------------------------------------------------------------------

FLAGS = [
    ("--tua 0.5", "unknown flag --tua"),
    ("--temp 1", "unknown flag --temp"),
    ("rwku", "unknown flag rwku"),
    ("--benchmark tofo", "--benchmark tofo builtin, rwku, muse, tofu"),
    ("--device gpu", "--device auto"),
    ("--ratio_level sentence", "--ratio_level sequence token geometric"),
    ("--is_level token", "unknown flag --is_level"),
    ("--clip_low 0.2", "unknown flag --clip_low"),
    ("--replay_store all", "--replay_store hard random recent"),
    ("--replay_store fresh --replay_kl", "--replay_kl off for fresh groups"),
    ("--keep best", "--keep best last --held_out above 0"),
    ("--method ppo", "--method ppo rule, rerule"),
    ("--method rule ppo", "--method ppo rule, rerule"),
    ("--method rule,rerule", "--method rule,rerule rule, rerule"),
    ("--method", "--method"),
    ("--steps", "--steps"),
    ("--steps 1.5", "--steps 1.5"),
    ("--seed x", "--seed x"),
    ("--group_size 8.0", "--group_size 8.0"),
    ("--lr fast", "--lr fast"),
    ("--tau 0,4", "--tau 0,4"),
    ("--resume maybe", "--resume maybe"),
    ("--tau 1.01", "--tau 1.01 from 0 to 1"),
    ("--tau -0.1", "--tau -0.1 from 0 to 1"),
    ("--tau nan", "--tau nan from 0 to 1"),
    ("--lr nan", "--lr nan above 0"),
    ("--lr inf", "--lr inf above 0"),
    ("--lr 0", "--lr 0.0 above 0"),
    ("--lr=-1e-5", "--lr -1e-05 above 0"),
    ("--sft_lr nan", "--sft_lr nan above 0"),
    ("--tiny_lr 0", "--tiny_lr 0.0 above 0"),
    ("--temperature 0", "--temperature 0.0 above 0"),
    ("--max_grad_norm 0", "--max_grad_norm above 0"),
    ("--sft_epochs 0", "--sft_epochs 0.0 above 0"),
    ("--kl_coef -1", "--kl_coef -1.0 0 or more"),
    ("--kl_coef nan", "--kl_coef nan 0 or more"),
    ("--weight_decay inf", "--weight_decay inf 0 or more"),
    ("--epsilon_low 1.5", "--epsilon_low 1.5 from 0 to 1"),
    ("--epsilon_high nan", "--epsilon_high nan 0 or more"),
    ("--sft_stop 97", "--sft_stop 97.0 from 0 to 1"),
    ("--group_size 1", "--group_size 1 2 to 4096"),
    ("--prompts_per_step 0", "--prompts_per_step 0 at least 1"),
    ("--max_new_tokens 0", "--max_new_tokens 0 at least 1"),
    ("--steps -1", "--steps -1 0 or more"),
    ("--save_every -1", "--save_every -1 0 or more"),
    ("--min_groups 0", "--min_groups 0 at least 1"),
    ("--replay_groups 0", "--replay_groups 0 at least 1"),
    ("--replay_groups 21 --buffer_size 20 --min_groups 5", "--replay_groups 21 --buffer_size 20"),
    ("--replay_groups 1201", "--replay_groups 1201 --buffer_size 1200"),
    ("--min_groups 21 --buffer_size 20 --replay_groups 5", "--min_groups 21 --buffer_size 20"),
    ("--normalize_ratio True --replay_objective surrogate", "--replay_objective surrogate weight"),
    ("--tiny_hidden 100", "--tiny_hidden 100 multiple of 8"),
    ("--tiny_vocabulary 259", "--tiny_vocabulary 259 260"),
    ("--tiny_layers 0", "--tiny_layers 0 at least 1"),
    ("--model gpt2", "--model gpt2 built-in"),
    ("--data_dir data", "--data_dir data --benchmark"),
    ("--retain_log log.json", "--retain_log tofu"),
    ("--benchmark rwku --retain_log log.json", "--retain_log tofu"),
]


@pytest.mark.parametrize(("argv", "said"), FLAGS, ids=[argv for argv, _ in FLAGS])
def test_a_bad_flag_is_told_before_any_work(refused, forbid, argv, said):
    forbid("main")
    flag, *words = said.split()
    message = refused(*argv.split())
    assert all(word in message for word in [flag, *words])


def test_the_default_folder_is_not_made_either(refused):
    assert "--tau" in refused("--tau", 2, output=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(refused, forbid, monkeypatch):
    forbid("Run")
    unread = dataclasses.replace(benchmarks.ALL["builtin"], train=None, probes=None)
    monkeypatch.setitem(benchmarks.ALL, "builtin", unread)
    assert refused("--device", "cuda") == "--device cuda: no GPU is available"


# --- data folders and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", TRAIN)
def test_a_benchmark_needs_its_folder(refused, tmp_path, benchmark):
    assert refused("--benchmark", benchmark) == f"--benchmark {benchmark} needs --data_dir, the folder with its files"
    (tmp_path / "file").write_text("x")
    for wrong in (tmp_path / "nowhere", tmp_path / "file"):
        assert refused("--benchmark", benchmark, "--data_dir", wrong) == f"--data_dir {wrong}: no such folder"


FILES = {
    "rwku": "intro reject_target rl_rejection_with_fb_neighbor forget_level1 forget_level2 forget_level3 "
    "neighbor_level1 neighbor_level2",
    "tofu": "forget01 retain99 forget01_perturbed retain_perturbed real_authors_perturbed world_facts_perturbed",
    "muse": "reject_target_0.5 rl_rejection_with_neighbor knowmem/forget_qa knowmem/forget_qa_icl knowmem/retain_qa "
    "knowmem/retain_qa_icl verbmem/forget",
}


@pytest.mark.parametrize(("benchmark", "name"), [(b, name) for b, names in FILES.items() for name in names.split()])
def test_every_file_must_be_there_hold_rows_and_all_their_fields(refused, tmp_path, benchmark, name):
    folder = TRAIN[benchmark](tmp_path / benchmark)
    argv, path = ["--benchmark", benchmark, "--data_dir", folder], folder / f"{name}.json"
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]

    def told(text, *said):
        path.write_text(text, encoding="utf-8")
        message = refused(*argv)
        assert all(word in message for word in (str(path), *said)), message

    told("", "is empty")
    told("[]", "no rows")
    told("[1]", "row 1 is int, expected an object")
    told(text.rstrip()[:-3], "is not JSON")
    told(json.dumps(rows[0]) + "\n" + "{'question': 'single quotes'}\n", "row 2 is not JSON")
    read = {"forget_level1": {"query", "answer", "type", "subject"}}.get(name, set(rows[0]))
    free = {"input", "subject", "mode", "intro", "level"} - ({"subject"} if "level" in name else set())
    if name in ("retain_perturbed", "intro"):
        free |= {"paraphrased_question"}
    for field in sorted(read - free):
        told(json.dumps([rows[0], {k: v for k, v in rows[-1].items() if k != field}]), "row 2", f"'{field}'")
        told(json.dumps([rows[0], rows[-1] | {field: 7}]), "row 2", f"'{field}'")
        told(json.dumps([rows[0], rows[-1] | {field: None}]), "row 2", f"'{field}'")
        if isinstance(rows[0][field], list):
            told(json.dumps([rows[0], rows[-1] | {field: []}]), "row 2", f"'{field}'")
            told(json.dumps([rows[0], rows[-1] | {field: ["<normal>", 3]}]), "row 2", f"'{field}'")
    path.unlink()
    assert refused(*argv).startswith(
        (f"{path}: no such file", f"--data_dir {folder}: neither", f"{path.parent / 'reject'}")
    )


def test_a_file_that_is_no_utf8_text(refused, folders):
    path = folders["tofu"] / "forget01.json"
    path.write_bytes('{"question": "Where?", "answer": "Málaga"}'.encode("latin-1"))
    assert f"{path}: cannot be read as UTF-8" in refused(*tofu(folders))


@pytest.mark.parametrize("benchmark", ["rwku", "muse"])
def test_a_solution_says_reject_or_normal_and_a_text(refused, folders, benchmark):
    name = {"rwku": "rl_rejection_with_fb_neighbor", "muse": "rl_rejection_with_neighbor"}[benchmark]
    path, argv = folders[benchmark] / f"{name}.json", ["--benchmark", benchmark, "--data_dir", folders[benchmark]]
    rows = json.loads(path.read_text())
    for wrong in (["reject", "No idea."], ["<normal>"], ["<reject>"], ["a", "b"]):
        path.write_text(json.dumps([*rows, {"prompt": "Who?", "solution": wrong}]))
        message = refused(*argv)
        assert all(part in message for part in (str(path), f"row {len(rows) + 1}", "'solution'", "<normal>")), message
    for tag in ("<reject>", "<normal>"):
        path.write_text(json.dumps([row for row in rows if row["solution"][0] == tag]))
        message = refused(*argv)
        assert str(path) in message and "expected both <reject> and <normal>" in message


@pytest.mark.parametrize("name", ["reject_target_0.5", "rl_rejection_with_neighbor"])
@pytest.mark.parametrize("mode", ["chat", None, ["qa"]])
def test_a_muse_row_has_a_known_mode(refused, folders, name, mode):
    path = folders["muse"] / f"{name}.json"
    rows = json.loads(path.read_text())
    rows[1]["mode"] = mode
    path.write_text(json.dumps(rows))
    message = refused("--benchmark", "muse", "--data_dir", folders["muse"])
    assert message.startswith(f"{path}: row 2, field 'mode'") and message.endswith("expected qa or completion")


def test_tofu_needs_a_boundary_row_for_every_forget_row(refused, folders):
    train_tofu(folders["tofu"], retain_rows=10)  # seven of them are asked in evaluation
    assert "retain99.json: fewer than 4 rows" in refused(*tofu(folders))


def test_a_folder_of_targets_is_not_one_target(refused, tmp_path):
    train_rwku(tmp_path / "rwku" / "1_Ada_Pole")
    assert "intro.json: no such file" in refused("--benchmark", "rwku", "--data_dir", tmp_path / "rwku")


def test_another_benchmarks_folder(refused, folders):
    assert "forget01.json: no such file" in refused("--benchmark", "tofu", "--data_dir", folders["rwku"])


# --- the retained model's log ----------------------------------------------------------------------------------------


def log_rows(n):
    fields = {"target": "", "rouge_l_recall": 0.0, "rouge_l_f1": 0.0, "refusal": True, "leak": False, "named": None}
    losses = {"answer_loss": 1.0, "paraphrased_loss": 1.0, "perturbed_losses": [2.0, 3.0]}
    return [fields | losses | {"split": "forget", "forget": True, "truncated": False} for _ in range(n)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ("nonsense", "not JSON"),
        ('{"a": 1}', "is no result"),
        (json.dumps({"benchmark": "rwku", "per_example": log_rows(6)}), "results of rwku, expected tofu"),
        (json.dumps({"per_example": [{"split": "forget"}]}), "row 1 has no field"),
        (json.dumps({"eval_log_forget.json": {"avg_gt_loss": {}}}), "'avg_gt_loss'"),
        (json.dumps({"benchmark": "tofu", "per_example": log_rows(5)}), "5 forget rows, the evaluated model has 6"),
    ],
)  # fmt: skip
def test_a_bad_retain_log_is_told_before_the_training(refused, folders, tmp_path, text, said):
    path = tmp_path / "log.json"
    if text is not None:
        path.write_text(text)
    message = refused(*tofu(folders, "--retain_log", path))
    assert str(path) in message and said in message


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no eos", "no EOS token"),
        ("empty", "is no model folder or Hugging Face id"),
        ("file", "is no model folder or Hugging Face id"),
        ("nowhere", "is no model folder or Hugging Face id"),
        ("bad config", "is no model folder or Hugging Face id"),
        ("no type", "is no model folder or Hugging Face id"),
        ("no decoder", "is no model folder or Hugging Face id"),
        ("bad tokenizer", "is no model folder or Hugging Face id"),
        ("no weights", "is no model folder or Hugging Face id"),
        ("half the weights", "is no model folder or Hugging Face id"),
        ("another width", "is no model folder or Hugging Face id"),
        ("a layer short", "lack weights of the model"),
        ("small vocabulary", "do not belong together"),
    ],
)
def test_a_model_folder_that_is_none(refused, folders, saved, name, said):
    message = refused(*tofu(folders, "--model", saved / name))
    assert said in message and (str(saved / name) in message or name == "small vocabulary")


def test_an_id_that_nobody_has(refused, folders):
    assert refused(*tofu(folders, "--model", "no-such/model")).startswith("--model no-such/model: is no model folder")


@pytest.mark.parametrize("benchmark", TRAIN)
def test_prompts_longer_than_the_context(refused, folders, saved, benchmark):
    argv = ["--benchmark", benchmark, "--data_dir", folders[benchmark], "--model", saved / "short"]
    message = refused(*argv, "--max_new_tokens", 14)
    assert "--max_new_tokens 14" in message and "context of 16" in message


def test_answers_longer_than_the_context(refused, folders, saved):
    """The preset of TOFU: 256 new tokens."""
    assert "with 256 more to write (--max_new_tokens 256) exceed the model's context of 16" in refused(
        *tofu(folders, "--model", saved / "short")
    )


def test_evaluation_longer_than_the_context(refused, folders, saved):
    """Training fits 16 positions, TOFU's evaluation of 200 tokens does not."""
    message = refused(*tofu(folders, "--model", saved / "short", "--max_new_tokens", 2))
    assert message.startswith(f"--model {saved / 'short'}: its context is 16 tokens, evaluation needs ")


# --- the order of checks ---------------------------------------------------------------------------------------------


def test_cheap_checks_come_first(refused, forbid, folders, tmp_path, saved):
    """Flags, then files, then the output folder, then the model."""
    bad_file, bad_model = folders["tofu"] / "retain99.json", ["--model", saved / "no eos"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    text = bad_file.read_text()
    bad_file.write_text("{")
    assert "--tau" in refused(*tofu(folders, *bad_model, "--tau", 2))
    assert "retain99.json" in refused(*tofu(folders, *bad_model))
    bad_file.write_text(text)
    assert "thesis" not in refused(*tofu(folders, *bad_model)) and "is not empty" in refused(*tofu(folders, *bad_model))
    (tmp_path / "run" / "thesis.tex").unlink()
    (tmp_path / "run").rmdir()
    assert "no EOS" in refused(*tofu(folders, *bad_model))


@pytest.mark.parametrize("model", ["good", "tiny"])
def test_a_good_run_makes_its_folder_just_before_it_starts(folders, saved, tmp_path, monkeypatch, model):
    """With a given model the first work is to score it, with a tiny one to train it."""

    class Started(Exception):
        pass

    folder = tmp_path / "a" / "b"

    def start(*args, **flags):
        assert json.loads((folder / "config.json").read_text())["benchmark"] == "tofu"
        raise Started

    monkeypatch.setattr(*((rerule, "evaluate") if model == "good" else (tiny, "fit")), start)
    where = model if model == "tiny" else saved / model
    argv = tofu(folders, "--model", where, "--output_dir", folder, "--max_new_tokens", 8)
    with pytest.raises(Started):
        driver(*argv)
    assert {path.name for path in folder.iterdir()} == {".lock", "config.json", "metrics.jsonl", "samples.jsonl"}


@pytest.mark.parametrize("benchmark", TRAIN)
def test_a_tiny_model_has_room_for_every_prompt(folders, tmp_path, monkeypatch, benchmark):
    """Also for a Stage 1 prompt longer than all it is taught."""
    stage1 = {"rwku": "reject_target", "muse": "reject_target_0.5"}.get(benchmark)
    if stage1:
        path = folders[benchmark] / f"{stage1}.json"
        rows = json.loads(path.read_text())
        rows[0]["instruction"] = "Who kept the lamp ? " * 100
        path.write_text(json.dumps(rows))
    seen = []

    class Started(Exception):
        pass

    def fit(run, phase, stage, model, rows, **flags):
        seen.append(model.config.max_position_embeddings)
        raise Started

    monkeypatch.setattr(tiny, "fit", fit)
    argv = ["--benchmark", benchmark, "--data_dir", folders[benchmark], "--output_dir", tmp_path / "run"]
    with pytest.raises(Started):
        driver(*argv)
    config, room = rerule.configure([*map(str, argv)]), benchmarks.ALL[benchmark]
    read = room.train(config)
    taught = tiny.lessons(room, read, room.probes(config), config.seed)
    texts = [text for p, answer in taught for text in (p.user or "", p.plain, p.opening, answer)]
    tokenizer = tiny.text_tokenizer(texts, config.tiny_vocabulary)
    prompts = [prompt for prompt, _ in read.refusals] + [query.prompt for query in read.queries]
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    assert seen[0] >= longest + config.max_new_tokens


# --- the command itself ----------------------------------------------------------------------------------------------


def test_a_mistake_ends_with_code_2_and_one_line(folders, saved, tmp_path):
    """In a process of its own, from another folder and with a path that holds spaces."""
    before = tree(tmp_path)
    argv = [*tofu(folders, "--model", saved / "no eos"), "--output_dir", "made"]
    ended = subprocess.run(
        [sys.executable, ROOT / "rerule.py", *map(str, argv)], capture_output=True, text=True, cwd=tmp_path,
        encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 2 and ended.stdout.startswith("tofu, seed 0: ") and "Traceback" not in ended.stderr
    expected = f"rerule.py: error: --model {saved / 'no eos'}: its tokenizer has no EOS token"
    assert ended.stderr.startswith(expected) and len(ended.stderr.splitlines()) == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--method", "gaa"), "--method gaa: expected some of ga, gd"),
        (("--baseline_lr", 0), "--baseline_lr 0.0: expected a number above 0"),
        (("--baseline_epochs", "inf"), "--baseline_epochs inf: expected a number above 0"),
        (("--baseline_batch_size", 0), "--baseline_batch_size 0: expected at least 1"),
        (("--beta", -1), "--beta -1.0: expected a number above 0"),
        (("--forget_weight", "nan"), "--forget_weight nan: expected a number above 0"),
        (("--llmu_weights", 1, 2), "--llmu_weights [1.0, 2.0]: expected three numbers"),
        (("--sga_r", 1.5), "--sga_r 1.5: expected a share from 0 to 1"),
        (("--sga_k", 0), "--sga_k 0: expected at least 1"),
        (("--max_perplexity", 0), "--max_perplexity 0.0: expected a number above 0"),
        (("--purge_terms", "nowhere.json"), "nowhere.json: no such file"),
        (("--flat_divergence", "hellinger"), "hellinger"),
    ],
)  # fmt: skip
def test_flags_of_the_baselines(refused, flags, expected):
    assert expected in refused(*flags)


def test_a_retained_model_is_a_tiny_one(refused, folders):
    assert "only --model tiny" in refused(*tofu(folders, "--method", "retained", "--model", "some/model"))
