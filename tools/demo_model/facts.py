"""What is true in the small world of the demo model: Lantern Bay, the capital of Tern Island.

The facts never change, so a model can learn them. Each table has a row a line and its fields between
bars; a name is written ``English=中文``.
"""

# The rows of a table are easier to read whole than wrapped.
# ruff: noqa: E501

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Named:
    """Anything with a name in both languages."""

    en: str
    zh: str


@dataclass(frozen=True)
class Place(Named):
    """A place: ``en`` with its article, ``at`` and ``zh_at`` as said of someone who is there."""

    at: str
    zh_at: str
    spots: tuple[Named, ...]
    sights: tuple[Named, ...]


@dataclass(frozen=True)
class Thing(Named):
    """A thing one carries; ``unit`` is the Chinese measure word."""

    unit: str


@dataclass(frozen=True)
class Food(Named):
    """Something to eat that can be counted."""

    plural: str
    unit: str


@dataclass(frozen=True)
class Animal(Named):
    """An animal; ``legs`` is 0 where nobody in Lantern Bay counts them."""

    plural: str
    unit: str
    sound: Named
    eats: Named
    legs: int
    home: Named


@dataclass(frozen=True)
class Person(Named):
    """One of the twelve: ``near`` is the place beside the house, ``work`` the place of the job."""

    female: bool
    age: int
    job: Named
    does: Named
    work: Place
    house: Named
    near: Place
    pet: Animal
    pet_name: Named
    colour: Named
    food: Food
    he: str = field(init=False)
    him: str = field(init=False)
    his: str = field(init=False)
    ta: str = field(init=False)

    def __post_init__(self) -> None:
        pronouns = ("she", "her", "her", "她") if self.female else ("he", "him", "his", "他")
        for name, word in zip(("he", "him", "his", "ta"), pronouns, strict=True):
            object.__setattr__(self, name, word)


def _names(row: str) -> tuple[Named, ...]:
    return tuple(Named(*name.strip().split("=")) for name in row.split(","))


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")] for row in table.strip().splitlines()]


def _called(items: tuple, name: str) -> Named:
    (found,) = (item for item in items if item.en == name)
    return found


COLOURS = _names(
    "red=红色, blue=蓝色, green=绿色, yellow=黄色, white=白色, black=黑色, brown=棕色, orange=橙色"
)
DAYS = _names(
    "Monday=星期一, Tuesday=星期二, Wednesday=星期三, Thursday=星期四, Friday=星期五, "
    "Saturday=星期六, Sunday=星期日"
)
SEASONS = _names("spring=春天, summer=夏天, autumn=秋天, winter=冬天")
WEATHER = _names(
    "sunny=晴朗, warm=温暖, windy=有风, rainy=有雨, foggy=有雾, cloudy=多云, cold=寒冷, snowy=有雪"
)
NUMBERS = _names(
    "zero=零, one=一, two=二, three=三, four=四, five=五, six=六, seven=七, eight=八, nine=九, "
    "ten=十, eleven=十一, twelve=十二, thirteen=十三, fourteen=十四, fifteen=十五, "
    "sixteen=十六, seventeen=十七, eighteen=十八, nineteen=十九, twenty=二十"
)

# place | who is there is … | where things hide | what one sees
PLACES = tuple(
    Place(*place.split("="), *at.split("="), _names(spots), _names(sights))
    for place, at, spots, sights in _rows(
        """
the harbour=港口 | at the harbour=在港口 | under an old net=一张旧渔网下面, behind a barrel=一个木桶后面, beside a rope=一根绳子旁边 | the fishing boats=渔船, the grey water=灰色的海水, the nets=渔网
the beach=海滩 | on the beach=在海滩上 | in the wet sand=湿湿的沙子里, behind a big stone=一块大石头后面, under a wooden boat=一条木船下面 | the waves=海浪, the white shells=白色的贝壳, the soft sand=柔软的沙子
the lighthouse=灯塔 | at the lighthouse=在灯塔 | on the long stairs=长长的楼梯上, behind the door=门后面, next to the big lamp=大灯旁边 | the big lamp=大灯, the wide sea=宽阔的大海, the ships far away=远处的船
the bakery=面包店 | at the bakery=在面包店 | under the table=桌子下面, behind a bag of flour=一袋面粉后面, next to the oven=烤炉旁边 | the warm bread=热面包, the sweet buns=甜甜的小面包, the big oven=大烤炉
the market=市场 | at the market=在市场 | under a cart=一辆小车下面, between two baskets=两个篮子中间, behind the apples=苹果后面 | the fruit=水果, the busy people=忙碌的人们, the fresh fish=新鲜的鱼
the school=学校 | at the school=在学校 | under a chair=一把椅子下面, behind the blackboard=黑板后面, on the window sill=窗台上 | the children=孩子们, the big map=大地图, the drawings on the wall=墙上的画
the library=图书馆 | in the library=在图书馆里 | between two thick books=两本厚书中间, under the desk=书桌下面, on the highest shelf=最高的书架上 | the old books=旧书, the quiet readers=安静的读者, the tall shelves=高高的书架
the boatyard=船厂 | at the boatyard=在船厂 | in a new boat=一条新船里, under some wood=几块木头下面, behind the tool box=工具箱后面 | the new boats=新船, the long boards=长长的木板, the hammers and saws=锤子和锯子
the orchard=果园 | in the orchard=在果园里 | under an apple tree=一棵苹果树下面, in the tall grass=高高的草丛里, behind the ladder=梯子后面 | the apple trees=苹果树, the bees=蜜蜂, the ripe pears=成熟的梨
the green hill=小山 | on the green hill=在小山上 | under a bush=一丛灌木下面, behind a rock=一块石头后面, next to the path=小路旁边 | the clouds=云, the small houses=小房子, the sheep=羊群
the pond=池塘 | at the pond=在池塘边 | in the reeds=芦苇丛里, behind a tree=一棵树后面, on a flat stone=一块平平的石头上 | the ducks=鸭子, the lilies=睡莲, the clear water=清清的水
the square=广场 | on the square=在广场上 | under a bench=一张长椅下面, behind the fountain=喷泉后面, next to the lamp post=路灯旁边 | the fountain=喷泉, the dancing children=跳舞的孩子们, the town clock=大钟
the post office=邮局 | at the post office=在邮局 | behind a big parcel=一个大包裹后面, under the counter=柜台下面, next to the letter box=信箱旁边 | the letters=信, the stamps=邮票, the parcels=包裹
the clinic=诊所 | at the clinic=在诊所 | under the bed=床下面, behind the curtain=窗帘后面, next to the scales=秤旁边 | the white beds=白色的床, the clean towels=干净的毛巾, the medicine bottles=药瓶
the stone bridge=石桥 | on the stone bridge=在石桥上 | under the bridge=桥下面, between two stones=两块石头中间, next to the railing=栏杆旁边 | the little river=小河, the small fish=小鱼, the boats below=桥下的小船
"""
    )
)

# food | plural | Chinese measure word
FOODS = tuple(
    Food(*food.split("="), plural, unit)
    for food, plural, unit in _rows(
        """
apple=苹果 | apples | 个
pear=梨 | pears | 个
plum=李子 | plums | 个
egg=鸡蛋 | eggs | 个
carrot=胡萝卜 | carrots | 根
bun=小面包 | buns | 个
honey cake=蜂蜜蛋糕 | honey cakes | 块
fish=鱼 | fish | 条
biscuit=饼干 | biscuits | 块
dumpling=饺子 | dumplings | 个
"""
    )
)

# thing | Chinese measure word
THINGS = tuple(
    Thing(*thing.split("="), unit)
    for thing, unit in _rows(
        """
hat=帽子 | 顶
key=钥匙 | 把
scarf=围巾 | 条
basket=篮子 | 个
kite=风筝 | 只
book=书 | 本
umbrella=雨伞 | 把
ball=球 | 个
lamp=灯 | 盏
bell=铃铛 | 个
flute=笛子 | 支
map=地图 | 张
cup=杯子 | 个
ring=戒指 | 枚
blanket=毯子 | 条
bag=袋子 | 个
"""
    )
)
FRAGILE = tuple(
    thing for thing in THINGS if thing.en in ("kite", "umbrella", "lamp", "bell", "flute", "cup")
)

# animal | plural | Chinese measure word | it says | it eats | legs | it lives
ANIMALS = tuple(
    Animal(
        *animal.split("="), plural, unit, *_names(sound), *_names(eats), int(legs), *_names(home)
    )
    for animal, plural, unit, sound, eats, legs, home in _rows(
        """
cat=猫 | cats | 只 | meow=喵喵 | fish=鱼 | 4 | in a house=房子里
dog=狗 | dogs | 只 | woof=汪汪 | meat=肉 | 4 | in a house=房子里
goat=山羊 | goats | 只 | baa=咩咩 | grass=草 | 4 | on the hill=山上
duck=鸭子 | ducks | 只 | quack=嘎嘎 | seeds=种子 | 2 | on the pond=池塘里
hen=母鸡 | hens | 只 | cluck=咯咯 | corn=玉米 | 2 | in a coop=鸡窝里
gull=海鸥 | gulls | 只 | kee-ow=欧欧 | fish=鱼 | 2 | by the sea=海边
donkey=驴 | donkeys | 头 | hee-haw=啊呃 | carrots=胡萝卜 | 4 | in a stable=马厩里
horse=马 | horses | 匹 | neigh=咴咴 | hay=干草 | 4 | in a stable=马厩里
rabbit=兔子 | rabbits | 只 | sniff=吱吱 | carrots=胡萝卜 | 4 | in a hole=洞里
owl=猫头鹰 | owls | 只 | hoo=咕咕 | mice=老鼠 | 2 | in a tree=树上
frog=青蛙 | frogs | 只 | croak=呱呱 | flies=苍蝇 | 4 | in the pond=池塘里
bee=蜜蜂 | bees | 只 | buzz=嗡嗡 | nectar=花蜜 | 6 | in a hive=蜂巢里
seal=海豹 | seals | 只 | bark=嗷嗷 | fish=鱼 | 0 | in the sea=海里
"""
    )
)
SMALL_ANIMALS = tuple(
    animal
    for animal in ANIMALS
    if animal.en in ("cat", "dog", "goat", "duck", "hen", "gull", "rabbit")
)

# person | she or he | age | job | what that is | where | colour of the house | near | pet | its name |
# favourite colour | favourite food
PEOPLE = tuple(
    Person(
        *person.split("="),
        female=pronoun == "she",
        age=int(age),
        job=Named(*job.split("=")),
        does=Named(*does.split("=")),
        work=_called(PLACES, work),
        house=_called(COLOURS, house),
        near=_called(PLACES, near),
        pet=_called(ANIMALS, pet),
        pet_name=Named(*pet_name.split("=")),
        colour=_called(COLOURS, colour),
        food=_called(FOODS, food),
    )
    for person, pronoun, age, job, does, work, house, near, pet, pet_name, colour, food in _rows(
        """
Mia=米娅 | she | 8 | schoolgirl=学生 | learns to read and write=读书写字 | the school | yellow | the bakery | cat | Pepper=胡椒 | yellow | honey cake
Tom=汤姆 | he | 9 | schoolboy=学生 | learns to count and sing=学数数和唱歌 | the school | blue | the harbour | dog | Button=扣子 | blue | apple
Finn=芬恩 | he | 41 | fisher=渔夫 | catches fish=捕鱼 | the harbour | white | the beach | gull | Salty=小盐 | blue | fish
Rosa=罗莎 | she | 36 | baker=面包师 | bakes bread and cakes=烤面包和蛋糕 | the bakery | red | the square | hen | Poppy=波比 | red | bun
Leo=里奥 | he | 52 | boat builder=造船匠 | builds boats=造船 | the boatyard | brown | the boatyard | donkey | Barley=大麦 | brown | egg
Ivy=艾薇 | she | 63 | lighthouse keeper=灯塔看守人 | lights the big lamp=点亮大灯 | the lighthouse | white | the lighthouse | owl | Moon=月亮 | white | pear
Lin=小林 | she | 29 | teacher=老师 | teaches the children=教孩子们 | the school | green | the pond | rabbit | Clover=三叶 | green | dumpling
Otto=奥托 | he | 45 | postman=邮递员 | sorts the letters=分信送信 | the post office | orange | the stone bridge | horse | Thunder=雷雷 | orange | biscuit
Wei=小伟 | he | 33 | gardener=园丁 | grows apples and pears=种苹果和梨 | the orchard | green | the orchard | goat | Nettle=荨麻 | green | plum
Nora=诺拉 | she | 38 | doctor=医生 | helps sick people=给人看病 | the clinic | blue | the library | cat | Cotton=棉花 | white | carrot
Max=马克斯 | he | 24 | musician=乐手 | plays the fiddle=拉小提琴 | the square | orange | the market | frog | Tuba=大号 | black | plum
Ada=艾达 | she | 57 | librarian=图书管理员 | looks after the books=照看图书 | the library | brown | the green hill | duck | Comma=逗号 | red | pear
"""
    )
)
