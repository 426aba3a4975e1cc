"""Words that stay out of the code and the documents, and what to write instead.

`python tests/test_words.py` lists where any of them are left.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("flaxfit", "examples", "docs")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")

# A regular expression -> the plain word, and the rooms of `flaxfit/` that still have to
# be cleaned. Everywhere else the word is an error.
WORDS = {
    r"afresh": ("again", ""),
    r"anew": ("again", "_loops _programs _runs callbacks data trainer"),
    r"for keeps": ("permanently", "_core callbacks"),
    r"go(es|ing)? on|went on|gone on": (
        "continue",
        "_loops _programs _reporting _runs callbacks data trainer",
    ),
    r"had by (index|number)": ("random access", "data trainer"),
    r"(the|this) house|the one door": ("the package, the function", ""),
    r"(?-i:(?<!there )is none)": ("there is no ...", "_loops callbacks data trainer"),
    r"lies|lain": (
        "is stored, is on",
        "_cli.py _core _programs data optimizers trainer",
    ),
    r"nobody|somebody|whoever": (
        "a caller, a user, a thread: who it is",
        "_core _loops _programs _reporting _runs callbacks data trainer",
    ),
    r"one's own": ("custom", "trainer"),
    r"see(s|n)? to it": ("ensure", "_core _runs data trainer"),
    r"segments?": ("chunk", "_loops"),
    r"so many": ("this many", "_loops callbacks data trainer"),
    r"(un)?told": ("known, given", "_programs _runs data losses trainer"),
    r"under way": ("running, in flight", "_loops _runs callbacks data trainer"),
}


def texts():
    """Yields `(path, text)` of all that the words stay out of."""
    files = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    files += [path for name in FOLDERS for path in (ROOT / name).rglob("*.md")]
    for path in [*sorted(files), *(ROOT / name for name in DOCUMENTS)]:
        yield path.relative_to(ROOT), path.read_text()


def found(expression):
    """Returns `(path, line number, line)` wherever a word stands."""
    word = re.compile(rf"\b(?:{expression})\b", re.IGNORECASE)
    return [
        (path, number, line.strip())
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if word.search(line)
    ]


@pytest.mark.parametrize("expression", WORDS)
def test_a_word_is_out(expression):
    instead, rooms = WORDS[expression]
    places = [
        f"{path}:{number}: {line}"
        for path, number, line in found(expression)
        if path.parts[0] != "flaxfit" or path.parts[1] not in rooms.split()
    ]
    assert not places, "\n".join([f"write {instead!r}:", *places])


def main():
    for expression, (instead, _) in WORDS.items():
        places = [
            f"{path}:{number}: {line}" for path, number, line in found(expression)
        ]
        print(f"{len(places)} of {expression!r}: write {instead!r}", *places, sep="\n ")


if __name__ == "__main__":
    main()
