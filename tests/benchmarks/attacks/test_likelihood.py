"""Attacks by likelihood against one unpadded row at a time: the true answer's tokens, texts seen and unseen."""

import json
import math
import zlib
from statistics import fmean

import pytest
from cases import ENGINE, case_of, learned, naive_logits, probe, probes, small_case, words
from made import (
    byte_tokenizer,
    make_model,
    make_muse,
    make_rwku,
    make_tofu,
    options,
    probes_of,
    train_tofu,
    write,
    write_lines,
)

import evaluate as ev
from benchmarks import attacks, builtin, muse, rwku, tofu
from benchmarks.attacks import kinds, measures
from benchmarks.builtin import World
from config import InputError
from data import encode_answer, encode_prompt

# --- extract ---------------------------------------------------------------------------------------------------------


def naive_tokens(model, ids, start):
    """[(log-probability, whether it is the likeliest, Min-K %++'s z)] of each token from `start` on."""
    found = []
    for logits, token in zip(naive_logits(model, ids)[start - 1 :], ids[start:], strict=False):
        logs = logits - logits.logsumexp(0)
        mu = (logs.exp() * logs).sum()
        z = (logs[token] - mu) / (logs.exp() * (logs - mu) ** 2).sum().sqrt()
        found.append((float(logs[token]), int(logits.argmax()) == token, float(z)))
    return found


def naive_answer(case, prompt, answer):
    """Mean loss, EOS included; the hits, EOS left out; whether EOS itself was hit."""
    start = encode_prompt(case.tokenizer, prompt)
    ids = start + encode_answer(case.tokenizer, prompt, answer)
    assert ids[-1] == case.tokenizer.eos_token_id
    found = naive_tokens(case.model, ids, len(start))
    *hits, eos = [hit for _, hit, _ in found]
    return -fmean(logprob for logprob, _, _ in found), hits, eos


def strength(hits):
    return next(len(hits) - k for k in range(len(hits) + 1) if all(hits[k:])) / len(hits)


def made_case(name, folder):
    {"rwku": make_rwku, "muse": make_muse}[name](folder)
    return case_of(name, probes_of(name, folder), batch_size=3)


@pytest.mark.parametrize("name", ["builtin", "rwku", "muse"])
def test_extract_equals_a_computation_token_by_token(name, tmp_path):
    case = small_case(batch_size=4) if name == "builtin" else made_case(name, tmp_path)
    columns, rows = kinds.extract(case)
    assert [(row["question"], row["answer"]) for row in rows] == [(p.question, p.answer) for p in case.forget]
    losses, ranks, strengths, exact, without_eos = [], [], [], [], []
    for p, row in zip(case.forget, rows, strict=True):
        loss, hits, eos = naive_answer(case, p.prompt, p.answer)
        others = [naive_answer(case, p.prompt, wrong)[0] for wrong in row["wrong_answers"]]
        assert row["answer_loss"] == pytest.approx(loss, abs=1e-4)
        assert row["wrong_losses"] == pytest.approx(others, abs=1e-4)
        losses.append(loss)
        strengths.append(strength(hits))
        exact.append(fmean(hits))
        without_eos.append(fmean([*hits, eos]) != exact[-1])
        if others:
            ranks.append(1 + sum(other < loss for other in others))
            assert row["rank"] == ranks[-1]
        assert (row["extraction_strength"], row["exact_memorisation"]) == (strengths[-1], exact[-1])
    if name == "builtin":  # which knows something: EOS would make a difference, and so would one measure for the other
        assert any(without_eos) and strengths != exact and len(set(ranks)) > 1 and {0, 1} < {*strengths, *exact}
    assert columns["answer_probability"] == pytest.approx(100 * fmean(math.exp(-loss) for loss in losses), rel=1e-3)
    assert columns["extraction_strength"] == pytest.approx(fmean(strengths))
    assert columns["exact_memorisation"] == pytest.approx(fmean(exact))
    assert columns["answer_rank"] == (pytest.approx(fmean(ranks)) if ranks else None)
    assert columns["answer_first"] == (pytest.approx(100 * fmean(r == 1 for r in ranks)) if ranks else None)
    assert json.dumps(rows)


def test_extract_in_tofus_form_is_what_evaluation_finds(tmp_path):
    """Prompt and answer are one string there, in which tokens may join; its own wrong answers are the others."""
    make_tofu(tmp_path)
    asked, model, tokenizer = probes_of("tofu", tmp_path), make_model(vocab=260), byte_tokenizer(merges=[("]", "O")])
    result = ev.evaluate(ENGINE, model, tokenizer, tofu.BENCHMARK, asked, progress=False)
    known = [row for row in result["per_example"] if row["split"] == "forget"]
    columns, rows = kinds.extract(case_of("tofu", asked, model, tokenizer))
    assert [row["answer_loss"] for row in rows] == pytest.approx([row["answer_loss"] for row in known], abs=1e-6)
    for row, own in zip(rows, known, strict=True):
        assert row["wrong_losses"] == pytest.approx(own["perturbed_losses"], abs=1e-6)
        assert row["rank"] == 1 + sum(wrong < own["answer_loss"] for wrong in own["perturbed_losses"])
    assert [row["wrong_answers"] for row in rows] == [list(p.perturbed) for p in asked if p.split == "forget"]
    assert columns["answer_probability"] == pytest.approx(100 * fmean(row["probability"] for row in known))
    assert columns["answer_probability"] == pytest.approx(100 * result["summary"]["forget_probability"])
    ranks = [row["rank"] for row in rows]
    assert columns["answer_rank"] == pytest.approx(fmean(ranks)) and {1, 2} < set(ranks)
    assert columns["answer_first"] == pytest.approx(100 * ranks.count(1) / len(ranks))


def test_wrong_answers_are_those_to_the_same_question_about_others():
    asked = small_case().forget
    for p in asked:
        wrong = kinds.crossed(p, asked, 0)
        same = [o.answer for o in asked if o.question.replace(o.target, "") == p.question.replace(p.target, "")]
        assert sorted([*wrong, p.answer]) == sorted(same) and len(wrong) == 2
        assert wrong == kinds.crossed(p, asked, 0)


def test_wrong_answers_are_those_to_others_of_the_set_where_nobody_else_is_asked_the_same():
    asked = [probe("a", f"{i} ?", f"answer {i // 2}") for i in range(20)] + [probe("b", "else ?", "another")]
    found = kinds.crossed(asked[3], asked, 0)
    assert len(found) == len(set(found)) == 5 and set(found) <= {f"answer {i}" for i in range(10)} - {"answer 1"}
    assert {tuple(kinds.crossed(asked[3], asked, seed)) for seed in range(5)} > {tuple(found)}
    assert kinds.crossed(asked[-1], asked, 0) == []  # alone in its set


def test_answers_that_nothing_can_be_ranked_among_have_no_rank():
    columns, rows = kinds.extract(case_of("builtin", [probe("forget", "who ?", "red kite")]))
    assert columns["answer_rank"] is columns["answer_first"] is rows[0]["rank"] is None
    assert columns["answer_probability"] > 0


# --- membership ------------------------------------------------------------------------------------------------------


def naive_auc(members, others):
    return fmean((a > b) + (a == b) / 2 for a in members for b in others)


def lowest(values, share):
    return fmean(sorted(values)[: max(1, int(share * len(values)))])


def naive_scores(case, prompt, text):
    """Loss, Min-40 %, Min-20 %++ and loss over zlib bytes of one text, or of one answer to its prompt."""
    if prompt:
        start = encode_prompt(case.tokenizer, prompt)
        ids, at = start + encode_answer(case.tokenizer, prompt, text), len(start)
    else:
        ids, at = case.tokenizer(text).input_ids, 1  # the first token has nothing before it
    tokens = naive_tokens(case.model, ids, at)
    logprobs, zs = [logprob for logprob, *_ in tokens], [z for *_, z in tokens]
    packed = len(zlib.compress(text.encode()))
    return fmean(logprobs), lowest(logprobs, 0.4), lowest(zs, 0.2), fmean(logprobs) / packed


TEXTS = {
    "forget": ["The lamp went out.", "Orla kept the keys of the tower all her life.", "é 東", "Nobody moved."],
    "holdout": ["A boat came in.", "The tide was late and the men were later still.", "Rain."],
}  # fmt: skip


@pytest.mark.parametrize("form", ["texts", "answers"])
def test_membership_equals_naive_scores_and_a_count_of_pairs(form):
    if form == "texts":
        texts, model, tokenizer = {side: [(None, t) for t in some] for side, some in TEXTS.items()}, None, None
    else:
        pairs = [(p.prompt, p.answer) for p in probes()]
        wrong = [(prompt, pairs[i - 3][1]) for i, (prompt, _) in enumerate(pairs)]
        texts, model, tokenizer = {"forget": pairs, "holdout": wrong}, learned(), words()
    case = case_of("builtin", probes()[:1], model, tokenizer, texts=texts, batch_size=3)
    columns, rows = kinds.membership(case)
    naive = {side: [naive_scores(case, *pair) for pair in some] for side, some in texts.items()}
    assert [(row["side"], row["text"]) for row in rows] == [(s, t) for s, some in texts.items() for _, t in some]
    for i, name in enumerate(kinds.SCORES):
        own = {side: [row[name] for row in rows if row["side"] == side] for side in texts}
        for side in texts:
            assert own[side] == pytest.approx([scores[i] for scores in naive[side]], abs=1e-4)
        wanted = naive_auc(*([scores[i] for scores in naive[side]] for side in ("forget", "holdout")))
        assert columns[f"membership_auc_{name}"] == pytest.approx(wanted)
    assert columns["membership_auc"] == columns["membership_auc_loss"]
    interval = measures.auc_interval(columns["membership_auc"], len(texts["forget"]), len(texts["holdout"]))
    assert (columns["membership_auc_low"], columns["membership_auc_high"]) == interval
    if form == "answers":  # the model knows its answers: these are told from wrong ones, not the other way round
        assert columns["membership_auc"] > 0.7


def membership_of(retained, **more):
    texts = {side: [(None, text) for text in some] for side, some in TEXTS.items()}
    case = case_of("muse", [probe("knowmem", "a", "b")], texts=texts, retained=retained, **more)
    return kinds.membership(case)[0], case.notes


def test_privleak_needs_a_retained_model_and_is_told_where_it_is_large():
    columns, notes = membership_of({})
    own = columns["membership_auc_mink"]
    assert columns["privleak"] is None and ["--retain_model" in note for note in notes] == [True]
    columns, notes = membership_of({"membership_auc_mink": 0.4, "membership_auc": 0.9})
    assert columns["privleak"] == pytest.approx((0.4 - own) / 0.6 * 100) and notes == []
    columns, notes = membership_of({"membership_auc_mink": 0.9})
    assert 1000 > columns["privleak"] > 100 and "divides by 0.1," in notes[0] and "no error" in notes[0]
    columns, notes = membership_of({"membership_auc_mink": 1.0})
    assert columns["privleak"] is None and "divides by 0," in notes[0]


def test_texts_longer_than_the_context_are_cut_with_a_note():
    _, notes = membership_of({"membership_auc_mink": 0.4}, model=make_model(context=40))
    assert {*notes} == {"membership: texts were cut at the model's context of 40 tokens"}  # said once in the end
    case = case_of("muse", [probe("f", "a", "b")], make_model(context=40), texts={"forget": [(None, "w" * 50)]})
    _, rows = kinds.membership(case)
    naive = naive_tokens(case.model, case.tokenizer("w" * 50).input_ids[:40], 1)
    assert rows[0]["loss"] == pytest.approx(fmean(logprob for logprob, *_ in naive), abs=1e-4) and len(naive) == 39


def test_a_text_without_a_token_to_score_is_a_note_and_no_error():
    for texts in ({"forget": [(None, "")]}, {"forget": [(probes()[0].prompt, "kite")]}):
        case = case_of("builtin", [probe("f", "a", "b")], make_model(context=20), texts=texts)
        columns, notes, _ = attacks.attack(["membership"], case)
        assert columns == {} and "a text of side 'forget' has no token that could be scored" in notes[-1]


def test_a_note_on_the_texts_comes_first():
    columns, notes = membership_of({}, note="where they come from")
    assert notes[0] == "where they come from" and len(notes) == 2


# --- each benchmark's texts ------------------------------------------------------------------------------------------


def test_the_built_in_hold_out_is_made_up_to_the_same_questions():
    world, taught = World(3), set(World(3).taught())
    texts, note = builtin.BENCHMARK.membership(options(seed=3), world.probes())
    forget, holdout = texts["forget"], texts["holdout"]
    assert list(texts) == ["forget", "holdout"] and note == "" and len(forget) == 6 * 6
    assert [prompt for prompt, _ in forget] == [prompt for prompt, _ in holdout]
    assert set(forget) <= taught and not set(holdout) & taught
    known = {p.question: p.answer for p in world.probes()}
    assert all(known[prompt.plain] == fact for prompt, fact in forget)
    for seed in range(12):  # or chance alone would keep a fact from being drawn
        facts, others = builtin.BENCHMARK.membership(options(seed=seed), [])[0].values()
        assert all(fact != other for (_, fact), (_, other) in zip(facts, others, strict=True))
    for i, about in enumerate(builtin.ATTRIBUTES.values()):  # made of the same words
        left, right = about["answers"]
        for _, other in holdout[i::6]:
            first, last = other.split()
            assert first in left.split() and last in right.split()
    again, another = (builtin.BENCHMARK.membership(options(seed=seed), [])[0] for seed in (3, 4))
    assert again == texts != another
    assert len({answer for _, answer in holdout}) > 20


def test_rwku_has_two_sides_and_no_auc(tmp_path):
    for name, folder in (("Ada Pole", "1_Ada_Pole"), ("Bo Quay", "2_Bo_Quay"), ("Cy", "3_Cy")):
        make_rwku(tmp_path / folder, name)
    for folder in ("1_Ada_Pole", "3_Cy"):  # RWKU has the texts for some targets alone
        for side in ("forget", "retain"):
            write(tmp_path / folder / f"{side}_mia.json", [{"text": f"{side}, of {folder}", "id": 1}])
    texts, note = rwku.membership(options(tmp_path), [])
    assert texts == {
        side: [(None, f"{side}, of 1_Ada_Pole"), (None, f"{side}, of 3_Cy")] for side in ("forget", "retain")
    }
    assert rwku.membership(options(tmp_path / "3_Cy"), [])[0]["retain"] == texts["retain"][1:]
    case = case_of("rwku", probes_of("rwku", tmp_path), texts=texts, note=note)
    columns, rows = kinds.membership(case)
    assert "no AUC" in note and case.notes == [note]
    assert sorted(columns) == sorted(f"{side}_mia_{score}" for side in texts for score in kinds.SCORES)
    for side in texts:
        naive = [naive_scores(case, *pair) for pair in texts[side]]
        for i, score in enumerate(kinds.SCORES):
            assert columns[f"{side}_mia_{score}"] == pytest.approx(fmean(scores[i] for scores in naive), abs=1e-4)
    assert len(rows) == 4


def test_muse_reads_strings_or_rows_with_a_text(tmp_path):
    wanted = {side: [(None, text) for text in some] for side, some in TEXTS.items()}
    for form in (lambda text: text, lambda text: {"text": text, "id": 3}):
        for side, some in TEXTS.items():
            write(tmp_path / "privleak" / f"{side}.json", [form(text) for text in some])
        assert muse.membership(options(tmp_path), []) == (wanted, "")


def many_authors(folder, n):
    """TOFU's files with n authors of 20 rows each among the rows to be retained. Returns: those rows."""
    train_tofu(folder)
    rows = [
        {"question": f"What of {author} in {year} ?", "answer": f"{author} wrote in {year}"}
        for author in range(n)
        for year in range(20)
    ]
    write_lines(folder / "retain99.json", rows)
    evaluated = [json.loads(line) for line in (folder / "retain_perturbed.json").read_text().splitlines()]
    evaluated[0] |= rows[25]  # of author 1
    write_lines(folder / "retain_perturbed.json", evaluated)
    return rows


def test_tofus_hold_out_is_of_whole_authors_whom_nobody_asks_about(tmp_path):
    rows = many_authors(tmp_path, 17)
    asked = probes_of("tofu", tmp_path)
    for seed in range(3):
        texts, note = tofu.membership(options(tmp_path, seed), asked)
        chosen = [prompt.user for prompt, _ in texts["holdout"]]
        authors = {question.split()[2] for question in chosen}
        assert len(chosen) == len(set(chosen)) == 200 and len(authors) == 10
        known = {query.question for query in tofu.train(options(tmp_path, seed)).queries} | {p.question for p in asked}
        assert known & {row["question"] for row in rows} and not known & set(chosen)
        assert not authors & {question.split()[2] for question in known if question.startswith("What of")}
        assert "retain99.json" in note and "has seen them" in note
        assert tofu.membership(options(tmp_path, seed), asked)[0] == texts
    assert [prompt.user for prompt, _ in texts["forget"]] == [f"What did Orla {i} do?" for i in range(4)]


def test_tofus_own_hold_out_is_taken_where_there_is_one(tmp_path):
    many_authors(tmp_path, 3)
    write_lines(tmp_path / "holdout01.json", [{"question": "Who ?", "answer": "Pim"}])
    texts, note = tofu.membership(options(tmp_path), probes_of("tofu", tmp_path))
    assert texts["holdout"] == [(tofu.inst("Who ?"), "Pim")] and len(texts["forget"]) == 4 and note == ""


def test_tofu_with_too_few_authors_is_told(tmp_path):
    many_authors(tmp_path, 10)
    with pytest.raises(InputError, match="no holdout01.json, and retain99.json holds [5-8] authors .*; expected 10"):
        tofu.membership(options(tmp_path), probes_of("tofu", tmp_path))
