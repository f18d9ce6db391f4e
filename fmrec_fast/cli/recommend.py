"""``fmrec-fast recommend`` and ``export-vectors``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmrec_fast import checkpoint
from fmrec_fast.cli.common import (
    UserError,
    load_model,
    read,
    reading,
    run_dataset,
    show,
    users_bar,
    with_items,
)
from fmrec_fast.data import Dataset
from fmrec_fast.recommend import Recommendations, recommend


def recommend_users(options: Any) -> None:
    if options.engine == "ray":
        _recommend_with_ray(options)
        return
    if options.resume:
        raise UserError("--resume is for --engine ray")
    from fmrec_fast.bulk import BulkRecommender
    from fmrec_fast.tables import SUFFIXES, TableFile

    if options.out is not None and Path(options.out).suffix not in SUFFIXES:
        raise UserError(f"--out must end in one of {SUFFIXES}, got {options.out!r}")
    model, state = load_model(options)
    item_ids = state["item_ids"]
    if options.history is not None:
        catalogue = Dataset.from_histories([], item_ids=item_ids)
        given = [part.strip() for part in options.history.split(",") if part.strip()]
        if not given:
            raise UserError(f"--history must list item ids, got {options.history!r}")
        best = recommend(
            model,
            [catalogue.encode_items(given).tolist()],
            options.k,
            exclude_seen=options.exclude_seen,
            steps=options.steps,
            seed=options.seed,
            padding=options.padding,
            precision=options.precision,
        )
        _write(options.out, ["history"], best, item_ids)
        return
    recommender = BulkRecommender(model, item_ids, **_bulk_options(options))
    users = _Users(options, state)
    with TableFile(None if options.out is None else Path(options.out)) as file:
        for part in users.batches():
            file.write(recommender(part))
    if options.out is not None:
        print(f"{file.rows} rows for {users.count} users in {options.out}", file=sys.stderr)


def _bulk_options(options: Any) -> dict[str, Any]:
    names = ("k", "exclude_seen", "steps", "seed", "padding", "precision")
    return {name: options[name] for name in names if name in options}


class _Users:
    """The users of --users or --all, in batches, with a progress bar; then how many there were."""

    def __init__(self, options: Any, state: dict[str, Any]) -> None:
        self.options, self.item_ids = options, state["item_ids"]
        self.count = 0
        self._dataset: Dataset | None = None
        if options.users is None:
            self._dataset = run_dataset(state)
        else:
            source, columns = _parquet_source(options)
            if columns is None:
                self._dataset = self._interactions(source)
            else:
                from fmrec_fast.data.users import HistoryEncoder

                self._source = source
                self._columns = columns["user"], columns["item"]
                self._encode = HistoryEncoder(self.item_ids, *self._columns, options.unknown)
        if self._dataset is not None:
            show(self._dataset)

    def _interactions(self, source: Any) -> Dataset:
        options = self.options
        if options.unknown != "error":
            raise UserError(
                f"--unknown {options.unknown} is for Parquet files of histories and for --engine "
                f"ray, and {options.users} holds interactions"
            )
        chosen = {"min_user": 1} | reading(options, options.users)
        if source is None:
            dataset = read(chosen)
        else:
            from fmrec_fast.data.users import read_interactions

            del chosen["path"]
            chosen.pop("format", None)
            dataset = read_interactions(source, **chosen)
        return with_items(dataset, self.item_ids)

    def batches(self) -> Any:
        from fmrec_fast.bulk import batches
        from fmrec_fast.data.users import read_histories

        if self._dataset is not None:
            total, parts = self._dataset.num_users, batches(self._dataset)
        else:
            total = self._source.num_rows()
            parts = map(self._encode, read_histories(self._source, self._columns))
        unknown = without = 0
        with users_bar(total, "recommend") as progress:
            for part in parts:
                yield part
                self.count += len(part.users)
                unknown, without = unknown + part.unknown, without + part.without
                progress(len(part.users) + part.without)
        _report_skipped(unknown, without)


def _report_skipped(unknown: int, without: int) -> None:
    if unknown or without:
        print(f"left out {unknown} unknown items, {without} users without others", file=sys.stderr)


def _parquet_source(options: Any) -> tuple[Any, dict[str, str] | None]:
    """Parquet files of --users, None for a file of another format; and the columns of histories,
    None where it holds interactions."""
    from fmrec_fast.data.users import ParquetFiles, history_columns, locate

    location = locate(options.users)
    parquet = location.is_parquet if options.format is None else options.format == "parquet"
    if not parquet:
        if len(location.paths) > 1 or "://" in options.users:
            raise UserError(
                f"--users {options.users}: expected Parquet files, or one file of another format; "
                f"got {location.paths[0]} among {len(location.paths)}"
            )
        return None, None
    source = ParquetFiles(location)
    found = history_columns(source, options.user_column, options.item_column)
    return source, None if found is None else dict(zip(("user", "item"), found, strict=True))


def _recommend_with_ray(options: Any) -> None:
    from fmrec_fast import ray_engine
    from fmrec_fast.shards import Output

    if options.users is None or options.out is None:
        raise UserError("--engine ray takes --users and --out")
    ray_engine.require_ray()
    Output(options.out, options.resume)
    state = checkpoint.load(checkpoint.locate(options.run, options.checkpoint))
    source, columns = _parquet_source(options)
    if source is None:
        raise UserError(f"--engine ray reads Parquet files, got {options.users}")
    chosen: dict[str, str | None] | None = None if columns is None else dict(columns)
    if chosen is None:
        chosen = _interaction_columns(options, source)
    try:
        result = ray_engine.recommend_with_ray(
            state,
            source,
            chosen,
            options.out,
            unknown=options.unknown,
            workers=ray_engine.Workers(options.workers, options.worker_cpus, options.worker_gpus),
            batch=options.batch,
            resume=options.resume,
            **_bulk_options(options),
        )
    except ray_engine.WorkError as error:
        raise UserError(str(error)) from None
    _report_skipped(result.unknown_items, result.users_left_out)
    print(
        f"{result.rows} rows for {result.users} users in {len(result.shards)} shards in "
        f"{options.out}",
        file=sys.stderr,
    )


def _interaction_columns(options: Any, source: Any) -> dict[str, str | None]:
    from fmrec_fast.data.columns import choose_columns

    for name in ("min_user", "min_item"):
        if options[name] is not None:
            raise UserError(f"--{name} is not for --engine ray, got {options[name]}")
    wanted = {"user": options.user_column, "item": options.item_column}
    found = choose_columns(source, wanted | {"timestamp": options.time_column})
    names: dict[str, str | None] = {role: source.names[at] for role, at in found.items()}
    return {"timestamp": None} | names


def _write(out: str | None, users: Sequence, best: Recommendations, item_ids: list) -> None:
    """One row per user and rank: user, rank, item, score."""
    import pyarrow as pa

    from fmrec_fast.bulk import external_ids, ranked_table
    from fmrec_fast.tables import TableFile

    path = None if out is None else Path(out)
    table = ranked_table(
        pa.array(users), best.scores.cpu().numpy(), best.ids.cpu().numpy(), external_ids(item_ids)
    )
    with TableFile(path) as file:
        file.write(table)
    if path is not None:
        print(f"{file.rows} rows for {len(users)} users in {path}", file=sys.stderr)


def export_vectors(options: Any) -> None:
    from fmrec_fast.bulk import BulkRecommender
    from fmrec_fast.vectors import export

    model, state = load_model(options)
    recommender = BulkRecommender(
        model, state["item_ids"], 1, **{k: v for k, v in _bulk_options(options).items() if k != "k"}
    )
    users = None if options.users is None else _Users(options, state)
    found = export(
        recommender, state["item_ids"], options.out, None if users is None else users.batches()
    )
    print(f"{found} in {options.out}", file=sys.stderr)
