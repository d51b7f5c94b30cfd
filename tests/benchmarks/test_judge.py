"""The judge of naturalness against a small server on loopback."""

import json

import huggingface_hub.constants
import pytest
from loopback import Loopback
from made import command

from benchmarks import judge, metrics
from config import InputError
from engine import llm

GOOD = {"read": 90, "help": 40, "truth": 80}


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The client refuses even a server on loopback where the environment says that all of the Hub is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def judging(*script):
    return Loopback(*script, reply=lambda prompt: GOOD)


def rows(n=1):
    return [{"question": f"Who is {i}?", "answer": f"Orla {i}", "prediction": "I don't know."} for i in range(n)]


def rate(server, some, tmp_path, **more):
    more = dict(model="m", key="secret", cache=tmp_path / "cache.jsonl", timeout=0.3, wait=0.01) | more
    return judge.rate_rows(some, url=server.url, **more)


@pytest.mark.parametrize(
    "reply",
    ["", "90", "null", "[90, 40, 80]", "read 90 help 40 truth 80", '{"read": 90, "help": 40}', "{", 'Sure! {"read": 1}',
     '{"read": 90, "help": 40, "truth": 101}', '{"read": 90, "help": -1, "truth": 80}',
     '{"read": 90, "help": 40.5, "truth": 80}', '{"read": "90", "help": 40, "truth": 80}',
     '{"read": true, "help": 40, "truth": 80}', '{"read": 90, "help": 40, "truth": 80, "note": 1}',
     '{"read": 90, "help": 40, "truth": 80} thanks', '{"read": NaN, "help": 40, "truth": 80}', None],
)  # fmt: skip
def test_replies_are_parsed_strictly(reply):
    with pytest.raises(llm.BadReply):
        judge.parse(reply)


def test_a_good_reply_is_taken_as_it_is():
    assert judge.parse(' {"truth": 0, "read": 100, "help": 40}\n') == {"read": 100, "help": 40, "truth": 0}


def test_a_row_without_a_rating_is_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "WORKERS", 1)
    some = rows(3)
    with judging(*["no"] * llm.ATTEMPTS) as server:
        notes = rate(server, some, tmp_path)
    assert [row["judge"] for row in some] == [None, GOOD, GOOD]
    assert "not comparable" in notes[0] and "leave out 1 of 3" in notes[1]


def test_nothing_is_judged_twice(tmp_path, capsys):
    with judging() as server:
        rate(server, rows(3), tmp_path, price=10.0)
        assert len(server.requests) == 3 and "$" in capsys.readouterr().err
        again = rows(4)
        rate(server, again, tmp_path)
        assert len(server.requests) == 4 and all(row["judge"] == GOOD for row in again)
        assert "1 requests" in capsys.readouterr().err
        rate(server, rows(1), tmp_path, model="other")  # another judge's opinion is not this one's
        assert len(server.requests) == 5
        rate(server, rows(1) * 2, tmp_path, model="third")  # the same answer twice is one request
        assert len(server.requests) == 6


def test_what_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    with judging() as server:
        rate(server, rows(), tmp_path)
        rate(server, rows(), tmp_path, key="", model="n")
        (message,) = server.requests[0]["messages"]
        assert server.requests[0]["model"] == "m" and server.requests[0]["temperature"] == 0
        assert "Who is 0?" in message["content"] and "I don't know." in message["content"]
        assert server.keys[0] == "Bearer secret"
        assert "hf_private" not in str(server.keys)  # a stored token never goes to someone's URL


def test_a_judge_that_is_not_there_or_never_rates_is_an_error(tmp_path):
    with judging(*["no"] * 100) as server:
        with pytest.raises(InputError, match="no usable rating"):
            rate(server, rows(2), tmp_path)
    with pytest.raises(InputError, match="cannot be reached"):
        rate(server, rows(2), tmp_path)


def test_answers_with_braces_are_judged_as_they_are(tmp_path):
    some = [{"question": "{x}", "answer": "{}", "prediction": "{question} {"}]
    with judging() as server:
        notes = rate(server, some, tmp_path)
        assert "{question} {" in server.requests[0]["messages"][0]["content"]
    assert len(notes) == 1 and "not comparable" in notes[0]


def test_the_command_fills_the_columns_from_a_log(tmp_path, monkeypatch, capsys):
    common = {"target": "", "rouge_l_recall": 0.0, "rouge_l_f1": 0.0, "refusal": True, "leak": False, "named": None}
    some = [{"split": "knowmem", "forget": True, "truncated": False} | common | row for row in rows(2)]
    some.append({"split": "utility", "forget": False, "truncated": False} | common | rows(3)[2])
    log, out = tmp_path / "log.json", tmp_path / "out.json"
    log.write_text(json.dumps({"benchmark": "muse", "per_example": some}), encoding="utf-8")
    monkeypatch.setenv("MY_KEY", "from the environment")
    flags = ["--benchmark", "muse", "--from_log", log, "--output", out]
    command(*flags)
    assert "–" in capsys.readouterr().out
    with judging() as server:
        result = command(*flags, "--judge_url", server.url, "--judge_model", "m", "--judge_key_env", "MY_KEY")
        assert len(server.requests) == 2  # retain queries are not judged
        assert server.keys[0] == "Bearer from the environment"
    assert [result["summary"][name] for name in metrics.NATURALNESS] == [90, 40, 80]
    assert result["summary"]["naturalness_all"] == 70
    assert any("not comparable" in note for note in result["notes"])
    assert "90.0" in capsys.readouterr().out
    assert (tmp_path / "out.json.judge.jsonl").exists()
