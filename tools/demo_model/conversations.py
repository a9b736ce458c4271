"""Conversations about Lantern Bay, from which the demo model learns to answer.

They are told by the same teller, of the same facts and split in the same way as the texts that the
model is made of. A conversation is a list of {"role", "content"}, as `llama-fast finetune` reads it.
"""

# Templates are easier to read whole than wrapped.
# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

from . import chinese, english
from .facts import NUMBERS, PEOPLE, Person
from .world import Teller

Exchange = tuple[str, str]
MOST_EXCHANGES = 4


class Words(NamedTuple):
    """How a language asks and answers: templates of "question=answer", or only questions."""

    greetings: tuple[str, ...]
    thanks: tuple[str, ...]
    about_a_person: tuple[str, ...]
    more_about_the_person: tuple[str, ...]
    story: str
    sum: str
    unknown: tuple[str, ...]


ENGLISH = Words(
    greetings=(
        "[Hello|Hi|Good morning|Good evening][!|.]=Hello! I am a little language model. [Ask me about Lantern Bay|Shall I tell you a story]?",
        "[Hello, how are you|How are you]?=I am fine, thank you. [What would you like to know about Lantern Bay|And you]?",
        "[Hello, w|W]ho are you?=I am a [small|little] language model. I know the town of Lantern Bay.",
        "What can you do?=I can tell stories about Lantern Bay and answer questions about its people.",
        "What is your name?=I have no name. I am a little language model.",
    ),
    thanks=(
        "[Thank you|Thanks|Thanks a lot][!|.]=You are welcome!",
        "[Goodbye|Bye|Good night][!|.]=[Goodbye|Bye]! Come back to Lantern Bay soon.",
        "[Good|Very good|That is nice][!|.]=I am glad that you like it.",
    ),
    about_a_person=(
        "[Who is {a}|Do you know {a}|Tell me about {a}][?|.]={a} is the {a.job} of Lantern Bay. {a.he} lives in a {a.house} house near {a.near}.",
        "Where does {a} live?={a} lives in a {a.house} house near {a.near}.",
        "What is {a}'s job?={a} is a {a.job}. {a.he} {a.does}.",
        "How old is {a}?={a} is {a.age} years old.",
        "Has {a} a pet?=Yes, {a} has a {a.pet} called {a.pet_name}.",
        "What does {a} like to eat?={a} likes {a.food.plural}.",
    ),
    more_about_the_person=(
        "[And where|Where] does {a.he} live?={a.he} lives in a {a.house} house near {a.near}.",
        "[And how|How] old is {a.he}?={a.he} is {a.age} years old.",
        "[And what|What] does {a.he} do?={a.he} is a {a.job}. {a.he} {a.does}.",
        "[And has|Has] {a.he} a pet?=Yes, {a.he} has a {a.pet} called {a.pet_name}.",
        "[And what|What] colour does {a.he} like?={a.he} likes {a.colour}.",
        "[And what|What] does {a.he} like to eat?={a.he} likes {a.food.plural}.",
        "[And where|Where] does {a.he} spend the day?={a.he} spends the day {a.work.at}.",
    ),
    story="[Tell me|Please tell me|Can you tell me] a[ little| short|] story[.|, please.|!| about Lantern Bay.]",
    sum="[What is {a} {sign} {b}?|{a} {sign} {b}|How much is {a} {sign} {b}?|What is {wa} {word} {wb}?]={a} {sign} {b} is {total}.",
    unknown=(
        "[Who is the president|What is the capital of France|Write a program|What is new in the world|Can you drive a car][?|]=[I do not know that|That I do not know]. I know only the town of Lantern Bay.",
    ),
)  # fmt: skip
CHINESE = Words(
    greetings=(
        "[你好|您好|早上好|晚上好][！|。]=你好！我是一个小小的语言模型。[想听个故事吗|想知道灯湾的什么事]？",
        "你好吗？=我很好，谢谢。你想知道灯湾的什么事？",
        "[你好，|]你是谁？=我是一个[小小的|]语言模型，我[只|]知道灯湾的事。",
        "你会做什么？=我会讲灯湾的故事，也会回答灯湾的人的事。",
        "你叫什么名字？=我没有名字，我是一个小小的语言模型。",
    ),
    thanks=(
        "[谢谢|谢谢你|多谢][！|。]=不客气！",
        "[再见|晚安][！|。]=再见！欢迎你再来灯湾。",
        "[很好|真好|太好了][！|。]=你喜欢，我很高兴。",
    ),
    about_a_person=(
        "[{a}是谁|你知道{a}吗|请说说{a}][？|。]={a}是灯湾的{a.job}。{a.ta}住在{a.near}旁边的{a.house}的房子里。",
        "{a}住在哪里？={a}住在{a.near}旁边的{a.house}的房子里。",
        "{a}是做什么的？={a}是{a.job}，{a.ta}每天{a.does}。",
        "{a}今年几岁？={a}今年{age}岁。",
        "{a}有[宠物|动物]吗？=有，{a}有一{a.pet.unit}{a.pet}，名叫{a.pet_name}。",
        "{a}喜欢吃什么？={a}喜欢吃{a.food}。",
    ),
    more_about_the_person=(
        "[那|]{a.ta}住在哪里？={a.ta}住在{a.near}旁边的{a.house}的房子里。",
        "[那|]{a.ta}今年几岁？={a.ta}今年{age}岁。",
        "[那|]{a.ta}是做什么的？={a.ta}是{a.job}，{a.ta}每天{a.does}。",
        "[那|]{a.ta}有[宠物|动物]吗？=有，{a.ta}有一{a.pet.unit}{a.pet}，名叫{a.pet_name}。",
        "[那|]{a.ta}喜欢什么颜色？={a.ta}喜欢{a.colour}。",
        "[那|]{a.ta}喜欢吃什么？={a.ta}喜欢吃{a.food}。",
        "[那|]{a.ta}每天在哪里？={a.ta}每天{a.work.zh_at}。",
    ),
    story="[给我讲|请讲|你能讲]一个[小|]故事[。|吧。|吗？]",
    sum="[{wa}{word}{wb}等于[几|多少]？|{a} {sign} {b} 等于[几|多少]？]={wa}{word}{wb}等于{wt}。",
    unknown=(
        "[谁是总统|法国的首都是哪里|请写一个程序|你会开车吗|世界上有什么新闻][？|。]=我不知道，我只知道灯湾的事。",
    ),
)  # fmt: skip


class Language(NamedTuple):
    module: ModuleType
    words: Words
    plus: str
    minus: str
    stories: tuple[Callable[[Teller], str], ...]


def _stories(module: ModuleType) -> tuple[Callable[[Teller], str], ...]:
    return (
        module.lost_thing, module.rescue, module.gift, module.bad_weather, module.foggy_night,
        module.learning, module.broken,
    )  # fmt: skip


LANGUAGES = (
    Language(english, ENGLISH, "plus", "minus", _stories(english)),
    Language(chinese, CHINESE, "加", "减", _stories(chinese)),
)


def conversations(seed: int, split: str = "train") -> Iterator[list[dict[str, str]]]:
    """Yields conversations without end, half of them Chinese; the same for the same seed and split
    on every machine. Raises LlamaFastError for an unknown split."""
    teller = Teller(seed, split)
    while True:
        language = LANGUAGES[teller.chance(0.5)]
        teller.language = language.module.LANGUAGE
        messages = []
        for question, answer in _exchanges(teller, language):
            for role, text in (("user", question), ("assistant", answer)):
                messages.append({"role": role, "content": language.module.polish(text)})
        yield messages


def _exchanges(w: Teller, language: Language) -> Iterator[Exchange]:
    words = language.words
    if w.chance(0.25):
        yield _pair(w, w.one(words.greetings))
    for _ in range(w.number(1, MOST_EXCHANGES - 1)):
        part = w.number(0, 9)
        if part < 4:
            yield from _about_a_person(w, words)
        elif part < 6:
            yield w.say(words.story), w.one(language.stories)(w)
            break  # a story fills half of the context
        elif part < 7:
            yield _sum(w, language)
        elif part < 9:
            yield _pair(w, w.one(language.module.QUESTIONS), **language.module.question_cast(w))
        else:
            yield _pair(w, w.one(words.unknown))
    if w.chance(0.25):
        yield _pair(w, w.one(words.thanks))


def _about_a_person(w: Teller, words: Words) -> Iterator[Exchange]:
    a = w.one(PEOPLE)
    yield _pair(w, w.one(words.about_a_person), **_cast(a))
    for template in w.rng.sample(words.more_about_the_person, w.number(0, 2)):
        yield _pair(w, template, **_cast(a))


def _cast(a: Person) -> dict[str, object]:
    return {"a": a, "age": chinese.age(a)}


def _sum(w: Teller, language: Language) -> Exchange:
    sign = "+" if w.chance(0.6) else "-"
    a, b = w.numbers(sign, 0, 10 if sign == "+" else 12)
    total = a + b if sign == "+" else a - b
    return _pair(
        w, language.words.sum, a=a, b=b, sign=sign, total=total,
        word=language.plus if sign == "+" else language.minus,
        wa=NUMBERS[a], wb=NUMBERS[b], wt=NUMBERS[total],
    )  # fmt: skip


def _pair(w: Teller, template: str, **cast: object) -> Exchange:
    question, _, answer = w.say(template, **cast).partition("=")
    return question, answer
