"""The driver end to end on a miniature of the built-in world: what it leaves, parity, replay, resume."""

import copy
import json
from pathlib import Path

import miniature
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import rerule
import run as run_module
from config import Config
from replay import ReplayBuffer

ALONE = ("--method", "rerule")


def metrics(folder, timings=False):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if timings or not k.startswith("seconds")} for row in rows]


def stage2(folder, method):
    return [row for row in metrics(folder) if row["method"] == method]


def weights(folder, phase):
    return (Path(folder) / phase / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run of both methods."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    miniature.main("--output_dir", folder, "--eval_every", 3)
    return folder


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_files(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "table.md", "table.json", "curves.png"} <= names
    assert not any(name.endswith(".tmp") for name in names)
    assert (whole / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list(json.loads((whole / "table.json").read_text())) == [
        "Original", "Retained", "Rej. Steer", "RULE", "ReRULE"]  # fmt: skip


def test_each_final_model_loads_and_has_a_card(whole):
    for phase in ("original", "retained", "rej_steer", "rule", "rerule"):
        model = AutoModelForCausalLM.from_pretrained(whole / phase)
        tokenizer = AutoTokenizer.from_pretrained(whole / phase)
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)
        assert "no guarantee" in (whole / phase / "README.md").read_text()


def test_metrics_hold_what_the_readme_defines(whole):
    rows = metrics(whole, timings=True)
    assert all({"method", "stage", "step", "reward", "kl", "grad_norm"} <= set(row) for row in rows)
    replayed = [row for row in rows if row.get("replay_groups")]
    assert replayed and all(row["method"] == "rerule" and row["step"] > 2 for row in replayed)
    defined = (Path(__file__).parent.parent / "README.md").read_text()
    for name in {name for row in rows for name in row if not name.startswith("eval_")}:
        assert f"`{name}`" in defined, f"{name} is in metrics.jsonl but not in the README's glossary"


def test_samples_agree_with_metrics(whole):
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    for row in [r for r in metrics(whole) if r["stage"] == 2]:
        own = [r for r in rows if (r["method"], r["step"]) == (row["method"], row["step"])]
        assert len(own) == 6 and all(len(r["completions"]) == len(r["rewards"]) == 4 for r in own)
        assert sum(sum(r["rewards"]) for r in own) / 24 == pytest.approx(row["reward"], abs=1e-6)


def test_evaluation_during_training(whole):
    assert [row["step"] for row in stage2(whole, "rule") if "eval_retain_recall" in row] == [3, 6]


def test_a_finished_run_shows_its_table_again(whole, capsys):
    before = {
        p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.suffix in (".jsonl", ".safetensors")
    }
    miniature.main("--output_dir", whole, "--eval_every", 3)
    assert "ReRULE" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}


# --- RULE and ReRULE are the same run until replay starts ------------------------------------------------------------


def test_rule_and_rerule_are_identical_until_replay_starts(whole):
    start = min(row["step"] for row in stage2(whole, "rerule") if row.get("replay_groups"))
    assert start == 3
    for rule, rerule_row in zip(stage2(whole, "rule"), stage2(whole, "rerule"), strict=True):
        same = {k: v for k, v in rerule_row.items() if not k.startswith(("replay", "ratio", "ess", "clipped", "eval"))}
        left = {k: v for k, v in rule.items() if not k.startswith("eval")}
        for row in (same, left):
            row.pop("method"), row.pop("buffer_size")
        if rule["step"] <= start:  # the rollouts of the first replay step are still the same
            assert left == same
    assert weights(whole, "rule") != weights(whole, "rerule")


def test_alone_equals_together_and_no_replay_equals_rule(whole, tmp_path):
    miniature.main("--output_dir", tmp_path / "a", "--eval_every", 3, *ALONE)
    assert weights(tmp_path / "a", "rerule") == weights(whole, "rerule")
    assert stage2(tmp_path / "a", "rerule") == stage2(whole, "rerule")
    miniature.main("--output_dir", tmp_path / "b", "--eval_every", 3, *ALONE, "--warmup_steps", 99)
    assert weights(tmp_path / "b", "rerule") == weights(whole, "rule")


# --- replay, seen through the driver ---------------------------------------------------------------------------------


@pytest.fixture
def spied(monkeypatch, tmp_path):
    """Run ReRULE with weights saved at every step; returns a function (flags) → (weights by step, replay updates)."""

    def go(*flags):
        saved, replays = {}, []
        save, replay, rollout = run_module.Run.save, rerule.off_policy_gradient, rerule.rollout

        def spy_rollout(model, *args):
            saved[args[-1]] = copy.deepcopy(model.state_dict())  # the weights that sample this step's groups
            return rollout(model, *args)

        def spy_replay(model, drawn, *args):
            used, stats = replay(model, drawn, *args)
            replays.append((copy.deepcopy(drawn), used, stats))
            return used, stats

        monkeypatch.setattr(rerule, "rollout", spy_rollout)
        monkeypatch.setattr(rerule, "off_policy_gradient", spy_replay)
        monkeypatch.setattr(run_module.Run, "save", save)
        miniature.main("--output_dir", tmp_path / "run", *ALONE, *flags)
        return saved, replays, tmp_path / "run"

    return go


def test_stored_pi_old_is_that_of_the_weights_that_sampled_it(spied):
    saved, replays, folder = spied("--temperature", "1.3")
    model = AutoModelForCausalLM.from_pretrained(folder / "rerule").eval()
    assert replays
    for drawn, used, _ in replays:
        assert used + sum(g.all_equal() for g in drawn) == len(drawn) == 5
        for group in drawn:
            model.load_state_dict(saved[group.step])
            batch = grpo.collate([group], "cpu")
            with torch.no_grad():
                plain = grpo.plain_response_logprobs(model, batch, 1.3)
            assert (plain - group.old_logprobs)[group.mask].abs().max() < 1e-4
    assert any(stats and abs(stats["ratio_mean"] - 1) > 1e-2 for _, _, stats in replays)  # replayed: not 1
    gaps = [row["logprob_gap"] for row in stage2(folder, "rerule")]
    assert all(0 <= gap < 1e-4 for gap in gaps)  # fresh: 1


def test_recent_replays_the_previous_step(spied):
    _, replays, folder = spied("--replay_store", "recent")
    starts = [row["step"] for row in stage2(folder, "rerule") if row.get("replay_groups")]
    assert starts == [3, 4, 5, 6, 7]
    assert [{g.step for g in drawn} for drawn, _, _ in replays] == [{2}, {3}, {4}, {5}, {6}]


def test_current_replays_the_step_itself(spied):
    _, replays, folder = spied("--replay_store", "current")
    assert [{g.step for g in drawn} for drawn, _, _ in replays] == [{3}, {4}, {5}, {6}, {7}]
    ratios = [row["ratio_mean"] for row in stage2(folder, "rerule") if "ratio_mean" in row]
    assert ratios and all(abs(ratio - 1) > 1e-5 for ratio in ratios)  # one optimiser step lies between


def test_none_steps_on_a_gradient_of_zero(spied):
    _, replays, folder = spied("--replay_store", "none")
    rows = [row for row in stage2(folder, "rerule") if "replay_groups" in row]
    assert [used for _, used, _ in replays] == [0] * 5 and [row["replay_grad_norm"] for row in rows] == [0.0] * 5
    rule = folder.parent / "rule"
    miniature.main("--output_dir", rule, "--method", "rule")
    assert weights(folder, "rerule") != weights(rule, "rule")  # momentum moved them


def test_unequal_stores_only_groups_with_a_gradient(spied):
    _, replays, _ = spied("--replay_store", "unequal", "--min_groups", 3)
    drawn = [group for groups, _, _ in replays for group in groups]
    assert drawn and not any(group.all_equal() for group in drawn)


def test_start_from_another_run_changes_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(rerule, "stage1", None)
    miniature.main("--output_dir", tmp_path / "run", "--eval_every", 3, *ALONE, "--start_from", whole)
    assert weights(tmp_path / "run", "rerule") == weights(whole, "rerule")
    assert metrics(tmp_path / "run") == [row for row in metrics(whole) if row["method"] != "rule"]
    mine, theirs = (json.loads((folder / "table.json").read_text()) for folder in (tmp_path / "run", whole))
    assert mine["Rej. Steer"] == theirs["Rej. Steer"] and list(mine) == [name for name in theirs if name != "RULE"]


def test_nothing_of_the_current_step_is_replayed(spied):
    _, replays, folder = spied()
    steps = [row["step"] for row in stage2(folder, "rerule") if row.get("replay_groups")]
    assert all(g.step < step for step, (drawn, _, _) in zip(steps, replays, strict=True) for g in drawn)


def test_storing_until_activation(spied):
    *_, folder = spied("--store_until", "activation")
    sizes = [row["buffer_size"] for row in stage2(folder, "rerule")]
    assert sizes[1] >= 8 and len(set(sizes[1:])) == 1


def test_combined_takes_one_step_and_separate_two(monkeypatch, tmp_path):
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (steps.append(self), step(self, *a))[1])
    count = {}
    for kind in ("combined", "separate"):
        miniature.main("--output_dir", tmp_path / kind, *ALONE, "--replay_step", kind)
        count[kind] = sum(1 for optimizer in steps if optimizer is steps[-1])
        steps.clear()
    rows = stage2(tmp_path / "separate", "rerule")
    assert count["combined"] == 7 and count["separate"] == 7 + sum("replay_grad_norm" in row for row in rows)
    assert all("replay_grad_norm" not in row for row in stage2(tmp_path / "combined", "rerule"))


def test_skipping_equal_groups_changes_no_gradient(model):
    """With every divisor counting all drawn groups, leaving out those without gradient is exact."""
    ids, mask, old = grpo.sample(model, [[3, 4], [5, 6, 7], [8, 9]], 4, 6, [2], 1.0, torch.Generator().manual_seed(0))
    rewards = torch.tensor([[0.0, 1, 0, 0], [0.5] * 4, [1.0, 0, 1, 0]])
    advantages = grpo.group_advantages(rewards)
    groups = [
        grpo.RolloutGroup(n, torch.tensor(p), ids[n], mask[n], old[n] + 0.1, None, rewards[n], advantages[n], 1)
        for n, p in enumerate([[3, 4], [5, 6, 7], [8, 9]])
    ]
    for flags in ({}, {"loss_norm": "token"}, {"is_level": "token"}, {"is_objective": "surrogate"}):
        config = Config(**flags)
        gradients = []
        for keep in (False, True):
            model.zero_grad()
            if keep:  # a reward changed behind Â's back: the group counts as unequal but its Â is still 0
                groups[1].rewards = torch.tensor([0.5, 0.5, 0.5, 0.4])
            used, _ = rerule.off_policy_gradient(model, groups, config, rerule.counts_of(groups, config))
            assert used == (3 if keep else 2)
            gradients.append([p.grad.clone() for p in model.parameters()])
            groups[1].rewards = rewards[1]
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, atol=1e-7)


def test_nothing_is_skipped_where_weights_are_normalised_or_kl_is_on(model):
    ids, mask, old = grpo.sample(model, [[3, 4]], 4, 6, [2], 1.0, torch.Generator().manual_seed(0))
    group = grpo.RolloutGroup(
        0, torch.tensor([3, 4]), ids[0], mask[0], old[0], old[0], torch.ones(4), torch.zeros(4), 1
    )  # fmt: skip
    for flags, used in (({}, 0), ({"is_normalize": True}, 1), ({"replay_kl": True}, 1)):
        config = Config(**flags)
        assert rerule.off_policy_gradient(model, [group], config, rerule.counts_of([group], config))[0] == used


def test_normalised_weights_have_mean_one(model, monkeypatch):
    ids, mask, old = grpo.sample(model, [[3, 4], [5, 6]], 4, 6, [2], 1.0, torch.Generator().manual_seed(0))
    advantages = grpo.group_advantages(torch.tensor([[0.0, 1, 0, 0], [1.0, 0, 1, 0]]))
    groups = [
        grpo.RolloutGroup(n, torch.tensor([3 + 2 * n, 4 + 2 * n]), ids[n], mask[n], old[n] - 0.1, None,
                          torch.tensor([0.0, 1, 0, 0]), advantages[n], 1) for n in range(2)
    ]  # fmt: skip
    seen = []
    monkeypatch.setattr(rerule, "off_policy_loss", lambda lp, ratio, *rest: (seen.append((ratio, rest[-1])), lp * 0)[1])
    config = Config(is_normalize=True, is_level="token", max_tokens=1)
    rerule.off_policy_gradient(model, groups, config, rerule.counts_of(groups, config))
    masks = [g.mask for g in sorted(groups, key=lambda g: g.mask.shape[1])]
    weights = torch.cat([r[m].clamp(0.8, 1.3) for (r, _), m in zip(seen, masks, strict=True)])
    assert all(torch.allclose(mean, weights.mean()) for _, mean in seen) and len(seen) == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--replay_store", "random"), ("--is_level", "token"), ("--is_level", "geometric"), ("--is_normalize", "True"),
        ("--is_objective", "surrogate"), ("--replay_kl", "True"), ("--kl_coef", "0"), ("--loss_norm", "token"),
        ("--forget_reward", "target", "--unbiased", "False"),
    ],
)  # fmt: skip
def test_every_variant_runs(flags, tmp_path):
    miniature.main("--output_dir", tmp_path / "run", *ALONE, *flags)
    rows = stage2(tmp_path / "run", "rerule")
    assert len(rows) == 7 and all(torch.isfinite(torch.tensor(row["grad_norm"])) for row in rows)
    if "replay_kl" not in flags[0]:
        payload = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
        assert payload["done"]["run"] == {}


def test_a_buffer_survives_its_saved_form():
    group = grpo.RolloutGroup(
        3, torch.tensor([1, 2]), torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool),
        torch.randn(2, 3), None, torch.tensor([0.0, 1.0]), torch.tensor([-0.7, 0.7]), 9,
    )  # fmt: skip
    again = ReplayBuffer(4, [grpo.RolloutGroup(**vars(group))]).ring[0]
    assert again.step == 9 and again.ref_logprobs is None and torch.equal(again.old_logprobs, group.old_logprobs)


# --- modes and precision ---------------------------------------------------------------------------------------------


def test_models_are_in_eval_mode_wherever_pi_old_is_compared(monkeypatch, tmp_path):
    modes = []

    def spy_on(original):
        def spy(model, *args, **kwargs):
            modes.append(model.training)
            return original(model, *args, **kwargs)

        return spy

    for name in ("sample", "accumulate_gradient", "add_reference"):
        monkeypatch.setattr(rerule, name, spy_on(getattr(rerule, name)))
    miniature.main("--output_dir", tmp_path / "run", *ALONE)
    assert len(modes) > 20 and not any(modes)


def test_a_2e_6_update_survives_bf16_compute(model):
    """Weights stay float32 under bf16 autocast; the same step on bf16 weights would change nothing."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = run_module.optimizer_for(model, 2e-6, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[3, 4, 5]])).logits.float().logsumexp(-1).sum().backward()
    optimizer.step()
    moved = [(p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()]
    assert min(moved) > 1e-6
    swallowed = torch.ones(8, dtype=torch.bfloat16) - 2e-6
    assert (swallowed == 1).all()


# --- resume ----------------------------------------------------------------------------------------------------------

KILLS = [
    ("original", 3),
    ("rej_steer", 3),
    ("rule", 1),
    ("rule", 5),
    ("rerule", 2),
    ("rerule", 5),
    ("save", 8),
    ("save", 26),
]


@pytest.mark.parametrize("kill_at", KILLS, ids=lambda at: f"{at[0]}-{at[1]}")
def test_killed_and_resumed_ends_the_same_bit_for_bit(whole, tmp_path, kill_at):
    argv = ["--output_dir", tmp_path / "run", "--eval_every", 3]
    assert miniature.start(argv, kill_at) == -9
    assert not (tmp_path / "run" / "table.md").exists()
    assert miniature.start([*argv, "--resume"]) == 0
    for phase in ("original", "retained", "rej_steer", "rule", "rerule"):
        assert weights(tmp_path / "run", phase) == weights(whole, phase), phase
    assert metrics(tmp_path / "run") == metrics(whole)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_resume_with_nothing_to_resume_just_starts(tmp_path):
    miniature.main("--output_dir", tmp_path / "run", "--method", "rule", "--resume", "--steps", 1)
    assert (tmp_path / "run" / "table.md").exists()
