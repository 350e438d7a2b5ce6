"""Reads training images: decodes them no larger than needed, and caches them in memory."""

import threading
from collections.abc import Callable

import numpy as np

from effdet_jax.data import transforms
from effdet_jax.data.example import Annotations
from effdet_jax.data.jitter import Place
from effdet_jax.data.sources import Source


class Reader:
    """Reads the images of a source as RGB, and caches up to `cache_bytes` of decoded pixels. Thread-safe.

    Nothing is evicted. Every image is used once per epoch, in random order, so replacing one by another gains nothing;
    least-recently-used eviction would drop most images before their next use.
    """

    def __init__(self, source: Source, cache_bytes: int = 0) -> None:
        self._source = source
        self._free_bytes = cache_bytes
        self._lock = threading.Lock()
        self._info: dict[int, tuple[tuple[int, int], bool, Annotations]] = {}  # size, whether it can be reduced
        self._pixels: dict[tuple[int, int], np.ndarray] = {}  # by index and reduction

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int, place: Callable[[tuple[int, int]], Place]) -> tuple[Place, np.ndarray, Annotations]:
        """(place, uint8 [h, w, 3] decoded for it, annotations); `place` maps the size of the image to its place.

        Raises UnreadableError if the image cannot be read or does not have the annotated size.
        """
        if index in self._info:
            size, reducible, annotations = self._info[index]
            where = place(size)
            pixels = self._pixels.get((index, where.reduction if reducible else 1))
            if pixels is not None:
                return where, pixels, annotations
        example = self._source[index]
        image, annotations = example.image, example.annotations
        if isinstance(image, bytes):
            where = place(transforms.image_size(image, annotations.file_name))
            pixels = transforms.decode(image, annotations.file_name, reduction=where.reduction)
        else:
            where, pixels = place(image.shape[:2]), image
        self._keep(index, where, pixels, isinstance(image, bytes) and transforms.is_jpeg(image), annotations)
        return where, pixels, annotations

    def _keep(self, index: int, where: Place, pixels: np.ndarray, reducible: bool, annotations: Annotations) -> None:
        key = index, where.reduction if reducible else 1
        with self._lock:
            if key in self._pixels or pixels.nbytes > self._free_bytes:
                return
            self._free_bytes -= pixels.nbytes
            self._info[index] = where.size, reducible, annotations
            self._pixels[key] = pixels
