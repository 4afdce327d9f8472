"""An index: the rows of a store that are nearest in gradient space, without reading every row.

    y(z) = S x(z) / ‖S x(z)‖

x is `similarity`'s vector, S `sketch`'s map to `dim` columns, y what FAISS indexes. A search takes
the `num_candidates` rows of largest ⟨y, y'⟩ and orders them by their exact similarity, from the store itself: what is
given is exact, and what can be missed is a row. How often that happens is measured when an index is built, against an
exact scan for some of its own rows, and written down with it.

The files, `index.json` and `index.faiss`, lie beside the store in `<name of the store>.index/<feature set>`. An index
is of one state of its store, and for no other. FAISS's own RaBitQ is not among the types: with inner products it ranks
rows that coincide with their list's centroid, as duplicates do, far too high (measured with FAISS 1.15.1).
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import ceil, sqrt
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from datastore.beside import INDEX, beside
from datastore.build import json_hash, write_json
from datastore.errors import DamagedStoreError, FormatVersionError, ProvenanceError, SettingError, StoreError
from datastore.files import FileEntry, disk_errors, from_json, make_folder, write_atomic
from datastore.search import Positions, Scores, import_faiss
from datastore.similarity import GradientSpace, Vectors, choose_feature_set, stacked
from datastore.sketch import SignSketch
from datastore.store import Datastore

__all__ = [
    "TYPES",
    "GradientIndex",
    "IndexConfig",
    "NearDuplicates",
    "build_index",
    "index_folder",
    "near_duplicates_ref",
]

TYPES = ("flat", "ivf", "ivf-sq8")
FORMAT, VERSION = "gradsift-index", 1
RECALL_K = 10
"""Of the neighbours that recall is measured of."""
NUM_MEASURED = 100
"""Rows that it is measured on."""
CANDIDATES = (100, 200, 400, 800, 1600)
"""How many rows a search may order exactly; the fewest that reach the recall asked for are taken."""
ROUNDING = 1e-5
"""What two equal inner products differ by at most."""
SQ8_ERROR = 0.01
"""What 8 bits a column change an inner product by at most, in practice."""
QUERIES_AT_ONCE = 64
"""Rows whose vectors are in memory at a time."""
MAX_FOUND = 2**26
"""Rows that FAISS may find at a time, should all be alike: 0.8 GB."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Settings of an index."""

    type: str = "flat"
    """flat compares with every row's sketch, ivf with those of some lists, ivf-sq8 likewise, with 8 bits a column."""
    dim: int = 1024
    """Columns of the sketch, by which a cosine ρ is off by about (1 − ρ²)/√dim; 0 indexes the features themselves."""
    checkpoint: str | None = None
    """Similarity at this checkpoint alone; None for the weighted sum over all."""
    recall: float = 0.95
    """Wanted share of a row's 10 nearest that a search finds."""
    seed: int = 0
    """Of the sketch, the lists and the rows that recall is measured on."""
    verify: bool = True
    """Check the checksum of every shard that is read."""

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise SettingError(f"type must be one of {', '.join(TYPES)}, got {self.type!r}")
        if self.dim < 0:
            raise SettingError(f"dim must be at least 1, or 0 for no sketch, got {self.dim}")
        if not 0 < self.recall <= 1:
            raise SettingError(f"recall must be above 0 and at most 1, got {self.recall}")
        if self.seed < 0:
            raise SettingError(f"seed must be at least 0, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """What `index.json` says."""

    feature_set: str
    "Which rows are indexed."
    weights: dict[str, float]
    "w_c of the checkpoints whose similarity it is."
    type: str
    "One of `TYPES`."
    dim: int
    "Columns of what is indexed."
    is_sketch: bool
    "Whether they are a sketch, or the vectors themselves."
    seed: int
    "Of the sketch."
    num_rows: int
    "N."
    num_lists: int
    "Lists of an ivf; 1 of flat."
    num_probes: int
    "Lists that a search looks into."
    num_candidates: int
    "Rows that a search orders exactly, for up to 10 neighbours."
    recall: float
    "Share of the 10 nearest rows that a search found, on `num_measured` of the rows."
    num_measured: int
    "Rows that recall was measured on."
    manifest_sha256: str
    "The state of the store: `sha256` in its manifest."
    settings_hash: str
    "The store's settings hash."
    faiss: str
    "The version that wrote it."
    file: FileEntry
    "Checksum and size of `index.faiss`."


@dataclass(frozen=True, kw_only=True, eq=False)
class NearDuplicates:
    """D rows that are like earlier ones, in the order of the store: of each group of likes all but the first row."""

    positions_D: Positions
    "Position of the row."
    firsts_D: Positions
    "Position of the first row of its group, which is no row of this list."
    similarities_D: Scores
    "Exact similarity of the two; below the threshold where only rows between them make them one group."


def index_folder(store: Datastore, feature_set: str) -> Path:
    """Where the index of a feature set lies: beside the store."""
    return beside(store.path, INDEX) / feature_set


def build_index(
    store: Datastore,
    feature_set: str | None = None,
    *,
    config: IndexConfig | None = None,
    folder: Path | None = None,
    advance: Callable[[int], None] = lambda num_rows: None,
) -> "GradientIndex":
    """Index the rows of a feature set, and write the index beside the store, in place of one that is there.

    Reads the store once, and holds N × dim float32 twice (as vectors and as the index) and N × 100 float32.

    Args:
        store: a sealed store.
        feature_set: which; None where the store has just one.
        config: settings.
        folder: where to write it; None for the store's own place.
        advance: told of rows as they are read.

    Raises:
        DamagedStoreError: a shard is not what the manifest says.
        DataError: the store has no row.
        DiskFullError, StoreError: it cannot be written.
        SettingError: no such feature set or checkpoint.
    """
    config = config or IndexConfig()
    space = GradientSpace(store, feature_set, config.checkpoint, verify=config.verify)
    folder = folder or index_folder(store, space.feature_set)
    N, is_sketch = space.num_rows, 0 < config.dim < space.width
    dim = config.dim if is_sketch else space.width
    columns = _columns(space, dim, config.seed) if is_sketch else _as_they_are
    faiss = import_faiss()
    with disk_errors(folder):  # what would stop the writing stops it before the reading
        make_folder(folder)

    measured_Q = np.sort(np.random.default_rng((config.seed, N)).permutation(N)[:NUM_MEASURED])
    queries_QX = space.vectors(measured_Q)
    vectors_NY, exact_QN = np.empty((N, dim), np.float32), np.empty((len(measured_Q), N), np.float32)
    for start, vectors_nX in space.iter_vectors():
        rows = slice(start, start + len(vectors_nX))
        vectors_NY[rows] = columns(vectors_nX)
        exact_QN[:, rows] = queries_QX @ vectors_nX.T
        advance(len(vectors_nX))
    index, num_lists = _filled(config, vectors_NY)
    recall = _Recall(index, num_lists, vectors_NY[measured_Q], exact_QN, measured_Q)
    del vectors_NY  # before the index is there twice
    num_candidates, num_probes, found = recall.tune(config.recall)
    with disk_errors(folder / "index.json"):
        (folder / "index.json").unlink(missing_ok=True)  # it would be a lie beside the new index
    written = write_atomic(folder / "index.faiss", [memoryview(faiss.serialize_index(index))])
    entry = IndexEntry(
        feature_set=space.feature_set,
        weights=space.weights,
        type=config.type,
        dim=dim,
        is_sketch=is_sketch,
        seed=config.seed,
        num_rows=N,
        num_lists=num_lists,
        num_probes=num_probes,
        num_candidates=num_candidates,
        recall=found,
        num_measured=len(measured_Q),
        manifest_sha256=store.manifest.sha256,
        settings_hash=store.manifest.settings_hash,
        faiss=faiss.__version__,
        file=written,
    )
    doc = {"format": FORMAT, "version": VERSION} | asdict(entry)
    write_json(folder / "index.json", doc | {"sha256": json_hash(doc)})
    return GradientIndex(space, entry, index, folder)


class GradientIndex:
    """An index and the store that it is of, open for searching."""

    def __init__(self, space: GradientSpace, entry: IndexEntry, index: Any, folder: Path) -> None:
        """Use `open` or `build_index`."""
        self.space, self.entry, self.folder = space, entry, folder
        self._index, self._faiss = index, import_faiss()
        self.columns = _columns(space, entry.dim, entry.seed) if entry.is_sketch else _as_they_are

    @classmethod
    def open(
        cls, store: Datastore, feature_set: str | None = None, *, verify: bool = True, folder: Path | None = None
    ) -> Self:
        """Read the index of a feature set; with `verify`, FAISS sees no byte of it before its checksum is right.

        Raises `StoreError` (there is none), `ProvenanceError` (it is of another state of the store),
        `FormatVersionError`, or `DamagedStoreError`.
        """
        feature_set = choose_feature_set(store, feature_set)
        folder = folder or index_folder(store, feature_set)
        entry = _read_entry(folder)
        if (entry.manifest_sha256, entry.feature_set) != (store.manifest.sha256, feature_set):
            raise ProvenanceError(
                f"{folder} is an index of {entry.feature_set} in another state of {store.path}: the store has changed "
                "since; run `gradsift index` again"
            )
        checkpoint = next(iter(entry.weights)) if len(entry.weights) == 1 else None
        space = GradientSpace(store, feature_set, checkpoint, verify=verify)
        if (entry.num_rows, entry.weights) != (space.num_rows, space.weights):
            raise _damaged(folder / "index.json", "its rows or checkpoints are not the store's")
        return cls(space, entry, _read_index(folder / "index.faiss", entry, verify), folder)

    def neighbours(self, positions_M: Positions, k: int) -> tuple[Scores, Positions]:
        """The min(k, N − 1) other rows most similar to each of these, as far as the index finds them.

        Gives exact similarities (M, k) float32 and positions (M, k) int64, best first; equal ones go to the earlier
        row. Without a sketch `flat` misses none. Raises `SettingError` for a k below 1 or a position that there is
        not, `DamagedStoreError`.
        """
        self.space.check(positions_M, k)
        k = min(k, self.entry.num_rows - 1)
        found = []
        for first in range(0, len(positions_M), QUERIES_AT_ONCE):
            own_m = positions_M[first : first + QUERIES_AT_ONCE]
            vectors_mX = self.space.vectors(own_m)
            candidates = self._candidates(self.columns(vectors_mX), own_m, k)
            found += [self.space.best(vectors_mX[m], near, k) for m, near in enumerate(candidates)]
        return stacked(found, k)

    def near_duplicates(
        self, threshold: float, *, advance: Callable[[int], None] = lambda num_rows: None
    ) -> NearDuplicates:
        """Groups of rows, joined by a similarity of at least `threshold` (to 1e-6), as far as the index finds them.

        Candidates are the pairs whose sketches are at least as similar, less five standard errors of a sketch. So
        `flat` misses less than one pair in a million, and none without a sketch; an ivf misses pairs that lie apart
        in lists that are not looked into. Rows that are in one group already are not compared again: m copies of a
        row cost some m comparisons of the m (m − 1) / 2.

        Args:
            threshold: above 0, at most 1.
            advance: told of rows whose candidates have been looked for.

        Raises:
            DamagedStoreError: a file of the index or of the store is not as it was written.
            SettingError: a threshold out of range.
        """
        if not 0 < threshold <= 1:
            raise SettingError(f"threshold must be above 0 and at most 1, got {threshold}")
        N = self.entry.num_rows
        groups = _Groups(N)
        for row, others in self._iter_alike(threshold, advance):
            others = np.sort(others)
            for one_of_each in (True, False):  # a group of copies is joined by its first, and the others are not read
                apart = groups.apart(row, others, one_of_each)
                for other in apart[self._similarities(row, apart) >= threshold - 1e-6].tolist():
                    groups.join(row, other)
        first_N = np.fromiter(map(groups.first, range(N)), np.int64, N)
        positions_D = np.flatnonzero(first_N != np.arange(N))
        firsts_D, similarities_D = first_N[positions_D], np.empty(len(positions_D), np.float32)
        for places in _equal(firsts_D):
            similarities_D[places] = self._similarities(int(firsts_D[places[0]]), positions_D[places])
        return NearDuplicates(positions_D=positions_D, firsts_D=firsts_D, similarities_D=similarities_D)

    def _similarities(self, first: int, others_P: Positions) -> Scores:
        """Exact similarity of a row with others; nothing is read where there are none."""
        if not others_P.size:
            return np.empty(0, np.float32)
        (vector_X,) = self.space.vectors(np.array([first]))
        return self.space.similarities(vector_X, others_P)

    def _candidates(self, vectors_mY: Vectors, own_m: Positions, k: int) -> list[Positions]:
        """For each row the positions of others that may be its k nearest, at least k of them."""
        N, found = self.entry.num_rows, [np.empty(0, np.int64)] * len(own_m)
        count = min(N, self.entry.num_candidates * ceil(k / RECALL_K) + 1)  # one is the row itself
        num_probes, pending = self.entry.num_probes, np.arange(len(own_m))
        while len(pending):
            probing = _probing(self._faiss, self.entry.num_lists, num_probes)
            scores_mk, positions_mk = self._index.search(vectors_mY[pending], count, **probing)
            if (positions_mk >= N).any():
                raise _damaged(self.folder / "index.faiss", f"it names a row beyond the {N} of the store")
            left, too_few = [], False
            for m, scores_k, positions_k in zip(pending.tolist(), scores_mk, positions_mk, strict=True):
                there = (positions_k >= 0) & (positions_k != own_m[m])
                found[m] = positions_k[there]
                if len(found[m]) < k and num_probes < self.entry.num_lists:
                    too_few = True
                    left.append(m)
                elif 0 < k <= len(found[m]) and count < N and positions_k[-1] >= 0:
                    # where those cut off may be as near as the k-th, the earliest among equals are to be found
                    is_cut = scores_k[-1] >= scores_k[there][k - 1] - ROUNDING
                    left += [m] * bool(is_cut)
            num_probes = self.entry.num_lists if too_few else num_probes
            count = count if too_few else min(N, 4 * count)
            pending = np.array(left, np.int64)
        if any(len(near) < k for near in found):
            raise _damaged(self.folder / "index.faiss", f"it does not have all {N} rows")
        return found

    def _iter_alike(
        self, threshold: float, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """For each row the others whose sketches are similar enough; of a pair one or both are told of the other."""
        N, entry = self.entry.num_rows, self.entry
        margin = ROUNDING + 5 * (1 - threshold**2) / sqrt(entry.dim) * entry.is_sketch
        margin += SQ8_ERROR * (entry.type == "ivf-sq8")
        if entry.type != "flat":
            try:
                self._index.make_direct_map()
            except RuntimeError as error:
                raise _damaged(self.folder / "index.faiss", " ".join(str(error).split())[:200]) from None
        step = min(1024, max(1, MAX_FOUND // N))
        for first in range(0, N, step):
            vectors_nY = self._index.reconstruct_n(first, min(step, N - first))
            limits, _, found = self._index.range_search(
                vectors_nY, threshold - margin, **_probing(self._faiss, entry.num_lists, entry.num_probes)
            )
            if len(found) and found.max() >= N:
                raise _damaged(self.folder / "index.faiss", f"it names a row beyond the {N} of the store")
            for row, near in enumerate(np.split(found, limits[1:-1].astype(np.int64)), start=first):
                # a flat index tells both, and the later row is enough; lists may be looked into one way only
                yield row, near[near < row] if entry.type == "flat" else near[near != row]
            advance(len(vectors_nY))


def near_duplicates_ref(space: GradientSpace, threshold: float) -> NearDuplicates:
    """`GradientIndex.near_duplicates`, each pair compared, with all rows in memory."""
    vectors_NX = np.concatenate([vectors_nX.copy() for _, vectors_nX in space.iter_vectors()])
    similarities_NN = np.stack([(vectors_NX * vector_X).sum(axis=1) for vector_X in vectors_NX])
    alike_NN = similarities_NN >= threshold - 1e-6
    np.fill_diagonal(alike_NN, True)
    first_N, before_N = np.arange(len(vectors_NX)), None
    while before_N is None or not np.array_equal(first_N, before_N):  # the first row spreads through its group
        before_N = first_N
        first_N = np.where(alike_NN, before_N, len(before_N)).min(axis=1)
    positions_D = np.flatnonzero(first_N != np.arange(len(first_N)))
    return NearDuplicates(
        positions_D=positions_D,
        firsts_D=first_N[positions_D],
        similarities_D=similarities_NN[positions_D, first_N[positions_D]],
    )


class _Groups:
    """Rows that are joined two by two, each group known by its first row."""

    def __init__(self, num_rows: int) -> None:
        self._earlier = array("q", range(num_rows))  # of each row one of its group that is not later

    def first(self, row: int) -> int:
        earlier = self._earlier
        while earlier[row] != row:
            earlier[row] = earlier[earlier[row]]  # so that the way is shorter the next time
            row = earlier[row]
        return row

    def apart(self, row: int, others: Positions, one_of_each: bool) -> Positions:
        """Those of the others that are in other groups than a row, or the first of them in each group."""
        firsts = np.fromiter(map(self.first, others.tolist()), np.int64, len(others))
        apart = np.flatnonzero(firsts != self.first(row))
        return others[apart[np.unique(firsts[apart], return_index=True)[1]] if one_of_each else apart]

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self._earlier[high] = low


def _equal(values_D: Positions) -> list[Positions]:
    """The places of each value, ascending."""
    order_D = np.argsort(values_D, kind="stable")
    changes = np.flatnonzero(np.diff(values_D[order_D])) + 1
    return np.split(order_D, changes) if values_D.size else []


def _columns(space: GradientSpace, dim: int, seed: int) -> Callable[[Vectors], Vectors]:
    """y: sketches, made unit vectors."""
    return SignSketch(list(space.weights), space.width // len(space.weights), dim, seed).unit


def _as_they_are(vectors_nX: Vectors) -> Vectors:
    return vectors_nX


def _filled(config: IndexConfig, vectors_NY: Vectors) -> tuple[Any, int]:
    """FAISS's index of these rows, trained where its type asks for it, and its number of lists."""
    faiss, (N, dim) = import_faiss(), vectors_NY.shape
    # FAISS's own advice: some 4 √N lists, and 39 rows or more to place each
    num_lists = 1 if config.type == "flat" else max(1, min(round(4 * sqrt(N)), N // 39))
    name = {"flat": "Flat", "ivf": f"IVF{num_lists},Flat", "ivf-sq8": f"IVF{num_lists},SQ8"}[config.type]
    index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    if config.type != "flat":
        index.cp.seed, index.cp.min_points_per_centroid = config.seed, 1
        sample = np.random.default_rng((config.seed, N, 1)).permutation(N)[: max(64 * num_lists, 1000)]
        index.train(vectors_NY[np.sort(sample)])
    index.add(vectors_NY)
    return index, num_lists


def _probing(faiss: ModuleType, num_lists: int, num_probes: int) -> dict[str, Any]:
    """The argument that tells an ivf how many of its lists to look into."""
    return {"params": faiss.SearchParametersIVF(nprobe=num_probes)} if num_lists > 1 else {}


class _Recall:
    """Which of the rows that are truly nearest are among the candidates: ordering them exactly loses none of those."""

    def __init__(
        self, index: Any, num_lists: int, vectors_QY: Vectors, exact_QN: Scores, measured_Q: Positions
    ) -> None:
        self._index, self._num_lists, self._faiss = index, num_lists, import_faiss()
        self._vectors_QY, self._exact_QN = vectors_QY, exact_QN
        exact_QN[np.arange(len(measured_Q)), measured_Q] = -np.inf  # a row is no neighbour of its own
        self.N = exact_QN.shape[1]
        self.k = min(RECALL_K, self.N - 1)
        if self.k:
            self._least_Q = np.partition(exact_QN, self.N - self.k, axis=1)[:, self.N - self.k] - ROUNDING

    def of(self, num_candidates: int, num_probes: int) -> float:
        """Share of the k nearest rows that are found; rows as similar as the k-th count as such."""
        if not self.k:
            return 1.0
        probing = _probing(self._faiss, self._num_lists, num_probes)
        _, found_Qk = self._index.search(self._vectors_QY, min(self.N, num_candidates + 1), **probing)
        exact_Qk = np.where(found_Qk >= 0, np.take_along_axis(self._exact_QN, np.maximum(found_Qk, 0), axis=1), -np.inf)
        num_right_Q = (exact_Qk >= self._least_Q[:, None]).sum(axis=1)
        return round(float(np.minimum(num_right_Q, self.k).mean() / self.k), 4)

    def tune(self, wanted: float) -> tuple[int, int, float]:
        """The fewest candidates and lists that reach a recall, the most where none do; and what they reach."""
        # of what an ivf may miss, half is left to the candidates, half to the lists
        enough = wanted if self._num_lists == 1 else (1 + wanted) / 2
        for num_candidates in CANDIDATES:
            if (found := self.of(num_candidates, self._num_lists)) >= enough:
                break
        for num_probes in (2**n for n in range(self._num_lists.bit_length()) if 2**n < self._num_lists):
            if (less := self.of(num_candidates, num_probes)) >= wanted:
                return num_candidates, num_probes, less
        return num_candidates, self._num_lists, found


def _damaged(path: Path, what: str) -> DamagedStoreError:
    return DamagedStoreError(f"{path} is damaged: {what}. Run `gradsift index` again.")


def _read_entry(folder: Path) -> IndexEntry:
    path = folder / "index.json"
    try:
        doc = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"no index at {folder}. Make one with `gradsift index`.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    try:
        if type(doc) is not dict or doc.get("format") != FORMAT or type(doc.get("version")) is not int:
            raise ValueError(f"not JSON of the format {FORMAT}")
        if doc["version"] > VERSION:
            raise FormatVersionError(
                f"{path} has format version {doc['version']}; this gradsift reads up to {VERSION}. "
                "Upgrade it: `pip install --upgrade gradsift`."
            )
        if doc.get("sha256") != json_hash({name: doc[name] for name in doc if name != "sha256"}):
            raise ValueError("its checksum is not that of its content")
        fields = {name: doc[name] for name in doc if name not in ("format", "version", "sha256")}
        entry: IndexEntry = from_json(IndexEntry, fields)
        if entry.type not in TYPES or not entry.weights:
            raise ValueError(f"it is of the type {entry.type!r} over {len(entry.weights)} checkpoints")
        if min(entry.dim, entry.num_rows, entry.num_lists) < 1 or entry.num_candidates < RECALL_K:
            raise ValueError("its numbers are out of range")
        if not 1 <= entry.num_probes <= entry.num_lists:
            raise ValueError(f"it looks into {entry.num_probes} of {entry.num_lists} lists")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    return entry


def _read_index(path: Path, entry: IndexEntry, verify: bool) -> Any:
    """FAISS's index, of the kind and size that its entry says."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if len(data) != entry.file.num_bytes:
        raise _damaged(path, f"it has {len(data)} bytes, expected {entry.file.num_bytes}")
    if verify and hashlib.sha256(data.data).hexdigest() != entry.file.sha256:
        raise _damaged(path, "its checksum is not the one in index.json")
    faiss = import_faiss()
    try:
        index = faiss.deserialize_index(data)
    except Exception as error:  # FAISS raises RuntimeError, and by way of SWIG other kinds
        raise _damaged(path, " ".join(str(error).split())[:200]) from None
    kinds = {"flat": faiss.IndexFlat, "ivf": faiss.IndexIVFFlat, "ivf-sq8": faiss.IndexIVFScalarQuantizer}
    found = (type(index), index.d, index.ntotal, index.metric_type, getattr(index, "nlist", 1))
    expected = (kinds[entry.type], entry.dim, entry.num_rows, faiss.METRIC_INNER_PRODUCT, entry.num_lists)
    if not isinstance(index, kinds[entry.type]) or found[1:] != expected[1:]:
        raise _damaged(path, f"it is {found}, expected {expected}")
    return index
