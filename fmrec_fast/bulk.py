"""Recommending for very many users: a batch of histories in, an Arrow table of items out.

Both engines of ``fmrec-fast recommend`` run `BulkRecommender`, the one in this process and Ray's in
its workers. A user's noise is keyed by the user's id, so that the result is the same whatever the
batches are, however many workers there are, and whether one of them had to start again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fmrec_fast import noise, serving
from fmrec_fast.data.dataset import Dataset
from fmrec_fast.data.users import Histories
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.ops import item_topk
from fmrec_fast.ops._checks import check_padding
from fmrec_fast.ops.linear import check_precision
from fmrec_fast.request import PADDING, Request, check_k
from fmrec_fast.sampler import check_steps, sample

# Rows sampled together: of like length, so that what is padded is short.
ROWS = 512
# Step by step: its result does not depend on what else is in the batch, not even by rounding.
METHOD = "euler"


def user_rows(users: Iterable) -> np.ndarray:
    """The names of users in the noise stream, int64 [U]: a hash of the id as it prints.

    BLAKE2b of 8 bytes, low byte first; so 12 and '12' are one user, on every machine. The stream
    reads the low 32 bits: of many millions, some pairs of users share their noise, each of whom
    still has noise of the right distribution.
    """
    hashes = (hashlib.blake2b(str(user).encode(), digest_size=8).digest() for user in users)
    return np.frombuffer(b"".join(hashes), "<i8").astype(np.int64)


def external_ids(ids: Sequence) -> pa.Array:
    """Ids as an Arrow array: of integers, or of text where any is text."""
    if all(type(value) is int for value in ids):
        return pa.array(ids)
    return pa.array([str(value) for value in ids], pa.string())


def batches(dataset: Dataset, size: int = 8 * ROWS) -> Iterable[Histories]:
    """All users of a dataset in memory."""
    for first in range(0, dataset.num_users, size):
        last = min(first + size, dataset.num_users)
        offsets = dataset.offsets[first : last + 1]
        yield Histories(
            external_ids(dataset.user_ids[first:last]),
            dataset.items[offsets[0] : offsets[-1]],
            offsets - offsets[0],
        )


class BulkRecommender:
    """Histories -> a table with a row per user and rank: user, rank, item, score.

    Users are in the order given, their items best first; one who has seen all items (under
    `exclude_seen`) has fewer rows than `k`.

    Args:
        model: in evaluation mode.
        item_ids: external ids of its items 1 .. V-1.
        k, exclude_seen, steps, padding, precision: as in `recommend`.
        seed: keys the noise, together with the user's id.

    Raises:
        TypeError, ValueError: k, steps, padding, precision or seed out of range.
    """

    def __init__(
        self,
        model: FMRecommender,
        item_ids: list,
        k: int = 10,
        *,
        exclude_seen: bool = False,
        steps: int | None = None,
        seed: int = 0,
        padding: str = "published",
        precision: str = "float32",
    ) -> None:
        check_k(model, k)
        check_steps(steps)
        check_padding(padding)
        check_precision(precision)
        self.model, self.k, self.exclude_seen = model, k, exclude_seen
        self.steps = model.fm.steps if steps is None else steps
        self.padding, self.precision = padding, precision
        self.device = model.item_embeddings.weight.device
        self.seed = noise.as_seed(seed, self.device)
        self._labels = external_ids(item_ids)
        # Packed once, not for each batch.
        self._packed = serving.packed_model(model, METHOD, precision)

    def __call__(self, users: Histories) -> pa.Table:
        """Raises ValueError where a score is NaN."""
        count = len(users.users)
        scores = np.empty((count, self.k), np.float32)
        ids = np.empty((count, self.k), np.int64)
        for index, part in self.parts(users):
            best_scores, best_ids = self._best(part)
            scores[index], ids[index] = best_scores.numpy(), best_ids.numpy()
        return ranked_table(users.users, scores, ids, self._labels)

    def vectors(self, users: Histories) -> np.ndarray:
        """The sampled embeddings of the next items, float32 [U, D]: an item's score is its inner
        product with it."""
        found = np.empty((len(users.users), self.model.emb_dim), np.float32)
        for index, part in self.parts(users):
            found[index] = self._sample(part).cpu().numpy()
        return found

    def parts(self, users: Histories) -> Iterable[tuple[np.ndarray, Request]]:
        """Up to `ROWS` users at a time, of like length: their places in the batch, and them."""
        rows = user_rows(users.users.to_pylist())
        starts, ends = users.offsets[:-1], users.offsets[1:]
        lengths = ends - starts
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(order), ROWS):
            index = order[first : first + ROWS]
            window = (users.items, starts[index], ends[index])
            longest = int(lengths[index[-1]]) if self.exclude_seen else 0
            exclude = np.full((len(index), longest + 1), PADDING, np.int64)
            exclude[:, 1:] = _last(*window, longest, -1)
            yield (
                index,
                Request(
                    torch.from_numpy(_last(*window, self.model.config.max_len, PADDING)).to(
                        self.device
                    ),
                    torch.from_numpy(rows[index]).to(self.device),
                    torch.from_numpy(exclude).to(self.device),
                    self.k,
                    self.steps,
                    self.padding,
                ),
            )

    def _sample(self, part: Request) -> Tensor:
        return sample(
            self.model,
            part.sequences,
            steps=self.steps,
            method=METHOD,
            seed=self.seed,
            rows=part.rows,
            padding=self.padding,
            precision=self.precision,
        )

    def _best(self, part: Request) -> tuple[Tensor, Tensor]:
        if self._packed is not None:
            best = self._packed.recommend(part, self.seed, METHOD)
            return best.scores, best.ids
        scores, ids = item_topk(
            self._sample(part),
            self.model.item_embeddings.weight,
            self.k,
            exclude=part.exclude(slice(None)),
        )
        return scores.cpu(), ids.cpu()


def ranked_table(
    users: pa.Array, scores: np.ndarray, ids: np.ndarray, labels: pa.Array
) -> pa.Table:
    """A row per user and rank of scores and internal ids [U, k]: user, rank, item, score. Items
    whose score is -inf are left out.

    Raises:
        ValueError: a score is NaN.
    """
    kept = np.flatnonzero(np.isfinite(scores))
    if len(kept) < scores.size and np.isnan(scores).any():
        bad = users[int(np.argmax(np.isnan(scores).any(1)))].as_py()
        raise ValueError(
            f"the scores of user {bad!r} are NaN; expected a model with finite weights"
        )
    row, rank = np.divmod(kept, scores.shape[1])
    return pa.table(
        {
            "user": users.take(pa.array(row)),
            "rank": (rank + 1).astype(np.int32),
            "item": labels.take(pa.array(ids.reshape(-1)[kept] - 1)),
            "score": scores.reshape(-1)[kept],
        }
    )


def _last(
    items: np.ndarray, start: np.ndarray, end: np.ndarray, count: int, padding: int
) -> np.ndarray:
    """The last `count` of each ``items[start:end]``, int64 [B, count], `padding` before them."""
    if len(items) == 0 or count == 0:
        return np.full((len(end), count), padding, np.int64)
    at = end[:, None] + np.arange(-count, 0)
    found = items[np.maximum(at, 0)].astype(np.int64)
    return np.where(at >= start[:, None], found, padding)
