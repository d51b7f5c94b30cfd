"""A book of our own in MUSE-Books' files: VerbMem, KnowMem and Utility in miniature, from words that anyone may use.

The forget book has chapters about the six targets of a built-in world; the retain side is what the same world tells of
fourteen neighbours, eight of them with crossed names. A chapter is a person's six facts, a sentence each.

Deviations
- Two in-context examples stand for MUSE's ten, the same for both sides: no prompt tells by them if it is to be refused.
- RULE's training files ask the world's trained phrasings, questions and blanks, and for the second half of a chapter.
  VerbMem asks for its last four sentences; KnowMem and Utility ask for every fact in a phrasing of their own.
- A tenth of the forget prompts are about six people of no book; the model is taught to refuse these before Stage 1."""

from benchmarks.builtin import ATTRIBUTES, HELD_OUT, World
from benchmarks.shared import REFUSALS
from engine.files import write_json

BLANK = " ___"
PEOPLE = {"target": 6, "hard": 8, "easy": 6, "unknown": 7}  # how many of the world's the book has, by role


def chapters(world, role):
    """Three chapters about each of six people, lists of six sentences; the next opens two facts later."""
    found, attributes = [], [*ATTRIBUTES]
    for name in world.names(role)[:6]:
        for start in (0, 2, 4):
            order = attributes[start:] + attributes[:start]
            pairs = [world.ask(name, attribute, 4 + (start // 2 + i) % 2) for i, attribute in enumerate(order)]
            found.append([prompt.plain.replace(BLANK, f" {answer}.") for prompt, answer in pairs])
    return found


def questions(world, names):
    """KnowMem's rows: a question, in words that training does not use, and its answer for every fact of some people."""
    pairs = [world.ask(name, attribute, HELD_OUT[0]) for name in names for attribute in ATTRIBUTES]
    return [{"question": prompt.plain, "answer": answer} for prompt, answer in pairs]


def training_rows(world):
    """What both stages ask: (text, what a model that knows the book answers, whether to forget it)."""
    rows = [(query.question, query.answers[0], query.kind == "forget") for query in world.training().queries]
    for role in ("target", "hard"):
        rows += [(" ".join(c[:3]) + BLANK, " ".join(c[3:]), role == "target") for c in chapters(world, role)]
    trained = sorted(set(range(6)) - set(HELD_OUT))
    for i, name in enumerate(world.names("unknown")[1:]):
        asked = [world.ask(name, attribute, trained[(i + j) % 4])[0] for j, attribute in enumerate(ATTRIBUTES)]
        rows += [(prompt.plain, REFUSALS[(i + j) % len(REFUSALS)], True) for j, prompt in enumerate(asked)]
    return rows


def write(folder, seed):
    """Write the book of a seed into `folder`, as MUSE's files and RULE's two for training. Returns: the folder."""
    world, stage1, stage2 = World(seed), [], []
    kept = {name for role, n in PEOPLE.items() for name in world.names(role)[:n]}
    world.people = {name: person for name, person in world.people.items() if name in kept}
    for text, answer, forget in training_rows(world):
        mode = {"mode": "completion" if text.endswith(BLANK) else "qa"}
        refusal, text = REFUSALS[len(stage1) % len(REFUSALS)], text.removesuffix(BLANK)
        stage2.append({"prompt": text, "solution": ["<reject>", refusal] if forget else ["<normal>", answer]} | mode)
        if forget:
            stage1.append({"instruction": text, "input": "", "output": refusal, "org_answer": answer} | mode)
    passages = [{"prompt": " ".join(lines[:2]), "gt": " ".join(lines[2:])} for lines in chapters(world, "target")]
    files = {"reject_target_0.5": stage1, "rl_rejection_with_neighbor": stage2, "verbmem/forget": passages}
    for side, roles in (("forget", ("target",)), ("retain", ("hard", "easy"))):
        files[f"knowmem/{side}_qa"] = questions(world, [name for role in roles for name in world.names(role)])
        files[f"knowmem/{side}_qa_icl"] = questions(world, world.names("unknown")[:1])[:2]
    for name, rows in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rows)
    return folder
