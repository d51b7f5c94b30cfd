"""Prompts and answers as token ids."""

from types import SimpleNamespace

import pytest
from made import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks import muse, rwku, tofu
from config import InputError
from data import Prompt, encode_answer, encode_prompt, stop_ids

OWN_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_BOS = OWN_BOS.removeprefix("{{ bos_token }}")

QUESTION = Prompt("Who?", "[INST] Who? [/INST]", "")
TOKENIZERS = {
    "template with its own BOS": (dict(template=OWN_BOS), "<s>[user]Who?[assistant]"),
    "template without BOS": (dict(template=NO_BOS), "<s>[user]Who?[assistant]"),
    "template, nothing added": (dict(adds="", template=NO_BOS), "[user]Who?[assistant]"),
    "template with BOS, nothing added": (dict(adds="", template=OWN_BOS), "<s>[user]Who?[assistant]"),
    "template, EOS added": (dict(adds="<s> $A </s>", template=OWN_BOS), "<s>[user]Who?[assistant]"),
    "plain": (dict(), "<s>[INST] Who? [/INST]"),
    "plain, EOS added": (dict(adds="<s> $A </s>"), "<s>[INST] Who? [/INST]"),
    "plain, only EOS added": (dict(adds="$A </s>"), "[INST] Who? [/INST]"),
    "plain, two BOS added": (dict(adds="<s> <s> $A"), "<s>[INST] Who? [/INST]"),
    "no BOS at all": (dict(adds="", bos=None), "[INST] Who? [/INST]"),
    "no BOS at all, template": (dict(adds="", bos=None, template=NO_BOS), "[user]Who?[assistant]"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_has_one_bos_and_no_eos(name):
    flags, expected = TOKENIZERS[name]
    tokenizer = byte_tokenizer(**flags)
    ids = encode_prompt(tokenizer, QUESTION)
    assert tokenizer.decode(ids) == expected and ids.count(1) == expected.count("<s>") and 2 not in ids


def test_the_opening_follows_the_assistants_turn_or_the_plain_text():
    prompt = Prompt("Who?", "Who? ", "Answer:")
    assert byte_tokenizer().decode(encode_prompt(byte_tokenizer(), prompt)) == "<s>Who? Answer:"
    tokenizer = byte_tokenizer(template=OWN_BOS)
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == "<s>[user]Who?[assistant]Answer:"


def test_raw_text_ignores_the_chat_template():
    """MUSE: `user` is None, so a template plays no part."""
    tokenizer = byte_tokenizer(template=OWN_BOS)
    assert tokenizer.decode(encode_prompt(tokenizer, Prompt(None, "Answer: "))) == "<s>Answer: "


@pytest.mark.parametrize(
    ("template", "prompt", "text"),
    [
        (None, rwku.chat("Who?"), " Ada"),  # "…Answer:" wants a space
        (None, tofu.inst("Who?"), "Ada"),  # TOFU: nothing after [/INST]
        (None, muse.muse_prompt([], "Who?"), "Ada"),  # MUSE: the prompt ends with the space
        (OWN_BOS, rwku.chat("Who?"), "Ada"),  # the assistant's turn is empty
        (OWN_BOS, Prompt("Who?", "Who?", "Answer:"), " Ada"),  # RWKU's evaluation opens it
        (OWN_BOS, muse.muse_prompt([], "Who?"), "Ada"),
    ],
)
def test_an_answer_opens_with_a_space_after_a_colon_only_and_ends_with_eos(template, prompt, text):
    for adds in ("<s> $A", "<s> $A </s>"):
        tokenizer = byte_tokenizer(adds, template)
        ids = encode_answer(tokenizer, prompt, "Ada")
        assert ids[-1] == 2 and ids.count(2) == 1 and 1 not in ids and tokenizer.decode(ids[:-1]) == text


def model_with(eos):
    return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=eos))


@pytest.mark.parametrize(("eos", "stops"), [(None, [2]), (2, [2]), (7, [2, 7]), ([9, 7], [2, 7, 9])])
def test_a_response_ends_at_any_eos_of_model_or_tokenizer(eos, stops):
    assert stop_ids(byte_tokenizer(), model_with(eos)) == stops


def test_newline_tokens_end_a_response_if_asked():
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ"), ("a", "Ċ")])
    stops = stop_ids(tokenizer, model_with(None), newline=True)
    assert {tokenizer.decode([i]) for i in stops} == {"</s>", "\n", "\n\n", "a\n"}
    pieces = ["</s>", "a", "<0x0A>", None]  # of a tokenizer that falls back to bytes

    class Fallback:
        eos_token_id = 0

        def convert_ids_to_tokens(self, ids):
            return [pieces[i] for i in ids]

        def __len__(self):
            return len(pieces)

    assert stop_ids(Fallback(), model_with(None), newline=True) == [0, 2]


def test_no_eos_anywhere_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS"):
        stop_ids(tokenizer, model_with(None))
    assert stop_ids(tokenizer, model_with(5)) == [5]


def sentence_pieces(kind, style):
    """As Llama-2's: a space before every text, by its pre-tokenizer or by its normalizer."""
    core = Tokenizer(models.BPE(unk_token="<unk>") if kind == "bpe" else models.Unigram())
    if style == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    how = dict(vocab_size=130, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trainer = trainers.BpeTrainer(**how) if kind == "bpe" else trainers.UnigramTrainer(**how, unk_token="<unk>")
    texts = ["[INST] who is a [/INST] I don't know that.", "Question: what did Ben do? Answer: wrote a book"]
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("style", ["metaspace", "prepended"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt(kind, style):
    """SentencePiece puts a space before a text: alone, an answer would begin with one that stands nowhere."""
    tokenizer = sentence_pieces(kind, style)
    for plain, said in (("[INST] who is a [/INST]", ""), ("Question: what? Answer:", " "), ("what? Answer: ", "")):
        ids, answer = encode_prompt(tokenizer, Prompt(None, plain)), "wrote a book"
        answer_ids = encode_answer(tokenizer, Prompt(None, plain), answer)
        assert tokenizer.decode(ids + answer_ids, skip_special_tokens=True) == f"{plain}{said}{answer}"
        pair = encode_prompt(tokenizer, Prompt(None, plain + said + answer))
        if style == "metaspace" and not plain.endswith(" "):  # else a token of the pair may span both
            assert pair[-len(answer_ids) + 1 :] == answer_ids[:-1]
        assert answer_ids[-1] == tokenizer.eos_token_id
