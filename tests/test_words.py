"""Words that stay out of the code and the documents, and what to write instead.

`python tests/test_words.py` lists where any of them are left.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("flaxfit", "examples", "docs")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")

# A regular expression -> the plain word.
WORDS = {
    r"afresh": "again",
    r"anew": "again",
    r"for keeps": "permanently",
    r"go(es|ing)? on|went on|gone on": "continue",
    r"had by (index|number)": "random access",
    r"(the|this) house|the one door": "the package, the function",
    r"(?-i:(?<!there )is none)": "there is no ...",
    r"lies|lain": "is stored, is on",
    r"nobody|somebody|whoever": "a caller, a user, a thread: who it is",
    r"one's own": "custom",
    r"see(s|n)? to it": "ensure",
    r"segments?": "chunk",
    r"so many": "this many",
    r"(un)?told": "known, given",
    r"under way": "running, in flight",
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
    places = [f"{path}:{number}: {line}" for path, number, line in found(expression)]
    assert not places, "\n".join([f"write {WORDS[expression]!r}:", *places])


def main():
    for expression, instead in WORDS.items():
        places = [
            f"{path}:{number}: {line}" for path, number, line in found(expression)
        ]
        print(f"{len(places)} of {expression!r}: write {instead!r}", *places, sep="\n ")


if __name__ == "__main__":
    main()
