"""Several adapters of one base model: one of them is in it, the others wait beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor, nn

from ..methods import MethodConfig, parts_of
from .adapter_files import copy_weights
from .allocation import check_size
from .checkpoint import Adapter, read_adapter
from .first_values import FirstValues, head_names, names_in_place, put_values
from .hub import local_folder
from .inject import Injection
from .labelled import LabelledModel
from .lora_targets import biases_of_targets
from .mixture import compares_passes
from .parked import FIELDS, MODULES, Parked
from .pruning import set_sparsity
from .task_inputs import TaskInputs
from .trained_tokens import TrainedTokens
from .vocabulary import word_embeddings
from .wrapped import BASE, shown_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT = "default"  # PEFT's name for the first adapter of a model
BASE_ADAPTER = "__base__"  # PEFT's name for no adapter
_NAME = re.compile(r"[\w-]+")


class SeveralAdapters(LabelledModel):
    """What a `PeltModel` does about its adapters.

    Exactly one adapter is in the model, the active one, as if it were the only one: what the model
    computes, trains, saves and shows is its. An adapter that waits holds its parts, and of the
    parameters that it trains in place, such as the head, its own values; the base model's own
    values are between the two, so each adapter starts and works from the same base.

    Attributes:
        active_adapter: the name of the adapter in the model.
        waiting: the others.
    """

    active_adapter: str
    tokens: TrainedTokens | None
    task_adapters: nn.Module | None
    waiting: nn.ModuleList
    _progress: float | None
    _in_model: tuple[Injection | TrainedTokens, ...]
    _names: tuple[str, ...]  # of all adapters, in the order in which they came

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        named = model.named_parameters()
        self._requires_grad = {name: parameter.requires_grad for name, parameter in named}
        self.waiting = nn.ModuleList()
        self._names = ()

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters in the model, of which there is one."""
        return [self.active_adapter]

    @property
    def adapter_configs(self) -> dict[str, MethodConfig]:
        """Each adapter's config, by name, in the order in which they came."""
        found = {parked.name: parked.method_config for parked in self._waiting()}
        found[self.active_adapter] = self.method_config
        return {name: found[name] for name in self._names}

    def add_adapter(self, adapter_name: str, config: MethodConfig) -> None:
        """Makes a new adapter of any method, beside those that are there. It is not active yet:
        `set_adapter` puts it into the model and has it trained.

        Raises:
            ValueError: a name that is taken or none; full fine-tuning, which leaves no base for
                another; what `get_pelt_model` refuses. The model is as it was.
            TypeError: config is not a method's config.
        """
        check_config("add_adapter", config)
        self._check_new("add_adapter", adapter_name, config)
        with self._aside("add_adapter"):
            self._put_in(adapter_name, config)
            self._keep(self._park())

    def set_adapter(self, adapter_name: str) -> None:
        """Puts an adapter into the model, in the place of the one that is there.

        Its parameters require a gradient again as they did when it was there last; those of the
        others require none and have none. An optimizer works on the parameters of one adapter: make
        it after this.

        Raises:
            ValueError: an unknown name. Or the one that is there cannot be taken out, as a
                parameter is computed from others (`remove`); the model is as it was.
        """
        self._check_known("set_adapter", [adapter_name])
        if adapter_name == self.active_adapter:
            return
        self._check_parkable("set_adapter")
        active = self._park()
        self._put_back(self._take(adapter_name))
        self._keep(active)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter that is not active.

        Raises:
            ValueError: an unknown name, or the active adapter's.
        """
        self._check_known("delete_adapter", [adapter_name])
        if adapter_name == self.active_adapter:
            others = [name for name in self._names if name != adapter_name]
            way_out = (
                f"set_adapter() another one first ({', '.join(others)})"
                if others
                else "it is the only one, and remove() gives the base model back"
            )
            raise ValueError(
                "delete_adapter: expected an adapter that is not in the model, got the active one, "
                f"{adapter_name!r}; {way_out}"
            )
        self._take(adapter_name)
        self._names = tuple(name for name in self._names if name != adapter_name)

    def load_adapter(
        self,
        directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        is_trainable: bool = False,
        *,
        revision: str | None = None,
    ) -> None:
        """Loads what `save_pretrained` wrote, or another library (`formats`).

        Args:
            directory: a folder, or the id of a repository on the hub.
            adapter_name: of a new adapter, which is not active yet; or of one that is there, which
                must have the same method. None: of the active one.
            is_trainable: of a new adapter, whether `set_adapter` has it trained.

        Raises:
            FileNotFoundError: a file is missing. ValueError: it is damaged, or of another method or
                model. The model is as it was.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_attached("load_adapter")
        directory = local_folder(directory, revision)
        if name in self._names:
            with self._activated(name):
                adapter = read_adapter(directory, self.base_model, self.method_config)
                copy_weights(self.trained_parameters(), adapter.tensors, directory)
                self._put_rows(adapter.rows)
            return
        self._check_new("load_adapter", name)
        with self._aside("load_adapter"):
            adapter = read_adapter(directory, self.base_model)
            self._check_new("load_adapter", name, adapter.config)
            check_size(self.base_model, adapter.config, adapter.tensors, directory)
            self._put_in(name, adapter.config)
            self._fill(adapter, directory)
            if not is_trainable:
                self.requires_grad_(False)
            self._keep(self._park())

    def _put_in(self, name: str, config: MethodConfig) -> None:
        """Makes the parts of a method for the plain base model, puts them into it, and has them
        trained. On an error nothing was put in.
        """
        model, parts = self.base_model, parts_of(config)
        injection = Injection(model, parts)
        head = head_names(model)
        if config.method == "head" and not head:
            raise ValueError(
                "HeadConfig: expected a model with a head, such as one for sequence "
                "classification, got "
                f"{type(model).__name__}, which has no parameter outside its encoder"
            )
        in_place = names_in_place(model, parts, head, biases_of_targets(model, parts.lora))
        first_values = None if parts.tune == "all" else FirstValues(model, in_place, head)
        tokens = TrainedTokens(model, words) if (words := parts.trainable_tokens) else None
        compares = parts.mixture is not None and compares_passes(model, parts.mixture)
        before = {name for name, _ in self.named_parameters()}
        self.prefix, self.tokens = injection.prefix, tokens
        self.task_adapters = injection.task_adapters
        self.written = None if injection.written is None else injection.written.weights
        self.active_adapter, self.method_config = name, config
        self._task_inputs, self._compares_passes = TaskInputs(parts), compares
        self._first_values, self._injection = first_values, injection
        self._in_model = (injection,) if tokens is None else (injection, tokens)
        self._progress = None  # as `set_progress` was told; None: never
        self._attach()
        added = {name for name, _ in self.named_parameters()} - before
        self._set_trained(added | {BASE + name for name in in_place})
        self.requires_grad_(False)
        for parameter in self.trained_parameters().values():
            parameter.requires_grad_(True)
        if name not in self._names:
            self._names = (*self._names, name)

    def _fill(self, adapter: Adapter, directory: str | os.PathLike[str]) -> None:
        """Gives the adapter that was just put in the values of a file."""
        copy_weights(self.trained_parameters(), adapter.tensors, directory)
        self._put_rows(adapter.rows)
        self.set_progress(1.0)

    def set_progress(self, progress: float) -> None:
        """Tells the method which share of the training is done: PST's sparsity follows it, for
        every forward from here on. A new model stands at 0, a loaded one at 1.
        """
        self._progress = progress
        set_sparsity(self.base_model, self.method_config, progress)

    def _put_rows(self, rows: Tensor | None) -> None:
        """Gives the last words a file's embeddings; the base model's own come back with it."""
        if rows is not None and self._first_values is not None:
            self._first_values.add(*word_embeddings(self.base_model))
        super()._put_rows(rows)

    def _park(self) -> Parked:
        """Takes the active adapter out: the base model is plain, bit for bit."""
        trained = self.trained_parameters()
        trainable = frozenset(name for name, p in trained.items() if p.requires_grad)
        self._detach()
        assert self._first_values is not None
        in_place = self._first_values.put(self.base_model, keep_head=False)
        for parameter in trained.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        fields = {name: getattr(self, name) for name in FIELDS}
        modules = {name: getattr(self, name) for name in MODULES}
        for name in MODULES:
            setattr(self, name, None)
        return Parked(fields, modules, trainable, in_place)

    def _put_back(self, parked: Parked) -> None:
        """Puts an adapter into the plain base model."""
        for name, value in parked.fields.items():
            setattr(self, name, value)
        for name in MODULES:
            setattr(self, name, getattr(parked, name))
        put_values(self.base_model, parked.values_in_place())
        self._attach()
        for name, parameter in self.trained_parameters().items():
            parameter.requires_grad_(name in parked.trainable)
        kind, base, _ = self.SHOWN
        self.__class__ = shown_as(kind, base, self._inputs(self.method_config))

    def _waiting(self) -> list[Parked]:
        return [parked for parked in self.waiting if isinstance(parked, Parked)]

    def _keep(self, parked: Parked) -> None:
        """An adapter waits from here on."""
        self.waiting.append(parked)

    def _take(self, name: str) -> Parked:
        """An adapter waits no longer."""
        found = next(parked for parked in self._waiting() if parked.name == name)
        self.waiting = nn.ModuleList(parked for parked in self._waiting() if parked is not found)
        return found

    @contextmanager
    def _aside(self, who: str) -> Iterator[None]:
        """Inside, the base model is plain and the active adapter out of it; another one that is put
        in inside has to be out again at the end.
        """
        self._check_parkable(who)
        names, active = self._names, self._park()
        try:
            yield
        except BaseException:
            self._names = names
            if not self._is_detached:
                self._park()
            raise
        finally:
            self._put_back(active)

    @contextmanager
    def _activated(self, name: str) -> Iterator[None]:
        """Inside, an adapter is the active one."""
        before = self.active_adapter
        self.set_adapter(name)
        try:
            yield
        finally:
            self.set_adapter(before)

    def _check_parkable(self, who: str) -> None:
        """Raises ValueError unless the active adapter can be taken out and leave the base model."""
        first_values = self._base_values(who)
        self._check_attached(who)
        self._injection.check_detachable(who)
        first_values.check(self.base_model, who, keep_head=False)

    def _check_new(self, who: str, name: object, config: MethodConfig | None = None) -> None:
        """Raises ValueError for what no new adapter can be called or consist of."""
        check_name(who, name)
        if name in self._names:
            raise ValueError(
                f"{who}: expected a new adapter_name, got {name!r}, which the model has; "
                "delete_adapter() forgets it"
            )
        if config is not None and parts_of(config).tune == "all":
            raise ValueError(
                f"{who}: expected a method that leaves the base model alone, got "
                f"{config.method!r}, which trains it in place; get_pelt_model takes it for a model "
                "of its own"
            )

    def _check_known(self, who: str, names: Sequence[object]) -> None:
        """Raises ValueError for an adapter that is not there."""
        for name in names:
            if name not in self._names:
                _raise_unknown(who, name, self._names)


def check_config(who: str, config: object) -> None:
    """Raises TypeError for what is no method's config."""
    if not isinstance(config, MethodConfig):
        raise TypeError(
            f"{who}: expected config as a method's config such as UniPELTConfig.apl(), got "
            f"{type(config).__name__}"
        )


def check_name(who: str, name: object) -> None:
    """Raises ValueError for what no adapter can be called: a folder of its files has its name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == BASE_ADAPTER:
        raise ValueError(
            f"{who}: expected adapter_name as letters, digits, _ and -, and not {BASE_ADAPTER!r}, "
            f"got {name!r:.80}"
        )


def _raise_unknown(who: str, name: object, known: Sequence[str]) -> NoReturn:
    raise ValueError(f"{who}: expected one of the adapters {', '.join(known)}, got {name!r:.80}")
