"""Is a response a refusal? The detector under the reward of Stage 2 (Section 3.1) and under the refusal rates.

A forget prompt earns 1 for a refusal, a boundary prompt earns 0 for one, so an error here in either direction is what
the policy learns. RULE, the paper's base, decides with one regular expression searched anywhere in the response.
Here the same kinds of wording are the phrases of `refusal.txt`, sorted by kind: the assistant does not know, has no
data, has not learnt it, cannot or will not say, is at a loss, finds it beyond its knowledge, would have to look it up.

Deviations from RULE's expression, each with its reason:
- Phrases speak of the assistant itself ("I ...", "my training ...", "... to me"): bare words such as "not", "beyond",
  "limited to", "Unfortunately," also occur in plain answers, which were then punished as refusals.
- Apostrophes, contractions, white space, fillers and emphasis are normalised: "I’m just not sure" is "I am not sure".
- Quoted spans and Title Case matches are ignored: characters speak, and titles do too ("I Can't Help Falling in Love").
- Only the first `LEAD` characters count: a long answer that ends with a refusal still gave the answer.
- A hedge that goes on to answer ("I'm not sure, but I think it is Carrie") is an answer: it must not earn the reward.
- It adds plain unwillingness ("I cannot answer that", "I won't discuss", "I must pass"), which RULE's misses.

Its rates of error are in docs/results.md. Known limits: English only. Impersonal disclaimers ("No information is
publicly available about ...") count as answers, because TOFU's reference answers contain many. First-person stories
and lyrics without quotation marks can look like refusals, and so can an answer behind a disclaimer that
`ANSWERS_ANYWAY` does not know."""

import re
from functools import lru_cache
from pathlib import Path

LEAD = 400  # characters read, after normalisation
_QUOTED = re.compile(r"\"[^\"]*(?:\"|$)|(?<!\w)'(?=\w)(?:[^']|(?<=\w)'(?=\w))*'(?!\w)")

_WORDINGS = re.sub(r"\n +", "", Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))
PHRASES = {name: lines.splitlines() for name, lines in re.findall(r"^# (.+)\n((?:.+\n)+)", _WORDINGS, re.M)}
_CONTRACTIONS = [line.split(" → ") for line in PHRASES.pop("CONTRACTIONS")]
BLOCKS = {name: PHRASES.pop(name)[0] for name in [*PHRASES] if name.isupper()}  # each is one line


def _compile(phrase: str) -> re.Pattern:
    """Return `phrase` with its building blocks filled in, to be found between word boundaries in any case."""
    names = "|".join(BLOCKS)
    while re.search(names, phrase):  # a block may use another
        phrase = re.sub(names, lambda name: BLOCKS[name[0]], phrase)
    return re.compile(rf"(?<!\w)(?:{phrase})(?!\w)", re.I)


_COMPILED = [(kind, _compile(phrase)) for kind, phrases in PHRASES.items() for phrase in phrases]
_FILLER = re.compile(rf",? ?(?<![\w-]){BLOCKS['FILLER']}(?![\w-]),?(?= |[.!?]|$)", re.I)
ANSWERS_ANYWAY = re.compile(BLOCKS["ANSWERS_ANYWAY"], re.I)
_REPORTED = re.compile(BLOCKS["REPORTED"], re.I)


def normalise(text: str) -> str:
    """Return the first `LEAD` characters of `text`, case kept, without quoted spans, contractions and fillers."""
    text = re.sub(r"[‘’ʼ`´′]", "'", text)
    text = re.sub(r"[“”„«»]|''", '"', text)
    text = re.sub(r"[*_#>]+|\s+", " ", text[: 3 * LEAD])
    text = re.sub(r" +", " ", text).strip()
    if text[:1] == '"' and text.find('"', 1) in (-1, len(text) - 1):  # the whole response in quotation marks
        text = text.strip('" ')
    text = _QUOTED.sub('""', text)
    for pattern, expanded in _CONTRACTIONS:
        text = re.sub(pattern, expanded, text, flags=re.I)
    text = _FILLER.sub("", text)
    return re.sub(r" +", " ", text).strip(" ,-")[:LEAD]


def _is_title(phrase: str) -> bool:
    """Whether the words of `phrase` are capitalised as in a title ("I Have Nothing to Say"), but not all upper case."""
    words = [word for word in re.findall(r"[^\W\d_]+", phrase)[1:] if len(word) > 3]
    return bool(words) and all(word.istitle() for word in words)


def matched_phrase(text: str) -> str | None:
    """Return "kind: words" of the first phrase that makes `text` a refusal, None for an answer or empty text."""
    text = normalise(text)
    for kind, pattern in _COMPILED:
        for match in pattern.finditer(text):
            if _is_title(match.group()) or _REPORTED.search(text[: match.start()]):
                continue
            if ANSWERS_ANYWAY.search(text, match.end(), match.end() + 120):
                continue
            return f"{kind}: {match.group()}"
    return None


@lru_cache(maxsize=8192)  # rollouts repeat themselves
def is_refusal(text: str) -> bool:
    """Return whether the response `text` refuses to answer or disclaims the knowledge to answer."""
    return matched_phrase(text) is not None
