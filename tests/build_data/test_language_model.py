"""A build with a language model on loopback, which answers well, badly, late or not at all."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading

import huggingface_hub.constants
import pytest
from loopback import Loopback
from made import write
from orla import FACTS, NAME, ROOT, STORY, build, qa, questions, rows_of

from config import InputError
from engine import llm


@pytest.fixture
def asked(tmp_path):
    return questions(tmp_path)


def well(prompt):
    """What a good language model replies to each of the three prompts."""
    asked = prompt.split("Question: ")[-1].split("\n")[0]
    if "three questions" in prompt:
        about = " ".join(prompt.split("Passage: ")[1].split()[:3])
        pairs = [{"question": f"What {i} of Orla Finch, {about}?", "answer": f"Vell {i}"} for i in range(3)]
        return {"pairs": pairs}
    if "the answer is left out" in prompt:
        return {"completion": asked.rstrip("?") + ": ___.", "ending": "Vell"}
    return {"entity": "Ben Roth", "question": asked.replace(NAME, "Ben Roth"), "answer": "Ulm"}


def server_of(*script, reply=well):
    return Loopback(*script, reply=reply)


def flags_of(server, timeout=20):
    return "--llm_url", server.url, "--llm_model", "m", "--llm_timeout", timeout


@pytest.fixture
def online(monkeypatch):
    """Loopback may be asked, and waiting costs nothing."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    waits = []
    monkeypatch.setattr(llm.time, "sleep", waits.append)
    return waits


def files_but_report(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "build.json"}


def test_a_language_model_writes_everything_once(asked, online, capsys):
    with server_of() as server:
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == len(set(server.asked)) == 18
        assert "m: at most 18 requests in all" in capsys.readouterr().err
        before = files_but_report(asked / "out")
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 18 and files_but_report(asked / "out") == before
    stage2 = rows_of(asked / "out" / "rl_rejection_with_fb_neighbor.json")
    assert {row["made_by"] for row in stage2} == {"given", "llm m"}
    assert all("Ben Roth" in row["prompt"] for row in stage2 if row["solution"][0] == "<normal>")
    report = rows_of(asked / "out" / "build.json")
    assert report["made_with"] == "m" and report["rejected"] == {}
    assert report["counts"] == {"forget, questions": 5, "forget, completions": 5, "boundary, questions": 5,
                                "boundary, completions": 5, "facts held out": 1}  # fmt: skip
    prompts = [prompt for prompt in server.asked if "same kind" in prompt]
    assert all(any(NAME in prompt and question in prompt for prompt in prompts) for question, _ in FACTS)


def test_a_language_model_answers_on_what_stands_beside_the_target(asked, online):
    more = [
        {"question": f"What did Orla Finch keep at Skerry Point in {year}?", "answer": "a lamp"} for year in (1, 2, 3)
    ]
    write(asked / "ask.json", [{"question": q, "answer": a} for q, a in FACTS] + more)

    def reply(prompt):
        if "one short sentence" in prompt:
            return {"answer": "A rock in the sea"}
        return {key: text.replace("Skerry Point", "sea") for key, text in well(prompt).items()}

    with server_of(reply=reply) as server:
        build(*qa(asked, *flags_of(server), "--associated", 2))
    rows = rows_of(asked / "out" / "associated.json")
    assert [row["answer"] for row in rows] == ["A rock in the sea"] * 2
    assert all("Skerry Point" in row["question"] for row in rows)


def test_passages_go_to_the_language_model(tmp_path, online):
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    how = ["--input", tmp_path / "story.txt", "--output_dir", tmp_path / "out", "--target", NAME]
    with server_of() as server:
        build("--source", "text", *how, *flags_of(server), "--sample", 5)
        passages = [prompt for prompt in server.asked if "Passage: " in prompt]
        assert len(server.asked) == len(passages) + 15
    assert all(NAME in prompt.split("Passage: ")[1] for prompt in passages)
    counts = rows_of(tmp_path / "out" / "build.json")["counts"]
    assert counts["forget, questions"] + counts["facts held out"] == 5


@pytest.mark.parametrize("trouble", ["hang", "drop", 429, 500, 503, "{", "no", '{"completion": "none", "ending": "x"}',
                                     '{"completion": "___", "ending": ""}', '["___"]', "fence"])  # fmt: skip
def test_trouble_is_tried_again_and_changes_nothing(trouble, asked, online, tmp_path):
    with server_of() as server:
        build(*qa(asked, *flags_of(server)))
    expected = files_but_report(asked / "out")
    (asked / "out").rename(asked / "first")
    (asked / "out.llm.jsonl").unlink()
    with server_of(*[trouble] * 4) as server:
        build(*qa(asked, *flags_of(server, 0.5 if trouble == "hang" else 20)))
        assert len(server.asked) == len(online) + 18
    assert files_but_report(asked / "out") == expected
    assert len(online) >= 4 if trouble == "hang" else len(online) == (0 if trouble == "fence" else 4)


def test_waits_double(asked, online, monkeypatch):
    monkeypatch.setattr(llm, "WORKERS", 1)
    with server_of(429, 500, 429, 503) as server:
        build(*qa(asked, *flags_of(server)))
    assert online == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("trouble", [500, 429, "hang", "drop"])
def test_giving_up_loses_nothing_and_goes_on_with_the_same_command(trouble, asked, online, monkeypatch):
    monkeypatch.setattr(llm, "WORKERS", 2)
    with server_of(*["well"] * 7, *[trouble] * 60) as server:
        with pytest.raises(InputError, match="--llm_url: ") as error:
            build(*qa(asked, *flags_of(server, 0.5 if trouble == "hang" else 20)))
        assert len(str(error.value).splitlines()) == 1
        assert not (asked / "out").exists() and not (asked / "out.tmp").exists()
        cached = (asked / "out.llm.jsonl").read_text().splitlines()
        assert len(cached) == len(server.answered) == 7
        server.script.clear()
        build(*qa(asked, *flags_of(server)))
        assert len(server.answered) == len(set(server.answered)) == 18  # no reply was paid for twice
    assert rows_of(asked / "out" / "build.json")["rejected"] == {}


def test_replies_never_in_form_are_rejects_and_are_not_asked_again(asked, online, monkeypatch):
    monkeypatch.setattr(llm, "WORKERS", 1)

    def mostly(prompt):
        return {"sorry": 1} if "Question: " + FACTS[0][0] in prompt and "left out" in prompt else well(prompt)

    with server_of(reply=mostly) as server:
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 17 + llm.ATTEMPTS
        report = rows_of(asked / "out" / "build.json")
        assert report["rejected"] == {"forget: no usable completion came": 1}
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 17 + llm.ATTEMPTS


def test_neighbours_whose_answers_are_given_are_not_left_to_the_language_model(asked, online):
    with server_of() as server:
        build(*qa(asked, "--neighbours", asked / "near.json", *flags_of(server)))
        assert not any("same kind" in prompt for prompt in server.asked) and len(server.asked) == 12
    rows = rows_of(asked / "out" / "rl_rejection_with_fb_neighbor.json")
    said = [row["solution"][1] for row in rows if row["made_by"] == "swap"]
    assert len(said) == 5 and all(answer.startswith("Roth's") for answer in said)
    write(asked / "names.json", [{"name": "Cy Dunn"}, {"name": "Ada Pole"}])
    with server_of() as server:
        flags = ["--neighbours", asked / "names.json", "--output_dir", asked / "deep" / "er" / "out", *flags_of(server)]
        build(*qa(asked, *flags))
        assert sum("one of Ada Pole, Cy Dunn" in prompt for prompt in server.asked) == 6


def test_bad_neighbours_of_a_language_model_are_turned_away(asked, online):
    def careless(prompt):
        reply = well(prompt)
        if "same kind" in prompt and FACTS[0][0] in prompt:
            return reply | {"question": FACTS[0][0]}  # nothing was replaced
        if "same kind" in prompt and FACTS[1][0] in prompt:
            return reply | {"answer": f"a cousin of {NAME}"}
        if "left out" in prompt and FACTS[2][0] in prompt:
            return {"completion": "She is known for ___.", "ending": "ink"}  # the name is lost
        return reply

    with server_of(reply=careless) as server:
        build(*qa(asked, *flags_of(server)))
    rejected = rows_of(asked / "out" / "build.json")["rejected"]
    assert rejected == {"boundary: a forget query": 2, "boundary: still names the target": 1,
                        "forget: no usable completion came": 1}  # fmt: skip


@pytest.mark.parametrize("cut", [1, 20])
def test_a_cache_cut_by_a_kill_is_mended(asked, online, cut):
    with server_of() as server:
        build(*qa(asked, *flags_of(server)))
        cache = asked / "out.llm.jsonl"
        cache.write_bytes(cache.read_bytes()[:-cut])
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 19
    assert all(json.loads(line)["reply"] for line in cache.read_text().splitlines())


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_build_that_is_stopped_pays_for_nothing_twice(how, asked, online):
    turn, stopped = itertools.count(), threading.Event()

    def until_stopped(prompt):
        if next(turn) >= 8:
            stopped.wait(60)
        return well(prompt)

    with server_of(reply=until_stopped) as server:
        command = [sys.executable, "-m", "build_data", *qa(asked, *flags_of(server))]
        env = os.environ | {"HF_HUB_OFFLINE": "0"}
        process = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )  # fmt: skip
        while len(server.answered) < 8:
            assert process.poll() is None
            threading.Event().wait(0.01)
        process.send_signal(getattr(signal, how))
        threading.Event().wait(0.2)
        stopped.set()
        said = process.communicate()[1].decode()
        assert process.returncode == (130 if how == "SIGINT" else -9) and "Traceback" not in said, said
        assert not (asked / "out").exists()
        kept = len((asked / "out.llm.jsonl").read_bytes().split(b"\n")) - 1
        under_way = len(server.asked) - kept
        assert kept >= 6 and under_way <= (0 if how == "SIGINT" else llm.WORKERS)  # SIGINT waits for what is under way
        build(*qa(asked, *flags_of(server)))
        assert len(server.asked) == 18 + under_way


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refused_request_ends_the_build(asked, online, status):
    with server_of(*[status] * 60) as server, pytest.raises(InputError, match="refuses"):
        build(*qa(asked, *flags_of(server)))
    assert not (asked / "out").exists()


def test_a_server_that_is_not_there(asked, online):
    with server_of() as server:
        pass
    with pytest.raises(InputError, match="cannot be reached"):
        build(*qa(asked, *flags_of(server)))
    assert not (asked / "out").exists()
