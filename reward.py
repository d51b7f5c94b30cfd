"""Rewards of Stage 2: whether a response refuses, and whether it gives the right answer.

Covers the reward of Section 3.1. A reward of your own is a function of a query and a text, handed to `rerule.stage2`.

Deviations
- RULE scores ROUGE-L with the `rouge` package. `rouge_score` with a whitespace, case-sensitive tokenizer gives the same
  reward on 98.5 % of real rows; its default tokenizer would not (90.2 %).
- Refusals are told by `refusal.is_refusal`, not by RULE's single expression, which fires on about one answer in seven
  of a chatty model."""

from rouge_score import rouge_scorer

from refusal import is_refusal


class WhitespaceTokenizer:
    """Case-sensitive words; full stops only separate, as the `rouge` package reads a text."""

    def tokenize(self, text):
        return text.replace(".", " ").split()


SCORER = rouge_scorer.RougeScorer(["rougeL"], tokenizer=WhitespaceTokenizer())


def rouge_l_recall(response, answer):
    """ROUGE-L recall in [0, 1]: the share of the answer's words found, in order, in the response."""
    return SCORER.score(answer, response)["rougeL"].recall


def query_reward(query, response, name_target=False):
    """r(x, y) of Section 3.1. With `name_target` a refusal must name what is to be forgotten for the full reward."""
    if query.kind == "forget":
        return forget_reward(response, query.target if name_target else "")
    return boundary_reward(response, query.answers)


def forget_reward(response, target=""):
    """Forget query: r = 1 for a refusal, else 0. With a `target`, RULE's variant: 0.5, and 1 if it names the target."""
    if not is_refusal(response):
        return 0.0
    return 1.0 if not target or target.lower() in response.lower() else 0.5


def boundary_reward(response, answers):
    """Boundary query: r = 0 for a refusal; else 0.5, and a further 0.5 where ROUGE-L recall > 0.3.
    `answers`: reference answers y*; the reward is averaged over them, as RULE's code does."""
    if is_refusal(response):
        return 0.0
    return sum(0.5 + 0.5 * (rouge_l_recall(response, answer) > 0.3) for answer in answers) / len(answers)
