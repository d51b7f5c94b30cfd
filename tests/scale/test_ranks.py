"""Several ranks, and one GPU with the host's memory, on CPU processes: same numbers, same states, same errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from conftest import make_groups, tiny
from made import SMALL, published_rwku
from miniature import driver
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import grpo
from benchmarks.tiny import text_tokenizer, word_tokenizer
from config import InputError
from engine.model import optimizer_for
from engine.process import micro_batches
from scale.ranks import Ranks, restore_shards, shard

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("llama", "qwen2", "gpt2")


def torchrun(n, *argv, timeout=300):
    """tests/ranks.py on n processes. Returns: (exit code, what was printed)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
    process = subprocess.Popen(
        [*map(str, command), ROOT / "tests" / "ranks.py", *map(str, argv)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its own
        raise
    return process.returncode, printed


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "time"))} for row in rows]


# --- one process, two processes and the host's memory: the same step ------------------------------------------------


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{(kind, how): what `ranks.step` found} by one process, by two, and by one whose weights are kept elsewhere."""
    folder = tmp_path_factory.mktemp("steps")
    for kind in KINDS:
        tiny(kind).save_pretrained(folder / kind)
        word_tokenizer(["a b c"]).save_pretrained(folder / kind)
    tiny("llama", len(word_tokenizer(ranks.WORDS))).save_pretrained(folder / "words")
    word_tokenizer(ranks.WORDS).save_pretrained(folder / "words")
    ranks.one(folder, "", "checkpoint", "offload", "checkpoint offload", "lora")
    code, printed = torchrun(2, "two", folder, "", "checkpoint", "lora", "checkpoint lora")
    assert code == 0, printed
    found = {}
    for path in folder.glob("*.pt"):
        kind, ran, how = path.stem.split(".")
        found[kind, f"{ran} {how}".strip()] = torch.load(path)
    found["all", "start"] = AutoModelForCausalLM.from_pretrained(folder / "words").state_dict()
    return found


WAYS = ["two", "one checkpoint", "two checkpoint", "one offload", "one checkpoint offload"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [*WAYS, "two lora", "two checkpoint lora"])
def test_draws_loss_and_gradients_are_one_processs(steps, kind, way):
    one, other = steps[kind, "one lora" if "lora" in way else "one"], steps[kind, way]
    assert all(torch.equal(a, b) for a, b in zip(one["drawn"][:2], other["drawn"][:2], strict=True))
    assert len({tuple(row) for row in one["drawn"][0].flatten(0, 1).tolist()}) > 10  # a sampler that samples
    for name in ("ref", "ref, once the policy has moved"):  # with adapters it is the same model without them
        for a, b in zip(one["ref"], other[name], strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert len(one["gradients"]) == len(other["gradients"]) and "lora" not in way or len(one["gradients"]) in (16, 28)
    assert one["on"][:2] == pytest.approx(other["on"][:2], abs=1e-6)
    same_gradients(one["gradients"], other["gradients"])
    assert one["norm"] == pytest.approx(other["norm"], rel=1e-5)
    assert sum(name.startswith("off") for name in one) == 3
    for name, values in one.items():
        if name.startswith("off"):  # replay, after steps with clipped gradients; the norm of its gradient too
            assert values == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert set(one["weights"]) == set(other["weights"])
    assert all(torch.allclose(one["weights"][n], other["weights"][n], atol=1e-3) for n in one["weights"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["one", *WAYS])
def test_weights_are_saved_in_either_type_and_tied_ones_once(steps, kind, way):
    found, one = steps[kind, way], steps[kind, "one"]
    assert set(found["half"]) == set(found["weights"])
    for name, tensor in found["half"].items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, found["weights"][name].bfloat16()), name
    (size, dtype), (half, low) = found["weights on disk"], found["half on disk"]
    assert (dtype, low) == ("float32", "bfloat16") and size == one["weights on disk"][0]
    weights = sum(4 * tensor.numel() for name, tensor in one["weights"].items() if kind != "gpt2" or "head" not in name)
    assert weights < size < weights + 4000 and abs(half - size / 2) < 4000  # names take some


@pytest.mark.parametrize(
    "way, method", [(w, m) for w in ("two", "one checkpoint offload", "two lora") for m in ranks.methods_of(w)]
)
def test_every_method_is_one_processs(steps, method, way):
    """Losses and norms of each step, the saved weights, both of WHP, and what they answer once read again."""
    one, other = steps["all", "one lora" if "lora" in way else "one"][method], steps["all", way][method]
    assert len(one[0]) == len(other[0]) >= 3
    for ours, theirs in zip(one[0], other[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for ours, theirs in zip(one[1], other[1], strict=True):
        assert set(ours) <= set(theirs)
        assert all((ours[n] - theirs[n]).abs().max() < 1e-5 for n in ours)
    start = steps["all", "start"]
    moved = max((one[1][-1][n] - start[n]).abs().max() for n in start)
    assert moved > 1e-3 and torch.equal(one[2], other[2])


def same_gradients(ours, theirs):
    assert set(ours) == set(theirs)
    largest = max(gradient.abs().max() for gradient in ours.values())
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_summed_over_ranks_and_a_stand_in_adds_nothing(steps, kind, way):
    """One micro-batch for two ranks: the other rank computes it too, at weight 0."""
    same_gradients(steps[kind, "one"]["one group"], steps[kind, way]["one group"])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_ranks_share_out_every_micro_batch_once_and_stand_in_with_weight_0(model, norm, world):
    groups = make_groups(model, prompts=[tuple(range(3, 3 + n)) for n in (1, 9, 4, 2, 7)])
    parts, counted, turns = micro_batches(groups, 30), [], set()
    for rank in range(world):
        engine = Ranks("cpu", max_tokens=30)
        engine.rank, engine.world = rank, world
        batches = list(engine.batches(model, groups, norm))
        turns.add(len(batches))
        counted += [batch for batch in batches if batch.weights.any()]
        for batch in batches:
            whole = grpo.collate(batch.groups, "cpu", norm, of=groups).weights
            assert torch.equal(batch.weights, whole) or not batch.weights.any()
    assert len(parts) == 5 and turns == {-(-5 // world)}  # none waits for a turn that another does not take
    assert sorted(group.query for batch in counted for group in batch.groups) == [0, 1, 2, 3, 4]
    total = sum(batch.weights.sum().item() for batch in counted)
    assert total == pytest.approx(grpo.collate(groups, "cpu", norm).weights.sum().item(), rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_ranks_share_out_rows_so_that_their_means_add_up_to_the_whole(world):
    rows, size = [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0], [7.0], [8.0, 9.0]], len
    total = 0.0
    for rank in range(world):
        engine = Ranks("cpu")
        engine.rank, engine.world = rank, world
        own, weight = engine.share(rows, size)
        total += weight * sum(map(sum, own)) / sum(map(size, own))  # what SFT's loss of these rows counts for
    assert total == pytest.approx(45 / 9)


def test_a_2e_6_update_survives_where_layers_compute_in_bf16(model):
    """FSDP2 with bf16 layers and host memory, as on a GPU: the weights that are stepped are float32."""
    engine = Ranks("cpu")
    with engine.session():
        shard(model, engine.device, engine.world, offload=True, dtype=torch.bfloat16)
        before = {name: engine.whole(p).detach().clone() for name, p in model.named_parameters()}
        optimizer = optimizer_for(model, 2e-6, 0.0)
        for _ in range(2):
            logits = model(torch.tensor([[3, 4, 5]])).logits
            assert logits.dtype == torch.bfloat16
            logits.float().logsumexp(-1).sum().backward()
            engine.step(model, optimizer, 1.0)
        for name, p in model.named_parameters():
            moved = (engine.whole(p).detach() - before[name]).abs().max().item()
            assert p.dtype == torch.float32 and 1e-6 < moved < 5e-6, name
            assert torch.equal((before[name].bfloat16() - 2e-6)[before[name].abs() > 1e-2],
                               before[name].bfloat16()[before[name].abs() > 1e-2])  # fmt: skip # what bf16 would do
        with engine.held(model):
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_gathered_once_for_a_rollout(steps, kind):
    """Three batches of prompts, six tokens: one gathering of each layer, and of what is in none."""
    assert steps[kind, "two"]["gathers"] == steps[kind, "two"]["blocks"] + 1 == 3
    assert steps[kind, "one"]["gathers"] == 0


# --- the driver -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process's run, to compare with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ranks.drive("-", "--output_dir", folder, *FLAGS)
    replayed = [row for row in metrics(folder) if row.get("replay_groups", 0) > row.get("replay_skipped", 0)]
    assert len(replayed) >= 2  # there is something to get wrong
    return folder


FLAGS = ("--method", "rerule", "--save_every", "2", "--tiny_epochs", "2")


def same_run(folder, other):
    assert (folder / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert len(metrics(folder)) == len(metrics(other))
    for row, theirs in zip(metrics(folder), metrics(other), strict=True):
        assert set(row) == set(theirs)
        for *drawn, weight in row.pop("replayed", ()):  # each rank has computed a part of the weights
            *same, other_weight = theirs["replayed"].pop(0)
            assert drawn == same and (weight or 0) == pytest.approx(other_weight or 0, rel=1e-3)
        assert not theirs.pop("replayed", None)
        for name, value in row.items():
            close = pytest.approx(theirs[name], rel=1e-3, abs=1e-4) if isinstance(value, float) else theirs[name]
            assert value == close, (row["method"], row["step"], name)
    for phase in ("rej_steer", "rerule"):
        ours, others = (AutoModelForCausalLM.from_pretrained(f / phase).state_dict() for f in (folder, other))
        assert set(ours) == set(others) and all(torch.allclose(ours[n], others[n], atol=1e-3) for n in ours)
    assert not list(folder.glob("shards*")) and not list(folder.glob("*.tmp"))


def test_a_killed_rank_ends_the_run_and_it_goes_on_with_one_or_three(whole, tmp_path):
    two = tmp_path / "two"
    code, printed = torchrun(2, "drive", "1:rerule:5", "--output_dir", two, *FLAGS)
    assert code != 0
    rows = [row for row in metrics(two) if row["method"] == "rerule"]
    died, ended = os.path.getmtime(two / "metrics.jsonl"), time.time()
    assert ended - died < 60
    said = re.search(r"rank 0: .*", printed)
    assert said and "go on with the same command and --resume" in said.group()
    assert [row["step"] for row in rows][:4] == [1, 2, 3, 4] and (two / "shards_rerule_4").is_dir()
    three = tmp_path / "three"
    subprocess.run(["cp", "-r", two, three], check=True)
    ranks.drive("-", "--output_dir", two, *FLAGS, "--resume")  # without torchrun
    same_run(two, whole)
    code, printed = torchrun(3, "drive", "-", "--output_dir", three, *FLAGS, "--resume")
    assert code == 0 and printed.count("Everything else is in") == 1, printed
    same_run(three, whole)


def test_a_state_of_one_process_goes_on_with_two(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ranks.drive("stop:rerule:5", "--output_dir", tmp_path / "run", *FLAGS)
    assert not (tmp_path / "run" / "table.md").exists()
    code, printed = torchrun(2, "drive", "-", "--output_dir", tmp_path / "run", *FLAGS, "--resume")
    assert code == 0, printed
    assert printed.count("sample, LlamaForCausalLM: packed_sample: gives") == 1  # not by each rank
    same_run(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """One process's run of adapters, and one of two processes, of which one was killed."""
    one, two = (tmp_path_factory.mktemp("adapted") / name for name in ("one", "two"))
    ranks.drive("-", "--output_dir", one, *ADAPTERS)
    code, printed = torchrun(2, "drive", "1:rerule:5", "--output_dir", two, *ADAPTERS)
    assert code != 0 and (two / "shards_rerule_4").is_dir(), printed
    kept = load_file(two / "shards_rerule_4" / "1.safetensors")
    assert sum(name.endswith(" weight") for name in kept) == 14 and all(".lora_" in name for name in kept)
    return one, two


ADAPTERS = (*FLAGS, "--lora_rank", "4")


@pytest.mark.parametrize("then", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, "two after one"))])
def test_adapters_on_ranks(adapted, tmp_path, then):
    """The run of one process, also where two were killed and two, or one, went on, or two took over from one."""
    (one, two), run = adapted, tmp_path / "run"
    if then == "two after one":
        with pytest.raises(KeyboardInterrupt):
            ranks.drive("stop:rerule:5", "--output_dir", run, *ADAPTERS)
    else:
        subprocess.run(["cp", "-r", two, run], check=True)
    if then == 1:
        ranks.drive("-", "--output_dir", run, *ADAPTERS, "--resume")
    else:
        code, printed = torchrun(2, "drive", "-", "--output_dir", run, *ADAPTERS, "--resume")
        assert code == 0, printed
    same_run(run, one)
    for row, theirs in zip(metrics(run), metrics(one), strict=True):
        assert row["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    for phase in ("rej_steer", "rerule"):
        ours, others = (load_file(f / phase / "adapter" / "adapter_model.safetensors") for f in (run, one))
        assert set(ours) == set(others) and all(torch.allclose(ours[n], others[n], atol=1e-4) for n in ours)


def test_a_damaged_part_of_a_state_is_one_line(tmp_path):
    engine = Ranks("cpu")
    with engine.session():
        model = tiny("llama")
        shard(model, engine.device, engine.world)
        optimizer = optimizer_for(model, 1e-3, 0.0)
        payload = engine.state_of(model, optimizer, tmp_path, "shards_x_1")
        part = tmp_path / "shards_x_1" / "0.safetensors"
        whole = load_file(part)
        cut, gone = ({name: t for name, t in whole.items() if name != "lm_head.weight weight"} for _ in range(2))
        cut["lm_head.weight weight"] = whole["lm_head.weight weight"][:-1]
        for damaged, why in ((cut, "rows, expected"), (gone, "does not contain tensor"), (None, "")):
            save_file(damaged, part) if damaged else part.write_bytes(part.read_bytes()[:-99])
            with pytest.raises(InputError, match=f"shards_x_1: cannot be read .*{why}"):
                restore_shards(payload, tmp_path, model, optimizer)
        part.unlink()
        with pytest.raises(InputError, match="shards_x_1: cannot be read"):
            restore_shards(payload, tmp_path, model, optimizer)


@pytest.mark.parametrize("name", ["../shards_x_1", "/tmp/shards_x_1", "shards_x_1/..", "", 7, "shards"])
def test_a_state_names_parts_in_its_own_folder_alone(name, tmp_path):
    with pytest.raises(InputError, match="is no name of a run's own"):
        restore_shards({"shards": name}, tmp_path, tiny("llama"), None)


def test_errors_of_one_rank_are_everyones_and_said_once(tmp_path):
    code, printed = torchrun(2, "drive", "-", "--output_dir", tmp_path / "run", "--attack", "leak")
    assert code != 0 and printed.count("--attack: takes one process, neither torchrun nor --offload") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_that_only_rank_0_finds_damaged_is_an_error_of_every_rank(tmp_path, words):
    words.save_pretrained(tmp_path)
    tiny("llama").config.save_pretrained(tmp_path)  # no weights, which only rank 0 reads
    first, second = Ranks("cpu"), Ranks("cpu")
    second.rank, said = 1, []
    first.gather = lambda failed: said.append(failed) or [failed, None]
    second.gather = lambda failed: [said[0], failed]
    for engine in (first, second):
        with pytest.raises(InputError, match="is no model folder or Hugging Face id"):
            engine.load(tmp_path)


def test_offload_takes_one_process_of_the_same_driver(whole, tmp_path):
    ranks.drive("-", "--output_dir", tmp_path / "run", *FLAGS, "--offload", "--rollout_prompts", "4")
    same_run(tmp_path / "run", whole)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_given_model_of_another_architecture_goes_through(kind, tmp_path):
    """`--model FOLDER`, checkpointed and kept in the host's memory: Stage 1, RULE, ReRULE, evaluation, table."""
    published_rwku(tmp_path / "data")
    texts = [path.read_text() for path in (tmp_path / "data").glob("*.json")]
    tokenizer = text_tokenizer(texts, 400)
    model = tiny(kind, len(tokenizer))
    model.config.max_position_embeddings = 256
    type(model)(model.config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = [*SMALL, "--benchmark", "rwku", "--data_dir", tmp_path / "data", "--model", tmp_path / "model"]
    out = tmp_path / "run"
    driver(*flags, "--offload", "--gradient_checkpointing", "--output_dir", out)
    assert list(json.loads((out / "table.json").read_text())) == ["Original", "Rej. Steer", "RULE", "ReRULE"]
    assert any(row.get("replay_groups") for row in metrics(out))
    trained = AutoModelForCausalLM.from_pretrained(out / "rerule")
    assert trained.config.architectures == [type(model).__name__] and trained.dtype == torch.float32
