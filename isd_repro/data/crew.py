"""Those who read, decode and encode images for a pack: threads, or processes where the source is a folder of files.

Results come in the order of the images whoever finished first, and a bounded number is waiting, so neither the number of
workers nor their speed changes a byte or needs memory that grows with the source.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from isd_repro.config import params
from isd_repro.data import sources
from isd_repro.data.encoding import Encoded, encoded
from isd_repro.data.opening import UnreadableError
from isd_repro.data.sources import Listing, Located
from isd_repro.runtime.errors import DataError

T = TypeVar("T")
CHUNK = 16  # images that a process gets at once
_worker: Reader | None = None  # of a process


class Reader:
    """Reads and packs images; a source that takes several processes is opened in each, for it holds a path alone."""

    def __init__(self, listing: Listing, store: params.Store) -> None:
        self._listing, self._store = listing, store

    def all(self, images: Sequence[Located]) -> list[Encoded | None]:
        """Each of them."""
        return [self.one(image) for image in images]

    def one(self, image: Located) -> Encoded | None:
        """None where the image cannot be read."""
        try:
            payload = self._listing.fetch(image)
            return encoded(payload, self._listing.decode(payload), self._store)
        except UnreadableError:
            return None


def packed(
    images: Iterable[Located], listing: Listing, source: params.Source, store: params.Store, processes: int
) -> Iterator[Encoded | None]:
    """Every image as the store keeps it, in order; None where it cannot be read.

    Raises:
        DataError: an image is gone, or one of the processes was ended from outside.
    """
    if processes < 2 or sources.open_files(source) is None:
        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads) as pool:
            yield from _in_order(lambda chunk: pool.submit(Reader(listing, store).all, chunk), images, 1, 4 * threads)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would take over locks that threads of this process hold
    crew = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_enter, initargs=(source, store))
    try:
        yield from _in_order(lambda chunk: crew.submit(_work, chunk), images, CHUNK, 2 * processes)
    except BrokenProcessPool as error:
        hint = "look at free memory; run again, with fewer processes if need be: it goes on where it was"
        raise DataError("a process that packs images was ended from outside", hint) from error
    finally:
        crew.shutdown(wait=True, cancel_futures=True)


def hashed(images: Iterable[Located], listing: Listing) -> Iterator[str | None]:
    """Sha256 of every image's bytes, in order; None where they cannot be read. Nothing is decoded."""

    def work(chunk: Sequence[Located]) -> list[str | None]:
        try:
            return [hashlib.sha256(listing.fetch(chunk[0])).hexdigest()]
        except UnreadableError:
            return [None]

    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        yield from _in_order(lambda chunk: pool.submit(work, chunk), images, 1, 4 * threads)


def _in_order(
    submit: Callable[[Sequence[Located]], Future[list[T]]], images: Iterable[Located], chunk: int, most: int
) -> Iterator[T]:
    """Results in the order of the images, of at most `most` chunks under way."""
    left = iter(images)
    waiting: deque[Future[list[T]]] = deque()
    try:
        while True:
            while len(waiting) < most and (some := list(islice(left, chunk))):
                waiting.append(submit(some))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


# --- in a process of the crew -----------------------------------------------------------------------------------------


def _enter(source: params.Source, store: params.Store) -> None:
    """Begin: leave the terminal's signals to the process that started this one, and end when it ends, however it does."""
    global _worker  # noqa: PLW0603 - what an initializer makes can be kept nowhere else
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True, name="follow-parent").start()
    listing = sources.open_files(source)
    assert listing is not None
    _worker = Reader(listing, store)


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(images: Sequence[Located]) -> list[Encoded | None]:
    assert _worker is not None
    return _worker.all(images)
