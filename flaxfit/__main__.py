"""The command line, `python -m flaxfit inspect|verify|diff FILE...`."""

import argparse
import sys
from collections.abc import Sequence

from flaxfit import _cli
from flaxfit._core.errors import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
      0 without findings, 1 if `verify` found a bad file or `diff` a difference, 2 if
      `inspect` or `diff` cannot read a file.
    """
    given = _parser().parse_args(arguments)
    try:
        if given.command == "inspect":
            print("\n\n".join(map(_cli.inspect_text, given.files)))
            return 0
        if given.command == "verify":
            text, good = _cli.verify_text(given.files)
        else:
            text, good = _cli.diff_text(given.one, given.other)
    except CheckpointError as err:
        print(err, file=sys.stderr)
        return 2
    if text:
        print(text)
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flaxfit", description="Examines the files of trainer.save."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="show the content of a file")
    inspect.add_argument("files", nargs="+", metavar="FILE")
    verify = commands.add_parser("verify", help="check that files are intact")
    verify.add_argument("files", nargs="+", metavar="FILE", help="a file or a folder")
    diff = commands.add_parser("diff", help="compare two files")
    diff.add_argument("one", metavar="A")
    diff.add_argument("other", metavar="B")
    return parser


if __name__ == "__main__":
    sys.exit(main())
