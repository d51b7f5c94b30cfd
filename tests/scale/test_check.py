"""The check of a machine, on the smallest model and a CPU: every part, a part that fails, the minutes."""

import gc
import json
import time
import weakref
from types import SimpleNamespace

import check
import pytest
import torch
from transformers import LlamaConfig

from config import Config, InputError
from engine.flags import parse
from scale import memory, speed

PARTS = ["machine", "host", "disk", "step tiny", "lora tiny"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small products, copies and files."""
    monkeypatch.setattr(speed, "matmul_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(speed, "best_rate", lambda amount, work, *_: work() is None or 1e10)


def rows_of(folder, *flags):
    """{part: {what: row}} of the JSON after a check, whose table must hold the same."""
    check.main(parse(check.Options, ["--device", "cpu", "--output_dir", str(folder), "--steps", "1", *flags]))
    rows = json.loads((folder / "check.json").read_text())["rows"]
    lines = (folder / "check.md").read_text().splitlines()
    assert len(lines) == len(rows) + 2
    for row, line in zip(rows, lines[2:], strict=True):
        assert line.startswith(f"| {row['part']} | {row['what']} | ")
    assert sorted(path.name for path in folder.iterdir()) == ["check.json", "check.md"]  # nothing else is left
    return {part: {row["what"]: row for row in rows if row["part"] == part} for part in [r["part"] for r in rows]}


def test_every_part_has_its_rows(tmp_path, capsys):
    found = rows_of(tmp_path, "--parts", "host", "disk", "step", "lora")
    assert list(found) == PARTS
    assert all(row["found"] for part in PARTS[:3] for row in found[part].values())
    value = {what: row["found"] for what, row in found["step tiny"].items()}
    assert sum(value[name] for name in ("gen_s", "ref_s", "update_s", "replay_s")) == pytest.approx(value["step_s"])
    assert 0 < value["sample_s"] <= value["gen_s"] and value["replay_groups"] == 4 and value["truncation"] > 0.5
    assert (
        value["steps timed"] == 1 and value["logprob_gap"] < 1e-4 and "packed" in value["way: sample, LlamaForCausalLM"]
    )
    assert value["flop_floor_multiple"] > 0 and value["update's share of products' rate"] > 0
    for name in ("saved state, GB", "saved model, GB"):  # tokenizer and logs beside the weights
        assert 1 < value[name] / found["step tiny"][name]["plan"] < 1.1
    assert found["step tiny"]["memory, most at once, GB"]["plan"] > 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == (tmp_path / "check.md").read_text().splitlines()


def test_what_fails_says_why_and_leaves_the_others(tmp_path, monkeypatch):
    models, stage2 = [], speed.time_stage2

    def short_of_memory(run, method, placed, tokenizer, prompts, reward, each):
        models.append(weakref.ref(placed[0]))

        def fails(log):
            each(log)
            raise torch.OutOfMemoryError("tried to allocate\n20 GiB")

        stage2(run, method, placed, tokenizer, prompts, reward, fails)

    def no_disk(*_):
        yield "free, GB", 1.0
        raise OSError("no space left")

    monkeypatch.setattr(speed, "time_stage2", short_of_memory)
    monkeypatch.setattr(check, "check_disk", no_disk)
    found = rows_of(tmp_path, "--sizes", "tiny", "tiny")
    assert found["disk"]["failed"]["found"] == "OSError: no space left" and found["disk"]["free, GB"]["found"] == 1.0
    step = found["step tiny"]
    assert step["failed"]["found"] == "OutOfMemoryError: tried to allocate 20 GiB"
    assert step["steps timed"]["found"] == 1 and step["memory, most at once, GB"]["found"]  # what was seen by then
    gc.collect()
    assert [model() for model in models] == [None]  # its memory is the next part's


def test_a_part_alone(tmp_path):
    assert list(rows_of(tmp_path / "new" / "folder", "--parts", "disk")) == ["machine", "disk"]


def test_nothing_begins_after_the_minutes(tmp_path, monkeypatch):
    now = iter(range(10**6))  # a minute's sixty calls of the clock
    monkeypatch.setattr(check, "time", SimpleNamespace(monotonic=lambda: next(now), perf_counter=time.perf_counter))
    found = rows_of(tmp_path, "--minutes", "0.05", "--parts", "host", "disk", "step", "lora")
    assert list(found) == PARTS and "left out" not in found["machine"]
    assert found["step tiny"]["left out"]["found"] == found["lora tiny"]["left out"]["found"] == "the minutes were over"


def test_no_step_begins_that_would_end_after_the_minutes(tmp_path):
    o = SimpleNamespace(prompts_per_step=2, max_new_tokens=4, steps=5, cuda_graphs=False, output_dir=tmp_path)
    rates = {"products": 1e11, "copy": 1e10, "nominal": None}
    rows = list(check.check_steps(o, torch.device("cpu"), rates, time.monotonic(), "tiny", 0))
    (timed,) = [row for row in rows if row[0] == "steps timed"]
    assert timed[1] == 1 and "warm up" in timed[3]
    assert [row[1] for row in rows if row[0].startswith("saved")] == [None, None]


@pytest.mark.parametrize(
    "flags", [["--sizes", "70b"], ["--parts", "ways"], ["--minutes", "0"], ["--steps", "0"], ["--cuda_graphs"]]
)
def test_mistakes(tmp_path, flags):
    with pytest.raises(InputError, match=flags[0]):
        rows_of(tmp_path, *flags)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output_dir"):
        rows_of(tmp_path / "file" / "folder")


@pytest.mark.parametrize("memory_of_gpu, flags", [
    (85e9, "--gradient_checkpointing True --offload True"), (1e12, "as it is"), (20e9, None),
])  # fmt: skip
def test_the_flags_are_those_that_the_gpu_needs(monkeypatch, memory_of_gpu, flags):
    """8 B without a GPU: what comes before the model is drawn."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, memory_of_gpu))
    o = SimpleNamespace(prompts_per_step=None, max_new_tokens=None, steps=2, cuda_graphs=False)
    part = check.check_steps(o, torch.device("cuda"), {}, 0, "8b", 0)
    if flags is None:
        with pytest.raises(MemoryError, match="does not fit this GPU"):
            next(part)
        return
    what, found, _, note = next(part)
    assert found == flags and "16 prompts × 8 responses of at most 1024 tokens" in note
    if "offload" in flags:
        monkeypatch.setattr(check, "host_memory", lambda: 100e9)
        with pytest.raises(MemoryError, match="128.5 GB of the host, which has 100.0"):
            next(part)


def test_the_sizes_are_llamas():
    for size, n in (("1b", 1_235_814_400), ("8b", 8_030_261_248)):
        *shape, tied = check.SIZES[size]
        architecture = LlamaConfig(**dict(zip(check.SHAPE, shape, strict=True)), tie_word_embeddings=tied)
        assert memory.seen(architecture, True).parameters == n


def test_bytes_of_decoding_by_hand():
    """4 prompts, 2 side by side: 2 × 10 turns read all weights. A response of 10 tokens reads 10²/2 own keys and
    values, and its group 64 of the prompt at each of 10 turns."""
    config = Config(benchmark="rwku", prompts_per_step=4, group_size=3, max_new_tokens=10, rollout_prompts=2)
    assert check.decode_bytes(1000, 7, config, 120) == 20 * 1000 + 7 * 4 * (64 * 10 + 3 * 50)


def test_shares_by_hand():
    """The first row warms up. 256 responses of 10 tokens in 2 s; a token meets 5e8 weights of 2 bytes on a GPU."""
    config = Config(benchmark="rwku", max_new_tokens=10)
    warm = dict.fromkeys(("step_s", "gen_s", "sample_s", "ref_s", "update_s", "replay_s", "forward", "updated"), 99.0)
    row = {"step_s": 10.0, "gen_s": 3.0, "sample_s": 2.0, "ref_s": 1.0, "update_s": 4.0, "replay_s": 2.0, "ess": 0.5,
           "response_tokens": 2560, "forward": 1e14, "updated": 3e14}  # fmt: skip
    rates = {"products": 5e14, "copy": 2e12, "nominal": 1e15}
    told = check.told_steps([warm, row, row], config, 0, rates, {"read": 5 * 10**8}, True)
    told = {what: [found, *rest] for what, found, *rest in told}
    assert told["steps timed"][0] == 2 and told["sample_s"][0] == 2.0
    assert told["tokens a second, sampling"] == [1280.0, None, "256 in the step"]
    assert told["sampling's share of copies' rate"] == [10 * 1e9 / 2e12 / 2, None, "10 GB read"]
    assert told["update's share of products' rate"] == [0.15, None, "0.075 of the nominal"]
    assert told["flop_floor_multiple"] == [8 / 1] and told["ess"] == [0.5] and told["fresh_ess"] == [None]


def test_offloaded_weights_are_checked_as_they_are_run(tmp_path):
    """FSDP2's own kinds of weights, in a group of one process."""
    config = Config(
        benchmark="rwku", model="random tiny", steps=2, prompts_per_step=2, group_size=2, max_new_tokens=4, tau=1.0,
        min_groups=1, warmup_steps=1, replay_groups=2, buffer_size=4, lr=1e-6, eval_every=0, save_every=2,
        device="cpu", offload=True, gradient_checkpointing=True, output_dir=str(tmp_path),
    )  # fmt: skip
    architecture = LlamaConfig(
        **dict(zip(check.SHAPE, check.SIZES["tiny"][:-1], strict=True)), tie_word_embeddings=True
    )
    rows, found = [], {}
    check.run_steps(config, architecture, time.monotonic() + 600, rows, found)
    assert len(rows) == 2 and rows[1]["replay_groups"] == 2
    n = memory.seen(architecture, False).parameters
    assert found["read"] == n - 5 * 64  # all but the norms: the head is the embeddings
    assert found["state"] > 12 * n and found["model"] > 4 * n
