"""Which columns of a source are the users, items and timestamps, and their checked values."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

import numpy as np

from .sources import Place, Source, Stream

if TYPE_CHECKING:
    import pyarrow as pa

# Compared without case, '_', '-' and spaces.
CONVENTIONAL = {
    "user": {
        *("user", "userid", "uid", "reviewerid", "customerid", "accountid"),
        *("memberid", "visitorid"),
    },
    "item": {
        *("item", "itemid", "iid", "movieid", "product", "productid", "asin", "parentasin"),
        *("businessid", "gmapid", "trackid", "songid", "bookid", "newsid", "articleid"),
        *("videoid", "gameid", "sku"),
    },
    "timestamp": {
        *("timestamp", "time", "ts", "date", "datetime", "unixtime", "unixtimestamp"),
        *("unixreviewtime", "eventtime"),
    },
}
INTEGER = r"^(?:0|-?[1-9][0-9]{0,18})$"
NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$"


def is_conventional(role: str, column: str) -> bool:
    return column.lower().translate(str.maketrans("", "", "_- ")) in CONVENTIONAL[role]


def choose_columns(source: Stream | Source, wanted: dict[str, str | None]) -> dict[str, int]:
    """The positions of the columns: 'user', 'item' and, where there is one, 'timestamp'."""
    chosen = {}
    for role, name in wanted.items():
        if name is None:
            found = [at for at, name in enumerate(source.names) if is_conventional(role, name)]
            problem = f"no {role} column" if not found else f"several {role} columns"
        else:
            found = [
                at
                for at, spellings in enumerate(zip(source.names, source.header, strict=True))
                if name in spellings
            ]
            problem = f"no column {name!r}" if not found else f"several columns {name!r}"
        if not found and role == "timestamp" and name is None:
            continue
        if len(found) != 1:
            which = f" ({', '.join(source.names[at] for at in found)})" if found else ""
            hint = f"; give its name as {role}=" if name is None else ""
            raise ValueError(
                f"{source.path}: {problem}{which}{hint}; the file's columns are {source.names}"
            )
        if source.types[found[0]].endswith("_seq"):
            raise ValueError(
                f"{source.path}: the {role} column {source.header[found[0]]!r} holds sequences; "
                f"expected one value per row"
            )
        chosen[role] = found[0]
    roles: dict[int, str] = {}
    for role, at in chosen.items():
        if at in roles:
            raise ValueError(
                f"{source.path}: column {source.names[at]!r} for both {roles[at]} and {role}; "
                f"expected different columns"
            )
        roles[at] = role
    return chosen


def valid_ids(source: Place, role: str, column: pa.ChunkedArray, first: int) -> pa.ChunkedArray:
    """The ids of rows `first` and on as text, integers, booleans or floats; none is missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    missing = pc.index(pc.is_null(column, nan_is_null=True), True).as_py()
    if missing >= 0:
        raise ValueError(
            f"{source.line(first + missing)}: the {role} id is missing; expected an id"
        )
    simple = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, is_text)
    if not any(is_kind(kind) for is_kind in simple):
        raise ValueError(
            f"{source.path}: the {role} column has type {kind}; expected integers or text"
        )
    return column


def are_whole(column: pa.ChunkedArray) -> bool:
    """Whether floats are what a table of ints becomes in passing through pandas with a gap."""
    import pyarrow.compute as pc

    whole = pc.all(pc.equal(pc.floor(column), column)).as_py()
    return whole and pc.max(pc.abs(column)).as_py() <= 2**53


def check_id_column(source: Place, role: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A whole column of valid ids, as integers where its floats are whole."""
    import pyarrow as pa

    column = valid_ids(source, role, column, 0)
    if pa.types.is_floating(column.type) and are_whole(column):
        column = column.cast(pa.int64())
    return column


def is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def check_text_ids(
    source: Place, role: str, codes: np.ndarray, distinct: list[str], first: int
) -> None:
    for code, value in enumerate(distinct):
        if not value.strip():
            problem = f"the {role} id is empty ({value!r}); expected an id"
        elif "\n" in value or "\r" in value:
            problem = f"the {role} id {reprlib.repr(value)} has a line break (an open quote?)"
        else:
            continue
        raise ValueError(f"{source.line(first + int(np.argmax(codes == code)))}: {problem}")


def as_ints(strings: pa.Array | pa.ChunkedArray) -> np.ndarray | None:
    """int64 values of strings that all are ints as Python prints them, else None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pc.all(pc.match_substring_regex(strings, INTEGER)).as_py():
        return None
    try:
        return strings.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        return None  # 19 digits may be beyond int64


def timestamps(source: Place, column: pa.ChunkedArray, first: int = 0) -> np.ndarray:
    """int64 or float64 [N], finite; `first` is the row of the first of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    row = pc.index(column.is_null(), True).as_py()
    if row >= 0:
        raise ValueError(f"{source.line(first + row)}: the timestamp is missing; expected a number")
    if pa.types.is_date32(kind):
        return column.cast(pa.int32()).to_numpy().astype(np.int64)
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind) or pa.types.is_int64(kind):
        return column.cast(pa.int64()).to_numpy()
    if is_text(kind):
        values = as_ints(column)
        if values is not None:
            return values
        row = pc.index(pc.match_substring_regex(column, NUMBER), False).as_py()
        if row >= 0:
            raise ValueError(
                f"{source.line(first + row)}: timestamp {reprlib.repr(column[row].as_py())}; "
                f"expected a number"
            )
    elif not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
        raise ValueError(
            f"{source.path}: the timestamp column has type {kind}; expected numbers or timestamps"
        )
    times = column.cast(pa.float64(), safe=False).to_numpy()
    if not np.isfinite(times).all():
        row = int(np.argmin(np.isfinite(times)))
        raise ValueError(
            f"{source.line(first + row)}: timestamp {column[row].as_py()}; expected a finite number"
        )
    return times
