"""Which elements of a matrix share a scale."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import FormatError

__all__ = ["MAX_GROUP", "Group"]

MAX_GROUP = 1 << 20  # rows or columns


@dataclass(frozen=True)
class Group:
    """``rows`` x ``cols`` elements share a scale; None means all of them.

    gN is (1, N), row (1, None), tensor (None, None), RxC (R, C). R is a multiple of 16. N and C are multiples of 16 in
    a weight, and of 8 in the format of a scale matrix (``Coded.check`` tells them apart).
    """

    rows: int | None
    cols: int | None

    def __post_init__(self) -> None:
        r, c = self.rows, self.cols
        if r is None and c is not None:
            raise FormatError("a group of all rows takes all columns too; write 'tensor'.")
        if c is not None and (c % 8 or not 8 <= c <= MAX_GROUP):
            raise FormatError(
                f"group '{self}' must have a multiple of 16 columns up to {MAX_GROUP} (of 8 in the format of a scale), "
                "such as g32 or g128, or be 'row'."
            )
        if r is not None and r != 1 and (c is None or r % 16 or not 16 <= r <= MAX_GROUP):
            raise FormatError(f"group '{self}' must have a multiple of 16 rows up to {MAX_GROUP}, such as 128x128.")

    @staticmethod
    def of(cols: int) -> Group:
        """gN: N columns of one row."""
        return Group(1, cols)

    @staticmethod
    def row() -> Group:
        return Group(1, None)

    @staticmethod
    def tensor() -> Group:
        return Group(None, None)

    @staticmethod
    def tile(rows: int, cols: int) -> Group:
        return Group(rows, cols)

    @property
    def shared(self) -> bool:
        """Whether several rows share a scale."""
        return self.rows != 1

    def __str__(self) -> str:
        if self.rows is None:
            return "tensor"
        if self.rows == 1:
            return "row" if self.cols is None else f"g{self.cols}"
        return f"{self.rows}x{'row' if self.cols is None else self.cols}"
