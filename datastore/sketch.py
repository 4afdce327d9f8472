"""A sketch: vectors in few columns, whose inner products are those of the vectors, about.

    E⟨Sx, Sy⟩ = ⟨x, y⟩,   Var⟨Sx, Sy⟩ ≤ (‖x‖² ‖y‖² + ⟨x, y⟩²) / dim

So a cosine ρ between two sketches is off by about (1 − ρ²)/√dim, root mean square: 0.03 at most for 1024 columns, and
nothing for rows that are alike. What is sketched, and for what, is `index`'s business.
"""

import hashlib
from math import ceil

import numpy as np
import numpy.typing as npt

__all__ = ["SignSketch"]

Vectors = npt.NDArray[np.float32]


class SignSketch:
    """S: from X columns to `dim`, with E⟨Sx, Sy⟩ = ⟨x, y⟩.

    Each checkpoint's columns are cut into chunks of `dim`; a chunk's columns get random signs, are turned by a random
    number of places, and added. So two columns of one chunk never meet, and others do with the chance 1/dim: the
    variance is that of a count sketch at most (Charikar, Chen & Farach-Colton, 2002). Signs and
    turns are words of Philox, a counter-based generator, keyed by seed and checkpoint: the same on any machine.
    """

    def __init__(self, checkpoints: list[str], proj_dim: int, dim: int, seed: int) -> None:
        self.dim = dim
        signs: list[Vectors] = []
        self._turns: list[tuple[int, int, int]] = []
        for number, checkpoint in enumerate(checkpoints):
            digest = hashlib.sha256(f"gradsift:index:{seed}:{checkpoint}".encode()).digest()
            words = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))  # its raw words never change, says numpy
            bits = np.unpackbits(words.random_raw(ceil(proj_dim / 64)).astype("<u8").view(np.uint8))[:proj_dim]
            signs.append(np.where(bits, np.float32(1), np.float32(-1)))
            turns = words.random_raw(ceil(proj_dim / dim)) % np.uint64(dim)
            self._turns += [
                (number * proj_dim + first, min(dim, proj_dim - first), int(turn))
                for first, turn in zip(range(0, proj_dim, dim), turns, strict=True)
            ]
        self.signs_X = np.concatenate(signs)

    def __call__(self, vectors_nX: Vectors) -> Vectors:
        """S x of n vectors, (n, dim) float32."""
        sums_nY = np.zeros((len(vectors_nX), self.dim), np.float32)
        for start, size, turn in self._turns:
            chunk_ns = vectors_nX[:, start : start + size] * self.signs_X[start : start + size]
            whole = min(size, self.dim - turn)
            sums_nY[:, turn : turn + whole] += chunk_ns[:, :whole]
            sums_nY[:, : size - whole] += chunk_ns[:, whole:]
        return sums_nY

    def unit(self, vectors_nX: Vectors) -> Vectors:
        """S x / ‖S x‖, whose inner products are cosines of sketches: 1 for equal rows, and off by (1 − ρ²)/√dim."""
        sums_nY = self(vectors_nX)
        norms_n1 = np.sqrt(np.square(sums_nY).sum(axis=1, keepdims=True))
        return sums_nY / np.maximum(norms_n1, np.finfo(np.float32).tiny)

    def matrix_ref(self) -> Vectors:
        """S itself, (X, dim), a column of x at a time."""
        matrix_XY = np.zeros((len(self.signs_X), self.dim), np.float32)
        for start, size, turn in self._turns:
            for place in range(size):
                matrix_XY[start + place, (place + turn) % self.dim] = self.signs_X[start + place]
        return matrix_XY
