"""The stopwatch on a model too small to say anything: what it prints, and that it runs the driver's own step."""

import importlib.util
import json
import time

import peer
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import benchmarks
import grpo
from config import Config, InputError
from engine import report
from engine.flags import parse, resolve
from engine.model import fast_products
from engine.process import Engine
from scale import speed

KEYS = {"step_s", "gen_s", "ref_s", "update_s", "replay_s", "peak_rss_mb", "tokens_per_s", "flop_floor_multiple"}
TINY = "--hidden 16 --layers 1 --steps 2 --warmup 1 --threads 1".split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few prompts."""
    monkeypatch.setattr(speed, "PROMPTS_PER_STEP", 4)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def main(*flags):
    print(json.dumps(speed.measure(parse(speed.Options, [*TINY, *flags]))))


def printed(capsys, *flags):
    main(*flags)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.mark.parametrize("shape", ["short", "rwku"])
def test_one_line_with_every_number(capsys, shape):
    row = printed(capsys, "--shape", shape)
    assert row.keys() >= KEYS and row["shape"] == shape and row["steps"] == 2
    parts = [row[name] for name in ("gen_s", "ref_s", "update_s", "replay_s")]
    assert sum(parts) == pytest.approx(row["step_s"], abs=5e-4)  # of two steps medians are means; rounded to 1e-4
    assert row["replay_s"] < 1e-3 and "replay_group_s" not in row
    longest = 4 * 8 * speed.SHAPES[shape][1]
    assert 0.8 * longest < row["tokens_per_step"] <= longest
    assert row["flop_floor_multiple"] > 1 and row["peak_rss_mb"] > 100
    assert row["vocab"] == 1000


def test_replay_is_timed_for_each_group_that_is_not_skipped(capsys):
    row = printed(capsys, "--replay")
    assert row["replay_s"] > 0 and 0 <= row["replay_skipped"] < 1
    assert 0 < row["replay_group_s"] <= row["replay_s"]


def test_the_steps_are_the_drivers(monkeypatch, capsys):
    calls, sample = [], Engine.sample
    monkeypatch.setattr(Engine, "sample", lambda *args: calls.append(args) or sample(*args))
    printed(capsys)
    assert len(calls) == 3  # the warm-up step and both timed ones
    _, _, prompts, group_size, longest, _, temperature, *_ = calls[0]
    assert (len(prompts), group_size, longest, temperature) == (4, 8, 24, 1.0)
    assert all(len(prompt) == 12 for prompt in prompts)


def test_what_only_the_log_shows_is_not_timed(monkeypatch, capsys):
    """Telling refusals takes a tenth of a short step, and the peer logs none."""
    monkeypatch.setattr(report, "is_refusal", lambda text: bool(time.sleep(0.1)))  # 32 responses a step
    row = printed(capsys)
    assert row["gen_s"] < row["step_s"] < 3.2


@pytest.mark.parametrize("tied", [False, True])
def test_the_floor_of_a_step_by_hand(tied):
    """One layer of 16: 4 · 16² and 3 · 16 · 64 weights in its matrices, 16 · 100 in the head, tied or not. Two prompts
    of 5 tokens, two responses each, 20 tokens in all, of which the last of each response meets no layer."""
    config = LlamaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                         intermediate_size=64, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config)
    forward = 2 * (4096 * (10 + 20 - 4) + 1600 * 20)
    assert speed.operations(model, 10, 4, 20) == (forward, 3 * forward) == (276_992, 830_976)
    model.model.layers.requires_grad_(False)  # as where adapters are trained
    assert speed.operations(model, 10, 4, 20) == (forward, 2 * forward + 2 * 1600 * 20)


def test_reference_and_policy_are_the_same_but_for_their_type():
    engine = Engine("cpu")
    engine.half = True
    model, reference = speed.place(engine, Config(), lambda: speed.build_model(16, 2))
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.lm_head.weight.requires_grad
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16} and not reference.lm_head.weight.requires_grad
    assert {b.dtype for b in reference.buffers()} == {torch.float32}  # rounded frequencies would turn far positions
    assert torch.equal(model.lm_head.weight.bfloat16(), reference.lm_head.weight)


def test_adapters_stand_beside_their_own_base_as_reference():
    config = resolve(Config(lora_rank=4), benchmarks.ALL)
    model, reference = speed.place(Engine("cpu"), config, lambda: speed.build_model(16, 2))
    assert not model.lm_head.weight.requires_grad and reference.lm_head.weight is model.lm_head.weight


def test_a_larger_vocabulary(capsys):
    row = printed(capsys, "--vocab", "3000", "--replay")
    assert row["vocab"] == 3000 and row["replay_group_s"] > 0


def test_the_share_of_responses_that_earn_is_the_same_at_any_vocabulary():
    for vocabulary in (1000, 10_000):
        texts = speed.build_prompts(24, vocabulary, 4000)
        assert sum(map(speed.earned, texts)) / len(texts) == pytest.approx(1 / 7, abs=0.03)


FAKE = {  # a trainer that takes its time, by its callbacks alone
    "trl": """
import time
class GRPOConfig:
    def __init__(self, **arguments): self.__dict__ |= arguments
class GRPOTrainer:
    def __init__(self, model, args, reward_funcs, callbacks, **_):
        self.model, self.ref_model, self.args, self.reward, self.callbacks = model, None, args, reward_funcs, callbacks
    def _generate_single_turn(self): time.sleep(0.05)
    def train(self):
        for _ in range(self.args.max_steps):
            [callback.on_step_begin() for callback in self.callbacks]
            self._generate_single_turn()
            self.reward(["w177"], [[1, 2, 3]])
            time.sleep(0 if self.model.config._attn_implementation == "eager" else 0.1)
            [callback.on_step_end() for callback in self.callbacks]
""",
    "datasets": "class Dataset:\n    from_dict = dict",
}


def test_the_peer_is_timed_as_it_is_and_with_our_products(tmp_path, monkeypatch, capsys):
    for name, code in FAKE.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    beside, quick = peer.trl_beside, []
    monkeypatch.setattr(peer, "trl_beside", lambda *args: quick.append(args[-1]) or beside(*args))
    peer.main([*TINY, "--warmup", "0"])
    row = json.loads(capsys.readouterr().out)
    for name in ("peer", "peer_quick"):
        assert row[name]["gen_s"] > 0.05 and row[name]["tokens_per_step"] == 3
        assert row[f"{name}_over_ours"] == pytest.approx(row[name]["step_s"] / row["step_s"], abs=0.01)
    assert quick == [False, True]
    if fast_products():
        assert row["peer"]["step_s"] > row["peer_quick"]["step_s"] + 0.05


def test_a_missing_peer_is_one_clear_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    with pytest.raises(InputError, match="pip install trl"):
        peer.main([])


def test_flags_that_make_no_sense():
    with pytest.raises(InputError, match="at least 1"):
        main("--steps", "0")
    with pytest.raises(InputError, match="--vocab 10: expected at least 1000"):
        main("--vocab", "10")


def test_loss_and_gradient_of_one_batch_are_trls(tmp_path):
    """Rewards, lengths and drift from the reference all differ, so every term of the loss is in play."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    engine = Engine("cpu")
    model, reference = speed.place(engine, Config(), lambda: speed.build_model(16, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    model.save_pretrained(tmp_path)
    theirs_model = LlamaForCausalLM.from_pretrained(tmp_path)  # its trainer loads it from there once more
    prompts, rng = [[5, 6, 7], [8, 9, 10, 11, 12]], torch.Generator().manual_seed(0)
    ids, mask, old = engine.sample(model, prompts, 4, 9, list(range(2, 90)), 1.0, rng)
    assert len(mask.sum(-1).unique()) > 2
    rewards = torch.rand(2, 4, generator=rng)
    advantages = grpo.group_advantages(rewards)
    groups = [
        grpo.RolloutGroup(n, 1, torch.tensor(p), ids[n], mask[n], old[n], None, rewards[n], advantages[n])
        for n, p in enumerate(prompts)
    ]
    logprobs_of = engine.logprobs(1.0)
    grpo.add_reference(reference, engine.batches(reference, groups), logprobs_of)
    batches = engine.batches(model, groups, Config.loss_norm)
    loss, kl = grpo.on_policy_gradient(model, batches, 0.3, logprobs_of)
    assert abs(loss) > 1e-3 and kl / grpo.counts(groups)[1] > 1e-3

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.3,
        num_generations=4, per_device_train_batch_size=8, loss_type="grpo", use_bias_correction_kl=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=theirs_model, args=arguments, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=speed.build_tokenizer(), train_dataset=Dataset.from_dict({"prompt": ["w1"]}),
    )  # fmt: skip
    batch = grpo.collate(groups, "cpu")
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(theirs_model, {
        "prompt_ids": batch.prompt_ids.repeat_interleave(4, 0), "completion_ids": batch.response_ids,
        "prompt_mask": batch.prompt_mask.long().repeat_interleave(4, 0), "completion_mask": batch.mask.long(),
        "advantages": batch.advantages[:, 0], "ref_per_token_logps": batch.ref_logprobs,
    })  # fmt: skip
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), abs=1e-6)
    for ours, other in zip(model.parameters(), theirs_model.parameters(), strict=True):
        assert torch.allclose(ours.grad, other.grad, atol=1e-6, rtol=1e-4)
