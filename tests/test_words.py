"""Words that stay out of the code and the documents, and what to write instead.

`python tests/test_words.py` lists where any of them are left, with those that are not
enforced yet.
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
    r"the one door": "the only function that opens data",
    r"(the|this) house": "the package",
    r"went on|gone on": "continued",
}
LATER = {
    r"anew": "again",
    r"for keeps": "permanently",
    r"go(es|ing)? on": "continue",
    r"had by (index|number)": "random access",
    r"(?-i:is none)": "there is no ...",
    r"lies|lain": "is stored, is on",
    r"(nobody|somebody|whoever)": "a caller, a user, a thread: who it is",
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
    """Returns `path:line: text` wherever a word stands."""
    word = re.compile(rf"\b(?:{expression})\b", re.IGNORECASE)
    return [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        # CONTRIBUTING.md names the words that are out.
        if word.search(line) and "not:" not in line
    ]


@pytest.mark.parametrize("expression", WORDS)
def test_a_word_is_out(expression):
    places = found(expression)
    assert not places, "\n".join([f"write {WORDS[expression]!r}:", *places])


def main():
    for expression, instead in (WORDS | LATER).items():
        places = found(expression)
        print(f"{len(places)} of {expression!r}: write {instead!r}", *places, sep="\n ")


if __name__ == "__main__":
    main()
