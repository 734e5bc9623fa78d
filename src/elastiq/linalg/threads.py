"""Work shared among threads whose results do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Chunk = TypeVar("_Chunk")
_Result = TypeVar("_Result")


def in_chunks(work: Callable[[_Chunk], _Result], chunks: Sequence[_Chunk]) -> list[_Result]:
    """The results of `work` for all chunks, in their order; as many at a time as torch has threads.

    Each is worked on by one thread alone: LAPACK and matrix products shared among threads give other last digits with
    another number of them.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, len(chunks)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, chunks))
    finally:
        torch.set_num_threads(threads)  # part of it is one setting for all threads
