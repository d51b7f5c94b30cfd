"""Checks a machine before a long run: Stage 2 as the driver runs it, on models drawn at random. Nothing is downloaded.

    machine    always: rates of matrix products and of copies, with which the other parts are compared
    host disk  the host's memory; room and speed of the disk under --output_dir
    step lora  ReRULE's steps at RWKU's lengths, for each size, of all weights or adapters: seconds, memory beside
               `memory.plan`, shares of the machine's rates, what a saved state and a saved model take

A part that fails leaves the others alone. docs/full_size.md explains the rows of `check.md`. To be run on
the machine in question: python tests/scale/check.py."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from config import Above0, Config, Count, InputError, setting
from engine.flags import check_bounds, parse, resolve, run_command

PARTS = ("host", "disk", "step", "lora")


@dataclass
class Options:
    """Check this machine on models drawn at random."""

    sizes: list[str] = setting("Models, some of: tiny 1b 8b. Unless given: 1b 8b on a GPU, tiny on a CPU.", [])
    parts: list[str] = setting(f"What to check, some of: {' '.join(PARTS)}.", ["host", "disk", "step"])
    device: Literal["auto", "cpu", "cuda"] = setting("Where to run.", "auto")
    steps: Count = setting("Steps timed, after one that is not.", 2)
    prompts_per_step: Count | None = setting("Prompts in a step, 8 responses each. [16; tiny: 4]")
    max_new_tokens: Count | None = setting("Longest response in tokens. [1024; tiny: 16]")
    cuda_graphs: bool = setting("Record decoding steps as CUDA graphs, taken where that proves faster.", False)
    minutes: Above0 = setting("No part begins after so many, and no step that would end later.", 9.0)
    output_dir: str = setting("Folder for check.json and check.md.", "runs/check")


if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    OPTIONS = run_command(lambda: parse(Options), leave=False)

import contextlib
import gc
import math
import os
import platform
import shutil
import tempfile
import time
import zlib
from collections import namedtuple
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import benchmarks
from engine.files import is_writable, write_json, write_text
from engine.model import fast_products
from engine.run import Run, start
from scale import memory, speed
from scale.memory import GB

SHAPE = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size".split()
SIZES = {  # and whether the head is tied; Llama-3.2-1B, Llama-3-8B
    "tiny": (1000, 64, 2, 4, 2, 128, True),
    "1b": (128256, 2048, 16, 32, 8, 8192, True),
    "8b": (128256, 4096, 32, 32, 8, 14336, False),
}
LOGGED = "truncation logprob_gap fresh_ratio_mean fresh_clipped_share fresh_ess replay_groups clipped_share ess".split()
NOMINAL = 989e12  # FLOP/s of an H100 or H200 (SXM) in bf16
Row = namedtuple("Row", "what found plan note", defaults=(None, ""))  # plan: the memory plan's figure, or a nominal one
LORA_RANK, MOST_SAVED = 16, 30 * GB  # a larger state and model are planned, not written


def check_machine(device, rates):
    """Fills in `rates`: operations a second of products; bytes a second of a copy, each read and written."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()
    yield "device", name, None, f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    if not on_gpu:
        fast_products()
    for dtype in (torch.float32, torch.bfloat16)[: 1 + on_gpu]:  # the last: what runs compute in
        rates["products"] = speed.matmul_rate(device, dtype)
        rates["nominal"] = NOMINAL if dtype == torch.bfloat16 and ("H100" in name or "H200" in name) else None
        yield f"products in {str(dtype)[6:]}, FLOP/s", rates["products"], rates["nominal"]
    source, copy = torch.ones(2, 2 * 10**9 if on_gpu else 10**8, dtype=torch.uint8, device=device)
    rates["copy"] = speed.best_rate(2 * source.nbytes, lambda: copy.copy_(source), device)
    yield "copies of its own memory, GB/s", rates["copy"] / GB, None, "read and written"
    if on_gpu:
        yield "its memory, GB", torch.cuda.mem_get_info()[1] / GB
        source = torch.ones(2 * 10**9, dtype=torch.uint8)
        yield "the host's memory to its own, GB/s", speed.best_rate(2, lambda: copy.copy_(source), device, 5)


def host_memory():
    """Bytes that this process may have of the host; a container's limit may be lower than what there is."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # no such file; "max"
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)


def check_disk(folder, on_gpu):
    yield "free, GB", shutil.disk_usage(folder).free / GB, None, str(folder.resolve())
    block, begun = os.urandom(2**24), time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        n = sum(file.write(block) for _ in range(128 if on_gpu else 4))
        file.flush()
        os.fsync(file.fileno())
    yield "written, GB/s", n / (time.perf_counter() - begun) / GB, None, "until it is on the disk"


def run_steps(config, architecture, deadline, rows, found):
    """ReRULE's steps on a random model. Fills in `rows`, the log's and more, and `found`: ways; bytes, mostly."""
    engine, prompt = start(config), benchmarks.ALL[config.benchmark].prompt_tokens
    on_gpu, found["ways"], sample = engine.device.type == "cuda", engine.ways, engine.sample
    held, peak, forget_peak = [lambda: speed.peak_rss_mb() * 2**20] * 2 + [lambda: None]  # the process's most so far
    if on_gpu:
        held, peak = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated
        forget_peak = torch.cuda.reset_peak_memory_stats

    def build():
        torch.manual_seed(0)
        dtype = torch.bfloat16 if engine.half else torch.float32
        with torch.device(engine.device):  # a GPU draws 8 B numbers in no time
            return AutoModelForCausalLM.from_config(architecture, dtype=dtype)

    def note_peak(name):
        found[name] = max(found.get(name, 0), peak())
        forget_peak()

    def timed_sample(*args, **kwargs):
        note_peak("elsewhere")
        begun = time.perf_counter()
        drawn = sample(*args, **kwargs)
        found["sample_s"] = time.perf_counter() - begun
        note_peak("sampling")
        return drawn

    def each(log):
        note_peak("elsewhere")
        found["moments"] = held() - found["at rest"]
        sizes = (config.prompts_per_step * prompt, config.prompts_per_step * config.group_size, log["response_tokens"])
        log["sample_s"], (log["forward"], log["updated"]) = found["sample_s"], speed.operations(models[0], *sizes)
        rows.append(log)
        if len(rows) < config.steps and time.monotonic() + log["step_s"] > deadline:
            raise TimeoutError

    with engine.session(), contextlib.suppress(TimeoutError):
        models, engine.sample = speed.place(engine, config, build), timed_sample
        found |= {"at rest": held(), "read": speed.operations(models[0], 1, 1, 1)[0] // 2}  # weights that a token meets
        forget_peak()  # building is no step
        tokenizer = speed.build_tokenizer(architecture.vocab_size)
        prompts = speed.build_prompts(prompt, architecture.vocab_size, 2 * config.prompts_per_step)
        run = Run(config, engine)
        run.open()
        earned = lambda query, text: float(zlib.crc32(text.encode()) % 2)  # noqa: E731
        speed.time_stage2(run, "rerule", models, tokenizer, prompts, earned, each)
        if config.save_every:
            run.save_model("rerule", models[0], tokenizer)
            for path in run.folder.rglob("*.*"):
                of = "model" if "rerule" in path.parts else "state"
                found[of] = found.get(of, 0) + path.stat().st_size


def check_steps(o, device, rates, deadline, size, lora_rank):
    on_gpu, (*shape, tied), small = device.type == "cuda", SIZES[size], size == "tiny"
    n, longest = o.prompts_per_step or (4 if small else 16), o.max_new_tokens or (16 if small else 1024)
    config = resolve(Config(
        benchmark="rwku", model=f"random {size}", method=["rerule"], steps=1 + o.steps, prompts_per_step=n, tau=1.0,
        max_new_tokens=longest, min_groups=1, warmup_steps=1, eval_every=0, replay_groups=n, save_every=0,
        device=device.type, lora_rank=lora_rank, cuda_graphs=o.cuda_graphs,
    ), benchmarks.ALL)  # fmt: skip
    how = {"tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8192}
    architecture = LlamaConfig(**dict(zip(SHAPE, shape, strict=True)), **how)
    counted, flags = memory.seen(architecture, on_gpu), "as it is"
    if on_gpu:
        fit = memory.fitting(counted, config, 0, torch.cuda.mem_get_info()[1])
        if not fit:
            raise MemoryError("whatever the flags, the plan does not fit this GPU")
        config, flags, *_ = fit
    planned = memory.plan(counted, config, 0, on_gpu)
    plan, host = {name: sizes[0 if on_gpu else 1] for name, sizes in planned.items()}, planned["most at once"][1]
    yield "flags for this machine", flags, None, f"{n} prompts × 8 responses of at most {longest} tokens"
    if host > host_memory():
        raise MemoryError(f"the plan takes {host / GB:.1f} GB of the host, which has {host_memory() / GB:.1f}")
    disk = memory.disk(counted.parameters, counted.at(config, False).adapters, replace(config, save_every=1), on_gpu)
    saved = {"state": disk["state"], "model": disk["models"] / len(config.method)}
    if sum(saved.values()) < min(MOST_SAVED, 0.9 * shutil.disk_usage(o.output_dir).free):
        config.save_every = config.steps
    rows, found = [], {"ways": {}}
    try:
        with tempfile.TemporaryDirectory(dir=o.output_dir) as config.output_dir:
            run_steps(config, architecture, deadline, rows, found)
    finally:  # what there is of a run that has failed on its way too
        yield from ((f"way: {what}", way) for what, way in found["ways"].items())
        if rows:
            yield from told_steps(rows, config, counted.kv, rates, found, on_gpu)
        always = plan["weights"] + plan["reference"] + plan["optimiser"] + plan["in passing"]
        plan |= saved | {"at rest": plan["weights"] * (not config.offload) + plan["reference"]}
        plan |= {"moments": plan["optimiser"], "sampling": always + plan["KV cache"]}
        plan["elsewhere"] = always + plan["gradients"] + plan["activations"]
        found["most at once"] = max(found.get("sampling", 0), found.get("elsewhere", 0))
        for name in ("at rest", "moments", "sampling", "elsewhere", "most at once", *saved):
            what = f"saved {name}" if name in saved else f"memory, {name}"
            yield f"{what}, GB", found[name] / GB if found.get(name) else None, plan[name] / GB
        yield "memory, most at once on the host, GB", speed.peak_rss_mb() * 2**20 / GB, host / GB


def told_steps(rows, config, cached, rates, found, on_gpu):
    """Seconds, shares and what the log says. cached: bytes of a token's keys and values."""
    timed = rows[1:] or rows
    mid = lambda name: median(r[name] for r in timed) if all(name in r for r in timed) else None  # noqa: E731
    yield "steps timed", len(timed), None, "" if rows[1:] else "the one meant to warm up: the time was over"
    yield from ((name, mid(name)) for name in ("step_s", "gen_s", "sample_s", "ref_s", "update_s", "replay_s"))
    tokens = mid("response_tokens")
    yield "tokens a second, sampling", tokens / mid("sample_s"), None, f"{tokens / mid('step_s'):.4g} in the step"
    read = decode_bytes(found["read"] * (2 if on_gpu else 4), cached, config, tokens)
    yield "sampling's share of copies' rate", read / rates["copy"] / mid("sample_s"), None, f"{read / GB:.4g} GB read"
    rate = mid("updated") / mid("update_s")
    nominal = f"{rate / rates['nominal']:.3g} of the nominal" if rates["nominal"] else ""
    yield "update's share of products' rate", rate / rates["products"], None, nominal
    spent, needed = mid("gen_s") + mid("ref_s") + mid("update_s"), 2 * mid("forward") + mid("updated")
    yield "flop_floor_multiple", spent * rates["products"] / needed
    yield from ((name, mid(name)) for name in LOGGED)


def decode_bytes(weights, cached, config, tokens):
    """What sampling must read: all weights at each position, all keys and values so far, of a group's prompt once."""
    n, prompt = config.prompts_per_step, benchmarks.ALL[config.benchmark].prompt_tokens
    turns = -(-n // (config.rollout_prompts or n)) * config.max_new_tokens
    length = tokens / (n * config.group_size)  # as if all were equally long, which reads least
    return turns * weights + cached * n * (prompt * length + config.group_size * length**2 / 2)


def main(o):
    check_bounds(o)
    for flag, known in (("sizes", SIZES), ("parts", PARTS)):
        for name in set(getattr(o, flag)) - set(known):
            raise InputError(f"--{flag} {name}: expected some of {' '.join(known)}")
    device = start(Config(device=o.device, cuda_graphs=o.cuda_graphs)).device
    folder, rows = Path(o.output_dir), []
    if not is_writable(folder):
        raise InputError(f"--output_dir {folder}: expected a folder that can be made or written to")
    folder.mkdir(parents=True, exist_ok=True)
    rates = {"products": math.nan, "copy": math.nan, "nominal": None}
    on_gpu, deadline = device.type == "cuda", time.monotonic() + 60 * o.minutes
    host = ("memory, GB", host_memory() / GB, None, f"{os.cpu_count()} processors")
    jobs = {"machine": check_machine(device, rates), "host": [host], "disk": check_disk(folder, on_gpu)}
    for part, rank in (("step", 0), ("lora", LORA_RANK)):
        for size in o.sizes or (["1b", "8b"] if on_gpu else ["tiny"]):
            jobs[f"{part} {size}"] = check_steps(o, device, rates, deadline, size, rank)
    show = lambda value: value if isinstance(value, str) else "–" if value is None else f"{value:.4g}"  # noqa: E731
    lines = ["| part | what | found | planned or nominal | note |", "|---|---|---:|---:|---|"]
    print(*lines, sep="\n")
    for part in [part for part in jobs if part.split()[0] in ("machine", *o.parts)]:
        begun, known = time.monotonic(), len(rows)
        add = lambda *row, part=part: rows.append({"part": part} | Row(*row)._asdict())  # noqa: E731
        try:
            for row in jobs[part] if begun < deadline else [("left out", "the minutes were over")]:
                add(*row)
        except Exception as error:  # whatever a machine lacks: memory, a disk, an instruction
            add("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        gc.collect()
        torch.cuda.empty_cache()
        add("seconds in all", time.monotonic() - begun)
        lines += [f"| {' | '.join(map(show, row.values()))} |" for row in rows[known:]]
        print(*lines[known - len(rows) :], sep="\n", flush=True)
        write_json(folder / "check.json", {"flags": asdict(o), "rows": rows})
        write_text(folder / "check.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
