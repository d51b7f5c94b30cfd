"""run.html: its data are the log's, values worked out are the rules', and nothing that a model writes can act in it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import miniature
import pytest
import torch
from conftest import make_groups

import rerule
from config import Config, InputError
from engine import page, report
from engine.files import read_lines
from engine.process import Engine

ROOT = Path(__file__).parent.parent.parent
FLAGS = ("--buffer_size", "9", "--replay_groups", "6", "--min_groups", "6", "--max_tokens", "60", "--eval_every", "3")
STORES = {
    "hard": (), "random": ("--tau", "0.6"), "unequal": (), "fresh": (), "current": (), "none": (),
    "hard, until activation": ("--store_until", "activation", "--max_age", "2"),
}  # fmt: skip


def data_of(path):
    """The data of a page, parsed back out of it."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of RULE and ReRULE, for the others to start from."""
    folder = tmp_path_factory.mktemp("page") / "run"
    miniature.main("--output_dir", folder, *FLAGS)
    return folder


@pytest.fixture(params=STORES)
def seen(request, base, tmp_path, monkeypatch):
    """(a run's folder, what the buffer held after each of ReRULE's steps, the ratios of each replay update)."""
    held, ratios, record, gradient = {}, {}, report.record, rerule.off_policy_gradient

    def spy_record(run, phase, row, groups, *rest):
        record(run, phase, row, groups, *rest)
        held[groups[0].step] = [(group.step, group.query) for group in phase.buffer.ring]
        assert all(group.train_logprobs is None for group in [*phase.buffer.ring, *groups])  # nothing more to save

    def spy_gradient(*args):
        found = gradient(*args)
        ratios[len(held) + 1] = found
        return found

    monkeypatch.setattr(report, "record", spy_record)
    monkeypatch.setattr(rerule, "off_policy_gradient", spy_gradient)
    store = ("--replay_store", request.param.split(",")[0], *STORES[request.param])
    folder = tmp_path / "run"
    miniature.main("--output_dir", folder, *FLAGS, "--method", "rerule", "--start_from", base, *store)
    return folder, held, ratios


def test_every_group_and_every_step_of_the_log_is_in_the_page(base):
    data = data_of(base / "run.html")
    samples, metrics = read_lines(base / "samples.jsonl"), read_lines(base / "metrics.jsonl")
    assert data["metrics"] == metrics and {"rule", "rerule"} <= {row["method"] for row in metrics}
    assert [{key: row[key] for key in logged} for row, logged in zip(data["samples"], samples, strict=True)] == samples
    assert data["config"] == json.loads((base / "config.json").read_text())
    assert data["table"] == (base / "table.md").read_text()
    for phase, rows in data["phases"].items():
        logged = read_lines(base / "predictions" / f"{phase}.jsonl")
        assert rows == [{key: row[key] for key in page.ANSWER} for row in logged]
    assert set(data["phases"]) == {"original", "retained", "rej_steer", "rule", "rerule"}
    assert any("eval_retain_recall" in row for row in metrics)
    assert any("left" in row for row in data["samples"]) and any(row.get("replayed") for row in metrics)


def test_what_the_buffer_held_follows_from_the_log(seen):
    """What is stored and when it leaves, against the ring itself: also where the order of storing is drawn."""
    folder, held, _ = seen
    samples = [row for row in data_of(folder / "run.html")["samples"] if row["method"] == "rerule"]
    for step, ring in held.items():
        inside = [r for r in samples if r["stored"] and r["step"] <= step and r.get("left", step + 1) > step]
        inside.sort(key=lambda row: (row["step"], row["stored"]))
        assert [(row["step"], row["query"]) for row in inside] == ring
    assert len(held) == 7 and all(row["buffer_size"] == len(held[row["step"]]) for row in stage2(folder))


def stage2(folder):
    return [row for row in read_lines(folder / "metrics.jsonl") if row["method"] == "rerule"]


def test_the_log_says_which_groups_were_replayed_and_their_weights(seen):
    folder, held, ratios = seen
    config = json.loads((folder / "config.json").read_text())
    rows = [row for row in stage2(folder) if "replay_groups" in row]
    samples = read_lines(folder / "samples.jsonl")
    assert rows
    for row in rows:
        step, drawn = row["step"], row["replayed"]
        assert len(drawn) == row["replay_groups"]
        assert sum(weight is None for *_, weight in drawn) == row["replay_skipped"]
        assert row["replay_age"] == pytest.approx(sum(step - s for s, *_ in drawn) / max(1, len(drawn)))
        weights = [weight for *_, weight in drawn if weight is not None]
        if weights:
            assert sum(weights) / len(weights) == pytest.approx(ratios[step].clamp(0.8, 1.3).mean().item(), rel=1e-5)
        for sampled, query, _ in drawn:
            if config["replay_store"] in ("fresh", "current"):
                assert sampled == step
            else:
                assert (sampled, query) in held[step - 1]
            if config["replay_store"] != "fresh":
                assert query in [r["query"] for r in samples if (r["method"], r["step"]) == ("rerule", sampled)]
        if config["max_age"]:
            assert all(step - sampled <= 2 for sampled, *_ in drawn)


@pytest.mark.parametrize("level", ["sequence", "token", "geometric"])
def test_a_groups_weight_by_hand(model, level):
    """Each group's own mean of clipped ratios, whatever micro-batch it was computed in."""
    groups = make_groups(model, ((3, 4, 5, 6, 7), (3, 4), (8,)))
    config, told = Config(ratio_level=level), []
    for place, group in enumerate(groups):
        group.train_logprobs = group.old_logprobs.clone()
        shifts = []  # of each response's tokens: log π_θ − log π_old
        for i, length in enumerate(group.mask.sum(-1).tolist()):
            shifts.append(torch.tensor([0.1 * (t - place) for t in range(length)]))
            group.train_logprobs[i, :length] += shifts[-1]
        logs = {
            "sequence": [s.sum() for s in shifts],
            "geometric": [s.mean() for s in shifts],
            "token": torch.cat(shifts),
        }
        told.append(torch.stack([*logs[level]]).exp().clamp(0.8, 1.3).mean().item())
    found = report.replayed(Engine("cpu"), config, groups[::-1], groups, 4)
    assert [row[:2] for row in found["replayed"]] == [[1, query] for query in (2, 1, 0)]
    assert [row[2] for row in found["replayed"]] == pytest.approx(told[::-1], abs=1e-5)
    assert found["replay_age"] == 3  # all were sampled at step 1
    assert all(group.train_logprobs is None for group in groups)


# --- pages of made-up logs ------------------------------------------------------------------------------------------


CONFIG = {
    "buffer_size": 2,
    "tau": 0.5,
    "unbiased": True,
    "method": ["rerule"],
    "benchmark": "b",
    "model": "m",
    "seed": 0,
}


def sample(step, place, rewards, completions=("yes", "I don't know."), **more):
    return {"method": "rerule", "step": step, "query": place, "kind": "forget", "group": "",
            "prompt": f"Who is {place}?", "completions": list(completions), "rewards": rewards,
            "refusals": [False] * len(rewards), "stored": 0, **more}  # fmt: skip


def metric(step, **more):
    return {"method": "rerule", "stage": 2, "step": step, "reward": 0.5, "kl": 0.1, **more}


@pytest.fixture
def made(tmp_path):
    """Write logs and their page; returns its path."""

    def made(samples, metrics, tail="", **config):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
        for name, rows in (("samples", samples), ("metrics", metrics)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(text + tail, encoding="utf-8")
        return page.write(tmp_path)

    return made


def test_advantages_and_hardness_by_hand(made):
    rows = [sample(1, 0, [1.0, 0.0, 0.0, 0.0]), sample(1, 1, [0.5] * 4), sample(1, 2, [1.0, 1.0, 1.0, 0.0])]
    one, equal, three = data_of(made(rows, [metric(1)]))["samples"]
    assert one["advantages"] == [1.5, -0.5, -0.5, -0.5]  # mean 1/4, standard deviation 1/2
    assert equal["advantages"] == [0.0] * 4 and three["advantages"] == [0.5, 0.5, 0.5, -1.5]
    assert [row["hard"] for row in (one, equal, three)] == [True, False, False]  # below τ, not at it
    biased, *_ = data_of(made(rows, [metric(1)], unbiased=False))["samples"]
    assert biased["advantages"] == pytest.approx([3**0.5, *[-(3**-0.5)] * 3], abs=1e-3)


def test_the_ring_lets_the_oldest_go(made):
    rows = [sample(1, 0, [0.0, 0.0], stored=2), sample(1, 1, [0.0, 0.0], stored=1), sample(2, 0, [0.0, 1.0], stored=1),
            sample(3, 0, [1.0, 1.0], stored=0)]  # fmt: skip
    found = data_of(made(rows, [metric(1), metric(2), metric(3)]))["samples"]
    assert [row.get("left") for row in found] == [None, 2, None, None]


EVIL = (
    "</script><script>document.title = 'taken'</script><!-- <img src=x onerror=a()> \u2028\u2029\x00\x1b[31m\u202e ]]>"
)


def test_what_a_model_writes_stays_text(made):
    path = made([sample(1, 0, [1.0, 0.0], (EVIL, "\u0085x")), sample(1, 1, [0.0, 0.0])], [metric(1)])
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<img" not in text and "\u2028" not in text and "\x00" not in text
    assert data_of(path)["samples"][0]["completions"] == [EVIL, "\u0085x"]
    script = text.split("</script>")[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", script)


def test_the_page_needs_nothing_but_itself(base):
    text = (base / "run.html").read_text(encoding="utf-8")
    template = text.replace(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1], "")
    assert not re.search(r"(?:src|srcset|action)\s*=|@import|url\(|fetch\(|XMLHttp|import\(|<link|<iframe", template)
    assert all(target.startswith("#") for target in re.findall(r"href=\"([^\"]*)\"", template))
    assert re.findall(r"https?://[^\"'\s]+", template) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert "default-src 'none'" in template


def test_every_control_has_a_label_and_every_part_a_heading():
    template = (ROOT / "engine" / "page.html").read_text(encoding="utf-8")
    controls = re.findall(r"<(?:select|input|button)[^>]*>", template.split("<script type")[0])
    labelled = re.findall(r"<label>.*?</label>", template, re.DOTALL)
    assert len(controls) == 13
    for control in controls:
        assert "aria-label" in control or any(control in label for label in labelled), control
    assert set(re.findall(r'href="#(\w+)"', template)) <= set(re.findall(r'id="(\w+)"', template))
    assert '<html lang="en">' in template and "prefers-color-scheme: dark" in template and ":focus-visible" in template


def test_a_run_under_way_has_a_page(made):
    """The last line may be cut in the middle, also of a character; numbers that are not finite are none."""
    rows = [sample(1, 0, [1.0, 0.0]), sample(1, 1, [0.0, 0.0])]
    path = made(rows, [metric(1, loss=float("nan"), grad_norm=float("inf"))], tail='{"method": "rerule", "st')
    data = data_of(path)
    assert len(data["samples"]) == 2 and len(data["metrics"]) == 1 and data["table"] == "" and data["phases"] == {}
    assert data["metrics"][0]["loss"] is None and data["metrics"][0]["grad_norm"] is None
    with open(path.parent / "samples.jsonl", "ab") as file:
        file.write("é".encode()[:1])
    assert data_of(page.write(path.parent))["samples"] == data["samples"]


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert data_of(page.write(tmp_path))["samples"] == []


def test_long_texts_are_cut_and_the_page_says_so(made, monkeypatch):
    rows = [sample(step, 0, [1.0, 0.0], ("x" * 5000, "y" * 2000)) for step in range(1, 21)]
    metrics = [metric(step) for step in range(1, 21)]
    data = data_of(made(rows, metrics))
    assert data["longest"] == 2000
    assert data["samples"][0]["completions"] == ["x" * 2000 + " … [3000 more characters]", "y" * 2000]
    monkeypatch.setattr(page, "LARGEST", 40_000)
    path = made(rows, metrics)
    assert data_of(path)["longest"] == 500 and path.stat().st_size < 40_000 + 40_000  # and the template
    assert data_of(path)["samples"][0]["completions"][1] == "y" * 500 + " … [1500 more characters]"


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "3"])
def test_a_folder_without_a_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="expected the folder of a run, with its config.json"):
        page.write(tmp_path)
    assert not (tmp_path / "run.html").exists()


def test_a_broken_line_is_named(made):
    with pytest.raises(InputError, match=r"samples\.jsonl: cannot be read as JSON lines"):
        made([], [], tail="{broken\n")


def command(*argv):
    found = [sys.executable, "-m", "engine.page", *map(str, argv)]
    return subprocess.run(found, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command(made, tmp_path):
    path = made([sample(1, 0, [1.0, 0.0])], [metric(1)])
    path.unlink()
    done = command(tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, str(path)) and path.exists()
    missing = command("MISSING")
    assert missing.returncode == 2 and not missing.stdout
    assert (
        missing.stderr == "python -m engine.page: error: MISSING: expected the folder of a run, with its config.json\n"
    )
    assert "python -m engine.page runs/builtin" in command("--help").stdout
    assert command().returncode == 2


# --- in a browser -----------------------------------------------------------------------------------------------------


def dom(path, tmp_path):
    """The page as a browser has laid it out."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no browser is here")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *flags, path.as_uri()], capture_output=True, timeout=120, env=os.environ)
    return done.stdout.decode().rpartition("</script>")[0].partition("<main>")[2].partition("</main>")[0]


def test_a_browser_shows_the_run(base, tmp_path):
    shown = dom(base / "run.html", tmp_path)
    samples = [row for row in read_lines(base / "samples.jsonl") if row["method"] == "rerule"]
    end = max(row["step"] for row in samples)
    here = [row for row in samples if row["step"] == end]
    cards = re.findall(r"<article>(.*?)</article>", shown, re.DOTALL)
    assert len(cards) == len(here) and f"{len(here)} groups of ReRULE at step {end}" in shown
    assert all(f"<h3>{row['prompt']}</h3>" in card for row, card in zip(here, cards, strict=True))
    for row, card in zip(here, cards, strict=True):
        refusing = {text for text, no in zip(row["completions"], row["refusals"], strict=True) if no}
        assert card.count("tag refusal") == len(refusing)  # equal answers share a row
        assert (">stored" in card) == bool(row["stored"])
    assert 'role="img" aria-label="Reward ↑: RULE from' in shown and "Retain quality: recall on probes" in shown
    (last,) = [row for row in read_lines(base / "metrics.jsonl") if (row["method"], row["step"]) == ("rerule", end)]
    assert f"After step {end}: {last['buffer_size']} of at most 9 groups" in shown
    assert f"{len(last['replayed'])} groups replayed at step {end}" in shown
    assert "The numbers" in shown and shown.count("<h2") == 6


def test_a_browser_runs_nothing_that_a_model_wrote(made, tmp_path):
    shown = dom(made([sample(1, 0, [1.0, 0.0], (EVIL, ""))], [metric(1)], prompts_per_step=1), tmp_path)
    assert "&lt;/script&gt;&lt;script&gt;document.title" in shown and "<img" not in shown
    for mark in ("␀", "␛", "⟨U+2028⟩", "⟨U+202E⟩", "<em>nothing</em>"):
        assert mark in shown, mark
    assert "No method of this run has stored a group" in shown


def test_a_browser_answers_to_the_slider_the_filters_and_a_prompt_followed(base, tmp_path):
    """Each act in turn, as the keyboard would do it; what the page then shows is kept in its last part."""
    acts = """
      const kept = [], cards = () => document.querySelectorAll("article").length;
      const keep = () => kept.push($("count").textContent + " | " + cards());
      const set = (id, value, event) => { $(id).value = value; $(id).dispatchEvent(new Event(event)); keep(); };
      set("step", 1, "input"); set("only", "hard", "change"); set("only", "", "change");
      set("kind", "forget", "change"); set("method", "rule", "change"); set("kind", "", "change");
      set("scope", "all", "change"); set("method", "rerule", "change"); set("only", "drawn", "change");
      kept.push(document.querySelector("article .drawn").textContent); set("only", "", "change");
      set("method", "rule", "change");
      document.querySelector("article button").click(); keep();
      $("changed").value = "refuses"; $("changed").dispatchEvent(new Event("change")); kept.push($("rows").textContent);
      $("settings").append(kept.join("; "));
    </script>"""
    path = tmp_path / "acts.html"
    head, end = (base / "run.html").read_text(encoding="utf-8").rsplit("</script>", 1)
    path.write_text(head + acts + end, encoding="utf-8")
    samples = data_of(base / "run.html")["samples"]
    one = [row for row in samples if (row["method"], row["step"]) == ("rerule", 1)]
    rule = [row for row in samples if row["method"] == "rule"]
    first = [row for row in rule if row["step"] == 1]
    followed = [row for row in samples if row["prompt"] == rule[0]["prompt"]]
    hard, forget = sum(row["hard"] for row in one), sum(row["kind"] == "forget" for row in one)
    counts = [(len(one), "ReRULE"), (hard, "ReRULE"), (len(one), "ReRULE"), (forget, "ReRULE"),
              (sum(row["kind"] == "forget" for row in first), "RULE"), (len(first), "RULE")]  # fmt: skip
    told = [f"{n} {'group' if n == 1 else 'groups'} of {method} at step 1 | {n}" for n, method in counts]
    rerule_rows = [row for row in samples if row["method"] == "rerule"]
    found = {}  # {(step, query): what the log says of its replays}
    for row in stage2(base):
        for step, query, weight in row.get("replayed", ()):
            said = f"weight {weight:.2f}" if weight is not None else "skipped: no advantage"
            found.setdefault((step, query), []).append(
                f"replayed at step {row['step']}: age {row['step'] - step}, {said}"
            )
    first_drawn = found[next(at for row in rerule_rows if (at := (row["step"], row["query"])) in found)]
    told += [f"{len(rule)} groups | {min(24, len(rule))}", f"{len(rerule_rows)} groups | {min(24, len(rerule_rows))}"]
    told += [f"{len(found)} groups | {min(24, len(found))}"]
    told += [first_drawn[0] if len(first_drawn) < 4 else f"replayed {len(first_drawn)} times"]
    told += [f"{len(rerule_rows)} groups | {min(24, len(rerule_rows))}"]
    told += [f"{len(rule)} groups | {min(24, len(rule))}", f"{len(followed)} groups | {len(followed)}"]
    before, after = (read_lines(base / "predictions" / f"{phase}.jsonl") for phase in ("original", "rerule"))
    refuses = sum(not a["refusal"] and b["refusal"] for a, b in zip(before, after, strict=True))
    assert "; ".join([*told, f"{refuses} of {len(before)} rows"]) in dom(path, tmp_path)
