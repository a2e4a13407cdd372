"""A page whose tables a program fills in, between `<!-- table: NAME -->` and `<!-- /table -->`; its prose is by hand."""

import re
from collections.abc import Collection
from pathlib import Path

MARK, END = "<!-- table: {} -->", "<!-- /table -->"
OPENED = re.compile(MARK.format(r"(\S+)"))
PLACE = re.compile(f"{OPENED.pattern}(.*?){END}", re.DOTALL)


def fill(page: Path, bodies: dict[str, str], others: Collection[str] = ()) -> None:
    """Puts what belongs there into every place and leaves the rest of the page as it is.

    Args:
        bodies: by the name of the place; "" leaves it empty.
        others: names of the places that another program fills in, which are left as they are.

    Raises:
        ValueError: as `check`.
    """

    def filled(place: re.Match) -> str:
        if place[1] in others:
            return place[0]
        return "\n\n".join(filter(None, [MARK.format(place[1]), bodies[place[1]], END]))

    page.write_text(PLACE.sub(filled, check(page, [*bodies, *others])), encoding="utf-8")


def check(page: Path, names: Collection[str]) -> str:
    """The text of a page that has one place for each of `names`.

    Raises:
        ValueError: if there is no page, or a place is missing, unknown, repeated or not closed, saying which.
    """
    if not page.is_file():
        raise ValueError(f"There is no page {page}; write one that marks the tables' places as docs/EVIDENCE.md does.")
    text = page.read_text(encoding="utf-8")
    opened = OPENED.findall(text)
    closed = [name for name, body in PLACE.findall(text) if not OPENED.search(body)]
    for name in [*opened, *names]:
        if name not in names:
            raise ValueError(f"{page} has a place for a table {name!r}; the tables are {', '.join(names)}.")
        if opened.count(name) != 1:
            count = "several places" if name in opened else "no place"
            raise ValueError(f"{page} has {count} for the table {name!r}; give it one: {MARK.format(name)} and {END}.")
        if name not in closed:
            raise ValueError(f"{page}: the place of the table {name!r} has no end; close it with {END}.")
    return text
