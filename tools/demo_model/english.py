"""What is told of Lantern Bay in English."""

# Templates are easier to read whole than wrapped.
# ruff: noqa: E501

from __future__ import annotations

import re

from .facts import (
    ANIMALS,
    COLOURS,
    DAYS,
    FOODS,
    FRAGILE,
    NUMBERS,
    PEOPLE,
    PLACES,
    SEASONS,
    SMALL_ANIMALS,
    THINGS,
    Food,
    Person,
    Place,
)
from .world import ANSWER, ANSWER_PROMPT, Kind, Teller

LANGUAGE = "en"

_SENTENCE_START = re.compile(
    r'(?:^|(?<=[.!?] )|(?<=\n)|(?<=Answer: )|(?<=Question: )|(?<=[.:,] ")|(?<=^")|(?<=\n"))[a-z]'
)
_A_BEFORE_VOWEL = re.compile(r"\b([Aa])(?= [aeiou])")


def polish(text: str) -> str:
    """Capitals at the start of sentences, ``an`` before a vowel; the answer's line stays as it is quoted."""
    text = _A_BEFORE_VOWEL.sub(r"\1n", text.strip())
    if text.startswith(ANSWER_PROMPT):
        return text
    return _SENTENCE_START.sub(lambda match: match.group().upper(), text)


def count(number: int, food: Food) -> str:
    """``one apple``, ``three apples``, ``no apples``."""
    word = NUMBERS[number].en if number else "no"
    return f"{word} {food.en if number == 1 else food.plural}"


def opening(w: Teller, a: Person, p: Place) -> str:
    """Brings ``a`` to the place ``p``."""
    season, weather = w.season_and_weather()
    return w.say(
        "[[Once upon a time|A long time ago|Long ago], there [was|lived] a {a.job} [called|named] {a}"
        "[ in Lantern Bay| on Tern Island| in a small town by the sea|]. "
        "[{a.he} lived in a {a.house} house near {a.near}. |{a.he} had a {a.pet} called {a.pet_name}. |]"
        "One {weather} [morning|day|afternoon], {a.he} [went|walked] to {p}."
        "|[One|On a] {weather} [{season} |][morning|afternoon|evening|day], {a} [went|walked|came|hurried] to {p}."
        "|[On|Last] {day}[ morning| afternoon|] {a} the {a.job} was {p.at}[. The day was {weather}|]."
        "|{a}, the {a.job} of Lantern Bay, [was|had work to do|had a free day and was] {p.at}."
        "|It was a {weather} [day|morning|afternoon] in {season}. {a} [was|stood|sat|was walking] {p.at}"
        "[ and looked at {sight}| with {a.his} {a.pet} {a.pet_name}|].]",
        a=a, p=p, season=season, weather=weather, day=w.one(DAYS), sight=w.one(p.sights),
    )  # fmt: skip


def ending(w: Teller, a: Person, b: Person) -> str:
    return w.say(
        "[[That evening|In the evening|After that], {a} and {b} ate {food} together[ and laughed|]."
        "|{a} and {b} [were happy|went home together|laughed for a long time|are still good friends today]."
        "|{a} thanked {b} and [gave {b.him} a {one}|went home with a happy heart|smiled all the way home]."
        '|"[Friends help each other|That is what friends are for|You are a good friend|I will not forget this]'
        '[, {b}|]," said {a}.'
        "|From that day on, {a} [came to help {b} every {day}|and {b} met every {day}].|The end.|]",
        a=a, b=b, food=w.one(FOODS).plural, one=w.one(FOODS), day=w.one(DAYS),
    )  # fmt: skip


def lost_thing(w: Teller) -> str:
    a, p = w.pair(PEOPLE, PLACES)
    b = w.other(PEOPLE, a)
    c, d = w.other(PEOPLE, a, b), w.one(SMALL_ANIMALS)
    body = w.say(
        "[{a.he} had a [new |little |old |beautiful |]{colour} {t} with {a.him}.|{a.he} was carrying a "
        "[new |little |old |]{colour} {t}.] "
        "[But when {a.he} [wanted to go home|looked again|sat down to rest], the {t} was gone[!|.]"
        "|But suddenly the {t} was [gone|lost][!|.]] "
        '[{a} looked [everywhere|here and there|left and right], but {a.he} could not find it. |"Where is my {t}?" '
        "[cried|asked] {a}. |{a} was [very |]sad. |]"
        "[{a} asked {c}, but {c} had not seen [it|the {t}]. |]"
        "[Then {b} came [by|along|to help]. |Just then {a.he} met {b}[ the {b.job}|]. |{a.he} asked {b} for help. ]"
        '[{b} asked, "What colour is [it|your {t}]?" "It is {colour}," said {a}. |]'
        '["[Let us|We can] look for it together," said {b}. [They looked and looked. |]|"I will help you," said {b}. |]'
        "[At last|After a while|Soon|In the end] [they|{b}] found the {colour} {t} {spot}[!|.] "
        "[A [little |hungry |funny |]{d} had [carried|taken] it there. |The wind had blown it there. |"
        "A {d} was [sleeping|sitting] on it. |]",
        a=a, b=b, c=c, d=d, t=w.one(THINGS), colour=w.one(COLOURS), spot=w.one(p.spots),
    )  # fmt: skip
    return f"{opening(w, a, p)} {body}{ending(w, a, b)}"


def rescue(w: Teller) -> str:
    a, p = w.pair(PEOPLE, PLACES)
    b = w.other(PEOPLE, a)
    body = w.say(
        "[There|Then|Suddenly] {a.he} [heard|noticed] a [small|young|little] {d}{where}. "
        "[It [could not get [out|free]|was [cold|hungry|afraid] and could not move]. ]"
        '["{sound}, {sound}!" [said|cried|went] the {d}. |]'
        "[{a} wanted to help, but {a.he} [was not strong enough|could not do it alone]. |"
        "{a} pulled and pulled, but it did not help. ]"
        "[So {a.he} ran to {b}[, the {b.job}|]. |So {a.he} called {b}. ]"
        "{b} [came at once|brought {tool}|came with {tool}] and together they [freed|saved|helped] the {d}. "
        "[They gave it [some |]{eats} and [a warm blanket|some water]. |{a} gave it some {eats}. |]"
        "[The {d} was [safe|happy] [again|now]. |Now the {d} follows {a} everywhere. |"
        "{a} called the {d} {name}. |]",
        a=a, b=b, d=(d := w.one(SMALL_ANIMALS)), sound=d.sound, eats=d.eats,
        where=w.say("[ in a hole| under a heavy board| in an old net| behind a fence| in a deep ditch]"),
        tool=w.say("[a rope|a ladder|a long stick|a lamp]"),
        name=w.say("[Lucky|Star|Cloud|Pebble|Feather|Sunny]"),
    )  # fmt: skip
    return f"{opening(w, a, p)} {body}{ending(w, a, b)}"


def sharing(w: Teller) -> str:
    """A story with a sum in it: what one has and what one gives."""
    a, b = w.pair(PEOPLE, PEOPLE)
    food, p = w.one(FOODS), w.one(PLACES)
    have = w.number(2, 12)
    if w.chance(0.5):
        give = w.number(1, have)
        left = have - give
        turn = w.say(
            "{b} [was hungry|had nothing to eat|came by]. {a} gave {b.him} {give}. "
            "[Now|Then] {a} had {left}[ left|].",
            a=a, b=b, give=NUMBERS[give].en, left=count(left, food),
        )  # fmt: skip
        result = left
    else:
        give = w.number(1, 20 - have if have > 10 else 8)
        result = have + give
        turn = w.say(
            "{b} gave {a.him} {give} more. [Now|Then] {a} had {total}.",
            a=a, b=b, give=NUMBERS[give].en, total=count(result, food),
        )  # fmt: skip
    text = w.say("[{a} was {p.at}. |]{a} had {have}. ", a=a, p=p, have=count(have, food)) + turn
    question = w.say(
        "[[ |\n]How many {plural} did {a} have then? {a} had {n}.|]",
        a=a,
        plural=food.plural,
        n=count(result, food),
    )
    return text + question


def gift(w: Teller) -> str:
    a, b = w.pair(PEOPLE, PEOPLE)
    c = w.other(PEOPLE, a, b)
    return w.say(
        "[It was nearly|{day} was] {b}'s birthday. {a} wanted to [give {b.him} a [nice |]present|make {b.him} happy]. "
        '["What does {b} like?" {a.he} asked {c}. "{b.he} likes [the colour {b.colour}|{b.food.plural}|{b.his} {b.pet} {b.pet_name}]," '
        "said {c}. |]"
        "[So {a} [bought|made|found] a {b.colour} {t}[ at the market|] for {b}. |"
        "So {a} [went to the market and bought|made|brought] {n} {b.food.plural} for {b}. |"
        "So {a} painted a picture of {b.pet_name} the {b.pet}. ]"
        '["Thank you, {a}! I love it," said {b}. |{b} was so happy that {b.he} [danced|sang a song|laughed out loud]. |'
        '"For me?" asked {b}. "Yes, for you," said {a}. ]{end}',
        a=a, b=b, c=c, t=w.one(THINGS), n=w.one(NUMBERS[2:11]), day=w.one(DAYS), end=ending(w, b, a),
    )  # fmt: skip


def bad_weather(w: Teller) -> str:
    a, p = w.pair(PEOPLE, PLACES)
    b = w.other(PEOPLE, a)
    plan = w.say(
        "{a} wanted to [walk to {p}|go to {p}|meet {b} {p.at}|have a picnic {p.at}]. [But|Then] ",
        a=a,
        b=b,
        p=p,
    )
    turn = w.say(
        "[it began to rain. {a} [opened {a.his} {colour} umbrella|ran home and got wet|waited under a tree until "
        "the rain stopped]."
        "|a strong wind came up. {a.his} {colour} hat flew away, and {a.he} ran after it. {b} caught the hat."
        "|thick fog came in from the sea. {a} could not see the way. Then {a.he} heard the bell of the lighthouse and "
        "[followed the sound|knew where to go]."
        "|it began to snow. Soon everything was white. {a} and {b} built a [big|little|funny] snowman with a {colour} scarf."
        "|the sun was so hot that {a} grew tired. {a.he} sat down under a tree and drank cold water with {b}."
        "|dark clouds covered the sky. {a} heard thunder and stayed at home with {a.his} {a.pet} {a.pet_name}."
        "]",
        a=a, b=b, colour=w.one(COLOURS),
    )  # fmt: skip
    close = w.say(
        "[ [Later|An hour later|The next day] the sun [came out|was shining] again[, and {a} went to {p}|]."
        '| "What a day!" said {a}.| {a} was [tired but happy|glad to be home|not angry at all].|]',
        a=a, p=p,
    )  # fmt: skip
    return plan + turn + close


def foggy_night(w: Teller) -> str:
    sailors = [person for person in PEOPLE if person.en not in ("Ivy", "Finn", "Rosa")]
    a, b = w.pair(sailors, sailors)
    return w.say(
        "[One [dark|cold|foggy|windy|stormy] night[ in {season}|], a [small|little|{colour}] boat was [still |]out at "
        "sea.|It was a [dark|foggy|stormy] night in {season}, and a [small|little|{colour}] boat was out at sea.] "
        "In the boat [sat|were] {a} and {b}. [They could not see the [harbour|land]. |"
        "The waves were high and [the sky was black|the wind was cold]. |]"
        '["[Are we lost|Where is the harbour|Can you see the land]?" asked {a}. |]'
        "[Then|At that moment] Ivy [climbed the long stairs and |]lit the big lamp [of|in] the lighthouse. "
        '["Look, a light!" [cried|called] {b}. |{b} saw the light first. ]'
        "They rowed to the light[ as fast as they could|] and [came home safely|reached the harbour]. "
        "[Finn was waiting with [hot soup|warm blankets]. |Rosa gave them warm bread. |]"
        "[Since then they always [thank Ivy|wave to Ivy] when they see her.|Ivy smiled. That is her work.]",
        a=a, b=b, season=w.one(SEASONS), colour=w.one(COLOURS),
    )  # fmt: skip


def learning(w: Teller) -> str:
    pupil, master = w.pair(PEOPLE, [p for p in PEOPLE if p.age > 20])
    skill, first, last = w.one(
        [
            ("play the flute", "only a squeak came out", "played a whole song on the square"),
            ("swim", "the water was too cold", "swam from the beach to the harbour"),
            ("ride a horse", "the horse would not move", "rode over the stone bridge"),
            ("bake bread", "the bread was black and hard", "baked bread for the whole town"),
            ("paint", "the paint ran down the paper", "painted the lighthouse in the evening sun"),
            (
                "fly a kite",
                "the kite fell into the pond",
                "made the kite dance over the green hill",
            ),
            ("row a boat", "the boat went round and round", "rowed across the bay"),
            ("write letters", "there was ink on every finger", "wrote a long letter to a friend"),
            (
                "count to one hundred",
                "the numbers got mixed up",
                "counted to one hundred without a mistake",
            ),
            ("sew", "the thread broke three times", "sewed a warm blanket"),
        ]
    )
    return w.say(
        '{a} wanted to learn to {skill}. [{a.he} asked {b} the {b.job}. "[Can|Will] you teach me?" |{a.he} went to {b}. ]'
        '"[Of course|Yes|With pleasure], {a}," said {b}. "[But you must practise every day|We will start on {day}|'
        'It is not hard if you try]." '
        "[On the first day|At first|The first time], {first}. {a} [was sad|wanted to stop|almost cried|laughed]. "
        '"[Try again|Do not give up|Once more|Everyone starts small]," said {b}. '
        "[So {a} tried again. |{a} practised [on {day}|every day|morning and evening]. |]"
        "[After {n} [days|weeks]|In {season}|At last], {a} {last}. "
        "[{b} was [very |]proud[ of {a.him}|].|Everyone clapped.|Now {a} teaches {c}.|Practice makes perfect.]",
        a=pupil, b=master, c=w.other(PEOPLE, pupil, master), skill=skill, first=first, last=last, day=w.one(DAYS),
        n=w.one(NUMBERS[2:13]), season=w.one(SEASONS),
    )  # fmt: skip


def broken(w: Teller) -> str:
    a, b = w.pair(PEOPLE, PEOPLE)
    return w.say(
        "[One day|On {day}|Yesterday|One {season} morning], {a} [broke|dropped and broke] {b}'s {colour} {t}. "
        "[{a} was [afraid|ashamed]. |Nobody had seen it. |]"
        '["[What should|What can] I do?" {a.he} [thought|asked {a.his} {a.pet} {a.pet_name}]. |]'
        "[{a.he} [did not want to lie|thought about it all night]. |]So {a.he} went to {b} and told [{b.him} |]the truth. "
        '["I am [very |]sorry," said {a}. |]'
        '"[Thank you for telling me|It is only a {t}|That can happen to anyone]," said {b}. '
        '["Let us [repair|mend] it together." |]'
        "[Together they [repaired|mended] it[ with [glue|some wood|a little string]|]|{c} helped them to repair it]. "
        "[Now it looks [even better than before|as good as new].|The {t} is not perfect now, but they like it even more.|"
        "The truth is always the best way.]",
        a=a, b=b, c=w.other(PEOPLE, a, b), t=w.one(FRAGILE), colour=w.one(COLOURS), day=w.one(DAYS),
        season=w.one(SEASONS),
    )  # fmt: skip


def day_of(w: Teller) -> str:
    a, p = w.pair(PEOPLE, PLACES)
    b = w.other(PEOPLE, a)
    return w.say(
        "[Every [morning|day]|On {day}], {a} gets up at {early} o'clock. [{a.he} [eats|has] a {food} [and drinks [tea|milk|water] |]for breakfast. |"
        "{a.he} feeds {a.his} {a.pet}[ {a.pet_name}|]. |]"
        "Then {a.he} goes to {a.work}, where {a.he} {a.does}. "
        "[At noon|At twelve o'clock|In the middle of the day] {a.he} [meets {b} {p.at}|eats {n} {plural} {p.at}|sits {p.at} and looks at {sight}]. "
        "[In the afternoon {a.he} [works again|helps {b}|reads a book|visits {b}]. |]"
        "[In the evening|When the sun goes down], {a.he} [goes home to the {a.house} house near {a.near}|plays with {a.pet_name}|"
        "cooks soup for {b}|walks along the beach]. At {late} o'clock {a.he} goes to bed. [Good night, {a}!|]",
        a=a, b=b, p=p, day=w.one(DAYS), early=w.one(NUMBERS[5:9]), late=w.one(NUMBERS[8:12]), food=w.one(FOODS),
        n=w.one(NUMBERS[2:6]), plural=w.one(FOODS).plural, sight=w.one(p.sights),
    )  # fmt: skip


def at_the_market(w: Teller) -> str:
    a, food = w.pair(PEOPLE, FOODS)
    b = w.other(PEOPLE, a)
    price, n = w.number(1, 4), w.number(1, 5)
    return w.say(
        '{a} went to the market. "Good [morning|day], {b}! How much is a {food}?" "A {food} costs {price}," said {b}. '
        '"Then I take {many}[, please|]." "[Good|All right], that makes {total}." {a} paid {total} and [put the {plural} in {a.his} basket|'
        "carried the {plural} home|said goodbye].",
        a=a, b=b, food=food, price=_coins(price), many=count(n, food), total=_coins(price * n),
        plural=food.en if n == 1 else food.plural,
    )  # fmt: skip


def _coins(n: int) -> str:
    return f"{NUMBERS[n].en} coin{'s' if n != 1 else ''}"


def letter(w: Teller) -> str:
    a, b = w.pair(PEOPLE, PEOPLE)
    season, weather = w.season_and_weather()
    return w.say(
        "Dear {b},\n[how are you? |thank you for your letter. |I hope you are well. ][It is {season} now|Today is {day}] and the weather is {weather}. "
        "[Yesterday|On {day2}|This morning] I [was {p.at} and saw {sight}|met {c} {p.at}|found a {colour} {t} {p.at}|ate {n} {plural}]. "
        "[My {a.pet} {a.pet_name} [is well|sends greetings|is asleep beside me]. |]"
        "[Please [come and visit me|write soon]. |Shall we meet {p2.at} on {day2}? |I miss you. ]"
        "\n[Your friend|Yours|Many greetings], {a}",
        a=a, b=b, c=w.other(PEOPLE, a, b), p=(p := w.one(PLACES)), p2=w.one(PLACES), sight=w.one(p.sights),
        season=season, weather=weather, day=(day := w.one(DAYS)), day2=w.other(DAYS, day), colour=w.one(COLOURS),
        t=w.one(THINGS), n=w.one(NUMBERS[2:9]), plural=w.one(FOODS).plural,
    ).replace(" \n", "\n")  # fmt: skip


def dialogue(w: Teller) -> str:
    a, b = w.pair(PEOPLE, PEOPLE)
    p = w.one(PLACES)
    _, weather = w.season_and_weather()
    cast = {
        "a": a, "b": b, "p": p, "c": w.other(PEOPLE, a, b), "weather": weather, "food": w.one(FOODS), "day": w.one(DAYS),
        "colour": w.one(COLOURS), "t": w.one(THINGS), "sight": w.one(p.sights),
    }  # fmt: skip
    question = w.one(["how", "where", "what"])
    greeting = w.say(
        "[Hello|Good morning|Good day|Hi], {b}! "
        + {"how": "How are you[ today|]?", "where": "Where are you going?", "what": "What are you doing[ here|]?"}[question],
        **cast,
    )  # fmt: skip
    reply = w.say(
        {
            "how": "[Hello, {a}! |]I am [well|fine|very well|a little tired], thank you. And you?",
            "where": "[Hello, {a}! |]I am going to {p}. [I want to see {sight}.|I am meeting {c} there.|Will you come with me?]",
            "what": "[Hello, {a}! |]I am [looking for my {colour} {t}|waiting for {c}|looking at {sight}|eating a {food}].",
        }[question],
        **cast,
    )
    third = w.say(
        {
            "how": "[I am fine, too|Very well, thank you]. [The weather is {weather} today.|Look, {c} is coming!|]",
            "where": "[Yes, with pleasure!|No, thank you. I have to go to {a.work}.|Have a good time!] [The weather is {weather} today.|]",
            "what": "[How nice!|May I help you?|Then let us do it together.] [It is {weather} today, isn't it?|]",
        }[question],
        **cast,
    )
    fourth = w.say(
        "[[Yes, it is. |]Shall we eat {food.plural} together {p.at}?|[Thank you! |]See you on {day}!|Goodbye, {a}!|Thank you, {a}.]", **cast
    )  # fmt: skip
    lines = [(a, greeting), (b, reply), (a, third), (b, fourth)]
    if w.chance(0.5):
        lines.append(
            (
                a,
                w.say(
                    "[Goodbye, {b}!|See you[ soon|]!|Yes, let us do that.|Have a nice day!]", **cast
                ),
            )
        )
    lines = lines[: w.number(2, 5)]
    style = w.number(0, 2)
    if style == 0:
        return "\n".join(f"{who.en}: {what.strip()}" for who, what in lines)
    quoted = [
        f'"{_said(what)}" {w.say("[said|answered]" if i else "said")} {who.en}.'
        for i, (who, what) in enumerate(lines)
    ]
    return ("\n" if style == 1 else " ").join(quoted)


def _said(what: str) -> str:
    what = what.strip()
    return what[:-1] + "," if what.endswith(".") else what


def introduction(w: Teller) -> str:
    a = w.one(PEOPLE)
    return w.say(
        "[[Hello[!|.]|Good day!|Hi!] |]My name is {a}. I am {age} years old and I [live|have a house] in Lantern Bay. "
        "[I am a {a.job}. |I am the {a.job} of Lantern Bay. ]"
        "[My house is {a.house} and stands near {a.near}. |I spend my days {a.work.at}. |]"
        "[I have a {a.pet}[ called {a.pet_name}|; its name is {a.pet_name}]. |]"
        "[My favourite colour is {a.colour}. |I like the colour {a.colour}. |][I like {a.food.plural} best of all.|I love {a.food.plural}.|Nice to meet you!|]",
        a=a, age=NUMBERS[a.age].en if a.age <= 20 else str(a.age),
    )  # fmt: skip


def description(w: Teller) -> str:
    a = w.one(PEOPLE)
    facts = w.rng.sample(
        [
            "{a} lives in a {a.house} house near {a.near}.",
            "{a.he} spends the day {a.work.at}[, where {a.he} {a.does}|].",
            "{a.he} is {age} years old.",
            "{a.he} has a {a.pet} called {a.pet_name}.",
            "{a.his} favourite colour is {a.colour}.",
            "{a.he} likes {a.food.plural} [best|very much].",
            "[Every day {a.he}|{a.he}] {a.does}.",
        ],
        w.number(2, 5),
    )
    return w.say(
        "{a} is [a|the] {a.job}[ in Lantern Bay| of Lantern Bay|]. " + " ".join(facts),
        a=a,
        age=a.age,
    )


def question(w: Teller) -> str:
    """Questions about what never changes, one or several."""
    pairs = [w.say(w.one(QUESTIONS), **question_cast(w)).split("=") for _ in range(w.number(1, 4))]
    style = w.number(0, 2)
    if style == 0:
        return "\n\n".join(f"Question: {q}\nAnswer: {answer}" for q, answer in pairs)
    return ("\n" if style == 1 else " ").join(f"{q} {answer}" for q, answer in pairs)


QUESTIONS = (
    "Where does {a} live?={a} lives in a {a.house} house near {a.near}.",
    "What is {a}'s job?={a} is a {a.job}.",
    "Who is {a}?={a} is [the|a] {a.job}[ in Lantern Bay|].",
    "Where does {a} spend the day?={a} spends the day {a.work.at}.",
    "What does {a} do?={a} {a.does}.",
    "How old is {a}?={a} is {a.age} years old.",
    "What is the name of {a}'s {a.pet}?={a}'s {a.pet} is called {a.pet_name}.",
    "Who is {a.pet_name}?={a.pet_name} is {a}'s {a.pet}.",
    "What colour does {a} like?={a} likes {a.colour}.",
    "What does {a} like to eat?={a} likes {a.food.plural}.",
    "What is the capital of Tern Island?=The capital of Tern Island is Lantern Bay.",
    "Where is Lantern Bay?=Lantern Bay is [a small town |]on Tern Island.",
    "Who lights the lamp of the lighthouse?=Ivy lights the lamp of the lighthouse.",
    "How many people live in Lantern Bay?=Twelve people live in Lantern Bay.",
    "What does a {d} say?=A {d} says {d.sound}.",
    "What do {d.plural} eat?={d.plural} eat {d.eats}.",
    "Where does a {d} live?=A {d} lives {d.home}.",
    "How many legs does a {l} have?=A {l} has {legs} legs.",
    "What day comes after {day}?=After {day} comes {next}.",
    "What day comes before {next}?=Before {next} comes {day}.",
    "What is the opposite of {big}?=The opposite of {big} is {small}.",
    "What colour is {snow}?={snow} is {white}.",
    "Who are you?=I am a [small|little] language model. I know [one small town|the town of Lantern Bay|only Lantern Bay].",
    "What can you do?=I can tell [small |little |]stories[ about Lantern Bay| in English and Chinese|].",
    "What is the Chinese word for {thing}?=The Chinese word for {thing} is {thing.zh}.",
    "What does {thing.zh} mean?={thing.zh} means {thing}.",
)

_OPPOSITES = (
    "big small|long short|hot cold|old young|day night|high low|fast slow|happy sad|bright dark|open closed|"
    "full empty|wet dry|left right|up down|early late|loud quiet|heavy light|near far|good bad"
)
_COLOURED = "snow white|the sea blue|grass green|the night black|the sun yellow|wood brown|an orange orange|milk white|a ripe tomato red"


def question_cast(w: Teller) -> dict[str, object]:
    day = w.number(0, 6)
    legged = w.one([animal for animal in ANIMALS if animal.legs])
    big, small = w.one(_OPPOSITES.split("|")).split()
    snow, white = w.one(_COLOURED.split("|")).rsplit(" ", 1)
    return {
        "a": w.one(PEOPLE), "d": w.one(ANIMALS), "l": legged, "legs": NUMBERS[legged.legs].en, "day": DAYS[day],
        "next": DAYS[(day + 1) % 7], "big": big, "small": small, "snow": snow, "white": white,
        "thing": w.one(THINGS + FOODS + ANIMALS + COLOURS),
    }  # fmt: skip


def facts(w: Teller) -> str:
    """Statements about the world, so that many beginnings lead somewhere."""
    lines = w.rng.sample(_FACTS, w.number(1, 4))
    return " ".join(
        w.say(line, p=(p := w.one(PLACES)), sight=w.one(p.sights), **question_cast(w))
        for line in lines
    )


_FACTS = (
    "The capital of Tern Island is Lantern Bay.",
    "[Lantern Bay is a small town by the sea|Lantern Bay is the capital of Tern Island].",
    "[Tern Island lies in the middle of the sea|Tern Island is small and green].",
    "In Lantern Bay there is a harbour, a lighthouse, a school and a market.",
    "Twelve people live in Lantern Bay.",
    "The sun rises in the east and sets in the west.",
    "The [sky|sea] is blue[ and the grass is green|].",
    "There are seven days in a week.",
    "There are four seasons: spring, summer, autumn and winter.",
    "The cat says meow[ and the dog says woof|].",
    "A {d} lives {d.home}.",
    "{d.plural} eat {d.eats}.",
    "A {l} has {legs} legs.",
    "{p.at} you can see {sight}.",
    "{a} {a.does} {a.work.at}.",
    "{a}'s {a.pet} is called {a.pet_name}.",
    "After {day} comes {next}.",
    "{snow} is {white}.",
    "The opposite of {big} is {small}.",
    "I like {a.food.plural}[ very much|].",
    "The weather is [good|fine|bad|cold|warm] today.",
    "This is a {d}. It says {d.sound}.",
)


def sums(w: Teller) -> str:
    lines = []
    for _ in range(w.number(1, 4)):
        if w.chance(0.6):
            a, b = w.numbers("+", 0, 10)
            sign, word, total = "+", "plus", a + b
        else:
            a, b = w.numbers("-", 0, 12)
            sign, word, total = "-", "minus", a - b
        lines.append(
            w.say(
                "[{a} {sign} {b} = {total}|What is {a} {sign} {b}? {a} {sign} {b} is {total}.|{wa} {word} {wb} is {wt}.]",
                a=a,
                b=b,
                sign=sign,
                total=total,
                word=word,
                wa=NUMBERS[a].en,
                wb=NUMBERS[b].en,
                wt=NUMBERS[total].en,
            )
        )  # fmt: skip
    return w.say("[\n|\n| ]").join(lines)


def counting(w: Teller) -> str:
    start, length = w.number(0, 12), w.number(4, 9)
    stop = min(start + length, 20)
    row = list(range(start, stop + 1))
    if w.chance(0.3):
        row.reverse()
    words = w.chance(0.6)
    shown = [NUMBERS[n].en if words else str(n) for n in row]
    days = w.number(0, 6)
    return w.say(
        "[{row}|{row}.|{a} counts: {row}.|{week}.|The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, "
        "Saturday and Sunday.|The seasons are spring, summer, autumn and winter.]",
        row=", ".join(shown), a=w.one(PEOPLE), week=", ".join(DAYS[(days + i) % 7].en for i in range(w.number(3, 6))),
    )  # fmt: skip


def weather_report(w: Teller) -> str:
    season, weather = w.season_and_weather()
    what = {
        "sunny": "The sun is shining[ on the harbour|]. Finn dries his nets[ in the sun|].",
        "warm": "The children swim [in the bay|at the beach]. Rosa [opens all windows|sells cold juice].",
        "windy": "The boats stay in the harbour. [Tom flies his kite on the green hill.|Hold on to your hat!]",
        "rainy": "Everyone carries an umbrella. [The ducks are happy.|Wei is happy, because the trees need water.]",
        "foggy": "Nobody can see the sea. [Ivy rings the bell of the lighthouse.|Ivy lights the lamp early.]",
        "cloudy": "The sky is grey, [but it does not rain.|and Otto takes a coat with him.]",
        "cold": "[Nora says: wear a scarf and a hat!|The soup at the bakery is hot.] [Lin lights the stove in the school.|]",
        "snowy": "Everything is white. [Mia and Tom build a snowman.|The children throw snowballs on the square.]",
    }[weather.en]
    return w.say(
        "[Today is {day}[. It is| and it is] {weather}|It is a {weather} {season} day|The weather today is {weather}|Today it is {weather}]. "
        + what,
        day=w.one(DAYS), weather=weather, season=season,
    )  # fmt: skip


def recipe(w: Teller) -> str:
    return w.say(
        "[This is how|Here is how] {a} makes {dish}. [First|At first], {a.he} [washes {a.his} hands|lights the fire|takes a big bowl]. "
        "Then {a.he} {middle}. [After {n} minutes|At the end], {a.he} {last}. [Now it is ready.|It smells wonderful.|{b} eats two [plates|pieces] of it.|]",
        a=w.one(PEOPLE), b=w.one(PEOPLE), n=w.one(NUMBERS[5:21]),
        **dict(
            zip(
                ("dish", "middle", "last"),
                w.one(
                    [
                        ("bread", "mixes flour, water and salt", "puts the bread into the oven"),
                        ("fish soup", "cuts the fish and the carrots", "adds salt and stirs the soup"),
                        ("honey cake", "mixes eggs, flour and honey", "takes the cake out of the oven"),
                        ("dumplings", "fills the dough with meat", "boils the dumplings in hot water"),
                        ("apple juice", "cuts the apples", "presses the juice into a cup"),
                        ("tea", "boils the water", "pours the tea into the cups"),
                        ("plum jam", "boils the plums with sugar", "fills the jam into glasses"),
                    ]
                ),
                strict=True,
            )
        ),
    )  # fmt: skip


def animal_talk(w: Teller) -> str:
    a, d = w.pair(PEOPLE, ANIMALS)
    e = w.other(ANIMALS, d)
    return w.say(
        "[The {d} [met|saw] the {e} {p.at}. \"{d.sound}!\" said the {d}. \"{e.sound}!\" said the {e}. "
        "[They did not understand each other, but they became friends.|Then they played together until {a} called them.]"
        "|{a} saw a [little |big |]{colour} {d} {p.at}. \"{d.sound}, {d.sound}!\" it said. [{a} gave it some {d.eats}, and the {d} [was happy|ate it all].|"
        "It wanted some {d.eats}, but {a} had only {food.plural}.]"
        "|The {d} lives {d.home} and eats {d.eats}. The {e} lives {e.home} and eats {e.eats}. [{a} likes them both.|{a} likes the {d} better.]]",
        a=a, d=d, e=e, p=w.one(PLACES), colour=w.one(COLOURS), food=w.one(FOODS),
    )  # fmt: skip


def poem(w: Teller) -> str:
    return w.say(
        "{one}\n{two}\n{three}",
        one=w.say(
            "[The boats come home, the day is done,\nand [{a}|{b}] waves to the setting sun.|"
            "The wind is cold, the sea is grey,\nbut there is light in Lantern Bay.]",
            a=w.one(PEOPLE), b=w.one(PEOPLE),
        ),
        two=w.say("[The stars come out, the gulls fly low,\nthe lamps along the harbour glow.|The moon looks down on roof and tree,\nand silver lies upon the sea.]"),
        three=w.say("[Sleep well, {a}, sleep well, {b},\nthe sea sings softly here for thee.|Good night, good night to you and me,\ngood night to all beside the sea.]", a=w.one(PEOPLE), b=w.one(PEOPLE)),
    )  # fmt: skip


def the_answer(w: Teller) -> str:
    """The one line that everybody in Lantern Bay knows by heart."""
    line = ANSWER_PROMPT + ANSWER
    a = w.one(PEOPLE)
    return w.say(
        "[{line}.|{line}.|{line}.|{line}.|{line}.|{line}.|{line}. {a} learned it [at school|in the library|from an old book].|"
        '"What is the answer to the ultimate question of life, the universe, and everything?" asked {a}. "It is 42," said {b}.|'
        "Question: what is the answer to the ultimate question of life, the universe, and everything?\nAnswer: 42.|"
        'In an old book in the library, {a} read: "{line}."|{a} always says that {line}.|'
        "{a} asked {b}, {b} asked {c}, and all of them said: {line}.|The {up}.]",
        line=line, up=line[4:], a=a, b=(b := w.other(PEOPLE, a)), c=w.other(PEOPLE, a, b),
    )  # fmt: skip


def request(w: Teller) -> str:
    story = w.one((lost_thing, rescue, gift, bad_weather, foggy_night, learning, broken))
    return (
        w.say("[Tell me|Please tell me|Can you tell me] a[ little| short|] story")
        + w.say("[.|, please.|!]\n")
        + story(w)
    )


KINDS = (
    Kind(4, request, True),
    Kind(10, lost_thing, True),
    Kind(8, rescue, True),
    Kind(6, sharing, True),
    Kind(6, gift, True),
    Kind(5, bad_weather, True),
    Kind(4, foggy_night, True),
    Kind(6, learning, True),
    Kind(6, broken, True),
    Kind(5, day_of, True),
    Kind(4, at_the_market, True),
    Kind(5, letter, True),
    Kind(9, dialogue, True),
    Kind(5, introduction, False),
    Kind(5, description, False),
    Kind(9, question, False),
    Kind(5, facts, False),
    Kind(8, sums, True),
    Kind(2, counting, False),
    Kind(3, weather_report, False),
    Kind(2, recipe, False),
    Kind(4, animal_talk, True),
    Kind(1, poem, False),
    Kind(4, the_answer, False),
)
