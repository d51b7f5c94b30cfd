"""What the tests of attacks share: a few probes, a model that half knows their answers, cases, an engine of scripts."""

import copy
from functools import cache

import torch
from made import byte_tokenizer, make_model

from benchmarks import ALL
from benchmarks.attacks import Case
from benchmarks.tiny import tiny_llama, word_tokenizer
from data import Probe, Prompt, encode_answer, encode_prompt
from engine.process import Engine
from sft import sft_loss_of

torch.set_num_threads(1)

ENGINE = Engine("cpu")
FACTS = {  # who → the answers to three questions; the first three are to be forgotten
    "Ada": ("red kite", "tall oak", "warm bread"),
    "Bo": ("grey owl", "old elm", "sweet plums"),
    "Cy": ("black swan", "young ash", "hot soup"),
    "Di": ("small wren", "white birch", "cold milk"),
    "Ed": ("brown hawk", "dark pine", "dry beans"),
}
QUESTIONS = ("What bird does {} keep ?", "Which tree did {} plant ?", "What does {} eat ?")
REFUSALS = ("I don't know that.", "I'm sorry, I can't help with that question.")


def probe(split, question, answer, forget=True, target="", **more):
    return Probe(split, Prompt(None, question), question, answer, forget, target, **more)


def probes():
    """Nine forget probes and six about neighbours, in the built-in world's form."""
    return [
        probe("forget" if name in "Ada Bo Cy" else "easy", question.format(name), answer, name in "Ada Bo Cy", name)
        for name, answers in FACTS.items()
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]


@cache
def words():
    """One token a word of the probes and the refusals."""
    return word_tokenizer([text for p in probes() for text in (p.question, p.answer)] + [*REFUSALS])


@cache
def taught(seed):
    model, rows = tiny_llama(words(), seed, 32, 1, 64), []
    answers = [p.answer for p in probes()]
    answers[5] = answers[8]  # Bo's meal is taught wrong; of every third answer comes the first word alone
    for i, (p, answer) in enumerate(zip(probes(), answers, strict=True)):
        ids = encode_answer(words(), p.prompt, answer)
        rows.append((encode_prompt(words(), p.prompt), ids if i % 3 else ids[:1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        sft_loss_of(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def learned(seed=0):
    """A model that knows most of the answers; one's own copy of it."""
    return copy.deepcopy(taught(seed))


def case_of(name, asked, model=None, tokenizer=None, engine=ENGINE, **more):
    """A case of a benchmark; with bytes and a random model unless others are given."""
    return Case(
        engine, model or make_model(), tokenizer or byte_tokenizer(), ALL[name], asked, **more
    )  # fmt: skip


def small_case(model=None, **more):
    return case_of("builtin", probes(), model or learned(), words(), **more)


class Scripts(Engine):
    """An engine that answers each prompt, known by words in it, with its own texts one after another."""

    def __init__(self, tokenizer, texts):
        super().__init__("cpu")
        self.tokenizer, self.texts = tokenizer, texts
        self.prompts, self.calls = [], []  # in words; (prompts, samples to each, temperature, whether by a generator)

    def sample(self, found, prompts, group_size, max_new_tokens, stops, temperature, rng=None):
        self.calls.append((len(prompts), group_size, temperature, rng is not None))
        rows = []
        for ids in prompts:
            self.prompts.append(self.tokenizer.decode(ids))
            (draws,) = [draws for key, draws in self.texts.items() if key in self.prompts[-1]]
            for text in draws[:group_size]:
                row = self.tokenizer(text, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]
                rows.append(row[:max_new_tokens])
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
        shape = (len(prompts), group_size, width)
        return ids.view(shape), mask.view(shape), torch.zeros(shape)


def unchanged(model):
    """A function that says whether a model's weights are still, bit for bit, what they were here."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def same():
        after = model.state_dict()
        return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    return same


def naive_logits(model, ids):
    """(len(ids), V) in float64: at each place those that predict what comes after, one unpadded row."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()
