"""The driver end to end on a miniature of the built-in world: what it leaves, parity, replay, resume."""

import copy
import json
from pathlib import Path

import miniature
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import replay
import rerule
from config import Config
from engine.model import optimizer_for
from engine.process import Engine
from replay import ReplayBuffer

ALONE = ("--method", "rerule")


def metrics(folder, timings=False):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if timings or not k.startswith(("seconds", "time"))} for row in rows]


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


def test_metrics_hold_what_their_glossary_defines(whole):
    rows = metrics(whole, timings=True)
    assert all({"method", "stage", "step", "reward", "kl", "grad_norm"} <= set(row) for row in rows)
    replayed = [row for row in rows if row.get("replay_groups")]
    assert replayed and all(row["method"] == "rerule" and row["step"] > 2 for row in replayed)
    defined = (Path(__file__).parent.parent / "docs" / "training_metrics.md").read_text()
    for name in {name for row in rows for name in row if not name.startswith("eval_")}:
        assert f"`{name}`" in defined, f"{name} is in metrics.jsonl but not in docs/training_metrics.md"


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
    a, b, flags = tmp_path / "a", tmp_path / "b", ("--eval_every", 3, *ALONE)
    miniature.main("--output_dir", a, *flags)
    assert weights(a, "rerule") == weights(whole, "rerule") and stage2(a, "rerule") == stage2(whole, "rerule")
    miniature.main("--output_dir", b, *flags, "--start_from", whole, "--warmup_steps", 99)
    assert weights(b, "rerule") == weights(whole, "rule")
    assert "ReRULE† |" in (b / "table.md").read_text() and "†" not in (whole / "table.md").read_text()


# --- replay, seen through the driver ---------------------------------------------------------------------------------


@pytest.fixture
def spied(monkeypatch, tmp_path, early):
    """Run ReRULE with weights saved at every step; returns a function (flags) → (weights by step, replay updates)."""

    def go(*flags):
        saved, replays, groups = {}, [], []
        draw, update, rollout = ReplayBuffer.draw, rerule.replay_update, rerule.rollout

        def spy_rollout(engine, model, *args):
            saved[args[-1]] = copy.deepcopy(model.state_dict())  # the weights that sample this step's groups
            return rollout(engine, model, *args)

        def spy_draw(*args):
            groups[:] = draw(*args)
            return list(groups)

        def spy_update(*args):
            row = update(*args)
            replays.append((copy.deepcopy(groups), row["replay_groups"] - row["replay_skipped"], row))
            return row

        monkeypatch.setattr(rerule, "rollout", spy_rollout)
        monkeypatch.setattr(rerule, "replay_update", spy_update)
        monkeypatch.setattr(ReplayBuffer, "draw", spy_draw)
        own = () if "--temperature" in flags else early  # another temperature is another run from the start
        miniature.main("--output_dir", tmp_path / "run", *ALONE, *own, *flags)
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
                plain = grpo.response_logprobs(model, batch, 1.3)
            assert (plain - group.old_logprobs)[group.mask].abs().max() < 1e-4
    assert any(abs(row.get("ratio_mean", 1) - 1) > 1e-2 for _, _, row in replays)  # replayed: not 1
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


def test_none_steps_on_a_gradient_of_zero(spied, early):
    _, replays, folder = spied("--replay_store", "none")
    rows = [row for row in stage2(folder, "rerule") if "replay_groups" in row]
    assert [used for _, used, _ in replays] == [0] * 5 and [row["replay_grad_norm"] for row in rows] == [0.0] * 5
    rule = folder.parent / "rule"
    miniature.main("--output_dir", rule, "--method", "rule", *early)
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


def test_combined_takes_one_step_and_separate_two(monkeypatch, tmp_path, early):
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (steps.append(self), step(self, *a))[1])
    count = {}
    for kind in ("combined", "separate"):
        miniature.main("--output_dir", tmp_path / kind, *ALONE, *early, "--replay_step", kind)
        count[kind] = sum(1 for optimizer in steps if optimizer is steps[-1])
        steps.clear()
    rows = stage2(tmp_path / "separate", "rerule")
    assert count["combined"] == 7 and count["separate"] == 7 + sum("replay_grad_norm" in row for row in rows)
    assert all("replay_grad_norm" not in row for row in stage2(tmp_path / "combined", "rerule"))


def replayed(model, groups, **flags):
    """`rerule.replay_update` over these groups without an optimiser: what the log says of it; gradients stay."""
    buffer, config = ReplayBuffer(len(groups)), Config(**flags)
    buffer.draw = lambda n, groups, generator: groups
    engine = Engine("cpu", config.max_tokens)
    return rerule.replay_update(
        engine, model, buffer, groups, lambda: 0.0, engine.logprobs(config.temperature), config, step=2
    )  # fmt: skip


def sampled(model, prompts, rewards, shift):
    """One group for each prompt, of 4 responses that π_old liked better by `shift` nats a token than the model does."""
    rng = torch.Generator().manual_seed(0)
    ids, mask, old = Engine("cpu").sample(model, prompts, 4, 6, [2], 1.0, rng)
    rewards = torch.tensor(rewards)
    advantages = grpo.group_advantages(rewards)
    return [
        grpo.RolloutGroup(n, 1, torch.tensor(p), ids[n], mask[n], old[n] + shift, None, rewards[n], advantages[n])
        for n, p in enumerate(prompts)
    ]


def test_skipping_equal_groups_changes_no_gradient(model):
    """With every divisor counting all drawn groups, leaving out those without gradient is exact."""
    groups = sampled(model, [[3, 4], [5, 6, 7], [8, 9]], [[0.0, 1, 0, 0], [0.5] * 4, [1.0, 0, 1, 0]], 0.1)
    for flags in ({}, {"loss_norm": "token"}, {"ratio_level": "token"}, {"replay_objective": "surrogate"}):
        gradients = []
        for keep in (False, True):
            model.zero_grad()
            if keep:  # a reward changed behind Â's back: the group counts as unequal but its Â is still 0
                groups[1].rewards = torch.tensor([0.5, 0.5, 0.5, 0.4])
            row = replayed(model, groups, **flags)
            assert (row["replay_groups"], row["replay_skipped"]) == (3, 0 if keep else 1)
            gradients.append([p.grad.clone() for p in model.parameters()])
            groups[1].rewards = torch.tensor([0.5] * 4)
        for a, b in zip(*gradients, strict=True):
            assert torch.allclose(a, b, atol=1e-7)
        assert max(p.abs().max() for p in gradients[0]) > 0


def test_nothing_is_skipped_where_weights_are_normalised_or_kl_is_on(model):
    (group,) = sampled(model, [[3, 4]], [[1.0] * 4], 0.0)
    group.ref_logprobs = group.old_logprobs
    for flags, skipped in (({}, 1), ({"normalize_ratio": True}, 0), ({"replay_kl": True}, 0)):
        row = replayed(model, [group], **flags)
        assert row["replay_skipped"] == skipped and ("replay_grad_norm" in row) == (skipped == 0)


def test_normalised_weights_have_mean_one(model, monkeypatch):
    groups = sampled(model, [[3, 4], [5, 6]], [[0.0, 1, 0, 0], [1.0, 0, 1, 0]], -0.1)
    seen = []
    monkeypatch.setattr(replay, "off_policy_loss", lambda lp, ratio, *rest: (seen.append((ratio, rest[-1])), lp * 0)[1])
    replayed(model, groups, normalize_ratio=True, ratio_level="token", max_tokens=1)
    masks = [g.mask for g in sorted(groups, key=lambda g: g.mask.shape[1])]
    weights = torch.cat([r[m].clamp(0.8, 1.3) for (r, _), m in zip(seen, masks, strict=True)])
    assert all(torch.allclose(mean, weights.mean()) for _, mean in seen) and len(seen) == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--replay_store", "random", "--ratio_level", "token", "--replay_kl", "True"),
        ("--ratio_level", "geometric", "--normalize_ratio", "True", "--kl_coef", "0"),
        ("--replay_objective", "surrogate", "--loss_norm", "token", "--forget_reward", "target", "--unbiased", "False"),
    ],
)  # fmt: skip
def test_every_variant_runs(flags, tmp_path, early):
    miniature.main("--output_dir", tmp_path / "run", *ALONE, *early, *flags)
    rows = stage2(tmp_path / "run", "rerule")
    assert len(rows) == 7 and all(torch.isfinite(torch.tensor(row["grad_norm"])) for row in rows)
    if "--replay_kl" not in flags:
        payload = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
        assert payload["done"]["run"] == {}


def test_a_buffer_survives_its_saved_form(model):
    groups = sampled(model, [[1, 2], [3]], [[0.0, 1.0, 0, 0], [0.0] * 4], 0.0)
    buffer, again = ReplayBuffer(4), ReplayBuffer(4)
    buffer.store(groups, 0.5, None)
    again.restore(buffer.state())
    assert len(again) == len(again.previous) == 2
    for mine, theirs in zip(again.ring, groups, strict=True):
        assert all(torch.equal(v, vars(theirs)[k]) if torch.is_tensor(v) else v == vars(theirs)[k]
                   for k, v in vars(mine).items())  # fmt: skip


def test_rules_buffer_stays_empty(whole):
    assert {row["buffer_size"] for row in stage2(whole, "rule")} == {0}
    assert not any("replay_groups" in row for row in stage2(whole, "rule"))


def test_the_chosen_ways_are_logged_with_their_reason(whole):
    ways = json.loads((whole / "ways.json").read_text())
    assert set(ways) == {"sample, LlamaForCausalLM", "logprobs, LlamaForCausalLM"}
    assert all(line.endswith("gives the plain numbers") for line in ways.values())


# --- modes and precision ---------------------------------------------------------------------------------------------


def test_models_are_in_eval_mode_wherever_pi_old_is_compared(monkeypatch, tmp_path):
    modes = []

    def spy_on(original):
        def spy(model, *args, **kwargs):
            modes.append(model.training)
            return original(model, *args, **kwargs)

        return spy

    def spy_on_engine(original):
        def spy(engine, model, *args, **kwargs):
            modes.append(model.training)
            return original(engine, model, *args, **kwargs)

        return spy

    monkeypatch.setattr(Engine, "sample", spy_on_engine(Engine.sample))
    for name in ("on_policy_gradient", "off_policy_gradient", "add_reference"):
        monkeypatch.setattr(rerule, name, spy_on(getattr(rerule, name)))
    miniature.main("--output_dir", tmp_path / "run", *ALONE)
    assert len(modes) > 20 and not any(modes)


def test_a_2e_6_update_survives_bf16_compute(model):
    """Weights stay float32 under bf16 autocast; the same step on bf16 weights would change nothing."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_for(model, 2e-6, 0.0)
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
    pytest.param(("rule", 1), marks=pytest.mark.long),
    pytest.param(("rule", 5), marks=pytest.mark.long),
    pytest.param(("rerule", 2), marks=pytest.mark.long),
    ("rerule", 5),
    pytest.param(("save", 8), marks=pytest.mark.long),
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
