"""Is a response a refusal? The detector under the reward of Stage 2 (Section 3.1) and under the refusal rates.

A forget prompt earns 1 for a refusal, a boundary prompt earns 0 for one, so an error here in either direction is what
the policy learns. RULE, the paper's base, decides with one regular expression searched anywhere in the response.
Here the same kinds of wording are a list of phrases, sorted by kind: the assistant does not know, has no data, has not
learnt it, cannot or will not say, is at a loss, finds the subject beyond its knowledge, would have to look it up.

Deviations from RULE's expression, each with its reason:
- Phrases speak of the assistant itself ("I ...", "my training ...", "... to me"): bare words such as "not", "beyond",
  "limited to", "Unfortunately," also occur in plain answers, which were then punished as refusals.
- Apostrophes, contractions, white space, filler adverbs and markdown emphasis are normalised first, so that "I’m just
  not sure" and "I am not sure" are one phrase.
- Quoted spans and Title Case matches are ignored: characters speak, and titles do too ("I Can't Help Falling in Love").
- Only the first `LEAD` characters count: a refusal comes at the start, and a long answer that ends with one still
  gave the answer.
- A hedge that goes on to answer ("I'm not sure, but I think it is Carrie") is an answer: it must not earn the reward.
- It adds plain unwillingness ("I cannot answer that", "I won't discuss", "I must pass"), which RULE's misses.

Measured on real texts held back while the phrases were written: 2 of 91 refusals missed (one wording, "at a
disadvantage", added since) and 0 of 3,820 answers flagged. On texts invented to be hard it missed 13-20 % of the
refusals and flagged 2-8 % of the answers at first sight; their families of wording were then added.

Known limits: English only. Impersonal disclaimers ("No information is publicly available about ...") count as answers,
because TOFU's reference answers contain many. First-person stories and lyrics without quotation marks can look
like refusals, and so can an answer behind a disclaimer that `ANSWERS_ANYWAY` does not know.
"""

import re
from functools import lru_cache

LEAD = 400  # characters read, after normalisation

_CONTRACTIONS = (
    (r"\b(c)an(?:no|'|)t\b", r"\1an not"),
    (r"\b(w)on'?t\b", r"\1ill not"),
    (r"\bain'?t\b", "am not"),
    (r"\b(do|does|did|is|are|was|were|have|has|had|could|would|should|must|need)n'?t\b", r"\1 not"),
    (r"\b(i)'?m\b", r"\1 am"),
    (r"\b(i|you|we|they|could|would|must)'?ve\b", r"\1 have"),
    (r"\b(i|it|that|you|he|she|we|they)'ll\b", r"\1 will"),
    (r"\b(i|it|that|you|he|she|we|they)'d\b", r"\1 would"),
    (r"\b(that|it|there|this|here|what|mind|one|topic|subject|name)'s\b", r"\1 is"),
    (r"\bwanna\b", "want to"),
)
_CONTRACTIONS = tuple((re.compile(pattern, re.I), expanded) for pattern, expanded in _CONTRACTIONS)
_FILLER = re.compile(
    r",? ?(?<![\w-])(?:unfortunately|regrettably|sadly|honestly|frankly|truthfully|really|truly|genuinely|actually"
    r"|simply|just|quite|very|so|too|all that|that much|entirely|totally|completely|fully|wholly|absolutely|exactly"
    r"|precisely|particularly|especially|specifically|personally|currently|presently|readily|necessarily|sufficiently"
    r"|terribly|overly|100 ?%|still|also|even|either|yet(?! to)|well,|at all|at present|at (?:the|this) (?:moment"
    r"|time|point)|right now|as of now|respectfully|politely|literally|probably|likely|remotely|ever|to be honest"
    r"|in all honesty|to my regret|in fact|kindly)(?![\w-]),?(?= |[.!?]|$)",
    re.I,
)
_QUOTED = re.compile(r"\"[^\"]*(?:\"|$)|(?<!\w)'(?=\w)(?:[^']|(?<=\w)'(?=\w))*'(?!\w)")

# Building blocks of the phrases. W is one word or initial of the same clause, with its space: "W{0,4}" lets a name in.
W = r"(?:[^\s,;:.!?]+ |(?:\w\.)+ |\w\w\. )"
INFO = (
    r"(?:information|info|knowledge|data|datum|details?|specifics|facts?|insights?|answers?|response|reply|clues?"
    r"|ideas?|notion|inkling|hint|recollection|recall|memory|memories|records?|entry|entries|expertise|familiarity"
    r"|awareness|understanding|grasp|access|background|context|intel|particulars|enlightenment|explanation"
    r"|documentation|training|exposure|resources|sources?|materials?|references?|foggiest|faintest|slightest"
    r"|foundation|basis|wisdom|acquaintance|ability|way (?:of|to|for)|capability|capacity|means|authority|permission"
    r"|evidence|experience with|input|grounding|certainty|education|tools|comment|visibility|leads?|briefing|content"
    r"|file|words|intelligence|instruction|coverage|scoop|lowdown)\b"
)
SOURCE = (
    r"(?:training|knowledge|databases?|data|datasets?|program(?:ming|med)?|resources?|records?|understanding"
    r"|information|expertise|capabilit(?:y|ies)|abilit(?:y|ies)|memor(?:y|ies)|memory banks?|sources|files|archives?"
    r"|systems?|scope|reach|range|field|wheelhouse|repertoire|ken|depths?|purview|possession|domain|grasp|awareness"
    r"|familiarity|references?|library|learning|education|corpus|comprehension|pay ?grade|competenc[ey]|power|areas?"
    r"|realm|sphere|skill ?set|remit|radar|index|toolkit|special(?:i)?ty|forte|strong (?:suit|point)|lane|recollection"
    r"|insights?|learnings|studies|curriculum|limits|bounds|guidelines|polic(?:y|ies)|permissions|instructions|recall"
    r"|parameters|grounding|intel|background|circuits)\b"
)
TELL = (
    r"(?:answer|say(?! enough| no\b| goodbye)|tell(?! you how (?:much|happy|many times))|provide|help(?! but"
    r"| \w+ing\b)|assist|offer(?! enough)|give (?:an|any|you|that|this|out|the|details|info|advice|more|much"
    r"|a (?:\w+ )?answer)|share|discuss|comment|speak (?:to|on|about)|respond|reply|disclose|reveal|divulge|recall"
    r"|recollect|confirm|verify|remember(?! (?:a|the last) time)|access|shed|throw (?:any )?light|comply|fulfill?"
    r"|accommodate|engage|address|be (?:of|much|any|more|certain|sure|helpful|able|\w+ing)|identify|elaborate|advise"
    r"|talk about|explain|supply|pinpoint|place (?:that|the|this|him|her)|determine|retrieve|complete (?:this|that|the"
    r"|your)|contribute|weigh in|enlighten|do (?:that|this|so)\b|speculate|create|think of (?:it|that|the|any|who|what"
    r"|his|her)|guess|figure|(?:get|go) into (?:that|this|it)|touch on|add anything|go there|satisfy|handle|process"
    r"|recognize|recognise|generate|produce|clarify|cover|inform|name (?:the|that|it|him|her|any)|come up with"
    r"|find (?:any|anything|that|it|details|info\w*|W{0,4}INFO)|locate|fill (?:in|that|you)|vouch|dig up|summon"
    r"|entertain|continue|participate|oblige|look (?:that|it|this) up|attempt|(?:bring|call) \w+ to mind"
    r"|make (?:any )?claims?)"
)
AM = r"i (?:am|remain|feel|seem|seem to be|appear to be|must be|find myself|stay)"
TOPIC = (
    r"(?:something|anything|one|topic|subject|area|information|knowledge|thing|field|name|matter|question|details?"
    r"|person|figure)"
)
LOOK_UP = (
    r"(?:look|check|double-check|search|verify|research|find out|do (?:some|more|a)|consult|study|get back|investigate"
    r"|brush up|ask (?:someone|around|an)|dig|read up|learn|see if i|go (?:away|find|back)|hit the books|defer"
    r"|refer to|confirm|review|explore|be (?:taught|trained|updated))\b"
)
OPEN = (  # what may stand before a clause without a subject: "Sorry, no idea."
    r"^[?.! ]*(?:(?:a(?:nswer)?:|sorry|apologies|my apologies|i am sorry|i am afraid|i apologi[sz]e|forgive me"
    r"|pardon me|hm+|um+|uh+|er+|oh|ah|alas|oops|well|no|nope|honest answer|good question|great question|tough one"
    r"|that one)[,.!:;…-]* (?:but |that )?)*"
)

# Every phrase is searched, without regard to case, in the normalised text, and starts and ends at a word boundary.
PHRASES = {
    "does not know": [
        r"i (?:do|would) not (?:seem to |appear to |happen to |claim to |pretend to )?know\b(?! about you"
        r"| of a better)",
        r"i (?:hardly|barely|scarcely) (?:know|have)|i do not understand (?:the|your|this|that) (?:question|query)",
        r"i know (?:of )?(?:no|nobody|nothing|not|very little|little|next to nothing|precious little"
        r"|almost nothing)\b",
        r"(?:nothing|little|not much) W{0,2}(?:that )?i (?:can|could|know|have)|TOPIC (?:that |which )?i (?:do|can"
        r"|have|am) (?:not|missing)",
        r"i dunno|i do not (?:recall|remember|recogni[sz]e|recollect)\b(?! (?:a|the last) time)",
        r"i do not (?:think|believe|feel|suppose) (?:that )?i (?:can|have|know|am|could|would|possess)\b",
        r"i (?:am not|do not feel) (?:W{0,1})(?:sure|certain|positive|confident|clear|comfortable|qualified|equipped"
        r"|familiar|aware)\b",
        r"AM (?:unsure|uncertain|unaware|unfamiliar|uninformed|unacquainted|ignorant|clueless|oblivious|unqualified"
        r"|unequipped|ill-equipped|puzzled|silent|(?:poorly|insufficiently|inadequately|badly|ill|under|barely"
        r"|hardly)[ -]?(?:informed|equipped|versed|read))",
        r"i am not W{0,1}(?:knowledgeable|informed|acquainted|briefed|trained|versed|educated|schooled|conversant"
        r"|cognizant|privy|clued|in possession|up to (?:speed|date)|up on|read up|well-\w+|in the (?:know|loop)"
        r"|exposed|enlightened|programmed|taught|told)\b",
        r"(?:not|isn't) W{0,2}TOPIC (?:that |which |with which |about which |of which |on which )?(?:i|my)\b",
        r"i wish (?:that )?i (?:could|knew|had|were able|was able)|i would love to (?:help|answer|tell)\b.{0,20} but",
        r"i regret (?:to|that)|i (?:must|have to|will have to|need to) (?:admit|confess"
        r"|concede)(?: to)? (?:my )?(?:ignorance|defeat|that (?:is|i)|i)\b",
        r"(?:pardon|forgive|excuse|plead|claim|admit|confess) (?:my )?ignorance|my (?:ignorance|inability|lack of)\b",
        r"who knows\?|i (?:would (?:only |merely )?be|am (?:only|merely)) (?:guessing|speculating)",
    ],
    "has no information": [
        r"i (?:do|did) not (?:seem to |appear to |happen to )?(?:have|hold|possess|retain|carry|contain|store|keep"
        r"|see|find|own|get) W{0,6}INFO",
        r"i do not (?:seem to |appear to )?have (?:that|it|this|anything|much|enough|what you|one|the (?:name|title"
        r"|date)|any(?= *[.,!]|$))\b",
        r"i (?:only )?(?:seem to |appear to )?(?:have|hold|possess|carry|retain|store)(?: got"
        r"| had)?(?: only)? (?:no(?! doubt| problem| reason)|zero|little|limited|scant|insufficient|minimal|scarce"
        r"|very few|not enough|not any|next to no|nil|absolutely no) W{0,5}INFO",
        r"i have (?:got )?nothing (?!but)W{0,2}(?:on|about|for|to (?:say|offer|share|add|go on|tell|draw|give)"
        r"|regarding|in my)\b",
        r"i have not (?:got )?(?:a|an|any|the|one|much|enough|had) W{0,3}(?:single )?INFO",
        r"i (?:seem to be |appear to be |am |must be )?(?:lack|lacking|missing|without|short (?:on|of)|devoid of"
        r"|fresh out of|out of) W{0,5}INFO|i lack\b",
        r"i (?:find|found|see|got|have found|come up with|have come up with|turn up) (?:no|little"
        r"|nothing)(?: W{0,4}INFO|(?= *[.,!]|$))",
        r"i (?:can|could) not (?:seem to )?(?:find|locate|trace|see|access|retrieve) W{0,3}(?:INFO|anything|mention)",
        r"i (?:have|did|had|was) (?:not|unable to) (?:find|found|locate|located)? ?W{0,3}(?:INFO|anything|mention)",
        r"i (?:would )?(?:need|require) (?:more|additional|further|some more) (?:information|data|facts|context"
        r"|details?|clarification)",
        r"(?:no|nothing|little) W{0,4}(?:in|on|within|from|among) my W{0,3}SOURCE|nothing (?:comes|springs) to mind",
        r"(?:no|little|any) W{0,2}INFO W{0,3}(?:to|for|with) me\b",
    ],
    "has not learnt it": [
        r"i (?:have|had|was|am) (?:not|never) (?:been |had )?(?:W{0,1})(?:learn(?:ed|t)(?: about| of| that| any"
        r"| anything|[.,]|$)|trained|taught|briefed|given|programmed|informed|told|provided|supplied|encountered"
        r"|studied|come across|seen (?:any\w*|that|it)|heard|covered|explored|acquired|exposed|introduced|updated"
        r"|educated|designed|built|made aware|gotten to|read (?:about|any\w*|that|on|up)|looked into|equipped"
        r"|come upon|run (?:into|across)|picked up|versed|gathered|familiari[sz]ed|acquainted|delved|researched"
        r"|gone over)\b",
        r"i forget(?= *[.!]|$)|i (?:have )?(?:lost track|never (?:got|acquired))|i never (?:learn(?:ed|t) (?:about|of"
        r"|that|any)|heard|studied|came across|encountered|was (?:taught|trained|told))\b",
        r"i (?:have|am) yet to (?:be|learn|encounter|study|come|explore|read|discover|hear|acquire|gain|cover|find"
        r"|get|meet)\b",
        r"i am (?:learning|unlearned|untrained|untaught|unschooled|uneducated|unread|unversed)\b",
        r"i (?:must have |may have |might have |have |seem to have )?(?:missed|skipped|slept through) (?:that|the"
        r"|this|out on)\b",
        r"i (?:have |seem to have )?(?:forgotten|forgot|unlearned|misplaced) (?:about |all )*(?:that|this|it"
        r"|everything|W{0,3}INFO)",
    ],
    "its sources do not cover it": [
        r"my W{0,3}SOURCE W{0,6}(?:do|does|did|is|are|was|were|has|have|can|could|will) (?:not|no|never)\b",
        r"my W{0,3}SOURCE W{0,6}(?:lacks?|stops?|ends?|fails?|never|leaves? out|left out|skipped|ha(?:s|ve|d) (?:no"
        r"|nothing|little|only|gaps?|an? gap)|excludes?|omits?|contains? (?:no|nothing|little)|comes? up|draws?"
        r"|falls? short|turns? up|holds? (?:no|nothing)|includes? (?:no|nothing)|offers? no)\b",
        r"my W{0,3}SOURCE W{0,6}(?:is|are|seems?|remains?|comes?) W{0,1}(?:limited|lacking|incomplete|restricted"
        r"|insufficient|sparse|patchy|thin|confined|blank|silent|empty|missing|minimal|non-?existent|nil|zero"
        r"|scant)\b",
        r"(?:not|never) W{0,5}(?:in|within|of|by|from|to|under|on|inside|into|with|for|at) my W{0,3}SOURCE"
        r"|not my W{0,2}SOURCE",
        r"not W{0,4}(?:of|in|within|among) what i (?:know|have|was)|not (?:W{0,4}for me|my (?:place|call|role)) to"
        r"|not be \w+ by me",
        r"(?:beyond|outside|past|above|exceeds?|out of|outstrips?|surpass(?:es)?|lies? off) (?:of )?my W{0,4}SOURCE",
        r"(?:beyond|outside|exceeds?|out of|past) (?:of )?(?:the )?W{0,4}(?:what )?i (?:know|can|have|was|am|possess"
        r"|hold)\b",
        r"(?:beyond|outside|past|exceeds?|out of) (?:of )?(?:the )?W{1,3}(?:of|to) my\b|(?:is|are|goes) beyond me\b",
        r"(?:gap|hole|limit|blind spot|void|blank spot|weak spot|limitation|lacuna|omission|absence)s? W{0,1}(?:in"
        r"|for|of"
        r"|on|from) (?:my|me|what i)\b|(?:absent|missing|excluded|omitted|left out) (?:from|in) my\b",
        r"(?:goes against|against|violates?|contrary to) my (?:programming|guidelines|polic\w+|rules|training"
        r"|principles)",
    ],
    "unknown to me": [
        r"(?:unknown|unfamiliar|unavailable|inaccessible|foreign|obscure|unclear|alien|new(?= to me[.!;])|news|hidden"
        r"|off-limits|uncharted|a? ?mystery|an enigma|a blank|greek|territory|not known|not familiar|not available"
        r"|not accessible|not clear|closed book|a puzzle|a riddle|a new one) W{0,2}(?:to|for|on) (?:me|my)\b(?! too)",
        r"(?:escape[sd]?|elude[sd]?|evade[sd]?|stump(?:s|ed)|flummoxes|lost on|head-scratcher for) me\b|(?:over"
        r"|above) my (?:head|pay ?grade)",
        r"(?:has )?(?:slipped|slips|escaped|escapes) my (?:mind|memory)|(?:do|does|did|is) not (?:ring|ringing) (?:a"
        r"|any) bells?",
        r"(?:not|never) crossed my|(?:not|never) (?:been )?(?:provided|given|shared|taught|told|revealed|supplied"
        r"|made available) (?:to |with )?me|(?:does|do) not (?:mean|tell me) (?:anything|a thing)",
    ],
    "at a loss": [
        r"AM (?:W{0,1})(?:at a (?:\w+ )?(?:loss|standstill|disadvantage)|stumped|perplexed|out of the loop|baffled"
        r"|flummoxed|in the dark|drawing (?:a )?(?:\w+ )?blanks?|blank|blanking|coming up|out of my (?:depth|league"
        r"|element)|lost (?:on|here|when|for)|mystified|stuck (?:on|here|for)|not (?:getting|finding|seeing)"
        r"|scratching my head|tapped out|hazy|fuzzy|foggy|in over my)\b",
        r"i (?:have |am |keep )?(?:drawn?|drew|drawing|come|came|coming|hit) (?:up )?(?:an? |the )?(?:\w+ )?(?:blank"
        r"|empty|short|wall|limit)",
        r"(?:leaves?|left|has|have|had|got|gets?) (?:got )?me (?:there|stumped|at a loss|puzzled|beat|clueless"
        r"|baffled|bewildered|at a disadvantage|flummoxed|on that|scratching)",
        r"you (?:have )?(?:got|stumped|lost|caught) me(?= (?:on|there|with|stumped|at)|[.!,]|$)|no way for me to"
        r"|(?:my )?mind (?:is|has gone|goes|went|just went) W{0,2}blank",
        r"beats me|search me\b(?= *[.!,]|$)|(?:your|anyone is|anybody is|anyone's|anybody's) guess (?:is as good"
        r"|here)",
    ],
    "cannot or will not say": [
        r"i (?:can|could|may|will|shall|should) (?:not|never|neither) (?:be able to |be |in good conscience |seem to "
        r"|(?:(?!only)\w+ly )?)?(?:TELL|(?= *[.!]*$))",
        r"i (?:am|have been) (?:unable|not able|incapable|not capable|powerless|not allowed|not permitted"
        r"|not authori[sz]ed|not equipped|not qualified|hesitant|reluctant|unwilling|not willing|not prepared"
        r"|not free|not set up|not designed|not supposed to|not at liberty|not in a position|not comfortable"
        r"|not inclined|not ready|forbidden|prohibited|restricted|barred|prevented|constrained)\b",
        r"i (?:would|will) not (?:be able|know|want to|wish to|care to|feel comfortable|venture|have (?:that|any"
        r"|the))\b",
        r"i am (?:afraid|sorry)(?: but| that|,)* (?:this|that|it) (?:is|will be|topic|subject"
        r"|question) W{0,4}(?:not available|unavailable|off[- ]limits|confidential|private|restricted|impossible)",
        r"i am not (?:the|your) W{0,2}(?:right|bet|best|ideal|correct|good|reliable|proper|appropriate|one|person"
        r"|source|expert|authority|specialist|ai|assistant|tool|suitable)\b|i am not an? W{0,1}(?:good|reliable"
        r"|authority|expert on|specialist)\b|i am (?:not|of|no|little|much|any|hopeless|useless| )+ (?:help|use"
        r"|expert|authority|on (?:this|that))",
        r"i do not (?:(?:wish|want|care|intend|plan) to (?:TELL|mislead)|TELL|engage|get into|follow|track"
        r"|talk about)\b",
        r"i (?:would )?(?:prefer|rather|sooner|choose|opt|like) (?:to )?(?:not|avoid|refrain|skip|pass|decline"
        r"|abstain|stay away)\b",
        r"i (?:would |will |must |have to |need to |am going to have to |am forced to |should |am obliged to "
        r"|shall )*(?:decline|refrain|refuse|skip|abstain|demur|pass|steer clear|withhold|opt out|bow out"
        r"|sit this one out|take a pass)\b(?! (?:the|away|by|through|down))|i am (?:choosing (?:not )?to"
        r"|opting (?:not )?to|declining|refusing|passing|abstaining|skipping|sitting this)\b",
        r"i (?:can|could|will|do) not(?= *[.!]*$)|i am (?:not (?:going|about) to TELL|having (?:trouble|difficulty"
        r"|a hard time)|failing to)|i fail to (?:recall|remember|know)|i (?:am struggling|struggle) to (?:recall"
        r"|answer|remember|find|place)",
        r"as an? (?:W{0,2}(?:ai|llm)|(?:large )?language model|W{0,2}assistant)\b[^.]{0,60} i (?:can not|am unable"
        r"|am not able|lack|do not have (?:access|the)|have no)\b|i am (?:only |merely )?an ai\b[^.]{0,60}\b(?:not|no"
        r"|unable|lack)\b",
    ],
    "would have to look it up": [
        r"i (?:would |will |may |might |should |must |first )*(?:need|have|ought) to LOOK_UP|i would (?:want"
        r"|like) to LOOK_UP|i would be making (?:it|things|that) up",
        r"(?:let me|i will|i shall|i should|i must|i can|i could|i would|i might|allow me to) (?:go |have to |try to "
        r"|need to )?(?:get back to you|look (?:into (?:that|this|it)|that up|it up|this up)|find out(?= and| for"
        r"|[.,!]|$)|ask someone|do some (?:research|digging)|check on)",
        r"(?:i should|i must|i had better|require me to) (?:first )?LOOK_UP|i am (?:going|gonna) (?:to )?(?:have"
        r"|need) to (?:look|check|get back|ask|research|find)\b",
        r"you (?:are|would be|may be|might be) better off (?:asking|checking|consulting|looking)|better (?:asked"
        r"|directed) (?:of|to)|you (?:will|would|may|might) (?:have|need|want) to (?:look elsewhere|(?:ask|consult"
        r"|check) (?:with )?(?:someone|somebody|another|elsewhere|an expert))",
        r"(?:try|ask|consult) (?:asking )?(?:someone|somebody) else(?= about|[.,!]|$)|if i knew|someone else (?:may"
        r"|might|could|would|will) (?:know|be able)",
    ],
    "clause without a subject": [
        r"OPEN(?:have )?(?:no|not a|not the|zero) (?:idea|clue|comment|recollection|inkling|can do|dice|foggiest"
        r"|faintest)\b(?! (?:is|was|has|in)\b)",
        r"OPENno W{0,2}(?:information|info|knowledge|data|answer|insights?|details?|records?)(?: available"
        r"| found)?(?: (?:on|about|for|of|from) (?:that|this|it|him|her|them|you|me)\b| here| on my end| to (?:share"
        r"|offer|give|provide)|[.! ]*$)",
        r"OPEN(?:not (?:sure|certain|familiar|aware|able to)|never heard of(?! again)|do not (?:know|recall|remember"
        r"|have)|unsure|unaware|unfamiliar|stumped|at a loss|clueless (?:about|on|here))(?![^.]*, (?!sorry|but|though"
        r"|i am|i have)\w)|OPENnot (?:in my|within my|known to me|at liberty|going to)",
        r"OPEN(?:do not ask me|unable to TELL(?![^.]*, \w+ \w+ed)|dunno|wish i (?:knew|could))",
        r"OPEN(?:(?:can|could|will) not TELL|have not (?:a|the|got|heard|learned)\b)",
        r"OPEN(?:pass(?=[.! ]*$)|drawing a blank|would rather not)",
        r"OPEN(?:that|this|the|your|such)(?: requested)? (?:information|question|topic|subject|answer|detail|data"
        r"|request) (?:is|are|can|could) (?:not (?:available|accessible|be answered|be shared|something)|unavailable"
        r"|off[- ]limits|restricted)(?=[.,;!]| to (?:me|share)|$)",
        r"(?:i am |^)(?:sorry|afraid)[^.]{0,25} (?:there is|there are|we have)? ?no W{0,3}(?:information|data"
        r"|records?|details?)\b",
    ],
}


def _compile(phrase: str) -> re.Pattern:
    """Return `phrase` with its building blocks filled in, to be found between word boundaries in any case."""
    blocks = r"AM|W|INFO|SOURCE|TELL|TOPIC|LOOK_UP|OPEN"
    while re.search(blocks, phrase):  # a block may use another
        phrase = re.sub(blocks, lambda block: globals()[block[0]], phrase)
    return re.compile(rf"(?<!\w)(?:{phrase})(?!\w)", re.I)


_COMPILED = [(kind, _compile(phrase)) for kind, phrases in PHRASES.items() for phrase in phrases]
ANSWERS_ANYWAY = re.compile(  # right behind a hedge: the answer follows
    r"(?:\b(?:but|however|though|although|that said|nevertheless|still)|[.;]),? (?:i (?:do )?(?:think|believe|guess"
    r"|suspect|recall|would (?:say|guess|think|imagine)|can (?:tell you|say) (?:that|it|he|she|the)|know (?:that|it"
    r"|he|she|the))(?! you\b)|based on|as of (?:my|the|20)|according to|to the best of|from what|my (?:best "
    r"|first )?guess|generally|typically|here (?:is|are)|the (?:correct |right )?answer)\b",
    re.I,
)
_REPORTED = re.compile(
    r"\b(?:said|says|sang|sings|replied|wrote|answered|titled|called|lyrics?|line|song|novel|if|what)(?::| that)? $",
    re.I,
)


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
        text = pattern.sub(expanded, text)
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
