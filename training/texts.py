"""The closed domain: a shop's phone line. Every text is sampled on line from carriers, slots and digits.

A caller asks, the shop answers; the answer follows from the question by rule, so that it can be judged. Texts are
lower case without punctuation, digits as words ("four seven two"), so that hearing, reading and speaking agree.
Texts whose hash says so are held out: no trainer ever sees them. Common ground is never held out: what the shop itself
says without a number (some hundred sentences, the same in every call), and the few questions such as "yes".
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from kimia.errors import ParameterError
from training.scores import distance

HELD_OUT_SHARE = 10  # one text in ten is held out
ORDER_DIGITS = 3
CARRIER_CHANCE = 0.5  # of a carrier before, and of one after a question

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
ITEMS = ("lamp", "chair", "jacket", "kettle", "phone", "radio", "table", "shirt", "camera", "bottle")
CITIES = ("london", "oxford", "bristol", "paris", "berlin", "dublin")
NAMES = ("anna", "peter", "maria", "david", "susan", "robert", "julia", "thomas")

BEFORE = (
    "hello",
    "hi",
    "good morning",
    "good afternoon",
    "excuse me",
    "please tell me",
    "could you tell me",
    "i would like to know",
    "i have a question",
    "um",
)
AFTER = ("please", "thank you", "thanks", "if you can help me")


@dataclass(frozen=True)
class Exchange:
    """What a caller says, and what the shop answers."""

    intent: str
    question: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """Exchanges of one call; the last one may need what was said before."""

    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True)
class Intent:
    """Ways to ask for one thing, and the rule of its answer."""

    name: str
    questions: tuple[str, ...]  # with {slots}
    answer: Callable[[dict[str, str]], str]  # from the slots' words
    carriers: bool = True


# ---- answers by rule --------------------------------------------------------------------------------------------


def _hours(slots: dict[str, str]) -> str:
    day = slots["day"]
    if day == "sunday":
        return "we are closed on sunday"
    opens, closes = ("ten", "four") if day == "saturday" else ("nine", "six")
    return f"on {day} we are open from {opens} to {closes}"


def _status(slots: dict[str, str]) -> str:
    """The state follows from the last digit."""
    states = (
        ("zero one two", "is on its way to you"),
        ("three four five", "was delivered yesterday"),
        ("six seven", "is being packed"),
        ("eight nine", "is ready for collection"),
    )
    last = slots["digits"].split()[-1]
    state = next(state for digits, state in states if last in digits.split())
    return f"order {slots['digits']} {state}"


def _delivery_to(slots: dict[str, str]) -> str:
    if slots["city"] in ("paris", "berlin", "dublin"):
        return f"i am sorry we do not deliver to {slots['city']}"
    return f"yes we deliver to {slots['city']} within three days"


def _fixed(answer: str) -> Callable[[dict[str, str]], str]:
    return answer.format_map


INTENTS = (
    Intent(
        "hours",
        (
            "what time do you open on {day}",
            "when do you close on {day}",
            "are you open on {day}",
            "what are your opening hours on {day}",
            "is the shop open on {day}",
        ),
        _hours,
    ),
    Intent(
        "status",
        (
            "where is my order {digits}",
            "what is the status of order number {digits}",
            "can you check order {digits}",
            "has order {digits} been sent",
            "i am calling about order {digits}",
        ),
        _status,
    ),
    Intent("delivery place", ("do you deliver to {city}", "can you send a {item} to {city}"), _delivery_to),
    Intent(
        "delivery time",
        ("how long does delivery take", "how fast do you deliver", "when will my {item} arrive"),
        _fixed("delivery takes two or three days"),
    ),
    Intent(
        "delivery price",
        ("how much does delivery cost", "is delivery free"),
        _fixed("delivery costs five pounds"),
    ),
    Intent(
        "returns",
        (
            "can i return my {item}",
            "i want to send back a {item}",
            "how do i return the {item}",
            "my {item} is broken",
        ),
        _fixed("you can return the {item} within thirty days"),
    ),
    Intent(
        "address",
        ("what is your address", "where are you", "where is the shop", "how do i find the shop"),
        _fixed("we are at twelve market street next to the station"),
    ),
    Intent(
        "person",
        (
            "can i speak to a person",
            "i want to talk to somebody",
            "put me through to the manager",
            "i need to speak with a human",
        ),
        _fixed("one moment i will connect you with a colleague"),
    ),
    Intent(
        "yes", ("yes", "yes please", "yes that is right", "that is correct"), _fixed("great what else can i do"), False
    ),
    Intent(
        "no",
        ("no", "no thank you", "no that is all", "that is wrong"),
        _fixed("all right is there anything else"),
        False,
    ),
    Intent(
        "greeting",
        ("hello", "good morning", "good afternoon", "hello is anybody there"),
        _fixed("hello how can i help you today"),
        False,
    ),
    Intent(
        "goodbye",
        ("goodbye", "bye bye", "thank you goodbye", "have a nice day", "see you soon"),
        _fixed("thank you for calling goodbye"),
        False,
    ),
    Intent(
        "give order",
        ("my order number is {digits}", "the number is {digits}"),
        _fixed("thank you i have order {digits}"),
    ),
    Intent("give name", ("my name is {name}", "this is {name} speaking"), _fixed("hello {name} what can i do for you")),
)
BY_NAME = {intent.name: intent for intent in INTENTS}
NUMBERED = frozenset(intent.name for intent in INTENTS if "{digits}" in intent.questions[0])
WEIGHTS = tuple(4 if intent.name in NUMBERED else 1 for intent in INTENTS)  # digits are hardest to echo

RECALLS = {  # what was given -> how to ask for it, and the answer
    "give order": (("what is my order number", "which order number did i give you"), "your order number is {digits}"),
    "give name": (("what is my name", "do you remember my name"), "your name is {name}"),
}
REPEATS = ("can you repeat that", "sorry i did not hear that", "could you say that again")
REPEATED = "of course "  # before the answer that is said again


# ---- sampling ---------------------------------------------------------------------------------------------------


def digits(rng: random.Random, count: int = ORDER_DIGITS) -> str:
    """A digit string as words."""
    return " ".join(rng.choice(DIGITS) for _ in range(count))


def _slots(rng: random.Random) -> dict[str, str]:
    return {
        "day": rng.choice(DAYS),
        "item": rng.choice(ITEMS),
        "city": rng.choice(CITIES),
        "name": rng.choice(NAMES),
        "digits": digits(rng),
    }


def _carried(rng: random.Random, question: str) -> str:
    before = rng.choice(BEFORE) + " " if rng.random() < CARRIER_CHANCE else ""
    after = " " + rng.choice(AFTER) if rng.random() < CARRIER_CHANCE / 2 else ""
    return before + question + after


def _exchange(rng: random.Random, intent: Intent, slots: dict[str, str]) -> Exchange:
    question = rng.choice(intent.questions).format_map(slots)
    used = _carried(rng, question) if intent.carriers else question
    item = next((item for item in ITEMS if item in question.split()), None)  # an answer speaks of the item asked about
    return Exchange(intent.name, used, intent.answer(slots if item is None else slots | {"item": item}))


def is_held_out(text: str) -> bool:
    """Is this text kept from training? Fixed by its hash, whatever the seed; common ground never is."""
    return text not in _common_ground() and hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


@cache
def _common_ground() -> frozenset[str]:
    few = (question for intent in INTENTS if not intent.carriers for question in intent.questions)
    return shop_sentences() | frozenset((*few, *REPEATS))


def sample_exchange(rng: random.Random, *, held_out: bool, intent: str | None = None) -> Exchange:
    """One question with its answer, of the wanted side of the split.

    Raises ParameterError for a held-out question of an intent that has a handful of sentences only.
    """
    if held_out and intent is not None and not BY_NAME[intent].carriers:
        raise ParameterError(f"the intent {intent!r} has no held-out questions: its few sentences are all trained on")
    while True:
        chosen = rng.choices(INTENTS, WEIGHTS)[0] if intent is None else BY_NAME[intent]
        exchange = _exchange(rng, chosen, _slots(rng))
        if is_held_out(exchange.question) == held_out:
            return exchange


def sample_dialogue(rng: random.Random, *, held_out: bool, distractors: int = 1) -> Dialogue:
    """A call with memory: something is told, other things are asked, then it is asked back; or an answer repeated."""
    kind = rng.choice((*RECALLS, "repeat"))
    between = [sample_exchange(rng, held_out=held_out) for _ in range(rng.randint(0, distractors))]
    if kind == "repeat":
        first = sample_exchange(rng, held_out=held_out)
        again = Exchange("repeat", rng.choice(REPEATS), REPEATED + first.answer)
        return Dialogue((first, again))
    slots = _slots(rng)
    told = _exchange(rng, BY_NAME[kind], slots)
    while is_held_out(told.question) != held_out:
        slots = _slots(rng)
        told = _exchange(rng, BY_NAME[kind], slots)
    kept = [other for other in between if other.intent != kind]
    questions, answer = RECALLS[kind]
    asked = Exchange("recall", rng.choice(questions), answer.format_map(slots))
    return Dialogue((told, *kept, asked))


def sample_text(rng: random.Random, *, held_out: bool) -> str:
    """A sentence that some voice says: a question or an answer, now and then one that only a longer call holds."""
    while True:
        exchange = _exchange(rng, rng.choices(INTENTS, WEIGHTS)[0], _slots(rng))
        text = rng.choice((exchange.question, exchange.question, exchange.answer))
        if rng.random() < 0.15:
            odd = (rng.choice(REPEATS), digits(rng, rng.randint(1, 6)), REPEATED + exchange.answer, *_recall(rng))
            text = rng.choice(odd)
        if is_held_out(text) == held_out:
            return text


def _recall(rng: random.Random) -> tuple[str, str]:
    """A question for what was told before, and its answer."""
    questions, answer = rng.choice(tuple(RECALLS.values()))
    return _carried(rng, rng.choice(questions)), answer.format_map(_slots(rng))


# ---- words ------------------------------------------------------------------------------------------------------


def _templates() -> Iterator[str]:
    yield from (*BEFORE, *AFTER, *REPEATS, REPEATED)
    for intent in INTENTS:
        yield from intent.questions
    for questions, answer in RECALLS.values():
        yield from (*questions, answer)


def vocabulary() -> frozenset[str]:
    """Every word that can occur."""
    rng = random.Random(0)
    words = {*DIGITS, *DAYS, *ITEMS, *CITIES, *NAMES}
    for template in _templates():
        words.update(word for word in template.split() if not word.startswith("{"))
    for intent in INTENTS:  # the answers follow from the slots
        for index in range(len(DAYS) * len(DIGITS)):
            slots = _slots(rng) | {"day": DAYS[index % len(DAYS)], "digits": DIGITS[index % len(DIGITS)]}
            words.update(intent.answer(slots).split())
    return frozenset(words)


# ---- as recognisers write it ------------------------------------------------------------------------------------

NUMBER_WORDS = {word: str(value) for value, word in enumerate(DIGITS)} | {
    "oh": "0",
    "for": "4",  # what sounds alike compares equal: a recogniser chooses the spelling by taste
    "to": "2",
    "too": "2",
    "ten": "10",
    "eleven": "11",
    "twelve": "12",
    "thirty": "30",
}
LETTERS = re.compile(r"[^a-z0-9' ]+")


def comparable(text: str) -> str:
    """A text as judges compare it: lower case, no punctuation, every digit a word of its own.

    A recogniser writes "4.72" or "472" where the caller said "four seven two", and "12" for "twelve".
    """
    plain = LETTERS.sub(" ", text.lower().replace(".", "").replace(",", " ").replace("-", " "))
    words = [NUMBER_WORDS.get(word, word) for word in plain.split()]
    return " ".join(" ".join(word) if word.isdigit() else word for word in words)


# ---- what the shop says -----------------------------------------------------------------------------------------


def _slot_rows() -> list[dict[str, str]]:
    """Slots such that every word of each occurs."""
    numbers = [" ".join([digit] * ORDER_DIGITS) for digit in DIGITS]
    slots = {"day": DAYS, "item": ITEMS, "city": CITIES, "name": NAMES, "digits": numbers}
    count = max(map(len, slots.values()))
    return [{name: words[index % len(words)] for name, words in slots.items()} for index in range(count)]


def _answers_with(digits: bool) -> Iterator[str]:
    """What the shop says with an order's number, or without any."""
    for row in _slot_rows():
        yield from (intent.answer(row) for intent in INTENTS if (intent.name in NUMBERED) == digits)
        yield from (answer.format_map(row) for told, (_, answer) in RECALLS.items() if (told in NUMBERED) == digits)


@cache
def shop_sentences() -> frozenset[str]:
    """All that the shop says without an order's number: as an answer, and as one that is said again."""
    return frozenset(said for answer in _answers_with(digits=False) for said in (answer, REPEATED + answer))


@cache
def _numbered_sentences() -> frozenset[str]:
    return frozenset(masked(answer) for answer in _answers_with(digits=True))


def is_said_by_shop(text: str) -> bool:
    """Is this one of the shop's own sentences, whatever number it holds?"""
    return text in shop_sentences() or masked(text.removeprefix(REPEATED)) in _numbered_sentences()


# ---- what an answer is about ------------------------------------------------------------------------------------


@cache
def _answers() -> Mapping[str, str]:
    """Every answer, digits apart -> its intent."""
    return {masked(intent.answer(row)): intent.name for intent in INTENTS for row in _slot_rows()}


def masked(text: str) -> str:
    """A text as judges compare it, every digit the same."""
    return re.sub(r"[0-9]", "#", comparable(text))


def intent_of(answer: str) -> str:
    """The intent whose answers are nearest to these words; which digits they hold does not count."""
    words = masked(answer).split()
    return _answers()[min(_answers(), key=lambda known: distance(known.split(), words) / len(known.split()))]
