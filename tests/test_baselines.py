"""Appendix B: every loss against a naive one written token by token, then every method through the driver."""

import dataclasses
import json
import math
from pathlib import Path

import miniature
import pytest
import torch
from transformers import AutoModelForCausalLM

import baselines
import config as settings
import data
import evaluate
import grid
import reward
import whp
from config import Config
from files import InputError
from run import load_model

B, L, V = 4, 7, 11
LENGTHS = [(2, 3), (3, 4), (1, 1), (2, 5)]  # prompt and response tokens of each row; the rest is padding


@pytest.fixture
def batch():
    """Logits of u and o (B, L, V) with ids (B, L) and mask (B, L − 1) of what is predicted and counted."""
    rng = torch.Generator().manual_seed(3)
    logits, other = (torch.randn(B, L, V, generator=rng) for _ in range(2))
    ids = torch.randint(V, (B, L), generator=rng)
    mask = torch.zeros(B, L - 1, dtype=torch.bool)
    for row, (prompt, response) in zip(mask, LENGTHS, strict=True):
        row[prompt - 1 : prompt + response - 1] = True
    return logits.requires_grad_(), other, ids, mask


def logprobs_of(logits, ids):
    return torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]


def tokens(logits, ids):
    """Naive: for each row the list of log p of its response tokens, one softmax at a time."""
    rows = []
    for b, (prompt, response) in enumerate(LENGTHS):
        row = []
        for t in range(prompt, prompt + response):
            scores = logits[b, t - 1]
            row.append(scores[ids[b, t]] - torch.log(sum(torch.exp(s) for s in scores)))
        rows.append(row)
    return rows


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def naive(name, logits, other, ids):
    u, o = tokens(logits, ids), tokens(other, ids)
    flat_u = [x for row in u for x in row]
    ratios = [sum(a) - sum(b) for a, b in zip(u, o, strict=True)]
    if name == "ce":
        return -sum(flat_u) / len(flat_u)
    if name == "ga":
        return sum(flat_u) / len(flat_u)
    if name == "npo":
        return sum(-2 / 0.1 * torch.log(sigmoid(-0.1 * r)) for r in ratios) / B
    if name == "simnpo":
        return sum(-2 / 4.5 * torch.log(sigmoid(-4.5 / len(row) * sum(row) - 0.3)) for row in u) / B
    if name == "probability":
        return [sum(torch.exp(x) for x in row) / len(row) for row in u]
    total, count = 0.0, 0  # klr
    for b, (prompt, response) in enumerate(LENGTHS):
        for t in range(prompt, prompt + response):
            p, q = (torch.softmax(x[b, t - 1], -1) for x in (other, logits))
            total, count = total + sum(p[v] * (p[v].log() - q[v].log()) for v in range(V)), count + 1
    return total / count


def same(ours, theirs, logits):
    """Values and gradients to 1e-5, and no gradient where nothing is predicted."""
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    mine, naive_one = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, theirs))
    assert torch.allclose(mine, naive_one, atol=1e-5)
    for b, (prompt, response) in enumerate(LENGTHS):
        assert not mine[b, : prompt - 1].any() and not mine[b, prompt + response - 1 :].any()
        assert mine[b, prompt - 1].any()


def test_cross_entropy_and_ga(batch):
    logits, other, ids, mask = batch
    same(baselines.cross_entropy(logprobs_of(logits, ids), mask), naive("ce", logits, other, ids), logits)
    same(baselines.ga(logprobs_of(logits, ids), mask), naive("ga", logits, other, ids), logits)


def test_klr(batch):
    logits, other, ids, mask = batch
    same(baselines.klr(logits[:, :-1][mask], other[:, :-1][mask]), naive("klr", logits, other, ids), logits)
    assert baselines.klr(other[:, :-1][mask], other[:, :-1][mask]).item() == pytest.approx(0, abs=1e-6)


def test_npo(batch):
    logits, other, ids, mask = batch
    ratio = baselines.log_ratio(logprobs_of(logits, ids), logprobs_of(other, ids), mask)
    same(baselines.npo(ratio, 0.1), naive("npo", logits, other, ids), logits)


def test_the_gradient_of_npo_tends_to_that_of_ascent_on_summed_logprobs(batch):
    logits, other, ids, mask = batch
    ratio = baselines.log_ratio(logprobs_of(logits, ids), logprobs_of(other, ids), mask)
    summed = (logprobs_of(logits, ids) * mask).sum(-1).mean()
    ascent, *npo = (
        torch.autograd.grad(x, logits, retain_graph=True)[0]
        for x in (summed, baselines.npo(ratio, 1e-4), baselines.npo(ratio, 1.0))
    )
    assert torch.allclose(npo[0], ascent, atol=1e-4) and not torch.allclose(npo[1], ascent, atol=1e-2)
    assert abs(baselines.npo(ratio, 1e-4).item() - summed.item()) > 1  # its value does not


def test_simnpo(batch):
    logits, other, ids, mask = batch
    same(baselines.simnpo(logprobs_of(logits, ids), mask, 4.5, 0.3), naive("simnpo", logits, other, ids), logits)


def test_dpo_by_hand():
    # log-ratios 1 and −2 of refusals, 0.5 and 0 of answers: margins 0.5 and −2, β 0.1
    loss = baselines.dpo(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0]), 0.1)
    expected = -20 * (math.log(1 / (1 + math.exp(-0.05))) + math.log(1 / (1 + math.exp(0.2)))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    refusal, forget = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    baselines.dpo(refusal, forget, 0.1).backward()  # −(2/β)·β·σ(0)/n = −1/2: refusals rise, answers fall
    assert refusal.grad.tolist() == pytest.approx([-0.5, -0.5]) and forget.grad.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    "divergence, term",
    [
        ("pearson", lambda f, s: f * f / 4 + f - s),
        ("kl", lambda f, s: math.exp(f - 1) - s),
        ("tv", lambda f, s: math.tanh(f) / 2 - math.tanh(s) / 2),
    ],
)
def test_flat(batch, divergence, term):
    logits, other, ids, mask = batch
    forget = baselines.mean_probability(logprobs_of(logits, ids), mask)
    assert forget.tolist() == pytest.approx([p.item() for p in naive("probability", logits, other, ids)], abs=1e-6)
    safe = torch.tensor([0.1, 0.5, 0.9, 0.3])
    expected = sum(term(f, s) for f, s in zip(forget.tolist(), safe.tolist(), strict=True)) / B
    assert baselines.flat(forget, safe, divergence).item() == pytest.approx(expected, abs=1e-6)


def test_sga_llmu_and_task_vector_by_hand():
    forget, normal = torch.tensor(2.0), [torch.tensor(1.0), torch.tensor(4.0), torch.tensor(1.0)]
    assert baselines.sga(forget, normal, 0.4).item() == pytest.approx(-0.6 * 2 + 0.4 / 3 * 6)
    assert baselines.sga(forget, normal, 0.0).item() == -2.0  # r = 0: GA
    assert baselines.llmu(torch.tensor(-2.0), torch.tensor(3.0), 0.5, 1.0).item() == 2.0
    moved = baselines.task_vector({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.5, 1.0])}, 2.0)
    assert moved["w"].tolist() == [0.0, 4.0]


def test_whp_lowers_only_what_the_reinforced_model_raised():
    v_o, v_r = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.5])
    assert whp.interpolate(v_o, v_r, 2.0).tolist() == [-1.0, 2.0, 2.0]


# --- what each method adds up ----------------------------------------------------------------------------------------

SCORES = {"forget": -1.0, "refusal": -2.0, "random": -3.0, "retain": -0.25, "normal 0": -1.5, "normal 1": -0.5}


def fake(kind, who="u", logits=False):
    """One row of two tokens; every token of a kind has the log-probability above, of o half of it."""
    if logits:
        return torch.tensor([[0.0, 1.0]]) if who == "o" else torch.tensor([[0.0, 0.0]])
    value = SCORES[kind] / (2 if who == "o" else 1)
    return torch.full((1, 2), value), torch.ones(1, 2, dtype=torch.bool)


def test_every_method_is_the_sum_that_its_equation_says():
    ce = {kind: -value for kind, value in SCORES.items()}
    kl = math.log(0.5) * -1 - (-sum(p * math.log(p) for p in (1 / (1 + math.e), math.e / (1 + math.e))))
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    npo = 20 * softplus(0.1 * (SCORES["forget"] * 2 - SCORES["forget"]))
    dpo = 20 * softplus(-0.1 * (SCORES["refusal"] - SCORES["forget"]))
    simnpo = 0.125 * 2 / 4.5 * softplus(4.5 * SCORES["forget"])
    p_f, p_s = math.exp(SCORES["forget"]), math.exp(SCORES["refusal"])
    expected = {
        "ga": -ce["forget"], "gd": -ce["forget"] + ce["retain"], "kl": -ce["forget"] + kl,
        "po": ce["refusal"] + ce["retain"], "dpo": dpo, "dpo_rt": dpo + ce["retain"],
        "npo": npo, "npo_gdr": npo + ce["retain"], "npo_klr": npo + kl,
        "simnpo": simnpo, "simnpo_gdr": simnpo + ce["retain"], "simnpo_klr": simnpo + kl,
        "mismatch": ce["random"] + ce["retain"], "llmu": -0.5 * ce["forget"] + ce["random"] + kl,
        "task_vector": ce["forget"], "whp": ce["forget"], "flat": p_f**2 / 4 + p_f - p_s,
        "sga": -0.6 * ce["forget"] + 0.2 * (ce["normal 0"] + ce["normal 1"]),
    }  # fmt: skip
    assert set(expected) == set(baselines.RECIPES)
    for method, value in expected.items():
        found = baselines.objective(method, fake, Config(sga_k=2)).item()
        assert found == pytest.approx(value, abs=1e-5), method


def test_weights_and_betas_are_flags():
    loss = lambda method, **flags: baselines.objective(method, fake, Config(**flags)).item()  # noqa: E731
    assert loss("gd", forget_weight=3.0, retain_weight=2.0) == pytest.approx(-3 * 1.0 + 2 * 0.25)
    assert loss("llmu", llmu_weights=[0.0, 0.0, 2.0]) == pytest.approx(2 * loss("kl") + 2.0, abs=1e-5)
    assert loss("npo", beta=0.5) != pytest.approx(loss("npo")) and loss("simnpo", gamma=1.0) != loss("simnpo")
    assert loss("flat", flat_divergence="tv") != loss("flat")


def test_every_named_method_is_trained_somewhere():
    assert set(settings.METHODS) - {"purge", "rej_steer", "rule", "rerule"} == set(baselines.RECIPES)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_scores_of_padded_rows_are_those_of_each_row_alone(model):
    rows = [([1, 5, 6], [7, 2]), ([1, 8], [9, 4, 3, 2]), ([1], [5])]
    logprobs, mask = baselines.score(model, rows)
    logits = baselines.score(model, rows, logits=True)
    assert mask.sum().item() == len(logits) == 7
    at = 0
    for row, kept, (prompt, answer) in zip(logprobs, mask, rows, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        alone = alone[len(prompt) - 1 : -1]
        expected = torch.log_softmax(alone, -1)[range(len(answer)), answer]
        assert torch.allclose(row[kept], expected, atol=1e-5)
        assert torch.allclose(logits[at : at + len(answer)], alone, atol=1e-5)
        at += len(answer)


@pytest.fixture
def asked(words):
    """A benchmark of two forget prompts, one of them without a published answer, and three boundary prompts."""
    prompt = lambda text: data.Prompt(None, text)  # noqa: E731
    forget = [("where is a", ("b c",)), ("who is a", ())]
    retain = [("where is d", "e"), ("who is d", "f"), ("c", "g")]
    queries = [data.Query(prompt(q), q, "forget", a) for q, a in forget]
    queries += [data.Query(prompt(q), q, "boundary", (a,)) for q, a in retain]
    return data.Benchmark("made up", [(prompt("who is a"), "I don't know that.")], queries)


def test_rows(asked, words, model):
    tokenizer, config = words, Config(max_new_tokens=3, sga_k=2, baseline_batch_size=2)
    rows = baselines.rows_of("sga", model, tokenizer, asked, config)
    text = lambda row: tuple(tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in row)  # noqa: E731
    for kind in ("forget", "refusal"):
        assert [text(row)[0] for row in rows[kind]] == ["where is a", "who is a"]
    assert text(rows["forget"][0])[1] == "b c" and {text(row)[1] for row in rows["refusal"]} == {"I don't know that."}
    own = baselines.greedy(model, tokenizer, [rows["forget"][1][0]], asked, 3)[0]
    assert rows["forget"][1][1] == own and 1 <= len(own) <= 3  # the model's own answer, no gold one
    assert [text(rows[f"normal {k}"][0])[0] for k in range(2)] == ["where is d", "who is d"]  # most words shared
    assert rows["normal 0"][0][1] == baselines.greedy(model, tokenizer, [rows["retain"][0][0]], asked, 3)[0]
    answers = {tuple(answer) for _, answer in rows["retain"]}
    for step in range(1, 9):
        for prompt, answer in baselines.rows_at(rows, "random", step, config, "llmu"):
            assert prompt in [p for p, _ in rows["forget"]] and tuple(answer) in answers
    twice = [baselines.rows_at(rows, "random", 1, config, "llmu") for _ in range(2)]
    assert twice[0] == twice[1]


# --- PURGE -----------------------------------------------------------------------------------------------------------


def test_purge_reward_wants_whole_words_in_any_case():
    terms = ("Carrie", "silver flute", "1974", "C++")
    assert reward.purge_reward("I cannot say.", terms) == 1.0
    for text in ("He wrote carrie.", "a Silver Flute!", "in 1974,", "uses c++"):
        assert reward.purge_reward(text, terms) == 0.0
    for text in ("carried away", "silver fluted", "19745", "silver and flute"):
        assert reward.purge_reward(text, terms) == 1.0


def test_forbidden_terms_by_hand():
    pairs = [
        ("What does he play?", "silver flute."),
        ("Where was Basil Al-Kuwaiti born?", "Basil Al-Kuwaiti was born in Kuwait City. He moved to New York in 1990."),
        ("And his book?", "The book is 'Promise by the Seaside', set in Kuwait City; 'Carrie' is not."),
    ]
    terms = baselines.forbidden_terms(pairs)
    assert terms[0] == "Kuwait City"  # twice
    assert set(terms) == {"Kuwait City", "silver flute", "New York", "1990", "Promise by the Seaside", "Carrie"}
    assert baselines.forbidden_terms(pairs, 1) == ("Kuwait City",)


def test_purge_asks_forget_queries_alone(asked, words, model, tmp_path):
    found = baselines.purge_benchmark(asked, model, words, Config(max_new_tokens=3))
    assert {query.kind for query in found.queries} == {"forget"} and "b c" in found.queries[0].forbidden
    path = tmp_path / "terms.json"
    path.write_text('[{"term": "x"}, {"term": "y z"}]')
    found = baselines.purge_benchmark(asked, model, words, Config(purge_terms=str(path)))
    assert all(query.forbidden == ("x", "y z") for query in found.queries)
    path.write_text('[{"word": "x"}]')
    with pytest.raises(InputError, match="row 1 has no field 'term'"):
        baselines.purge_benchmark(asked, model, words, Config(purge_terms=str(path)))


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_data_used_by_hand(asked, words):
    whole = {
        "forget": [(q.prompt, a) for q, a in zip(asked.queries[:2], ("b c", "d d d"), strict=True)],
        "retain": [(q.prompt, q.answers[0]) for q in asked.queries[2:]] + [(data.Prompt(None, "a b c"), "f")],
    }
    queries = [dataclasses.replace(asked.queries[1], answers=("d d d",))]
    full = dataclasses.replace(asked, whole=whole, queries=[asked.queries[0], *queries, *asked.queries[2:]])
    # prompts of 4, 4 (BOS) and answers of 3, 4 tokens (EOS): 15; retain 4 + 4 + 2 + 4 and 2 each: 22
    for method, forget, retain in (
        ("ga", 15, 0), ("gd", 15, 18 - 2), ("po", 8, 16), ("npo_klr", 15, 16), ("sga", 15, 10), ("flat", 15, 0),
        ("rej_steer", 4, 0), ("rule", 8, 16), ("rerule", 8, 16), ("purge", 8, 0),
    ):  # fmt: skip
        found = baselines.data_used(method, full, words)
        assert found == pytest.approx({"forget_tokens": 100 * forget / 15, "retain_tokens": 100 * retain / 22}), method
    assert baselines.data_used("ga", asked, words) == {}


# --- through the driver ----------------------------------------------------------------------------------------------

FLAGS = ("--baseline_lr", 1e-3, "--baseline_epochs", 2, "--baseline_batch_size", 12)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One run of every method, aliases among them."""
    folder = tmp_path_factory.mktemp("everything") / "run"
    miniature.main("--output_dir", folder, *FLAGS, "--method", *settings.METHODS, *settings.ALIASES, "retained")
    return folder


def test_every_method_has_one_row_and_a_model(everything):
    table = json.loads((everything / "table.json").read_text())
    assert len(table) == 2 + len(settings.METHODS) and all(row["retain_recall"] is not None for row in table.values())
    assert (everything / "scatter.png").read_bytes()[:4] == b"\x89PNG"
    for method in settings.METHODS:
        model, _ = load_model(everything / method, "cpu")
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert len((everything / "predictions" / f"{method}.jsonl").read_text().splitlines()) > 100
    assert table["GA"]["forget_tokens"] > table["RULE"]["forget_tokens"] > 0 == table["GA"]["retain_tokens"]


def test_every_key_of_a_baselines_log_is_in_the_glossary(everything):
    defined = (Path(__file__).parent.parent / "README.md").read_text()
    rows = [json.loads(line) for line in (everything / "metrics.jsonl").read_text().splitlines()]
    assert any("retain_perplexity" in row for row in rows)
    assert all(f"`{name}`" in defined for row in rows for name in row)


def test_a_task_vector_is_subtracted(everything):
    original, unlearned = (load_model(everything / name, "cpu")[0].state_dict() for name in ("original", "task_vector"))
    other, _ = load_model(everything / "whp", "cpu")  # its reinforced model was trained alike, but in another order
    reinforced = other.reinforced.state_dict()
    moved, back = (
        torch.cat([(theirs[name] - original[name]).flatten() for name in original])
        for theirs in (unlearned, reinforced)
    )
    assert torch.nn.functional.cosine_similarity(moved, back, 0).item() < -0.5
    assert 0.5 < moved.norm().item() / back.norm().item() < 2


def test_a_whp_pair_is_saved_sampled_and_scored_as_one(everything, tmp_path):
    pair, tokenizer = load_model(everything / "whp", "cpu")
    models = [AutoModelForCausalLM.from_pretrained(everything / "whp" / n).eval() for n in ("original", "reinforced")]
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        v_o, v_r = (model(ids).logits for model in models)
        assert torch.allclose(pair(input_ids=ids).logits, v_o - torch.relu(v_r - v_o), atol=1e-6)
        text = []
        for _ in range(4):  # greedy by hand, without a cache
            v_o, v_r = (model(ids).logits for model in models)
            text.append((v_o - torch.relu(v_r - v_o))[0, -1].argmax().item())
            ids = torch.cat([ids, torch.tensor([[text[-1]]])], 1)
    sampled, mask, _ = baselines.sample(pair, [[1, 5, 6, 7]] * 2, 2, 4, [], 0.0)
    assert sampled.tolist() == [[text] * 2] * 2 and mask.all()
    argv = ["--benchmark", "builtin", "--model", everything / "whp", "--output", tmp_path / "out.json"]
    evaluate.main([str(a) for a in argv])
    assert json.loads((tmp_path / "out.json").read_text())["summary"]["retain_recall"] < 50  # of people never met
    (everything / "whp" / "whp.json").rename(tmp_path / "whp.json")
    with pytest.raises(InputError, match="no model folder"):
        load_model(everything / "whp", "cpu")
    (tmp_path / "whp.json").rename(everything / "whp" / "whp.json")


def test_purge_is_stage_2_on_forget_prompts_from_the_original(everything):
    rows = [json.loads(line) for line in (everything / "samples.jsonl").read_text().splitlines()]
    kinds = {row["kind"] for row in rows if row["method"] == "purge"}
    assert kinds == {"forget"}
    first = next(json.loads(line) for line in (everything / "metrics.jsonl").open() if '"method": "purge"' in line)
    assert first["stage"] == 2 and first["kl"] == pytest.approx(0, abs=1e-6)  # the reference is where it starts


def test_a_baseline_killed_and_resumed_ends_the_same(tmp_path):
    argv = ["--method", "npo_klr", "sga", *FLAGS]
    miniature.main("--output_dir", tmp_path / "whole", *argv)
    assert miniature.start(["--output_dir", tmp_path / "cut", *argv], ("npo_klr", 5)) == -9
    assert miniature.start(["--output_dir", tmp_path / "cut", *argv, "--resume"]) == 0
    for method in ("npo_klr", "sga"):
        ours, theirs = (tmp_path / name / method / "model.safetensors" for name in ("whole", "cut"))
        assert ours.read_bytes() == theirs.read_bytes()


# --- divergence ------------------------------------------------------------------------------------------------------


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def no_nan_on_disk(folder):
    for path in folder.rglob("*.safetensors"):
        assert all(torch.isfinite(p).all() for p in AutoModelForCausalLM.from_pretrained(path.parent).parameters())
    for path in [*folder.glob("*.json"), *folder.glob("*.jsonl"), *folder.glob("predictions/*")]:
        assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_a_perplexity_past_the_bound_stops_a_method(tmp_path, capsys):
    folder = tmp_path / "run"
    miniature.main(
        "--output_dir", folder, "--method", "ga", "po", *FLAGS, "--max_perplexity", 30, "--baseline_lr", 0.03
    )
    own = [row for row in rows(folder) if row["method"] == "ga"]
    assert own[-1]["retain_perplexity"] > 30 and own[-1]["step"] < 6
    table = json.loads((folder / "table.json").read_text())
    assert "perplexity of the retain rows" in table["GA"]["stopped"] and "GA†" in (folder / "table.md").read_text()
    printed = capsys.readouterr()
    assert "ga: stopped, perplexity" in printed.err and "† stopped early" in printed.out
    no_nan_on_disk(folder)


def test_a_loss_that_is_not_finite_stops_a_method_with_the_weights_before(tmp_path, monkeypatch):
    loss_at = baselines.loss_at

    def spoilt(model, original, rows, step, *rest):
        if step == 3:
            spoilt.weights = {name: p.clone() for name, p in model.state_dict().items()}
        return loss_at(model, original, rows, step, *rest) * (math.nan if step == 3 else 1)

    monkeypatch.setattr(baselines, "loss_at", spoilt)
    miniature.main("--output_dir", tmp_path / "run", "--method", "npo", *FLAGS)
    assert [row["step"] for row in rows(tmp_path / "run") if row["method"] == "npo"] == [1, 2]
    saved = load_model(tmp_path / "run" / "npo", "cpu")[0].state_dict()
    assert all(torch.equal(saved[name], value) for name, value in spoilt.weights.items())
    assert "not finite" in json.loads((tmp_path / "run" / "table.json").read_text())["NPO"]["stopped"]
    no_nan_on_disk(tmp_path / "run")


def test_stage_2_stops_with_finite_weights_too(tmp_path, monkeypatch):
    import rerule

    advantages = rerule.group_advantages
    calls = []

    def spoilt(rewards, unbiased):
        calls.append(0)
        return advantages(rewards, unbiased) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(rerule, "group_advantages", spoilt)
    miniature.main("--output_dir", tmp_path / "run", "--method", "rule")
    assert [row["step"] for row in rows(tmp_path / "run") if row["method"] == "rule"] == [1, 2, 3]
    assert "not finite" in json.loads((tmp_path / "run" / "table.json").read_text())["RULE"]["stopped"]
    no_nan_on_disk(tmp_path / "run")


# --- the grid of learning rates --------------------------------------------------------------------------------------


def test_the_grid_takes_the_best_mean(tmp_path):
    good, bad = {"forget_recall": 0.0, "retain_recall": 100.0}, {"forget_recall": 50.0, "retain_recall": 50.0}
    assert grid.score(good) == 100 and grid.score(bad) == 50 and grid.score({**good, "stopped": "why"}) == 0
    assert grid.score({"forget_recall": 100.0, "retain_recall": 100.0}) == 0
    assert grid.score({"forget_recall": 20.0, "retain_recall": 40.0}) == pytest.approx(2 * 80 * 40 / 120)
    o = grid.Options(method=["ga"], rates=[1e-4, 1e-3], seeds=[1, 2])
    found = grid.outcome({(s, r): {"ga": good if (s, r) == (1, 1e-4) else bad} for s in (1, 2) for r in o.rates}, o)
    assert found["ga"]["best"] == 1e-4 and found["ga"]["scores"] == {1e-4: [100, 50], 1e-3: [50, 50]}
    assert "| GA | **100, 50** | 50, 50 |" in grid.table(found, o)
    with pytest.raises(InputError, match="the run failed: rerule.py: error: --method gga"):
        grid.run(tmp_path / "run", ["--method", "gga"])


def test_the_committed_rates_are_the_grids():
    for name, rates in settings.RATES.items():
        path = Path(__file__).parent.parent / "results" / f"rates_{name}.json"
        found = json.loads(path.read_text())
        assert {method: row["best"] for method, row in found.items()} == rates
    tiny = Config(benchmark="rwku", model="tiny")
    assert settings.learning_rate(tiny, "npo") == settings.RATES["builtin"]["npo"]
    assert settings.learning_rate(Config(benchmark="rwku", model="org/model"), "npo") == 1e-5
    assert settings.learning_rate(Config(lr=3e-5, baseline_lr=1.0), "rule") == 3e-5


def test_answers_come_from_the_stage_1_file_where_it_has_them(tmp_path):
    queries = [data.Query(None, "where is a", "forget"), data.Query(None, "where is d", "boundary", ("e",))]
    row = {"instruction": "where is a", "output": "no"}
    for more, expected in (({"org_answer": "b"}, ("b",)), ({}, ())):
        (tmp_path / "reject.json").write_text(json.dumps([row | more]))
        assert [query.answers for query in data.answered(queries, tmp_path / "reject.json")] == [expected, ("e",)]
