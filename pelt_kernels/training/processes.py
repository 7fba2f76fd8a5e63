"""Several processes that train one model together, as ``accelerate launch`` and ``torchrun`` start
them. With one process every function here is what its docstring says of one, and costs nothing.

All of them compute the same numbers and so take the same decisions. What is on the disk is read and
written by the main one. When a process ends early, its connections close, the others notice, and
the launcher ends them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from torch import distributed

from .errors import RunError

T = TypeVar("T")
U = TypeVar("U")

# The others wait as long as the main process, which may itself wait for another run to end.
LONGEST_WAIT = timedelta(days=30)


def join(device: str) -> None:
    """Meets the other processes that the launcher has started, if there are any; `device` is one of
    `machine.DEVICES`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=device == "cpu")


def leave() -> None:
    """Parts from the others at the end of all work."""
    if count() > 1:
        distributed.destroy_process_group()


def count() -> int:
    """How many there are."""
    is_several = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_several else 1


def index() -> int:
    """The number of this one; the main one is 0."""
    return distributed.get_rank() if count() > 1 else 0


def of_main(work: Callable[[], T]) -> T:
    """What `work` gives in the main process, in all of them; an error there is raised in all."""
    if count() == 1:
        return work()
    outcome: list[Any] = [None, None]  # a value, an error
    if index() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    with _told_of_ends():
        distributed.broadcast_object_list(outcome, src=0, group=_control())
    value, failure = outcome
    if failure is not None:
        raise failure
    return cast(T, value)


def gathered(value: T) -> list[T]:
    """The value of each process, by their numbers, in all of them."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with _told_of_ends():
        distributed.all_gather_object(values, value, group=_control())
    return values


def largest(number: int) -> int:
    """The largest of the processes' numbers, in all of them."""
    if count() == 1:
        return number
    found = torch.tensor(number)
    with _told_of_ends():
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=_control())
    return int(found)


def in_shares(work: Callable[[Sequence[T]], Sequence[U]], items: Sequence[T]) -> list[U]:
    """What `work` makes of the items, one of each and in their order, each process of its share."""
    made: list[Any] = [None] * len(items)
    for number, part in enumerate(gathered(work(items[index() :: count()]))):
        made[number :: count()] = part
    return made


def _control() -> Any:
    """The group for objects and decisions: on processors, apart from that of the gradients."""
    return _control_beside(distributed.group.WORLD)


@cache
def _control_beside(world: Any) -> Any:
    return distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)


@contextmanager
def _told_of_ends() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's for a closed connection
        raise RunError("another process of the run has ended, and with it this one") from error
