"""Training's images: decoded no larger than they are needed, and kept in memory where there is room for them."""

import threading
from collections.abc import Callable

import numpy as np

from effdet_jax.data import transforms
from effdet_jax.data.example import Annotations
from effdet_jax.data.jitter import Place
from effdet_jax.data.sources import Source


class Reader:
    """A source's images, RGB. Keeps up to `cache_bytes` of pixels, and so reads and decodes them once. Thread safe.

    What is kept stays: every image is needed once an epoch, in any order. To give one up for a newer one would lose as
    much as it gains, and with more images than room (least recently used first) nearly all would go before their turn.
    """

    def __init__(self, source: Source, cache_bytes: int = 0) -> None:
        self._source = source
        self._room = cache_bytes
        self._lock = threading.Lock()
        self._known: dict[int, tuple[tuple[int, int], bool, Annotations]] = {}  # size, whether it can be reduced
        self._pixels: dict[tuple[int, int], np.ndarray] = {}  # by index and reduction

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int, place: Callable[[tuple[int, int]], Place]) -> tuple[Place, np.ndarray, Annotations]:
        """(place, uint8 [h, w, 3] decoded as it says, annotations); `place` is a function of the image's size.

        Raises UnreadableError where the image cannot be read or is not the one annotated.
        """
        if index in self._known:
            size, reducible, annotations = self._known[index]
            where = place(size)
            pixels = self._pixels.get((index, where.reduction if reducible else 1))
            if pixels is not None:
                return where, pixels, annotations
        example = self._source[index]
        image, annotations = example.image, example.annotations
        if not isinstance(image, bytes):
            where = place(image.shape[:2])
            self._keep(index, where, image, False, annotations)
            return where, image, annotations
        where = place(transforms.image_size(image, annotations.file_name))
        pixels = transforms.decode(image, annotations.file_name, reduction=where.reduction)
        self._keep(index, where, pixels, transforms.is_jpeg(image), annotations)
        return where, pixels, annotations

    def _keep(self, index: int, where: Place, pixels: np.ndarray, reducible: bool, annotations: Annotations) -> None:
        key = index, where.reduction if reducible else 1
        with self._lock:
            if key in self._pixels or pixels.nbytes > self._room:
                return
            self._room -= pixels.nbytes
            self._known[index] = where.size, reducible, annotations
            self._pixels[key] = pixels
