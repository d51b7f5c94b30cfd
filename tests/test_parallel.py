"""Several ranks, and one GPU with the host's memory, on CPU processes: same numbers, same states; the memory plan."""

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
from conftest import tiny
from miniature import driver
from test_published_forms import SMALL, rwku
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import grpo
import memory
import parallel
import run as run_module
import world
from config import Config
from files import InputError

HERE = Path(__file__).parent
KINDS = ("llama", "qwen2", "gpt2")


def torchrun(n, *argv, timeout=300):
    """tests/ranks.py on n processes. Returns: (exit code, what was printed)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
    process = subprocess.Popen(
        [*map(str, command), HERE / "ranks.py", *map(str, argv)], text=True, stdout=subprocess.PIPE,
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
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


# --- one process, two processes and the host's memory: the same step ------------------------------------------------


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{(kind, how): what `ranks.step` found} by one process, by two, and by one whose weights are kept elsewhere."""
    folder = tmp_path_factory.mktemp("steps")
    for kind in KINDS:
        tiny(kind).save_pretrained(folder / kind)
        world.word_tokenizer(["a b c"]).save_pretrained(folder / kind)
    found = {}
    for how in ("", "checkpoint", "offload", "checkpoint offload"):
        ranks.steps(folder, "one", how)
    code, printed = torchrun(2, "two", folder, "two", "", "checkpoint")
    assert code == 0, printed
    for path in folder.glob("*.pt"):
        kind, ran, how = path.stem.split(".")
        found[kind, f"{ran} {how}".strip()] = torch.load(path)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["two", "one checkpoint", "two checkpoint", "one offload", "one checkpoint offload"])
def test_draws_loss_and_gradients_are_one_processs(steps, kind, way):
    one, other = steps[kind, "one"], steps[kind, way]
    assert all(torch.equal(a, b) for a, b in zip(one["drawn"][:2], other["drawn"][:2], strict=True))
    assert len({tuple(row) for row in one["drawn"][0].flatten(0, 1).tolist()}) > 10  # a sampler that samples
    for a, b in zip(one["ref"], other["ref"], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert one["on"][:2] == pytest.approx(other["on"][:2], abs=1e-6)
    assert set(one["gradients"]) == set(other["gradients"])
    largest = max(gradient.abs().max() for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        assert (gradient - other["gradients"][name]).abs().max() < 1e-5 * largest, name
    assert one["norm"] == pytest.approx(other["norm"], rel=1e-5)
    for name, values in one.items():
        if name.startswith(("off", "norm")):  # replay, after steps with clipped gradients
            assert values == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    assert set(one["weights"]) == set(other["weights"])
    assert all(torch.allclose(one["weights"][n], other["weights"][n], atol=1e-3) for n in one["weights"])


def test_the_packed_way_is_the_plain_one_and_can_be_computed_twice(any_model):
    prompts = [[3, 4], [5, 6, 7], [8]]
    ids, mask, old = grpo.sample(any_model, prompts, 3, 6, [2], 1.0, torch.Generator().manual_seed(0))
    groups = [
        grpo.RolloutGroup(n, torch.tensor(p), ids[n], mask[n], old[n], None, torch.ones(3), torch.ones(3), 1)
        for n, p in enumerate(prompts)
    ]
    batch = grpo.collate(groups, "cpu")
    assert grpo.shares(any_model, grpo.packed_response_logprobs)
    weight = torch.randn(batch.mask.shape) * batch.mask
    found = []
    for way in (grpo.plain_response_logprobs, grpo.packed_response_logprobs, grpo.response_logprobs):
        if way is grpo.response_logprobs:
            parallel.checkpoint_layers(any_model)
        any_model.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            logprobs = way(any_model, batch, 1.3)
        (logprobs * weight).sum().backward()
        found.append((logprobs[batch.mask], [p.grad.clone() for p in any_model.parameters()], sum(kept)))
    for logprobs, gradients, _ in found[1:]:
        assert torch.allclose(logprobs, found[0][0], atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients, found[0][1], strict=True))
    assert found[2][2] < 0.5 * found[1][2]  # checkpointing keeps less
    assert not any(module.training for module in any_model.modules())


def test_so_many_prompts_side_by_side_draw_the_same(any_model):
    prompts = [[3, 4], [5, 6, 7], [8], [4, 4, 4, 4], [9, 3]]
    found = [grpo.sample(any_model, prompts, 3, 7, [2], 1.0, torch.Generator().manual_seed(5), n) for n in (0, 1, 2, 9)]
    for ids, mask, logprobs in found[1:]:
        assert torch.equal(ids, found[0][0]) and torch.equal(mask, found[0][1])
        assert torch.allclose(logprobs, found[0][2], atol=1e-5)


def test_a_2e_6_update_survives_where_layers_compute_in_bf16(model):
    """FSDP2 with bf16 layers and host memory, as on a GPU: the weights that are stepped are float32."""
    with parallel.session(torch.device("cpu"), offload=True):
        parallel.shard(model, torch.device("cpu"), offload=True, dtype=torch.bfloat16)
        before = {name: parallel.whole(p).detach().clone() for name, p in model.named_parameters()}
        optimizer = run_module.optimizer_for(model, 2e-6, 0.0)
        for _ in range(2):
            logits = model(torch.tensor([[3, 4, 5]])).logits
            assert logits.dtype == torch.bfloat16
            logits.float().logsumexp(-1).sum().backward()
            run_module.optimizer_step(model, optimizer, 1.0)
        for name, p in model.named_parameters():
            moved = (parallel.whole(p).detach() - before[name]).abs().max().item()
            assert p.dtype == torch.float32 and 1e-6 < moved < 5e-6, name
            assert torch.equal((before[name].bfloat16() - 2e-6)[before[name].abs() > 1e-2],
                               before[name].bfloat16()[before[name].abs() > 1e-2])  # fmt: skip # what bf16 would do
        with parallel.gathered(model):
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
    same_run(tmp_path / "run", whole)


def test_a_damaged_part_of_a_state_is_one_line(tmp_path):
    with parallel.session(torch.device("cpu"), offload=True):
        model = parallel.shard(tiny("llama"), torch.device("cpu"))
        optimizer = run_module.optimizer_for(model, 1e-3, 0.0)
        payload = parallel.state_of(model, optimizer, tmp_path, "shards_x_1")
        next((tmp_path / "shards_x_1").glob("*.distcp")).unlink()
        with pytest.raises(InputError, match="shards_x_1: cannot be read"):
            parallel.restore(payload, tmp_path, model, optimizer)


def test_errors_of_one_rank_are_everyones_and_said_once(tmp_path):
    code, printed = torchrun(2, "drive", "-", "--output_dir", tmp_path / "run", "--method", "ga")
    assert code != 0 and printed.count("--method ga: takes one process, neither torchrun nor --offload") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("act, code", [("print('done')", 0), ("raise files.InputError('no')", 2)])
def test_a_rank_ends_before_the_interpreter_takes_itself_apart(launched, act, code):
    """A thread of gloo's may abort it there. What was printed is not lost, and a single process ends as ever."""
    program = (
        f"import atexit, files\natexit.register(print, 'late')\ndef main(): {act}\nfiles.exit_on_input_error(main)"
    )
    env = os.environ | {"PYTHONUNBUFFERED": ""} | ({"WORLD_SIZE": "2"} if launched else {})
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == code
    assert ("done" in done.stdout, "error: no" in done.stderr) == (code == 0, code == 2)
    assert ("late" in done.stdout) == (not launched)


def test_offload_takes_one_process_of_the_same_driver(whole, tmp_path):
    ranks.drive("-", "--output_dir", tmp_path / "run", *FLAGS, "--offload", "--rollout_prompts", "4")
    same_run(tmp_path / "run", whole)
    assert not parallel.active()
    with pytest.raises(InputError, match="--method ga"):
        driver("--offload", "--method", "ga", "--output_dir", tmp_path / "other")


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_given_model_of_another_architecture_goes_through(kind, tmp_path):
    """`--model FOLDER`, checkpointed and kept in the host's memory: Stage 1, RULE, ReRULE, evaluation, table."""
    rwku(tmp_path / "data")
    texts = [path.read_text() for path in (tmp_path / "data").glob("*.json")]
    tokenizer = world.text_tokenizer(texts, 400)
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


# --- the memory plan --------------------------------------------------------------------------------------------------

EIGHT = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192)  # fmt: skip


def test_the_plan_by_hand():
    """Llama-3-8B: 8.03e9 parameters; a token's keys and values are 2 · 32 layers · 8 heads · 128 · 2 bytes."""
    n, together, kv, kept, vocabulary = memory.count(LlamaConfig(**EIGHT), torch.bfloat16, 128)
    assert n == 8_030_261_248 and together == 2 * 128256 * 4096 + 4096 and vocabulary == 128256
    assert kv == 2 * 32 * 8 * 128 * 2
    inputs = 32 * 128 * 4096 * 2  # what each layer is given
    assert inputs <= kept[True] < 2 * inputs + kept[False] / 32 and kept[False] > 10 * inputs
    config = Config(max_new_tokens=1024, offload=True, gradient_checkpointing=True, rollout_prompts=16)
    found = memory.plan((n, together, kv, kept, vocabulary), config, 0, True)
    assert found["weights"] == (2 * n, 4 * n) and found["gradients"] == (4 * n, 4 * n)
    assert found["optimiser"] == (0, 8 * n) and found["reference"] == (2 * n, 0)
    assert found["KV cache"][0] == 1.5 * kv * 16 * (64 + 8 * 1024)
    assert found["most at once"][0] < 80e9 and found["most at once"][1] == 16 * n
    four = memory.plan((n, together, kv, kept, vocabulary), Config(max_new_tokens=1024), 4, True)
    assert four["optimiser"] == (2 * n, 0) and four["reference"] == (n / 2, 0)


def test_dry_run_prints_and_leaves_nothing(tmp_path, capsys):
    LlamaConfig(**EIGHT).save_pretrained(tmp_path / "model")
    common = ["--benchmark", "rwku", "--data_dir", tmp_path, "--output_dir", tmp_path / "run", "--dry_run"]
    driver(*common, "--model", tmp_path / "model")
    printed = capsys.readouterr().out
    for name in memory.ROWS:
        assert name in printed
    assert "--gradient_checkpointing True --offload True --rollout_prompts" in printed
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--model .*nowhere"):
        driver(*common, "--model", tmp_path / "nowhere")
    with pytest.raises(InputError, match="--dry_run: expected a --model"):
        driver("--dry_run")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_what_a_step_on_the_cpu_takes(checkpointing):
    """A step of the driver's own functions in a fresh process: its peak beside the plan's."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, HERE / "ranks.py", "measure", str(checkpointing)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    planned, measured = map(float, done.stdout.split()[-2:])
    assert 0.85 < measured / planned < 1.15, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_can_be_counted(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    counted = memory.count(AutoConfig.from_pretrained(tmp_path), torch.float32, 32)
    assert counted[0] == sum(p.numel() for p in model.parameters()) and counted[3][True] < counted[3][False]
