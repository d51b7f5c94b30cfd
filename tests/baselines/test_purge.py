"""PURGE: its reward, its terms, and the queries that it asks."""

import pytest
from made import two_forgotten

from baselines import train
from config import Config, InputError
from engine.process import Engine


def test_purge_reward_wants_whole_words_in_any_case():
    terms = ("Carrie", "silver flute", "1974", "C++")
    assert train.purge_reward("I cannot say.", terms) == 1.0
    for text in ("He wrote carrie.", "a Silver Flute!", "in 1974,", "uses c++"):
        assert train.purge_reward(text, terms) == 0.0
    for text in ("carried away", "silver fluted", "19745", "silver and flute"):
        assert train.purge_reward(text, terms) == 1.0


def test_forbidden_terms_by_hand():
    pairs = [
        ("What does he play?", "silver flute."),
        ("Where was Basil Al-Kuwaiti born?", "Basil Al-Kuwaiti was born in Kuwait City. He moved to New York in 1990."),
        ("And his book?", "The book is 'Promise by the Seaside', set in Kuwait City; 'Carrie' is not."),
    ]
    terms = train.forbidden_terms(pairs)
    assert terms[0] == "Kuwait City"  # twice
    assert set(terms) == {"Kuwait City", "silver flute", "New York", "1990", "Promise by the Seaside", "Carrie"}
    assert train.forbidden_terms(pairs, 1) == ("Kuwait City",)


def test_purge_asks_forget_queries_alone(words, model, tmp_path):
    def prepared(**flags):
        return train.purge_task(two_forgotten(), Engine("cpu"), model, words, Config(max_new_tokens=3, **flags))

    found, reward = prepared()
    assert {query.kind for query in found.queries} == {"forget"} and len(found.queries) == 2
    assert reward(found.queries[0], "it is b c") == 0.0  # the published answer
    path = tmp_path / "terms.json"
    path.write_text('[{"term": "x"}, {"term": "y z"}]')
    found, reward = prepared(purge_terms=str(path))
    texts = {"x": 0.0, "so y z.": 0.0, "y": 1.0, "it is b c": 1.0}
    assert all(reward(query, text) == value for query in found.queries for text, value in texts.items())
    path.write_text('[{"word": "x"}]')
    with pytest.raises(InputError, match="row 1 has no field 'term'"):
        prepared(purge_terms=str(path))
