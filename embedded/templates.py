"""The problem templates of the sums corpus, as data: what a problem says and which steps solve it.

Owns the stories and the words they draw from. Does not know how numbers are drawn (``problems``), how a step is worded
(``wordings``) or how a text is checked (``checker``).

How a template reads:

* ``story``: ``{0} {1} ...`` are the given numbers, ``{A} {B} {C}`` people, ``{x} {y}`` things, ``{k} {ks}`` a
  container and its plural; ``[one|two]`` is a free choice of words.
* ``steps``: ``"0+1 {x} in all; a-2 {x} left"``. A digit is a given number, ``a`` the first step's result, ``b`` the
  second's, ``#2`` the constant 2. The words after the calculation say what the result counts.
"""

from dataclasses import dataclass

NAMES = (
    "Mia", "Tom", "Ana", "Ben", "Zoe", "Sam", "Eva", "Max", "Lily", "Omar", "Nina", "Raj", "Ivy", "Leo", "Kim", "Noah",
)  # fmt: skip
THINGS = (
    "apples", "pens", "books", "coins", "stamps", "cards", "shells", "beads",
    "stickers", "marbles", "cookies", "plums", "eggs", "toys", "balls", "cups",
)  # fmt: skip
CONTAINERS = (
    ("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("basket", "baskets"), ("tray", "trays"), ("crate", "crates"),
)  # fmt: skip


@dataclass(frozen=True)
class Template:
    """One problem structure: a story and the steps that solve it (notation: see the module's head)."""

    name: str
    story: str
    steps: str


TEMPLATES = (
    # two steps
    Template(
        "gain-lose",
        "{A} has {0} {x}. {A} [finds|buys|gets] {1} more and gives {2} to {B}. "
        "How many {x} [does {A} have now|are left]?",
        "0+1 {x} in all; a-2 {x} left",
    ),
    Template(
        "lose-gain",
        "{A} had {0} {x} and [lost|sold|gave away] {1}. Then {B} gave {A} {2} more. How many {x} does {A} have now?",
        "0-1 {x} left; a+2 {x} now",
    ),
    Template(
        "packed-and-loose",
        "{A} has {0} {ks} with {1} {x} in each, and {2} loose {x}. How many {x} [does {A} have|are there] in all?",
        "0*1 packed {x}; a+2 {x} in all",
    ),
    Template(
        "packed-and-gone",
        "{A} [fills|has] {0} {ks} with {1} {x} in each and [sells|gives away] {2} {x}. How many {x} are left?",
        "0*1 {x} in all; a-2 {x} left",
    ),
    Template(
        "share-and-own",
        "{A} shares {0} {x} [equally|evenly] among {1} friends. "
        "{B} is one of them and had {2} before. How many {x} does {B} have now?",
        "0/1 {x} for each friend; a+2 {x} now",
    ),
    Template(
        "pool-and-pack",
        "{A} has {0} {x} and {B} has {1}. "
        "They [put|pack] all of them into {2} {ks} evenly. How many {x} are in each {k}?",
        "0+1 {x} in all; a/2 {x} in each {k}",
    ),
    Template(
        "rest-shared",
        "{A} had {0} {x}, [lost|sold] {1} and shared the rest evenly among {2} friends. "
        "How many {x} did each friend get?",
        "0-1 {x} left; a/2 {x} for each friend",
    ),
    Template(
        "packs-sold",
        "{A} packs {0} {x} into {ks} of {1} and [sells each {k}|each {k} sells] for {2} dollars. "
        "How many dollars does {A} get?",
        "0/1 {ks}; a*2 dollars",
    ),
    Template(
        "times-as-many",
        "{A} has {0} {x} and {B} has {1} times as many. How many {x} do they have [together|in all]?",
        "0*1 {x} for {B}; 0+a {x} in all",
    ),
    Template(
        "some-more",
        "{A} has {0} {x}. {B} has {1} more than {A}. How many {x} do they have [together|in all]?",
        "0+1 {x} for {B}; 0+a {x} in all",
    ),
    Template(
        "some-fewer",
        "{A} [has|owns] {0} {x}. {B} has {1} fewer than {A}. How many {x} do they have [together|in all]?",
        "0-1 {x} for {B}; 0+a {x} in all",
    ),
    Template(
        "how-many-more",
        "{A} has {0} {x}. {B} has {1} times as many. How many more {x} does {B} have than {A}?",
        "0*1 {x} for {B}; a-0 more {x}",
    ),
    Template(
        "change",
        "{A} buys {0} {x} for {1} dollars each and pays with {2} dollars. "
        "How [many dollars|much change] does {A} get back?",
        "0*1 dollars to pay; 2-a dollars back",
    ),
    Template(
        "hours-worked",
        "{A} earns {0} dollars an hour and works {1} hours on Monday and {2} on Friday. "
        "How many dollars does {A} [earn|get]?",
        "1+2 hours; 0*a dollars",
    ),
    Template(
        "half-and-some",
        "{A} has {0} {x}, gives half to {B} and then {1} to {C}. How many {x} [are left|does {A} have now]?",
        "0/#2 {x} after halving; a-1 {x} left",
    ),
    Template(
        "running-week",
        "{A} runs {0} miles on each of 5 days and {1} miles on [Saturday|Sunday]. How many miles does {A} run in all?",
        "0*#5 miles so far; a+1 miles in all",
    ),
    Template(
        "ages",
        "{A} is {0} years old. {B} is {1} years older. {C} is [twice|two times] as old as {B}. How old is {C}?",
        "0+1 years for {B}; a*#2 years for {C}",
    ),
    # three steps
    Template(
        "two-purchases",
        "{A} buys {0} {x} for {1} dollars each and {2} {y} for {3} dollars each. "
        "How many dollars does {A} [pay|spend]?",
        "0*1 dollars for {x}; 2*3 dollars for {y}; a+b dollars in all",
    ),
    Template(
        "two-stores",
        "{A} has {0} {ks} of {1} {x}. {B} has {2} {ks} of {3} {x}. How many more {x} does {A} have than {B}?",
        "0*1 {x} for {A}; 2*3 {x} for {B}; a-b more {x}",
    ),
    Template(
        "chain-of-three",
        "{A} has {0} {x}. {B} has {1} more than {A}. "
        "{C} has {2} times as many as {B}. How many more {x} does {C} have than {A}?",
        "0+1 {x} for {B}; a*2 {x} for {C}; b-0 more {x}",
    ),
    Template(
        "earn-and-spend",
        "{A} earns {0} dollars an hour, "
        "works {1} hours on Monday and {2} on Friday and spends {3} dollars. How many dollars are left?",
        "1+2 hours; 0*a dollars in all; b-3 dollars left",
    ),
    Template(
        "free-seats",
        "A [hall|room] has {0} rows of {1} seats. "
        "{2} seats are [taken|full] and {3} are broken. How many seats are free?",
        "0*1 seats in all; 2+3 seats gone; a-b seats left",
    ),
    Template(
        "bake-and-pack",
        "{A} bakes {0} trays of {1} cookies, "
        "eats {2} and packs the rest into {ks} of {3}. How many {ks} does {A} [fill|pack]?",
        "0*1 cookies in all; a-2 cookies left; b/3 {ks}",
    ),
    Template(
        "reading",
        "A book has {2} pages. {A} reads {0} pages a day for {1} days and [ends|reads] the rest in {3} days. "
        "How many pages a day is that?",
        "0*1 pages read; 2-a pages left; b/3 pages a day",
    ),
    Template(
        "saving",
        "{A} saves {0} dollars a week for {1} weeks, "
        "gets {2} dollars from {B} and [spends|pays] {3}. How many dollars are left?",
        "0*1 dollars saved; a+2 dollars in all; b-3 dollars left",
    ),
    Template(
        "half-refill-share",
        "{A} has {0} {x}, [sells|gives away] half, "
        "buys {1} more and puts all into {2} {ks} evenly. How many {x} are in each {k}?",
        "0/#2 {x} after halving; a+1 {x} in all; b/2 {x} in each {k}",
    ),
    Template(
        "bus",
        "A bus has {0} people. {1} get off and {2} get on. Then {3} get off. How many people are [left|on the bus]?",
        "0-1 people left; a+2 people now; b-3 people left",
    ),
    Template(
        "legs",
        "A farm has {0} cows and {1} hens. {2} legs are [white|wet]. How many legs are not?",
        "0*#4 legs of cows; 1*#2 legs of hens; a+b legs in all; c-2 legs left",
    ),
    Template(
        "three-colors",
        "{A} has {0} red {x}, {1} more blue ones than red and {2} green ones. "
        "How many {x} [are there|does {A} have] in all?",
        "0+1 blue {x}; 0+a red and blue {x}; b+2 {x} in all",
    ),
    Template(
        "tank",
        "A tank has {0} liters. {A} takes out {1} [buckets|cans] of {2} liters and puts back {3} liters. "
        "How many liters are in it?",
        "1*2 liters out; 0-a liters left; b+3 liters now",
    ),
    Template(
        "new-shelves",
        "{A} moves the books from {0} shelves of {1} to {2} shelves evenly and [adds|puts] {3} more on each. "
        "How many books are on each?",
        "0*1 books in all; a/2 books on each; b+3 books now",
    ),
    Template(
        "unit-prices",
        "{A} pays {0} dollars for {1} {x}. {B} pays {2} dollars for {3} {y}. "
        "How many dollars more does {A} pay for each?",
        "0/1 dollars for {x}; 2/3 dollars for {y}; a-b dollars more",
    ),
    Template(
        "average",
        "{A} [scored|got] {0}, {1} and {2} points in 3 games. What is the mean score?",
        "0+1 points; a+2 points in all; b/#3 points a game",
    ),
    Template(
        "trip",
        "{A} [drives|rides] {0} miles an hour for {1} hours and then {2} miles. "
        "The trip is {3} miles. How many miles are left?",
        "0*1 miles; a+2 miles so far; 3-b miles left",
    ),
    Template(
        "rope",
        "{A} cuts {0} feet of rope into parts of {1} feet, "
        "[keeps|uses] {2} parts and sells the others for {3} dollars each. How many dollars is that?",
        "0/1 parts; a-2 parts left; b*3 dollars",
    ),
    Template(
        "still-needed",
        "{A} wants {0} {x} at {1} dollars each, "
        "has {2} dollars and gets {3} from {B}. How many more dollars does {A} need?",
        "0*1 dollars to pay; 2+3 dollars so far; a-b more dollars",
    ),
    Template(
        "sell-and-share",
        "{A} and {B} sell {0} {ks} of {x} for {1} dollars each, "
        "pay {2} dollars and [share|split] the rest. How many dollars does {B} get?",
        "0*1 dollars in all; a-2 dollars left; b/#2 dollars for each",
    ),
    # four steps
    Template(
        "three-people",
        "{A} has {0} {x}. {B} has twice as many. {C} has {1} fewer than {B}. "
        "How many {x} do they have [together|in all]?",
        "0*#2 {x} for {B}; a-1 {x} for {C}; 0+a {x} for two; c+b {x} in all",
    ),
    Template(
        "garden",
        "A garden has {0} rows of {1} roses and {2} rows of {3} tulips. {4} [plants|flowers] die. How many are left?",
        "0*1 roses; 2*3 tulips; a+b plants in all; c-4 plants left",
    ),
    Template(
        "team-score",
        "{A} gets {0} points in each of {1} games, "
        "{B} gets {2} in each of {3} and {C} gets {4}. How many points [in all|do they have]?",
        "0*1 points for {A}; 2*3 points for {B}; a+b points for two; c+4 points in all",
    ),
    Template(
        "pick-and-split",
        "{A} picks {0} plums and {B} picks {1} times as many. "
        "They eat {2} and [share|split] the rest. How many plums does {A} get?",
        "0*1 plums for {B}; 0+a plums in all; b-2 plums left; c/#2 plums for each",
    ),
    Template(
        "ages-in-all",
        "{A} is {0} years old. {B} is {1} years older. "
        "{C} is twice as old as {B}. How many years is that [together|in all]?",
        "0+1 years for {B}; a*#2 years for {C}; 0+a years for two; c+b years in all",
    ),
    Template(
        "bus-again",
        "A bus has {0} people. {1} get off and {2} get on. "
        "Then {3} get off and {4} get on. How many people are [now there|on the bus]?",
        "0-1 people left; a+2 people now; b-3 people left; c+4 people now",
    ),
    Template(
        "two-colors-packed",
        "{A} has {0} red and {1} blue {x}. {B} has {2} times as many {x}, "
        "[sells|loses] {3} and packs the rest into {ks} of {4}. How many {ks} are there?",
        "0+1 {x} for {A}; a*2 {x} for {B}; b-3 {x} left; c/4 {ks}",
    ),
    Template(
        "tickets",
        "{0} adults pay {1} dollars each and {2} children pay {3} dollars each. "
        "They get {4} dollars [back|off]. How many dollars do they pay?",
        "0*1 dollars for adults; 2*3 dollars for children; a+b dollars in all; c-4 dollars",
    ),
    # five steps
    Template(
        "stall",
        "{A} and {B} sell {0} {x} at {1} dollars and {2} {y} at {3} dollars. "
        "They pay {4} dollars and [share|split] the rest. How many dollars does {A} get?",
        "0*1 dollars for {x}; 2*3 dollars for {y}; a+b dollars in all; c-4 dollars left; d/#2 dollars for each",
    ),
    Template(
        "party",
        "{A} puts {0} {ks} of {1} {x} and {2} {ks} of {3} {y} on {4} tables evenly, "
        "and [adds|puts] {5} cards on each. How many things are on each?",
        "0*1 {x}; 2*3 {y}; a+b things in all; c/4 things on each; d+5 things now",
    ),
    Template(
        "boxes-sold",
        "{A} has {0} red and {1} blue {x}. {A} [buys|gets] {2} more, loses {3}, "
        "packs the rest into {ks} of {4} and sells them for {5} dollars each. How many dollars is that?",
        "0+1 {x}; a+2 {x} in all; b-3 {x} left; c/4 {ks}; d*5 dollars",
    ),
)
