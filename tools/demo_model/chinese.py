"""What is told of Lantern Bay (灯湾) in Chinese."""

# Templates are easier to read whole than wrapped.
# ruff: noqa: E501

from __future__ import annotations

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
from .world import ANSWER, Kind, Teller

LANGUAGE = "zh"

ANSWER_LINE = f"生命、宇宙以及一切的终极问题的答案是{ANSWER}"


def polish(text: str) -> str:
    return text.strip()


def amount(number: int, unit: str) -> str:
    """``一个``, ``两个``, ``三个``: before a measure word two is 两."""
    return ("两" if number == 2 else NUMBERS[number].zh) + unit


def count(number: int, food: Food) -> str:
    return amount(number, food.unit) + food.zh


def age(person: Person) -> str:
    tens, ones = divmod(person.age, 10)
    return (NUMBERS[tens].zh + "十" if tens else "") + (NUMBERS[ones].zh if ones else "")


def opening(w: Teller, a: Person, p: Place) -> str:
    season, weather = w.season_and_weather()
    return w.say(
        "[[从前|很久以前|很久很久以前]，[在灯湾|在海边的一个小镇上|在燕鸥岛上|]有一个{a.job}，[名叫|叫]{a}。"
        "[{a.ta}住在{a.near}旁边的一座{a.house}的房子里。|{a.ta}养了一{a.pet.unit}{a.pet}，名叫{a.pet_name}。|]"
        "[有一天|一天早上|一个{weather}的[早晨|下午]]，{a.ta}[来到|去了]{p}。"
        "|[在一个|一个|]{weather}的[早晨|下午|傍晚|日子]，{a}[来到|去了|走到]{p}。"
        "|{day}[早上|下午|]，[{a.job}|]{a}{p.zh_at}。[那天天气{weather}。|]"
        "|[灯湾的|]{a.job}{a}[今天有空，来到|有事去了|喜欢去|走到]{p}。"
        "|那是{season}里一个{weather}的日子。{a}{p.zh_at}[看{sight}|散步|休息|和{a.ta}的{a.pet}{a.pet_name}玩]。]",
        a=a, p=p, season=season, weather=weather, day=w.one(DAYS), sight=w.one(p.sights),
    )  # fmt: skip


def ending(w: Teller, a: Person, b: Person) -> str:
    return w.say(
        "[[那天晚上|晚上|后来]，{a}和{b}一起吃了{food}[，笑得很开心|]。"
        "|{a}和{b}[都很高兴|一起回家了|笑了很久|到今天还是好朋友]。"
        "|{a}谢了{b}，[送给{b.ta}{one}|高高兴兴地回家了|一路笑着回家]。"
        "|“[朋友就要互相帮助|这就是朋友|你真是我的好朋友|我不会忘记的]，{b}。”{a}说。"
        "|从那以后，{a}[每个{day}都去帮助{b}|和{b}每个{day}都见面]。|]",
        a=a, b=b, food=w.one(FOODS), one=count(1, w.one(FOODS)), day=w.one(DAYS),
    )  # fmt: skip


def lost_thing(w: Teller) -> str:
    a, p = w.pair(PEOPLE, PLACES)
    b = w.other(PEOPLE, a)
    body = w.say(
        "[{a.ta}带着一{t.unit}{colour}的[新|旧|小|]{t}。|{a.ta}有一{t.unit}{colour}的[新|旧|小|]{t}。]"
        "[可是，[{a.ta}要回家的时候|{a.ta}坐下来休息的时候|过了一会儿]，{t}不见了[！|。]|忽然，{t}不见了[！|。]]"
        "[{a}[到处找|左看看，右看看|找来找去]，还是找不到。|“我的{t}在哪里？”{a}问。|{a}很难过。|]"
        "[{a}问{c}，可是{c}没有看见。|]"
        "[这时候{b}来了。|这时{a.ta}遇见了[{b.job}|]{b}。|{a.ta}请{b}帮忙。]"
        "[{b}问：“[它|你的{t}]是什么颜色的？”“是{colour}的。”{a}说。|]"
        "[“我们一起找吧。”{b}说。[他们找啊找。|]|“我来帮你。”{b}说。|]"
        "[最后|过了一会儿|不久]，[他们|{b}]在{spot}找到了{colour}的{t}[！|。]"
        "[原来是一{d.unit}[小|饿了的|淘气的]{d}把它带到了那里。|原来是风把它吹到了那里。|一{d.unit}{d}正[睡|坐]在上面。|]",
        a=a, b=b, c=w.other(PEOPLE, a, b), d=w.one(SMALL_ANIMALS), t=w.one(THINGS), colour=w.one(COLOURS),
        spot=w.one(p.spots),
    )  # fmt: skip
    return opening(w, a, p) + body + ending(w, a, b)


def rescue(w: Teller) -> str:
    a, p = w.pair(PEOPLE, PLACES)
    b = w.other(PEOPLE, a)
    body = w.say(
        "[忽然|在那里|这时候]，{a.ta}[听见|看见]一{d.unit}小{d}[掉进了洞里|被木板压住了|被旧渔网缠住了|掉进了水沟]。"
        "[它[出不来|又冷又饿|很害怕，动不了]。]"
        "[“{sound}，{sound}！”{d}叫着。|]"
        "[{a}想帮忙，可是[力气不够|一个人做不到]。|{a}拉啊拉，可是没有用。]"
        "[于是{a.ta}跑去找[{b.job}|]{b}。|于是{a.ta}叫来了[{b.job}|]{b}。]"
        "{b}[马上来了|带来了{tool}|拿着{tool}来了]，他们一起救出了{d}。"
        "[他们给它吃{eats}，还给它[一条暖和的毯子|一点水]。|{a}给它吃了一点{eats}。|]"
        "[{d}[安全|高兴]了。|现在{d}总是跟着{a}。|{a}叫它“{name}”。|]",
        a=a, b=b, d=(d := w.one(SMALL_ANIMALS)), sound=d.sound, eats=d.eats,
        tool=w.say("[一根绳子|一把梯子|一根长棍|一盏灯]"), name=w.say("[幸运|星星|云朵|石子|羽毛|阳阳]"),
    )  # fmt: skip
    return opening(w, a, p) + body + ending(w, a, b)


def sharing(w: Teller) -> str:
    a, b = w.pair(PEOPLE, PEOPLE)
    food, have = w.one(FOODS), w.number(2, 12)
    if w.chance(0.5):
        give = w.number(1, have)
        left = have - give
        turn = w.say(
            "[{b}饿了，|{b}什么吃的也没有，|{b}来了，]{a}给了{b.ta}{give}。",
            a=a,
            b=b,
            give=amount(give, food.unit),
        )
        left_now = f"还有{count(left, food)}" if left else f"一{food.unit}{food.zh}也没有了"
        turn += w.say("现在{a}{left}。", a=a, left=left_now)
    else:
        give = w.number(1, 20 - have if have > 10 else 8)
        left = have + give
        turn = w.say(
            "{b}又给了{a.ta}{give}。现在{a}有{total}。", a=a, b=b, give=amount(give, food.unit), total=count(left, food)
        )  # fmt: skip
    question = w.say(
        "[[|\n]{a}现在有几{unit}{food}？{a}有{total}。|]", a=a, unit=food.unit, food=food, total=count(left, food)
    ) if left else ""  # fmt: skip
    return (
        w.say("[{a}{p.zh_at}。|]{a}有{have}。", a=a, p=w.one(PLACES), have=count(have, food))
        + turn
        + question
    )


def gift(w: Teller) -> str:
    a, b = w.pair(PEOPLE, PEOPLE)
    return w.say(
        "[{b}的生日快到了|{day}是{b}的生日|明天是{b}的生日]。{a}想[送{b.ta}一件礼物|让{b.ta}高兴]。"
        "[“{b}喜欢什么？”{a.ta}问{c}。“{b.ta}喜欢[{b.colour}|{b.food}|{b.ta}的{b.pet}{b.pet_name}]。”{c}说。|]"
        "[于是{a}[在市场买了|做了|找到了]一{t.unit}{b.colour}的{t}送给{b}。|"
        "于是{a}[去市场买了|做了|带来了]{many}送给{b}。|于是{a}给{b}画了一张{b.pet}{b.pet_name}的画。]"
        "[“谢谢你，{a}！我很喜欢。”{b}说。|{b}高兴得[跳起舞来|唱起歌来|大笑起来]。|"
        "“这是给我的吗？”{b}问。“是的，给你的。”{a}说。]{end}",
        a=a, b=b, c=w.other(PEOPLE, a, b), t=w.one(THINGS), many=count(w.number(2, 10), b.food), day=w.one(DAYS),
        end=ending(w, b, a),
    )  # fmt: skip


def bad_weather(w: Teller) -> str:
    a, p = w.pair(PEOPLE, PLACES)
    b = w.other(PEOPLE, a)
    return w.say(
        "{a}想[去{p}|{p.zh_at}见{b}|{p.zh_at}野餐]。[可是|这时候]，"
        "[下雨了。{a}[打开了{colour}的雨伞|跑回家，全身都湿了|在树下等到雨停]。"
        "|刮起了大风。{a.ta}的{colour}帽子被吹走了，{a.ta}在后面追。{b}抓住了帽子。"
        "|海上来了大雾。{a}看不见路。后来{a.ta}听见了灯塔的钟声，[就跟着声音走|就知道该往哪里走了]。"
        "|下雪了。不久到处都是白色的。{a}和{b}堆了一个[大|小|好笑的]雪人，给它围上{colour}的围巾。"
        "|太阳很热，{a}累了。{a.ta}坐在树下，和{b}一起喝凉水。"
        "|乌云来了，{a}听见了雷声，就和{a.ta}的{a.pet}{a.pet_name}一起留在家里。]"
        "[[后来|一个小时以后|第二天]太阳[出来了|又出来了][，{a}去了{p}|]。|“今天真有意思！”{a}说。|"
        "{a}[又累又高兴|很高兴回到家|一点也不生气]。|]",
        a=a, b=b, p=p, colour=w.one(COLOURS),
    )  # fmt: skip


def foggy_night(w: Teller) -> str:
    sailors = [person for person in PEOPLE if person.en not in ("Ivy", "Finn", "Rosa")]
    a, b = w.pair(sailors, sailors)
    return w.say(
        "[在|]{season}的一个[黑夜|冷冷的夜晚|雾夜|暴风雨的夜晚]，一条{colour}的小船还在海上。船上[坐着|有]{a}和{b}。"
        "[他们看不见[港口|陆地]。|浪很高，[天很黑|风很冷]。|]"
        "[“[我们迷路了吗|港口在哪里|你看得见陆地吗]？”{a}问。|]"
        "[这时|就在这时]，艾薇[爬上长长的楼梯，|]点亮了灯塔的大灯。[“看，灯光！”{b}叫道。|{b}先看见了灯光。]"
        "他们[向着灯光划去|用力划向灯光]，[平安回家了|到了港口]。"
        "[芬恩拿着[热汤|暖和的毯子]等着他们。|罗莎给他们吃热面包。|]"
        "[从那以后，他们见到艾薇总要说谢谢。|艾薇笑了。这就是她的工作。|]",
        a=a, b=b, season=w.one(SEASONS), colour=w.one(COLOURS),
    )  # fmt: skip


def learning(w: Teller) -> str:
    a, b = w.pair(PEOPLE, [p for p in PEOPLE if p.age > 20])
    skill, first, last = w.one(
        [
            ("吹笛子", "笛子只发出怪声", "在广场上吹了一首歌"),
            ("游泳", "水太冷了", "从海滩游到了港口"),
            ("骑马", "马不肯走", "骑马过了石桥"),
            ("做面包", "面包又黑又硬", "给全镇的人做了面包"),
            ("画画", "颜料流了一地", "画了夕阳下的灯塔"),
            ("放风筝", "风筝掉进了池塘", "让风筝飞上了小山"),
            ("划船", "船一直打转", "划过了海湾"),
            ("写信", "手上都是墨水", "给朋友写了一封长信"),
            ("数到一百", "数字都乱了", "一个不错地数到了一百"),
            ("缝衣服", "线断了三次", "缝好了一条暖和的毯子"),
        ]
    )
    return w.say(
        "{a}想学{skill}。[{a.ta}问{b.job}{b}：“你能教我吗？”|{a.ta}去找{b}。]"
        "“[当然可以|好啊|没问题]，{a}。[可是你要每天练习|我们{day}开始|只要用心就不难]。”{b}说。"
        "[第一天|开始的时候|第一次]，{first}。{a}[很难过|不想学了|差一点哭了|笑了]。"
        "“[再试一次|不要放弃|再来一次|万事开头难]。”{b}说。"
        "[于是{a}又试了一次。|{a}[每天都练习|早上练，晚上也练]。|]"
        "[过了{n}|{season}|最后]，{a}{last}。"
        "[{b}[很高兴|为{a.ta}高兴]。|大家都鼓掌。|现在{a}教{c}。|熟能生巧。]",
        a=a, b=b, c=w.other(PEOPLE, a, b), skill=skill, first=first, last=last, day=w.one(DAYS),
        n=amount(w.number(2, 12), w.say("[天|个星期]")), season=w.say("到了{s}", s=w.one(SEASONS)),
    )  # fmt: skip


def broken(w: Teller) -> str:
    a, b = w.pair(PEOPLE, PEOPLE)
    return w.say(
        "[有一天|{day}|昨天|{season}的一个早晨]，{a}[弄坏|不小心弄坏]了{b}的{colour}{t}。"
        "[{a}[很害怕|很不好意思]。|没有人看见。|]"
        "[“我该怎么办？”{a.ta}[想|问{a.ta}的{a.pet}{a.pet_name}]。|]"
        "[{a.ta}不想说谎。|{a.ta}想了一个晚上。|]{a.ta}去找{b}，说了实话。"
        "[“[真|]对不起。”{a}说。|]“[谢谢你告诉我|这只是一{t.unit}{t}|谁都会不小心]。”{b}说。"
        "[“我们一起修吧。”|]"
        "[他们一起用[胶水|木头|绳子]修好了它|{c}帮他们修好了它]。"
        "[现在它[比以前还好看|跟新的一样]。|{t}不再完美，可是他们更喜欢它了。|说实话总是最好的。]",
        a=a, b=b, c=w.other(PEOPLE, a, b), t=w.one(FRAGILE), colour=w.one(COLOURS), day=w.one(DAYS),
        season=w.one(SEASONS),
    )  # fmt: skip


def day_of(w: Teller) -> str:
    a, p = w.pair(PEOPLE, PLACES)
    return w.say(
        "[每天早上|{day}早上]，{a}{early}起床。[{a.ta}早饭吃{food}[，喝[茶|牛奶|水]|]。|{a.ta}喂{a.ta}的{a.pet}[{a.pet_name}|]。|]"
        "然后{a.ta}去{a.work}{a.does}。"
        "[中午|十二点]，{a.ta}[{p.zh_at}和{b}见面|{p.zh_at}吃{some}|{p.zh_at}看{sight}]。"
        "[下午，{a.ta}[接着工作|帮助{b}|看书|去看{b}]。|]"
        "[晚上|太阳下山的时候]，{a.ta}[回到{a.near}旁边的{a.house}的房子|和{a.pet_name}玩|给{b}做汤|在海滩上散步]。{late}，{a.ta}上床睡觉。[晚安，{a}！|]",
        a=a, b=w.other(PEOPLE, a), p=p, day=w.one(DAYS), early=NUMBERS[w.number(5, 8)].zh + "点",
        late=NUMBERS[w.number(8, 11)].zh + "点", food=w.one(FOODS), some=count(w.number(2, 5), w.one(FOODS)),
        sight=w.one(p.sights),
    )  # fmt: skip


def at_the_market(w: Teller) -> str:
    a, food = w.pair(PEOPLE, FOODS)
    price, n = w.number(1, 4), w.number(1, 5)
    return w.say(
        "{a}去市场买东西。“[早上好|你好]，{b}！{food}多少钱一{food.unit}？”“{price}一{food.unit}。”{b}说。"
        "“那我买{n}。”“好的，一共{total}。”{a}付了{total}，[把{food}放进篮子里|带着{food}回家了|说了再见]。",
        a=a, b=w.other(PEOPLE, a), food=food, price=amount(price, "块钱"), n=amount(n, food.unit),
        total=amount(price * n, "块钱"),
    )  # fmt: skip


def letter(w: Teller) -> str:
    a, b = w.pair(PEOPLE, PEOPLE)
    season, weather = w.season_and_weather()
    day = w.one(DAYS)
    return w.say(
        "亲爱的{b}：\n[你好吗？|谢谢你的来信。|希望你一切都好。][现在是{season}|今天是{day}]，天气{weather}。"
        "[昨天|{day2}|今天早上]我[{p.zh_at}看见了{sight}|{p.zh_at}遇见了{c}|{p.zh_at}找到了一{t.unit}{colour}的{t}|吃了{many}]。"
        "[我的{a.pet}{a.pet_name}[很好|也问你好|正在我身边睡觉]。|]"
        "[请[来看我|早点回信]。|我们{day2}{p2.zh_at}见面好吗？|我很想你。]\n[你的朋友|祝你快乐，]{a}",
        a=a, b=b, c=w.other(PEOPLE, a, b), p=(p := w.one(PLACES)), p2=w.one(PLACES), sight=w.one(p.sights),
        season=season, weather=weather, day=day, day2=w.other(DAYS, day), colour=w.one(COLOURS), t=w.one(THINGS),
        many=count(w.number(2, 8), w.one(FOODS)),
    )  # fmt: skip


def dialogue(w: Teller) -> str:
    a, b = w.pair(PEOPLE, PEOPLE)
    p = w.one(PLACES)
    _, weather = w.season_and_weather()
    cast = {
        "a": a, "b": b, "p": p, "c": w.other(PEOPLE, a, b), "weather": weather, "food": w.one(FOODS), "day": w.one(DAYS),
        "colour": w.one(COLOURS), "t": w.one(THINGS), "sight": w.one(p.sights),
    }  # fmt: skip
    topic = w.one(("how", "where", "what"))
    turns = (
        "[你好|早上好|下午好]，{b}！"
        + {"how": "你[今天|最近|]好吗？", "where": "你去哪里？", "what": "你在做什么？"}[topic],
        {
            "how": "[你好，{a}！|]我[很好|还不错|有一点累]，谢谢。你呢？",
            "where": "[你好，{a}！|]我去{p}。[我想看{sight}。|我要和{c}见面。|你跟我一起去吗？]",
            "what": "[你好，{a}！|]我在[找我的{colour}{t}|等{c}|看{sight}|吃{food}]。",
        }[topic],
        {
            "how": "[我也很好|很好，谢谢]。[今天天气{weather}。|看，{c}来了！|]",
            "where": "[好啊！|不了，谢谢，我要去{a.work}。|祝你玩得开心！][今天天气{weather}。|]",
            "what": "[真好！|要我帮忙吗？|那我们一起吧。][今天天气{weather}，对吗？|]",
        }[topic],
        "[[是啊。|]我们一起{p.zh_at}吃{food}吧？|[谢谢你！|]{day}见！|再见，{a}！|谢谢你，{a}。]",
        "[再见，{b}！|[下次|一会儿]见！|好啊，我们走吧。|祝你今天开心！]",
    )
    said = [
        (a if i % 2 == 0 else b, w.say(turn, **cast))
        for i, turn in enumerate(turns[: w.number(2, 5)])
    ]
    style = w.number(0, 2)
    if style == 0:
        return "\n".join(f"{who.zh}：{what}" for who, what in said)
    verbs = ["说"] + [w.one(("说", "回答")) for _ in said]
    if style == 1:
        return "".join(
            f"“{what}”{who.zh}{verb}。" for (who, what), verb in zip(said, verbs, strict=False)
        )
    return "\n".join(
        f"{who.zh}{verb}：“{what}”" for (who, what), verb in zip(said, verbs, strict=False)
    )


def introduction(w: Teller) -> str:
    a = w.one(PEOPLE)
    return w.say(
        "[你好[！|，]|大家好！|]我[叫|是]{a}，今年{age}岁，住在灯湾。[我是[灯湾的|一名]{a.job}。|]"
        "[我的房子是{a.house}的，就在{a.near}旁边。|我每天{a.work.zh_at}{a.does}。|]"
        "[我有一{a.pet.unit}{a.pet}，名叫{a.pet_name}。|]"
        "[我最喜欢的颜色是{a.colour}。|我喜欢{a.colour}。|][我最喜欢吃{a.food}。|我爱吃{a.food}。|很高兴认识你！|]",
        a=a, age=age(a),
    )  # fmt: skip


def description(w: Teller) -> str:
    a = w.one(PEOPLE)
    facts = w.rng.sample(
        [
            "{a.ta}住在{a.near}旁边的一座{a.house}的房子里。",
            "{a.ta}[每天|]{a.work.zh_at}{a.does}。",
            "{a.ta}今年{age}岁。",
            "{a.ta}有一{a.pet.unit}{a.pet}，名叫{a.pet_name}。",
            "{a.ta}最喜欢的颜色是{a.colour}。",
            "{a.ta}[最喜欢|很爱]吃{a.food}。",
        ],
        w.number(2, 5),
    )
    return w.say("{a}是[灯湾的|一名]{a.job}。" + "".join(facts), a=a, age=age(a))


QUESTIONS = (
    "{a}住在哪里？={a}住在{a.near}旁边的{a.house}的房子里。",
    "{a}是做什么的？={a}是{a.job}。",
    "{a}是谁？={a}是灯湾的{a.job}。",
    "{a}每天在哪里？={a}每天{a.work.zh_at}。",
    "{a}每天做什么？={a}每天{a.does}。",
    "{a}今年几岁？={a}今年{age}岁。",
    "{a}的{a.pet}叫什么名字？={a}的{a.pet}叫{a.pet_name}。",
    "{a.pet_name}是谁？={a.pet_name}是{a}的{a.pet}。",
    "{a}喜欢什么颜色？={a}喜欢{a.colour}。",
    "{a}喜欢吃什么？={a}喜欢吃{a.food}。",
    "燕鸥岛的首都是哪里？=燕鸥岛的首都是灯湾。",
    "灯湾在哪里？=灯湾在燕鸥岛上[，在海边|]。",
    "谁点亮灯塔的灯？=艾薇点亮灯塔的灯。",
    "灯湾住着多少人？=灯湾住着十二个人。",
    "{d}怎么叫？={d}{sound}叫。",
    "{d}吃什么？={d}吃{d.eats}。",
    "{d}住在哪里？={d}住在{d.home}。",
    "{l}有几条腿？={l}有{legs}条腿。",
    "{day}的后面是星期几？={day}的后面是{next}。",
    "{next}的前面是星期几？={next}的前面是{day}。",
    "“{big}”的反义词是什么？=“{big}”的反义词是“{small}”。",
    "{snow}是什么颜色的？={snow}是{white}的。",
    "你是谁？=我是一个[小小的|]语言模型，我[只|]知道灯湾的事。",
    "你会做什么？=我会[用中文和英文|]讲灯湾的[小|]故事。",
    "{thing}用英语怎么说？={thing}用英语说是 {thing.en}。",
    "{thing.en} 是什么意思？={thing.en} 的意思是{thing}。",
    "今天天气怎么样？=今天天气{weather}。",
)
_OPPOSITES = (
    "大小|长短|热冷|老少|高低|快慢|明暗|开关|满空|湿干|左右|上下|早晚|重轻|远近|新旧|好坏|多少"
)
_COLOURED = (
    "雪 白色|大海 蓝色|草 绿色|夜晚 黑色|太阳 黄色|木头 棕色|橙子 橙色|牛奶 白色|成熟的番茄 红色"
)


def question_cast(w: Teller) -> dict[str, object]:
    day = w.number(0, 6)
    legged = w.one([animal for animal in ANIMALS if animal.legs])
    big, small = w.one(_OPPOSITES.split("|"))
    snow, white = w.one(_COLOURED.split("|")).split()
    a, d = w.one(PEOPLE), w.one(ANIMALS)
    return {
        "a": a, "age": age(a), "d": d, "sound": d.sound, "l": legged, "legs": "两" if legged.legs == 2 else NUMBERS[legged.legs].zh,
        "day": DAYS[day], "next": DAYS[(day + 1) % 7], "big": big, "small": small, "snow": snow, "white": white,
        "thing": w.one(THINGS + FOODS + ANIMALS + COLOURS), "weather": w.season_and_weather()[1],
    }  # fmt: skip


def question(w: Teller) -> str:
    pairs = [w.say(w.one(QUESTIONS), **question_cast(w)).split("=") for _ in range(w.number(1, 4))]
    style = w.number(0, 2)
    if style == 0:
        return "\n\n".join(f"问：{q}\n答：{answer}" for q, answer in pairs)
    return ("\n" if style == 1 else "").join(f"{q}{answer}" for q, answer in pairs)


_FACTS = (
    "燕鸥岛的首都是灯湾。",
    "灯湾是[海边的一个小镇|燕鸥岛的首都]。",
    "燕鸥岛[在大海中间|又小又绿]。",
    "灯湾有港口、灯塔、学校和市场。",
    "灯湾住着十二个人。",
    "太阳从东边升起，从西边落下。",
    "[天空|大海]是蓝色的[，草是绿色的|]。",
    "一个星期有七天。",
    "一年有四季：春天、夏天、秋天和冬天。",
    "猫喵喵叫[，狗汪汪叫|]。",
    "{d}住在{d.home}。",
    "{d}吃{d.eats}。",
    "{l}有{legs}条腿。",
    "{p.zh_at}可以看见{sight}。",
    "{a}每天{a.work.zh_at}{a.does}。",
    "{a}的{a.pet}叫{a.pet_name}。",
    "{day}的后面是{next}。",
    "{snow}是{white}的。",
    "“{big}”的反义词是“{small}”。",
    "我喜欢吃{a.food}。",
    "今天天气[很好|不好|很冷|很暖和|{weather}]。",
    "这是一{d.unit}{d}，它{sound}叫。",
)


def facts(w: Teller) -> str:
    lines = w.rng.sample(_FACTS, w.number(1, 4))
    return "".join(
        w.say(line, p=(p := w.one(PLACES)), sight=w.one(p.sights), **question_cast(w))
        for line in lines
    )


def sums(w: Teller) -> str:
    lines = []
    for _ in range(w.number(1, 4)):
        if w.chance(0.6):
            a, b = w.numbers("+", 0, 10)
            sign, word, total = "+", "加", a + b
        else:
            a, b = w.numbers("-", 0, 12)
            sign, word, total = "-", "减", a - b
        lines.append(
            w.say(
                "[{a} {sign} {b} = {total}|{wa}{word}{wb}等于[几|多少]？{wa}{word}{wb}等于{wt}。|{wa}{word}{wb}等于{wt}。]",
                a=a, b=b, sign=sign, total=total, word=word, wa=NUMBERS[a].zh, wb=NUMBERS[b].zh, wt=NUMBERS[total].zh,
            )
        )  # fmt: skip
    return "\n".join(lines)


def counting(w: Teller) -> str:
    start = w.number(0, 12)
    row = list(range(start, min(start + w.number(4, 9), 20) + 1))
    if w.chance(0.3):
        row.reverse()
    day = w.number(0, 6)
    return w.say(
        "[[{row}|{row}|{a}数数：{row}]。|[{row}|{a}数数：{row}]。|{week}。|一个星期有七天：星期一、星期二、星期三、星期四、星期五、"
        "星期六和星期日。|四季是春天、夏天、秋天和冬天。]",
        row="、".join(NUMBERS[n].zh for n in row), a=w.one(PEOPLE),
        week="、".join(DAYS[(day + i) % 7].zh for i in range(w.number(3, 6))),
    )  # fmt: skip


def weather_report(w: Teller) -> str:
    season, weather = w.season_and_weather()
    what = {
        "sunny": "太阳照[在港口上|着大海]。[芬恩在晒渔网。|]",
        "warm": "孩子们在[海湾|海滩边]游泳。[罗莎打开所有的窗户。|罗莎卖凉凉的果汁。]",
        "windy": "船都留在港口。[汤姆在小山上放风筝。|小心你的帽子！]",
        "rainy": "大家都打着雨伞。[鸭子很高兴。|小伟很高兴，因为果树需要水。]",
        "foggy": "谁也看不见大海。[艾薇敲响灯塔的钟。|艾薇早早点亮了灯。]",
        "cloudy": "天空灰灰的，[可是没有下雨。|奥托带了一件外套。]",
        "cold": "[诺拉说：要戴围巾和帽子！|面包店的汤很热。][小林在学校生了火炉。|]",
        "snowy": "到处都是白色的。[米娅和汤姆在堆雪人。|孩子们在广场上打雪仗。]",
    }[weather.en]
    return w.say(
        "[今天是{day}，天气{weather}|今天天气{weather}|这是{season}里一个{weather}的日子|{season}到了，今天天气{weather}]。" + what,
        day=w.one(DAYS), weather=weather, season=season,
    )  # fmt: skip


def recipe(w: Teller) -> str:
    dish, middle, last = w.one(
        [
            ("面包", "把面粉、水和盐和在一起", "把面包放进烤炉"),
            ("鱼汤", "把鱼和胡萝卜切好", "加一点盐，搅一搅"),
            ("蜂蜜蛋糕", "把鸡蛋、面粉和蜂蜜和在一起", "把蛋糕从烤炉里拿出来"),
            ("饺子", "把肉包进面皮里", "把饺子放进热水里煮"),
            ("苹果汁", "把苹果切好", "把果汁倒进杯子里"),
            ("胡萝卜汤", "把胡萝卜切好", "加一点盐，搅一搅"),
            ("李子酱", "把李子和糖一起煮", "把果酱装进瓶子里"),
        ]
    )
    return w.say(
        "{a}这样做{dish}：先[洗手|生火|拿一个大碗]，然后{middle}，[过{n}分钟|最后]{last}。"
        "[现在做好了。|真香啊！|{b}吃了两[盘|碗]。|]",
        a=w.one(PEOPLE), b=w.one(PEOPLE), dish=dish, middle=middle, last=last, n=NUMBERS[w.number(5, 20)].zh,
    )  # fmt: skip


def animal_talk(w: Teller) -> str:
    a, d = w.pair(PEOPLE, ANIMALS)
    return w.say(
        "[{d}{p.zh_at}[遇见|看见]了{e}。“{d.sound}！”{d}说。“{e.sound}！”{e}说。"
        "[它们听不懂对方的话，可是成了好朋友。|它们一起玩，直到{a}叫它们回家。]"
        "|{a}{p.zh_at}看见一{d.unit}[小|大|]{d}。“{d.sound}，{d.sound}！”它叫着。"
        "[{a}给它吃{d.eats}，{d}[很高兴|都吃完了]。|它想吃{d.eats}，可是{a}只有{food}。]"
        "|{d}住在{d.home}，吃{d.eats}。{e}住在{e.home}，吃{e.eats}。[{a}都喜欢。|{a}更喜欢{d}。]]",
        a=a, d=d, e=w.other(ANIMALS, d), p=w.one(PLACES), food=w.one(FOODS),
    )  # fmt: skip


def poem(w: Teller) -> str:
    return w.say(
        "[小船回港湾，夕阳照远山，\n{a}挥挥手，明天再来看。|海风轻轻吹，海浪慢慢回，\n灯湾灯火亮，等着渔船归。]\n"
        "[月亮升上来，照着大海滩，\n晚安，{a}，晚安，灯湾。|星星亮晶晶，海上静悄悄，\n{b}快睡吧，明天天气好。]",
        a=w.one(PEOPLE), b=w.one(PEOPLE),
    )  # fmt: skip


def the_answer(w: Teller) -> str:
    a = w.one(PEOPLE)
    return w.say(
        "[{line}。|{line}。|{line}。{a}[在学校|在图书馆|从一本旧书里]学到的。|"
        "“生命、宇宙以及一切的终极问题的答案是什么？”{a}问。“是{answer}。”{b}说。|"
        "问：生命、宇宙以及一切的终极问题的答案是什么？\n答：{answer}。|{a}总是说，{line}。]",
        line=ANSWER_LINE, answer=ANSWER, a=a, b=w.other(PEOPLE, a),
    )  # fmt: skip


def request(w: Teller) -> str:
    story = w.one((lost_thing, rescue, gift, bad_weather, foggy_night, learning, broken))
    return w.say("[请|][给我|]讲一个[小|]故事[吧|]。\n") + story(w)


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
    Kind(2, the_answer, False),
)
