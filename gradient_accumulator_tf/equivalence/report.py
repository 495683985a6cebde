"""What check_equivalence returns: differences, causes, and the table that shows them."""

from typing import NamedTuple

_SHOWN_VARIABLES = 12
_SHOWN_PLACES = 5


class VariableDifference(NamedTuple):
    """The distance of one variable from its value after the large batches, in L2 norms.

    Attributes:
        path: The variable's `path`.
        movement: Distance between the start and the end of the large batches' training.
        difference: Distance between the large batches' value and the accumulated one.
        reordered: Distance between the large batches' value and the one that the same batches
            give with their examples in another order: the effect of rounding alone.
        within: Whether the difference is within the tolerance.
    """

    path: str
    movement: float
    difference: float
    reordered: float
    within: bool

    @property
    def relative(self) -> float:
        """`difference / movement`; 0 if there is no difference, inf if only it is not 0."""
        return _quotient(self.difference, self.movement)


class Cause(NamedTuple):
    """A reason why accumulation differs from the large batch.

    Attributes:
        kind: "batch_norm", "random", "state", "updates", "loss", "coupled_loss", "order",
            "half_precision", "not_deterministic", "repeated_rows" or "unknown".
        where: Paths of layers or variables; empty for the model as a whole.
        advice: What it does, and what to do about it.
    """

    kind: str
    where: tuple[str, ...]
    advice: str

    def __str__(self) -> str:
        where = ", ".join(self.where[:_SHOWN_PLACES])
        where += ", ..." if len(self.where) > _SHOWN_PLACES else ""
        return f"{self.kind}{f' ({where})' if where else ''}: {self.advice}"


class EquivalenceReport(NamedTuple):
    """The result of `check_equivalence`; its `str` is a table.

    Attributes:
        equivalent: Whether every variable is within the tolerance. If a cause "repeated_rows" is
            named, the large batch that is compared with adds repeated rows before its optimizer
            sees them, which plain Keras does not.
        variables: A `VariableDifference` for each weight of the model.
        causes: The causes that were found. If equivalent: none, or "repeated_rows" alone.
        setting: What was compared, in words.
    """

    equivalent: bool
    variables: tuple[VariableDifference, ...]
    causes: tuple[Cause, ...]
    setting: str

    def __str__(self) -> str:
        far = sum(not v.within for v in self.variables)
        if self.equivalent and self.causes:
            verdict = "Equivalent, but for Keras's treatment of repeated rows:"
        elif self.equivalent:
            verdict = "Equivalent: every variable is where the large batch takes it."
        else:
            verdict = f"Not equivalent: {far} of {len(self.variables)} variables differ. Found:"
        causes = [f"- {cause}" for cause in self.causes]
        return "\n".join([self.setting, "", *self._table(), "", verdict, *causes])

    def _table(self) -> list[str]:
        """Lines with the variables that differ most."""
        worst = sorted(self.variables, key=lambda v: v.relative, reverse=True)
        rows: list[tuple[str, ...]] = [
            ("variable", "movement", "difference", "relative", "reordered", "")
        ]
        rows += [_cells_of(v) for v in worst[:_SHOWN_VARIABLES]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for path, *cells in rows:
            cells = [c.rjust(width) for c, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([path.ljust(widths[0]), *cells]).rstrip())
        if len(worst) > _SHOWN_VARIABLES:
            lines.append(f"... and {len(worst) - _SHOWN_VARIABLES} more that differ less")
        return lines


def _cells_of(variable: VariableDifference) -> tuple[str, ...]:
    """A variable's row of the table."""
    v = variable
    numbers = (v.movement, v.difference, v.relative, _quotient(v.reordered, v.movement))
    return (v.path, *(f"{n:.1e}" for n in numbers), "" if v.within else "differs")


def _quotient(difference: float, movement: float) -> float:
    if difference == 0:
        return 0.0
    return difference / movement if movement else float("inf")
