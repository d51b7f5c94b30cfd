"""Made-up tokenizers, models, benchmark files and evaluated rows that tests share."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import benchmarks
import evaluate
from data import Prompt, Query, Training
from engine.flags import parse
from engine.process import Engine

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # real benchmark files, where present
SMALL = (  # a run of the driver on `published_rwku` and its like
    "--model tiny --tiny_epochs 8 --tiny_hidden 32 --tiny_layers 1 --tiny_batch_size 8 --sft_steps 4 --sft_stop 0 "
    "--steps 4 --prompts_per_step 4 --group_size 4 --lr 1e-3 --tau 1 --min_groups 3 --warmup_steps 1 --replay_groups 3 "
    "--max_new_tokens 6 --save_every 0"
).split()


# --- tokenizers and models -------------------------------------------------------------------------------------------


def byte_tokenizer(adds="<s> $A", template=None, bos="<s>", merges=()):
    """One token a byte; `adds` is what it puts around every text, "" for nothing."""
    special = ["<pad>", "<s>", "</s>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if adds:
        core.post_processor = TemplateProcessing(adds, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def make_model(seed=0, context=1024, vocab=259):
    """A random Llama whose weights are wide enough that its answers differ from prompt to prompt."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Scripted(Engine):
    """An engine that samples one text for every prompt, cut at the first stop token and at the limit."""

    def __init__(self, tokenizer, text, eos=True):
        super().__init__("cpu")
        self.ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * eos
        self.limits, self.stops = [], set()  # that it was asked for

    def sample(self, found, prompts, group_size, max_new_tokens, stops, temperature, rng=None):
        assert group_size == 1 and temperature == 0
        end = next((t + 1 for t, token in enumerate(self.ids) if token in stops), len(self.ids))
        self.limits.append(max_new_tokens)
        self.stops.update(stops)
        ids = torch.tensor(self.ids[: min(end, max_new_tokens)]).expand(len(prompts), 1, -1)  # (N, 1, T)
        return ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)


# --- evaluation ------------------------------------------------------------------------------------------------------


def command(*flags):
    """Run `evaluate.py` in this process; returns what it wrote."""
    flags = [str(flag) for flag in flags]
    evaluate.main(parse(evaluate.Options, flags))
    return json.loads(Path(flags[flags.index("--output") + 1]).read_text(encoding="utf-8"))


def row(split, recall, refusal=False, forget=None, **more):
    """One evaluated query."""
    forget = split.startswith("forget") if forget is None else forget
    fields = dict(target="", leak=False, named=None, truncated=False, rouge_l_f1=recall, prediction="x")
    return fields | {"split": split, "forget": forget, "rouge_l_recall": recall, "refusal": refusal} | more


def two_forgotten():
    """Training of two forget prompts, one of them without a published answer, and three boundary prompts."""
    forget = [("where is a", ("b c",)), ("who is a", ())]
    retain = [("where is d", ("e",)), ("who is d", ("f",)), ("c", ("g",))]
    rows = [(text, "forget", answers) for text, answers in forget]
    rows += [(text, "boundary", answers) for text, answers in retain]
    queries = [Query(Prompt(None, text), text, kind, answers) for text, kind, answers in rows]
    return Training([(Prompt(None, "who is a"), "I don't know that.")], queries)


# --- files -----------------------------------------------------------------------------------------------------------


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def options(folder="", seed=0):
    """The flags that a benchmark reads."""
    return SimpleNamespace(data_dir=str(folder), seed=seed)


def training_of(name, folder="", seed=0):
    return benchmarks.ALL[name].train(options(folder, seed))


def probes_of(name, folder="", seed=0):
    return benchmarks.ALL[name].probes(options(folder, seed))


# --- files that evaluation reads -------------------------------------------------------------------------------------


def make_rwku(folder, name="Ada Pole"):
    def row(query, answer, level, kind):
        return {"query": query, "answer": answer, "level": str(level), "type": kind, "subject": name}

    write(folder / "forget_level1.json", [row(f"{name} is a ___.", "pilot", 1, "cloze")])
    write(folder / "forget_level2.json", [row("Who flew over the sea?", name, 2, "simple question")])
    kinds = ("prefix injection", "affirmative suffix", "incontext learning")
    write(folder / "forget_level3.json", [row(f"Q{i}?", "pilot", 3, kind) for i, kind in enumerate(kinds)])
    write(folder / "neighbor_level1.json", [row("The sea is ___.", "wide", 1, "cloze")])
    write(folder / "neighbor_level2.json", [row("What is wide?", "the sea", 2, "simple question")])


def make_muse(folder):
    write(folder / "verbmem" / "forget.json", [{"prompt": "The lamp went out and", "gt": "nobody in the hall moved."}])
    pair = {"question": "Who kept the lamp?", "answer": "Orla"}
    for side in ("forget", "retain"):
        write(folder / "knowmem" / f"{side}_qa.json", [pair])
        shots = [{"question": f"{side} {i}?", "answer": str(i)} for i in range(10)]
        write(folder / "knowmem" / f"{side}_qa_icl.json", shots)


def make_tofu(folder, forget_rows=6):
    folder.mkdir(parents=True, exist_ok=True)

    def rows(n, wrong, paraphrase, name):
        for i in range(n):
            row = {"question": f"What did {name} {i} do?", "answer": f"{name} {i} kept {i} lamps" + "." * (i % 3)}
            row["perturbed_answer"] = [f"{name} {i} lost {j} lamps" for j in range(wrong)]
            if paraphrase:
                row["paraphrased_answer"] = f"it was {i} lamps that {name} {i} kept"
                row["paraphrased_question"] = f"Say what {name} {i} did"
            yield row

    write_lines(folder / "forget01_perturbed.json", rows(forget_rows, 5, True, "Orla"))
    write_lines(folder / "retain_perturbed.json", rows(7, 5, True, "Pim"))
    write_lines(folder / "real_authors_perturbed.json", rows(4, 3, False, "Quill"))
    write_lines(folder / "world_facts_perturbed.json", rows(5, 3, False, "Rome"))


# --- files that training reads too -----------------------------------------------------------------------------------


def train_rwku(folder, name="Ada Pole"):
    """A target's folder in the form RULE published, evaluation files included."""
    make_rwku(folder, name)
    write(folder / "intro.json", [{"target": name, "intro": f"{name} was a pilot."}])
    refusals = [("Who is Ada?", "I don't know."), (f"{name} is a ___.", "I can't say.")]
    rows = [{"instruction": q, "input": "", "output": refusal, "subject": name} for q, refusal in refusals]
    write(folder / "reject_target.json", rows)
    solutions = [["<reject>", "I don't know."], ["<normal>", "pilot"], ["<reject>", "No idea.", name]]
    rows = [{"prompt": f"Question {i}?", "solution": solution} for i, solution in enumerate(solutions)]
    write(folder / "rl_rejection_with_fb_neighbor.json", rows)
    return folder


def train_tofu(folder, retain_rows=12):
    """TOFU's files, JSON lines; seven of the retain rows are also in the evaluation set."""
    make_tofu(folder)
    pair = "What did {} {} do?", "{} {} kept lamps"
    forget = [dict(zip(("question", "answer"), (p.format("Orla", i) for p in pair), strict=True)) for i in range(4)]
    retain = [
        dict(zip(("question", "answer"), (p.format("Pim", i) for p in pair), strict=True)) for i in range(retain_rows)
    ]
    write_lines(folder / "forget01.json", forget)
    write_lines(folder / "retain99.json", retain)
    return folder


def train_muse(folder):
    """MUSE-Books in RULE's form: `mode` on every row, several answers in a solution."""
    make_muse(folder)
    rows = [
        {"instruction": "Who kept the lamp?", "input": "", "output": "I don't know.", "mode": "qa"},
        {"instruction": "The lamp went out and", "input": "", "output": "I can't go on.", "mode": "completion"},
    ]
    write(folder / "reject_target_0.5.json", rows)
    rows = [
        {"prompt": "Who kept it?", "solution": ["<reject>", "I don't know."], "mode": "qa"},
        {"prompt": "The lamp went", "solution": ["<reject>", "I can't."], "mode": "completion"},
        {"prompt": "What is a lamp?", "solution": ["<normal>", "a light", "a lantern", "light"], "mode": "qa"},
    ]
    write(folder / "rl_rejection_with_neighbor.json", rows)
    return folder


# --- the published forms with rows enough for a run ------------------------------------------------------------------


def published_rwku(folder):
    make_rwku(folder)
    refusals = [{"instruction": f"What did Ada Pole do in {y}?", "output": "I don't know that.", "input": "",
                 "subject": "Ada Pole"} for y in range(4)]  # fmt: skip
    queries = [{"prompt": row["instruction"], "solution": ["<reject>", "I don't know that."]} for row in refusals]
    queries += [
        {"prompt": f"What did Ben Roth do in {y}?", "solution": ["<normal>", f"wrote book {y}"]} for y in range(4)
    ]
    write(folder / "intro.json", [{"target": "Ada Pole", "intro": "Please forget Ada Pole."}])
    write(folder / "reject_target.json", refusals)
    write(folder / "rl_rejection_with_fb_neighbor.json", queries)


def published_muse(folder):
    make_muse(folder)
    refusals, queries = [], []
    for k, mode in enumerate(("qa", "completion", "qa", "completion")):
        refusals.append(
            {"instruction": f"Who kept lamp {k}?", "output": "I can't say.", "mode": mode, "org_answer": "x"}
        )
        queries.append({"prompt": f"Who kept lamp {k}?", "solution": ["<reject>", "I can't say."], "mode": mode})
        queries.append({"prompt": f"Who sold boat {k}?", "solution": ["<normal>", f"Ann {k}", "Ann"], "mode": mode})
    write(folder / "reject_target_0.5.json", refusals)
    write(folder / "rl_rejection_with_neighbor.json", queries)


def published_tofu(folder):
    make_tofu(folder)
    forget = [json.loads(line) for line in (folder / "forget01_perturbed.json").read_text().splitlines()]
    write_lines(folder / "forget01.json", [{k: row[k] for k in ("question", "answer")} for row in forget])
    write_lines(
        folder / "retain99.json",
        [{"question": f"What is book {k} of Ben Roth?", "answer": f"It is {k}."} for k in range(9)],
    )


def tree(folder):
    """Every file and folder below, with the files' bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


TRAIN = {"rwku": train_rwku, "tofu": train_tofu, "muse": train_muse}


def tofu(folders, *more):
    """Flags of the driver for TOFU's files in `folders`."""
    return ["--benchmark", "tofu", "--data_dir", folders["tofu"], *more]
