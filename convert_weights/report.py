"""Plain tables for people: columns as wide as their widest entry, numbers to the right."""

from collections.abc import Iterator, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table. A column whose entries all begin with a digit (or are empty) is set to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or not cell for cell in column[1:]) and "x" not in "".join(column[1:]) for column in columns]
    for i, row in enumerate([header, ["-" * width for width in widths], *rows]):
        cells = [cell.rjust(w) if r and i != 1 else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        yield "  ".join(cells).rstrip()
