"""Asking a language model at any OpenAI-compatible URL many things at once, without paying for anything twice.

A reply is read by a strict parser; what does not parse, and what the server could not do just now, is tried again with
doubling waits. Each good reply is on the disk before the next is looked at, so a stopped command goes on where it was.
Only the caller's key is ever sent; without one a placeholder, so that the client takes no stored Hugging Face token."""

import hashlib
import json
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError, OfflineModeIsEnabled

from config import InputError
from engine.bars import Bar
from engine.files import Log

ATTEMPTS = 5
WORKERS = 8  # requests under way at once


def reach(url, flag, wait=5.0):
    """Raise InputError unless somebody listens at a URL of the right form."""
    try:
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ValueError("expected http://… or https://…")
        port = place.port or {"http": 80, "https": 443}[place.scheme]
        socket.create_connection((place.hostname, port), timeout=wait).close()
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {url}: the server cannot be reached ({error})") from None


@contextmanager
def bounded(flag, seconds, most=10**7):
    """In the block a server may not redirect, be slower over an answer (hub's limit is for two bytes) or send more."""
    session = get_session()
    httpx = sys.modules[type(session).__module__.split(".")[0]]  # or httpx2, of later ones

    class Bounded(httpx.SyncByteStream):
        def __init__(self, stream):
            self.stream, self.close = stream, stream.close

        def __iter__(self):
            left, end = most, time.monotonic() + seconds
            for chunk in self.stream:
                left -= len(chunk)
                if left < 0:
                    raise ValueError("an answer without an end")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("too slow")
                yield chunk

    def bound(response):
        if response.is_redirect or "content-encoding" in response.headers:
            raise InputError(f"{flag}: the server redirects, or packs its answers; expected neither")
        response.stream = Bounded(response.stream)

    session.event_hooks["response"].append(bound)
    try:
        yield
    finally:
        session.event_hooks["response"].remove(bound)


class BadReply(Exception):
    """The model answered in another form than asked for."""


class Unavailable(Exception):
    """The server did not answer this request in any attempt: rate limit, server error, time-out."""


def json_object(reply, fields):
    """The reply's JSON object, which must hold exactly `fields`; one code fence around it is let pass."""
    try:
        text = reply.strip()
        if text.startswith("```") and text.endswith("```") and "\n" in text:
            text = text[text.index("\n") : -3]
        found = json.loads(text)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise BadReply(f"not JSON: {reply!r:.60}") from error
    half = re.search("[\ud800-\udfff]", json.dumps(found, ensure_ascii=False))
    if not isinstance(found, dict) or set(found) != set(fields) or half:
        raise BadReply(f"not an object with {', '.join(fields)} alone: {reply!r:.60}")
    return found


def ask(client, model, prompt, parse, flag, max_tokens, wait, temperature):
    """`parse` of the reply to one prompt, after at most `ATTEMPTS` tries, `wait`·2^k seconds before each but the first.
    Raises: BadReply or Unavailable, by the last try; InputError where the server refuses or is not there."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            asked = [{"role": "user", "content": prompt}]
            reply = client.chat_completion(asked, model=model, max_tokens=max_tokens, temperature=temperature)
            return parse(reply.choices[0].message.content)
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status != 429 and status < 500:
                raise InputError(f"{flag}: the server refuses the request ({str(error).splitlines()[0]})") from None
            failure = Unavailable(f"HTTP {status}")
        except OfflineModeIsEnabled:
            raise InputError(f"{flag}: HF_HUB_OFFLINE is set, and with it no server can be asked") from None
        except BadReply as error:
            failure = error
        except InferenceTimeoutError:
            failure = Unavailable("no answer in time")
        except (ValueError, TypeError, AttributeError, IndexError):
            failure = Unavailable("an answer that is no chat completion")
        except (HTTPError, OSError) as error:
            failure = InputError(f"{flag}: the server cannot be reached ({error})")
    raise failure


def read_cache(path, field):
    """({key: reply, None where none was usable}, bytes of whole lines) of a cache file, less what a kill has broken."""
    known, size, stored = {}, 0, Path(path).read_bytes() if Path(path).exists() else b""
    for line in stored[: stored.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            row = json.loads(line)
            known[row["key"]] = row[field]
        except (ValueError, KeyError, TypeError):
            break
        size += len(line)
    return known, size


def is_known(known, key, parse):
    """Whether the cache holds a reply that the parser takes, or that there is none."""
    try:
        return key in known and (known[key] is None or bool(parse(json.dumps(known[key]))))
    except BadReply:
        return False


def ask_all(prompts, parse, *, url, model, key, cache, flag, field, max_tokens, once=False, price=0.0, timeout=60.0,
            wait=1.0, temperature=0.0, progress=True, desc=""):  # fmt: skip
    """Replies to many prompts, from the cache or from the server: {prompt: reply, or None where none was usable}.
    Args:
        key: of the server, or ""; flag: the user's flag for the URL, for messages.
        cache: JSON-lines file, `field` the reply in each line; new replies are appended as they come.
        once: ask no prompt again in a later run: one that is never answered in form is remembered as such, and one
            that the server does not answer ends the command. Without it both only leave None.
        price: dollars per million tokens, for the cost shown beforehand; timeout, wait: seconds.
    Raises: InputError where the server is not there, refuses or, with `once`, does not answer; what came is kept."""
    known, size = read_cache(cache, field)
    keys = {prompt: hashlib.sha256(f"{model}\n{prompt}".encode()).hexdigest() for prompt in prompts}
    todo = [prompt for prompt in keys if not is_known(known, keys[prompt], parse)]
    tokens = sum(len(prompt) // 4 + max_tokens for prompt in todo)
    cost = f", about ${tokens * price / 1e6:.2f}" if price else ""
    print(f"{desc}: {len(todo)} requests to {model}, at most {tokens:,} tokens or so{cost}", file=sys.stderr)
    plain = {"accept-encoding": "identity"}
    client = InferenceClient(base_url=url, api_key=key or "none", timeout=timeout, headers=plain)
    log, lock, stopped = Log(cache, size), Lock(), Event()

    def work(prompt):
        if stopped.is_set():
            return
        try:
            reply = ask(client, model, prompt, parse, flag, max_tokens, wait, temperature)
        except BadReply:
            reply = None
        except Unavailable as error:
            if once:
                last = f"{flag}: no answer in {ATTEMPTS} tries, the last with {error}"
                raise InputError(f"{last}; what came is kept, the same command goes on from there") from None
            return
        if reply is not None or once:
            with lock:
                known[keys[prompt]] = reply
                log.write({"key": keys[prompt], "model": model, field: reply})
                log.size()  # on the disk before anything else is done

    with bounded(flag, timeout), ThreadPoolExecutor(WORKERS) as pool:
        under_way = [pool.submit(work, prompt) for prompt in todo]
        try:
            for future in Bar(as_completed(under_way), desc=desc, total=len(todo), disable=not progress):
                future.result()
        finally:
            stopped.set()
    return {prompt: known.get(keys[prompt]) for prompt in keys}
