"""Reports what is wrong with the input, to the person who can fix it."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong: a row of the table that an error shows.

    Attributes:
        subject: what it is about: a file, a tensor, a config key.
        found: what is there, or what each side declares (one line each).
        remedy: what to do about it.
    """

    subject: str
    found: str
    remedy: str


class BridgeError(ValueError):
    """The input is at fault. Carries every problem that was found, not only the first; exit code 2."""

    def __init__(self, headline: str, problems: Iterable[Problem] = ()) -> None:
        self.headline = headline
        self.problems = list(problems)
        super().__init__(headline)

    def __str__(self) -> str:
        headline = _printable(self.headline)
        if not self.problems:
            return headline
        return f"{headline}\n{table(('what', 'found', 'what to do'), self.problems)}"


def refuse(headline: str, problems: Iterable[Problem]) -> None:
    """Raises a BridgeError with these problems, if there are any."""
    if found := list(problems):
        raise BridgeError(headline, found)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], style: str = "grid") -> str:
    """A plain-text table with wrapped cells, the form of all reports of this package.

    Args:
        headers: of the columns.
        rows: the cells.
        style: tabulate's name of it; ``grid`` for cells of several lines, ``simple`` for many rows of numbers.
    """
    from tabulate import tabulate  # only a report needs it

    cells = [list(map(_printable, row)) for row in rows]
    return tabulate(cells, headers=headers, tablefmt=style, maxcolwidths=60, disable_numparse=True)


_LONGEST = 2000


def _printable(value: object) -> str:
    """Text as a terminal may show it: no control characters and no half surrogates, and not endlessly long."""
    text = str(value)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({len(text)} characters)"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


_NUMBER = re.compile(r"(?<=\.)(?:[0-9]{1,9}|\{[0-9,.]+\})(?=\.)")


def fold_names(names: Iterable[str]) -> list[str]:
    """Tensor names, sorted, with runs of layer numbers, and of expert numbers, folded into one.

    >>> fold_names(["layers.0.a", "layers.1.a", "layers.3.a", "norm"])
    ['layers.{0..1,3}.a', 'norm']
    """
    folded = sorted(names)
    for position in (0, 1):  # of the layer, of the expert
        families: dict[tuple[str, str], list[int]] = defaultdict(list)
        for name in folded:
            numbers = list(_NUMBER.finditer(name))
            match = numbers[position] if len(numbers) > position else None
            if match and match.group().isdigit():
                families[name[: match.start()], name[match.end() :]].append(int(match.group()))
            else:
                families[name, ""] = []
        folded = [before + _braces(sorted(numbers)) + after for (before, after), numbers in families.items()]
    return folded


def first_names(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def folded_problems(names_of: Mapping[tuple[str, str], Iterable[str]]) -> Iterator[Problem]:
    """From (found, remedy) -> tensor names, a problem for each of :func:`fold_names`."""
    for (found, remedy), names in names_of.items():
        for name in fold_names(names):
            yield Problem(name, found, remedy)


def _braces(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("..".join(map(str, run)) for run in runs)
    return f"{{{text}}}" if len(numbers) > 1 else text
