"""One GPU with the host's memory: how often weights go up and gradients down, that none is stale, locked memory."""

import gc
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import miniature
import pytest
import torch
from conftest import tiny
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

from baselines.losses import cross_entropy
from baselines.train import score
from engine.files import Log
from engine.model import optimizer_for
from engine.process import Engine
from scale import ranks
from scale.ranks import Ranks, drop, layers_of, lock, restore_shards, shard


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """{method: [(row of its log, times that all weights went up for it, times that all gradients went down)]}."""
    found, moves, write = {}, Counter(), Log.write
    up, down = _fsdp_param.FSDPParam.init_unsharded_param, _fsdp_param_group.foreach_reduce

    def counted(name, function, size):
        def called(first, *rest):
            moves[name] += size(first)
            return function(first, *rest)

        return called

    def noted(log, row):
        if "loss" in row:
            n = 11  # weights of a Llama of one layer, its head tied
            rounds = [moves[name] / n for name in ("up", "down")]
            found.setdefault(row["method"], []).append((row, *rounds))
            moves.clear()
        write(log, row)

    flags = "--offload --gradient_checkpointing --tiny_epochs 1 --sft_stop 1 --save_every 0 --max_tokens 60 --lr 1e-3 "
    flags += "--baseline_lr 1e-3 --baseline_epochs 7 --baseline_batch_size 6 --method npo_klr rerule"
    out = tmp_path_factory.mktemp("moved") / "run"
    with (
        patch.object(_fsdp_param.FSDPParam, "init_unsharded_param", counted("up", up, lambda _: 1)),
        patch.object(_fsdp_param_group, "foreach_reduce", counted("down", down, len)),
        patch.object(Log, "write", noted),
    ):
        miniature.main("--output_dir", out, *flags.split())
    return found


def test_a_rollout_s_weights_serve_the_update_and_stage_1_has_one_upload_a_step(moved):
    """The first step of Stage 2 samples from weights that nothing has stepped yet, which are let go of."""
    for row, up, down in moved["rerule"]:
        replayed = row.get("replay_groups", 0) > row.get("replay_skipped", 0)
        assert (up, down) == ((row["step"] == 1) + 1 + replayed, 1 + replayed), row["step"]
    assert sum(row.get("replay_groups", 0) > 0 for row, *_ in moved["rerule"]) >= 3
    assert len(moved["rej_steer"]) == 6
    for row, up, down in moved["rej_steer"]:  # a forward, then samples for `--sft_stop`, which the next forward shares
        assert (up, down) == ((row["step"] == 1) + 1, 1)


def test_a_baseline_s_many_parts_share_an_upload_and_send_gradients_once(moved):
    """And one upload more where the perplexity of the retain rows is measured, after the step."""
    rows = moved["npo_klr"][1:]  # the evaluation of the original model comes before
    assert {"retain_perplexity" in row for row, *_ in rows} == {True, False}
    for row, up, down in rows:
        assert (up, down) == (1 + ("retain_perplexity" in row), 1)


def test_sampling_sees_a_step_s_new_weights(model, tmp_path):
    engine, plain = Ranks("cpu", 40), tiny("llama")
    how = ([[3, 4], [5, 6, 7]], 4, 6, [2], 1.0)

    def in_place():
        return [p for p in model.parameters() if not isinstance(p, torch.distributed.tensor.DTensor)]

    def sampled(found):
        return engine.sample(found, *how, torch.Generator().manual_seed(5))

    def step(found, optimizer):
        found(torch.tensor([[3, 4, 5]])).logits.square().mean().backward()
        engine.step(found, optimizer, 1.0)

    with engine.session():
        shard(model, engine.device, engine.world, offload=True)
        optimizers = [optimizer_for(found, 0.05, 0.0) for found in (model, plain)]
        before = sampled(model)
        assert (
            not in_place()
        )  # nothing is stepped yet: whoever asks for the model's parameters gets those that are kept
        for _ in range(2):
            for found, optimizer in zip((model, plain), optimizers, strict=True):
                step(found, optimizer)
            assert not in_place()
            ours, theirs = sampled(model), sampled(plain)
            assert in_place()
            assert torch.equal(ours[0], theirs[0]) and torch.allclose(ours[2], theirs[2], atol=1e-5)
            assert not torch.equal(ours[0], before[0])
            before = ours
        payload = engine.state_of(model, optimizers[0], tmp_path, "shards_x_1")  # whatever is in place
        restored = tiny("llama")
        optimizers.append(optimizer_for(restored, 0.05, 0.0))
        restore_shards(payload, tmp_path, restored, optimizers[2])
        sampled(model)
        kept = dict(engine.plain(model, torch.float32)[1])
        assert all(torch.equal(kept[n], p) for n, p in restored.named_parameters())
        states = [list(optimizers[i].state.values()) for i in (0, 2)]
        assert len(states[0]) == len(states[1]) == len(kept)
        assert all(torch.equal(engine.whole(a["exp_avg"]), b["exp_avg"]) for a, b in zip(*states, strict=True))
        assert not in_place() and all(torch.allclose(kept[n], p, atol=1e-3) for n, p in plain.named_parameters())


def test_rows_that_are_computed_twice_meet_the_same_dropout():
    rows, gradients = [([3, 4], [5, 6]), ([7], [8, 9, 3]), ([4, 4], [2])], []
    for engine in (Engine("cpu"), Ranks("cpu", 100)):
        model = tiny("gpt2").train()
        assert model.config.resid_pdrop > 0
        with engine.session():
            if isinstance(engine, Ranks):
                shard(model, engine.device, engine.world, offload=True)
            torch.manual_seed(7)
            engine.backward(cross_entropy(*score(engine, model, rows)))
            drop(model)
            gradients.append({name: engine.whole(p.grad) for name, p in model.named_parameters()})
    assert all(torch.allclose(gradients[1][name], p, atol=1e-6) for name, p in gradients[0].items())


def test_memory_is_locked_where_it_is_and_unlocked_with_the_model(capsys, monkeypatch):
    locked, failing = {}, []

    def register(at, size, flags):
        if failing and failing.pop():
            return "no"
        locked[at] = size
        return "yes"

    cudart = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=locked.pop, cudaError=SimpleNamespace(success="yes")
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(ranks, "LEAST", 2000)
    engine = Ranks("cpu")
    with engine.session():
        model = tiny("llama")
        shard(model, engine.device, engine.world, offload=True)
        lock(model)
        large = {p.to_local().data_ptr(): p.numel() * 4 for p in model.parameters() if p.numel() * 4 >= 2000}
        assert locked == large and 0 < len(large) < len(list(model.parameters()))
        assert not capsys.readouterr().err
        with engine.held(model):  # FSDP reads the same memory still
            pass
        assert {p.to_local().data_ptr() for p in model.parameters()} > set(locked)
        assert len(layers_of(model)) == 3
        del model
        gc.collect()
        assert not locked
        model, failing[:] = tiny("llama"), [True]
        shard(model, engine.device, engine.world, offload=True)
        lock(model)
        assert len(locked) == len(large) - 1
        assert capsys.readouterr().err.count("of the host cannot be locked: weights go up slower") == 1
