"""Prompts, training queries and evaluation probes; how a prompt becomes tokens; what a benchmark is.

Covers Section 3.1's forget set D_f and boundary set D̃_r as records. The files, prompts and metrics of each benchmark
are in a module of its own in `benchmarks/`, which ends in one `Benchmark`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from config import InputError


@dataclass(frozen=True)
class Prompt:
    """One query in the two forms that a model may need."""

    user: str | None  # the user's turn for a chat template, or None where the benchmark is always raw text
    plain: str  # the whole text where there is no template
    opening: str = ""  # words that open the assistant's turn (RWKU's evaluation: "Answer:")


@dataclass(frozen=True)
class Query:
    """A training query x: `kind` is "forget" (x ∈ D_f) or "boundary" (x ∈ D̃_r, with its reference answers y*)."""

    prompt: Prompt
    question: str  # as the file has it, for logs
    kind: str
    answers: tuple[str, ...] = ()  # of a forget query: what is to be forgotten, where published; baselines read it
    target: str = ""  # forget queries: the name to be forgotten, where known
    group: str = ""  # built-in world: "hard" or "easy" neighbour


@dataclass(frozen=True)
class Probe:
    """One evaluation query; `forget` is True where a refusal is wanted."""

    split: str
    prompt: Prompt
    question: str  # as the file has it
    answer: str
    forget: bool
    target: str = ""  # RWKU: the folder's subject; TOFU: the author named in question or answer
    type: str = ""  # RWKU's kind of attack
    paraphrased: str = ""  # TOFU: the answer in other words; empty where the answer itself takes its place
    perturbed: tuple[str, ...] = ()  # TOFU: wrong answers; probes without any get no losses


@dataclass
class Training:
    """Everything that training reads. `taught` is what a `tiny` model memorises first: (prompt, answer) pairs."""

    refusals: list[tuple[Prompt, str]]  # Stage 1: forget prompts with refusals y^rej
    queries: list[Query]  # Stage 2: D_f ∪ D̃_r
    taught: list[tuple[Prompt, str]] = field(default_factory=list)
    newline_stops: bool = False  # a rollout ends at a newline (MUSE)
    whole: dict[str, list[tuple[Prompt, str]]] | None = None  # all "forget" and "retain" data, where the files hold it

    def prompts(self):
        """Every prompt that either stage trains on."""
        return [prompt for prompt, _ in self.refusals] + [query.prompt for query in self.queries]


@dataclass(frozen=True)
class Benchmark:
    """All that is particular to one benchmark. To add one, write a module that makes this and name it in `ALL`. In each
    function `o` holds the command's flags, `data_dir` and `seed` among them; a row is one evaluated probe."""

    name: str
    preset: dict  # flag → its value here (Appendix D)
    columns: dict  # the paper's columns → heading with the direction that is better
    train: Callable  # (o) → Training
    probes: Callable  # (o) → [Probe], in the order of the files
    limit: Callable  # (split, tokens of the prompt) → new tokens that an answer may have
    scorer: object  # of `rouge_score`, with the benchmark's own tokens
    summarise: Callable  # (rows, truth ratios of a retained model or None) → {column: value}, [notes]
    tiny: dict = field(default_factory=dict)  # what --model tiny changes of the preset
    row_columns: dict = field(default_factory=dict)  # of a run's table; unless given: `columns` and all others'
    prompt_tokens: int = 64  # about as many as its longest prompts have, for the memory plan
    reads_files: bool = True  # from --data_dir
    hub: str = ""  # its data set on the Hub
    by_target: bool = False  # a summary is the mean over targets of each target's own
    newline_ends: bool = False  # an evaluated answer ends at a newline
    cut: Callable = lambda split, text: text  # what of an answer is scored
    continued: tuple = ()  # splits in which the text goes on: the true answer too is cut at the limit
    losses: Callable | None = None  # (split, losses of answer, paraphrase, wrong answers) → fields of a row
    log_splits: tuple = ()  # splits whose rows hold losses
    own_log: Callable = lambda path, log, sets: None  # rows of a log in the benchmark's own form, None for others
    forget_rows: set | None = None  # rows of its forget sets, where it compares truth ratios with a retained model's
    more_lines: Callable = lambda summary: []  # what `evaluate.py` prints below its table
    wordings: Callable = lambda query: []  # prompts in which training and evaluation ask a query's question
    retained: Callable | None = None  # (o) → what a model that never saw the forget set is taught
    ability: Callable | None = None  # (o) → sets of `benchmarks/ability.py`
    membership: Callable | None = None  # (o, probes) → {side: [(Prompt or None, text)]}, note; sides forget, holdout


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, with one BOS where the tokenizer has one; no other place encodes prompts. A chat template
    writes its own special tokens, so none are added; plain text gets the tokenizer's, less an EOS at its end."""
    if prompt.user is not None and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt.user}]
        try:
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + prompt.opening
        except Exception as error:  # whatever a template raises, or its code runs into
            raise InputError(f"the model's chat template does not take {prompt.user[:60]!r} ({error})") from None
        ids = tokenizer(text, add_special_tokens=False).input_ids
        bos = tokenizer("").input_ids[:1]  # [] where the tokenizer adds no BOS by itself
        if bos == [tokenizer.bos_token_id] and ids[:1] != bos:
            ids = bos + ids
    else:
        ids = tokenizer(prompt.plain + prompt.opening).input_ids
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def encode_answer(tokenizer, prompt, answer):
    """Token ids of an answer to `prompt`, EOS at the end; after "Answer:" it opens with a space, else without."""
    chat = prompt.user is not None and tokenizer.chat_template
    ending = prompt.opening if chat else prompt.plain + prompt.opening
    space = " " if ending.endswith(":") else ""
    return encode_rest(tokenizer, space + answer) + [tokenizer.eos_token_id]


def encode_rest(tokenizer, text):
    """Token ids of a text that goes on where another ended: without the space that SentencePiece puts before a text."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    if not "".join(tokenizer.convert_ids_to_tokens(encode("a")[:1])).startswith(("▁", "Ġ")):
        return encode(text)
    before, both = encode("\n"), encode("\n" + text)
    return both[len(before) :] if both[: len(before)] == before else encode(text)


def encode_pair(tokenizer, prompt, answer):
    """Prompt and answer as one string with nothing between, then EOS (TOFU)."""
    return encode_prompt(tokenizer, replace(prompt, opening=prompt.opening + answer)) + [tokenizer.eos_token_id]


def decode(tokenizer, ids, mask):
    """Sampled ids and mask (N, G, T) → N lists of G texts."""
    return [
        [tokenizer.decode(row[keep], skip_special_tokens=True).strip() for row, keep in zip(*group, strict=True)]
        for group in zip(ids, mask, strict=True)
    ]


def stop_ids(tokenizer, model, newline=False):
    """Ids that end a response: all EOS ids of the generation config and the tokenizer, and newline tokens if asked."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    if newline:
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        ids |= {i for i, name in enumerate(names) if name and ("\n" in name or "Ċ" in name or name == "<0x0A>")}
    ids.discard(None)
    if not ids:
        raise InputError("the tokenizer has no EOS token and the model's generation config names none")
    return sorted(ids)
