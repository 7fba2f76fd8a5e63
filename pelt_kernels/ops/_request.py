"""The request for a backend that holds here: each thread and each asynchronous task has its own.

`torch.compile` cannot read a context variable, but it reads a module's attribute, a computed one
too, and compiles again where that has changed. So a function being compiled sees the request as an
attribute, and blocks that it opens itself are in a plain variable, which it can set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch

_DEFAULT = os.environ.get("PELT_KERNELS_BACKEND", "")


@dataclass(eq=False)
class _Block:
    """A request with a flag of its own for whether the block is open: blocks may be left in any
    order, and in a generator even in another thread than the one that opened them.
    """

    name: str
    is_open: bool = True


# The blocks opened here, the last one at the end; None where none was opened yet.
_blocks: ContextVar[tuple[_Block, ...] | None] = ContextVar("pelt_kernels_blocks", default=None)
_were_blocks = False  # has any thread opened one
_compiled: str | None = None  # the request of a block inside of what is being compiled


@contextmanager
def block(name: str) -> Iterator[None]:
    """A block in which ``name`` is requested; "" is the automatic choice."""
    global _compiled, _were_blocks
    if torch.compiler.is_compiling():
        before, _compiled = _compiled, name
        try:
            yield
        finally:
            _compiled = before
        return
    mine, _were_blocks = _Block(name), True
    _blocks.set((*_open(_blocks.get()), mine))
    try:
        yield
    finally:
        mine.is_open = False
        _blocks.set(_open(_blocks.get()))


def _open(blocks: tuple[_Block, ...] | None) -> tuple[_Block, ...]:
    return tuple(block for block in blocks or () if block.is_open)


def current() -> str:
    """The request of the innermost open block, else the process's; empty: the automatic choice."""
    blocks = _blocks.get()
    if blocks is None and _were_blocks:
        blocks = _blocks_of_backward()
    if not blocks:
        return _DEFAULT
    return next((block.name for block in reversed(blocks) if block.is_open), _DEFAULT)


def compiled() -> str:
    """The same for a function that is being compiled."""
    return _HERE.name if _compiled is None else _compiled


def _blocks_of_backward() -> tuple[_Block, ...] | None:
    """In a thread in which autograd runs on a GPU, the blocks that are open where backward was
    called: activation checkpointing calls operators there. torch leaves that context behind.
    """
    tls = torch._C
    if not hasattr(tls, "_is_key_in_tls") or not tls._is_key_in_tls("context"):
        return None
    return tls._get_obj_in_tls("context").get(_blocks)


def _attribute(name: str) -> str:
    if name != "name":
        raise AttributeError(name)
    return current()


_HERE = ModuleType("pelt_kernels_request")
_HERE.__getattr__ = _attribute  # type: ignore[method-assign]
