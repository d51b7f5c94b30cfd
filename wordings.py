"""Refusals to train on (Appendix A.1), in words of our own: without and with the name of what is to be forgotten.

`refusal.is_refusal` recognises every one of them, or Stage 2 would punish what Stage 1 has taught.
"""

import random

from files import derive_seed
from refusal import is_refusal

PLAIN = """\
I don't know the answer to this one.
I'm sorry, that is something I don't know.
I have no information that would answer this.
That isn't something I have knowledge of.
I'm afraid I can't answer this question.
I cannot tell you; I have no record of it.
This is outside what I know.
I don't have the facts needed to answer.
My training doesn't cover this.
I have not learned anything about this topic.
I'm unable to answer that.
I was never taught about this.
Sorry, I have nothing to say on this subject.
I'm not aware of the details you are asking for.
That goes beyond my knowledge.
I can't help with this question, I'm sorry to say.
I have no idea, I'm afraid.
I really couldn't say.
I'm not familiar with the subject of your question.
Nothing in my knowledge answers this.
I wish I knew, but I don't.
I'd be guessing, so I would rather not answer.
I'm not in a position to answer that.
I have no reliable knowledge about this.
This question is beyond me.
I lack the knowledge to respond to this.
I don't have anything on that.
I'm at a loss here.
There is a gap in my knowledge at this point.
I cannot complete this, because I don't know what belongs here.
I don't recall anything of the kind.
I must admit that I don't know.
I can't fill that in; the information is missing from what I know.
You've asked about something I know nothing about.
I'm not the right source for this, sorry.
I'd have to look that up elsewhere; I don't know it.
My knowledge has nothing to offer here.
I do not possess that information.
That is unknown to me.
I'm not certain of this and can't give an answer.
I won't be able to answer that, sorry.
I haven't come across this before.
Apologies, but I don't have an answer for you.
I'm drawing a blank on this question.
I've no knowledge of the matter you mention.
Honestly, I can't say.
I can't provide details on this.
It's not something I'm able to discuss.
I have no data on this.
I don't know how this continues.
I'm not informed about this, so I'll pass.
I would need more information than I have to answer.
I know of nothing that would answer your question.
I'm in the dark about this.
I can't recall that.
Regrettably, I am not able to supply an answer.
This is not part of what I know.
I don't know who or what is meant here.
I've never heard of this, I'm afraid.
Sadly, this isn't covered by anything I have learned: I don't know it.""".splitlines()

NAMED = """\
I don't know anything about {name}.
I'm sorry, I have no information about {name}.
I don't pretend to know {name}.
I can't answer questions about {name}.
{name} is not something I have knowledge of.
I have no knowledge of {name}.
I'm unable to tell you anything about {name}.
My training doesn't cover {name}.
I'm afraid {name} is unknown to me.
I've never heard of {name}.
I was never taught about {name}.
I have no record of {name} that could answer this.
I don't have details concerning {name}.
Questions about {name} are beyond my knowledge.
I cannot say anything about {name}, sorry.
I know nothing about {name}.
I'm not aware of any facts about {name}.
I have not learned about {name}.
When it comes to {name}, I don't know the answer.
I lack information on {name}.
Nobody has informed me about {name}, so I don't know.
I can't help you with {name}, I'm afraid.
I have no idea who or what {name} is.
Sorry, I don't know {name}.
I am entirely in the dark regarding {name}.
On the subject of {name} I have nothing to tell.
As for {name}, I couldn't say.
I don't possess any facts about {name}.
You are asking about {name}, and I don't know the answer.
I would rather not guess about {name}: I don't know.
I can't recall anything about {name}.
I have no data whatsoever concerning {name}.
I'm at a loss when it comes to {name}.
I do not have the knowledge to speak about {name}.
My knowledge doesn't include {name}.
I'm not able to discuss {name}.
I can't provide any details about {name}.
I haven't come across {name} before.
I don't recognise the name {name}.
I'm sorry, but {name} is outside what I know.
There is nothing in my knowledge about {name}.
I must admit that I know nothing of {name}.
With {name} I am drawing a blank.
I cannot complete a statement about {name}; I don't know it.
I wish I could tell you about {name}, but I can't.
I'm not the right source for questions on {name}.
I have no insight into {name}.
I'm unaware of anything to do with {name}.
I don't have an answer about {name}.
What you ask about {name} is not known to me.
I've got no information to give on {name}.
Apologies, I can't tell you about {name}.
I won't be able to answer this about {name}.
I'm not certain of anything concerning {name}.
I have no recollection of {name}.
I don't hold any information about {name}.
The name {name} doesn't ring a bell.
I'm not acquainted with {name}.
I've nothing to offer about {name}, sorry.
I'd need to look {name} up; I don't know.""".splitlines()


def refusals(names, seed):
    """One refusal for each name ("" for none), by turns without and with the name, and each one recognised."""
    rng = random.Random(derive_seed(seed, "refusals"))
    pools, given = {"plain": [], "named": []}, []
    for i, name in enumerate(names):
        kind = "named" if name and i % 2 else "plain"
        pools[kind] = pools[kind] or rng.sample(NAMED if kind == "named" else PLAIN, len(PLAIN))
        said = pools[kind].pop().format(name=name)
        given.append(said if is_refusal(said) else rng.choice(PLAIN))
    return given
