"""How is a table of results laid out, on a terminal and in markdown?"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Rows:
    """A table of texts; the first `n_labels` columns are words, the others numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_labels: int = 1

    def to_markdown(self) -> str:
        rule = ["---"] * self.n_labels + ["---:"] * (len(self.columns) - self.n_labels)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (self.columns, rule, *self.rows))

    def to_rich(self, title: str) -> Table:
        table = Table(title=title)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.n_labels else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table
