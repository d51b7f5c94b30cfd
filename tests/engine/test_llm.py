"""Asking a language model many things, against a small server on loopback that also misbehaves."""

import json

import huggingface_hub.constants
import pytest
from loopback import Loopback

from config import InputError
from engine import llm

GOOD = {"read": 90, "help": 40}


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The client refuses even a server on loopback where the environment says that all of the Hub is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def answering(*script):
    return Loopback(*script, reply=lambda prompt: GOOD)


def prompts(n=1):
    return [f"Who is {i}?" for i in range(n)]


def ask(server, some, tmp_path, **more):
    """The replies, in the order of the prompts."""
    more = dict(model="m", key="secret", cache=tmp_path / "cache.jsonl", timeout=0.3, wait=0.01, progress=False) | more
    replies = llm.ask_all(
        some, lambda reply: llm.json_object(reply, GOOD), url=server.url, flag="--url", field="scores", max_tokens=60,
        **more,
    )  # fmt: skip
    return [replies[prompt] for prompt in some]


@pytest.mark.parametrize("trouble", ["not json", "html", 429, 500, 503, "hang", "drop", {"read": 1}, ""])
def test_misbehaviour_is_tried_again(trouble, tmp_path):
    with answering(trouble, trouble) as server:
        assert ask(server, prompts(), tmp_path) == [GOOD] and len(server.requests) == 3


def test_back_off_doubles(monkeypatch, tmp_path):
    waits = []
    monkeypatch.setattr(llm.time, "sleep", waits.append)
    with answering(429, 429, 500, 429) as server:
        ask(server, prompts(), tmp_path, wait=1.0)
    assert waits[:4] == [1.0, 2.0, 4.0, 8.0]


def test_a_cache_cut_short_by_a_kill_is_mended(tmp_path):
    cache = tmp_path / "cache.jsonl"
    with answering() as server:
        ask(server, prompts(2), tmp_path)
        cache.write_bytes(cache.read_bytes()[:-20])
        assert ask(server, prompts(2), tmp_path) == [GOOD] * 2 and len(server.requests) == 3
    lines = cache.read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["scores"] == GOOD for line in lines)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refused_request_is_an_error_at_once(status, tmp_path):
    with answering(*[status] * 20) as server:
        with pytest.raises(InputError, match="refuses"):
            ask(server, prompts(), tmp_path)
        assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_an_error(tmp_path):
    with answering() as server:
        pass
    with pytest.raises(InputError, match="--url: the server cannot be reached"):
        ask(server, prompts(2), tmp_path)


def test_offline_mode_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with answering() as server, pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        ask(server, prompts(), tmp_path)
    assert server.requests == []
