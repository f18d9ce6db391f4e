"""External ids that stay in a mapped file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

PART = 1 << 16


class Ids(Sequence):
    """A read-only sequence of int or str, equal to a list of the same.

    `is_int` says which of the strings `ids` stand for ints; None: none does, or all are ints.
    """

    def __init__(self, ids: pa.ChunkedArray, is_int: pa.ChunkedArray | None = None) -> None:
        self._ids, self._is_int = ids, is_int

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, at: Any) -> Any:
        """An id, or the list of ids of a slice."""
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            if step != 1:
                return [self[i] for i in range(first, last, step)]
            length = max(last - first, 0)
            kinds = None if self._is_int is None else self._is_int.slice(first, length)
            return _values(self._ids.slice(first, length), kinds)
        where = range(len(self))[at]
        return self[where : where + 1][0]

    def __iter__(self) -> Iterator:
        for first in range(0, len(self), PART):
            yield from self[first : first + PART]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, Ids)):
            return NotImplemented
        return len(self) == len(other) and all(
            self[first : first + PART] == other[first : first + PART]
            for first in range(0, len(self), PART)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = ", ..." if len(self) > 3 else ""
        return f"Ids({', '.join(map(repr, self[:3]))}{more}; {len(self):,} in all)"


def _values(ids: pa.ChunkedArray, is_int: pa.ChunkedArray | None) -> list:
    values = ids.to_pylist()
    if is_int is None:
        return values
    return [int(v) if exact else v for v, exact in zip(values, is_int.to_pylist(), strict=True)]
