"""The command; see the package."""

import sys
from typing import Annotated

import tyro

from parity_tests.fuzz.cases import Workshop, cases_of
from parity_tests.fuzz.readers import READERS


def main(
    readers: Annotated[tuple[str, ...], tyro.conf.Positional] = (), *, cases: int = 200, first: int = 0
) -> None:
    """Damages small files and reads them; the exit status is 1 where a case ends as none may.

    Args:
        readers: which [all].
        cases: of a reader.
        first: the seed of the first case.
    """
    wrong = 0
    with Workshop() as workshop:
        for name in readers or READERS:
            found = [workshop.ask(name, seed) for seed in cases_of(name, cases, first)]
            ends = [outcome.end for outcome in found]
            print(f"{name}: {', '.join(f'{ends.count(end)} {end}' for end in sorted(set(ends)))}", flush=True)
            for outcome in found:
                if outcome.end == "wrong" or cases == 1:
                    print(f"  {outcome}", flush=True)
            wrong += ends.count("wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    tyro.cli(main)
