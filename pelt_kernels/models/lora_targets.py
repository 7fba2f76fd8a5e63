"""Which Linears of a model LoRA works on: its targets, resolved by the modules' names once, before
anything is changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from torch import nn

from ..methods import LoraConfig
from ..methods.lora import ALL_LINEAR, TARGETS
from ..nn.original import is_transposed, linear_kind, why_not_replaceable
from .first_values import head_names
from .slots import FAMILIES, Place, Slots, layers_of, stacks_of, target_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE = ""  # the projection whose columns are all of a Linear's
SHOWN = 8  # names in a sentence
# What reads the weights of Linears in it without calling them, so that no branch would be seen: by
# the class of the parent, and by the model's type with the Linears' names.
UNCALLED_IN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_MAMBA = ("x_proj", "dt_proj", "out_proj")
UNCALLED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid"), _MAMBA),
    **dict.fromkeys(("jamba", "mamba", "mamba2", "nemotron_h", "zamba2"), _MAMBA),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


class Branch(NamedTuple):
    """A low-rank branch: its rank r, and the alpha of its scale alpha / r."""

    r: int
    alpha: float


@dataclass(frozen=True)
class Chosen:
    """A Linear that LoRA works on.

    Attributes:
        name: its name in the model.
        branches: by the projection whose columns they have; `WHOLE`: all columns.
        is_place: whether it is a place of a layer of the model's family.
    """

    name: str
    module: nn.Module
    branches: Mapping[str, Branch]
    is_place: bool


def chosen_linears(
    model: PreTrainedModel,
    config: LoraConfig | None,
    stacks: Iterable[tuple[Slots, nn.ModuleList]],
) -> dict[int, Chosen]:
    """The Linears on which LoRA works, by their ids, in the model's order.

    Args:
        stacks: the places and layers of a known family; none of another model, whose modules have
            no other names than their own.

    Raises:
        ValueError: a target, an excluded name, a pattern or a layer that fits nothing, or a target
            that is no Linear which a branch can stand beside.
    """
    if config is None:
        return {}
    return _Resolver(model, config, stacks).chosen()


def biases_of_targets(model: PreTrainedModel, config: LoraConfig | None) -> frozenset[str]:
    """The biases that ``bias="lora_only"`` has trained; of another config none."""
    if config is None or config.bias != "lora_only":
        return frozenset()
    is_known = getattr(model.config, "model_type", None) in FAMILIES
    slots = stacks_of(model) if is_known else ()
    stacks = [(each, layers_of(model, each)) for each in slots]
    chosen = chosen_linears(model, config, stacks).values()
    return frozenset(
        f"{c.name}.bias" for c in chosen if c.module._parameters.get("bias") is not None
    )


class _Resolver:
    """One model, and what its targets are matched with."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: LoraConfig,
        stacks: Iterable[tuple[Slots, nn.ModuleList]],
    ) -> None:
        self.model, self.config = model, config
        self.named = {name: module for name, module in model.named_modules() if name}
        names = {id(module): name for name, module in self.named.items()}
        self.places: dict[str, list[tuple[str, Place]]] = {}
        for slots, layers in stacks:
            for layer in layers:
                for path, projections in slots.linears(TARGETS):
                    self.places[names[id(layer.get_submodule(path))]] = projections
        self.head = head_names(model)
        self.words = model.get_output_embeddings()
        embeddings = (m for m in self.named.values() if isinstance(m, nn.Embedding))
        self.tables = {id(module._parameters.get("weight")) for module in embeddings}
        self.left_out: frozenset[str] = frozenset()
        self.owners: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(id(parameter), []).append(name)

    def chosen(self) -> dict[int, Chosen]:
        """The Linears that are left when all fields of the config have been read."""
        self._check_exclude()
        by_place = {
            name: places for name, places in self._by_place().items() if self._is_kept(name)
        }
        whole = [name for name in self._by_name() if self._is_kept(name)]
        for name in whole:
            self._check_target(name)
            if any(place.is_fused for _, place in by_place.get(name, ())):
                raise ValueError(
                    f"LoraConfig: expected {name} by its own name or by those of its projections, "
                    f"got both in targets={self.config.targets!r}"
                )
        projections: dict[str, tuple[str, ...]] = {}
        projections |= {name: (self._only_projection(name),) for name in whole}
        projections |= {name: tuple(n for n, _ in places) for name, places in by_place.items()}
        if not projections:
            self._refuse("targets that exclude, layers and the trained head leave", "none")
        for name in projections:
            self._check_replaceable(name)
        branches = self._branches(projections)
        return {
            id(module): Chosen(name, module, branches[name], name in self.places)
            for name, module in self.named.items()
            if name in branches
        }

    def _only_projection(self, name: str) -> str:
        """The name under which a family knows all columns of a Linear, where it has one."""
        places = self.places.get(name, [])
        return places[0][0] if len(places) == 1 and not places[0][1].is_fused else WHOLE

    def _by_place(self) -> dict[str, list[tuple[str, Place]]]:
        """The projections that the six names mean in the model's family, by their Linears."""
        wanted = self.config.places
        found = {}
        for name, projections in self.places.items():
            mine = [(n, place) for n, place in projections if target_of(n) in wanted]
            if mine:
                found[name] = mine
        return found

    def _by_name(self) -> list[str]:
        """The modules that are targets by their own names, in the model's order."""
        targets = self.config.targets
        if targets == ALL_LINEAR:
            linears = (name for name, m in self.named.items() if self._is_of_all_linear(m))
            return [name for name in linears if not self._is_in_head(name)]
        ends = () if isinstance(targets, str) else targets
        if self.places:
            ends = tuple(end for end in ends if end not in TARGETS)
        asked: list[str | tuple[str, ...]] = [(end,) for end in ends]
        for each in [targets] if isinstance(targets, str) else asked:
            fitting = matching(each, self.named)
            if all(self._is_in_head(name) for name in fitting):
                got = repr(each if isinstance(each, str) else each[0])
                got += ", which is in the trained head" if fitting else ""
                self._refuse("targets that name Linears", got)
        found = matching(targets if isinstance(targets, str) else ends, self.named)
        return [name for name in found if not self._is_in_head(name)]

    def _is_of_all_linear(self, module: nn.Module) -> bool:
        """Whether a module is a Linear, of whatever class: those that no branch can stand beside
        are refused later, by name.
        """
        if self._gives_words(module):
            return False
        has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
        is_like_one = "Linear" in type(module).__name__ and has_sizes
        return isinstance(module, nn.Linear) or is_transposed(module) or is_like_one

    def _gives_words(self, module: nn.Module) -> bool:
        """Whether a module is the output embeddings, or shares the table of embeddings."""
        weight = module._parameters.get("weight")
        return module is self.words or (weight is not None and id(weight) in self.tables)

    def _check_exclude(self) -> None:
        """Every name that is to be left out is one of some module."""
        exclude = self.config.exclude
        each: list[str | tuple[str, ...]] = [(name,) for name in exclude]
        for names in [exclude] if isinstance(exclude, str) else each:
            if not matching(names, self.named):
                got = repr(names if isinstance(names, str) else names[0])
                self._refuse("exclude with names of modules", got)
        self.left_out = frozenset(matching(exclude, self.named))

    def _is_kept(self, name: str) -> bool:
        """Whether `exclude` and `layers` leave a module."""
        layers = self.config.layers
        return name not in self.left_out and (not layers or layer_number(name) in layers)

    def _is_in_head(self, name: str) -> bool:
        """Whether all that a module holds is trained in place anyway."""
        held = [f"{name}.{own}" for own, _ in self.named[name].named_parameters()]
        return bool(held) and self.head.issuperset(held)

    def _check_target(self, name: str) -> None:
        """Raises ValueError unless a module that is a target by its name may have a branch."""
        module = self.named[name]
        parent = self.model.get_submodule(name.rpartition(".")[0])
        is_linear = isinstance(module, linear_kind(module)) or "Linear" in type(module).__name__
        if not (is_linear or hasattr(module, "base_layer")):
            self._refuse("targets that name Linears", f"{name}, which is {type(module).__name__}")
        if self._gives_words(module):
            self._refuse("targets other than the output embeddings", name)
        for parameter in module.parameters(recurse=False):
            others = [owner for owner in self.owners[id(parameter)] if owner != name]
            if others:
                got = f"{name}, which shares them with {others[0]}; exclude it"
                self._refuse("targets with parameters of their own", got)
        uncalled = UNCALLED.get(getattr(self.model.config, "model_type", ""), ())
        if isinstance(parent, UNCALLED_IN) or name.rpartition(".")[2] in uncalled:
            got = f"{name}, whose weight {type(parent).__name__} reads itself; exclude it"
            self._refuse("targets that are called", got)

    def _check_replaceable(self, name: str) -> None:
        """Raises ValueError unless another module may stand for a Linear, and for a gated one in a
        layer, where its gate finds the mask.
        """
        module = self.named[name]
        kind = linear_kind(module)
        reason = why_not_replaceable(module, kind)
        if reason:
            raise ValueError(
                f"get_pelt_model: expected {name} as an nn.{kind.__name__} with floating-point "
                f"weight and bias, got {reason}"
            )
        if self.config.gated and name not in self.places:
            raise ValueError(
                "LoraConfig: expected gated targets in the layers of a known family, where gates "
                f"find the mask, got {name}; exclude it, or leave the gates out (gated=False)"
            )

    def _branches(self, found: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, Branch]]:
        """Rank and scale of each projection's branch."""
        config = self.config
        used: set[tuple[str, str]] = set()
        branches: dict[str, dict[str, Branch]] = {}
        for name, projections in found.items():
            branches[name] = {}
            for projection in projections:
                rank = fitting(config.ranks, name, projection)
                alpha = fitting(config.alphas, name, projection)
                r = config.r if rank is None else int(rank[1])
                numerator = config.alpha if alpha is None else alpha[1]
                # s = alpha / sqrt(r), in the terms of alpha / r.
                numerator *= r**0.5 if config.use_rslora else 1
                branches[name][projection] = Branch(r, numerator)
                used |= {("rank_pattern", rank[0])} if rank else set()
                used |= {("alpha_pattern", alpha[0])} if alpha else set()
        for field, pairs in (("rank_pattern", config.ranks), ("alpha_pattern", config.alphas)):
            for pattern, _ in pairs:
                if (field, pattern) not in used:
                    self._refuse(f"{field} for modules among the targets", repr(pattern))
        self._check_layers(found)
        return branches

    def _check_layers(self, found: Collection[str]) -> None:
        """Every layer that was asked for has a target in it."""
        without = set(self.config.layers) - {layer_number(name) for name in found}
        if without:
            self._refuse("layers that have targets in them", str(sorted(without)))

    def _refuse(self, expected: str, got: str) -> NoReturn:
        """One sentence, which names some modules that would do."""
        fitting = dict.fromkeys(name.rpartition(".")[2] for name in self._eligible())
        shown = ", ".join(list(fitting)[:SHOWN]) + (", ..." if len(fitting) > SHOWN else "")
        places = f" or its places ({', '.join(TARGETS)})" if self.places else ""
        raise ValueError(
            f"LoraConfig: expected {expected}, got {got}; {type(self.model).__name__} has the "
            f"Linears {shown or '(none)'}{places}"
        )

    def _eligible(self) -> Iterator[str]:
        """The Linears that may be targets."""
        for name, module in self.named.items():
            if self._is_in_head(name) or self._gives_words(module):
                continue
            if not why_not_replaceable(module, linear_kind(module)):
                yield name


def matching(names: Collection[str] | str, modules: Iterable[str]) -> list[str]:
    """The modules whose whole name fits a regular expression, or whose name is one of a list or
    ends with a point and it.
    """
    if isinstance(names, str):
        pattern = re.compile(names)
        return [module for module in modules if pattern.fullmatch(module)] if names else []
    ends = tuple(f".{name}" for name in names)
    return [module for module in modules if module in names or module.endswith(ends)]


def layer_number(name: str) -> int | None:
    """The number of the layer that a module is in: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def fitting(
    pairs: Collection[tuple[str, float]], name: str, projection: str
) -> tuple[str, float] | None:
    """The first pair whose pattern is a projection's target or the end of a module's name."""
    for pattern, value in pairs:
        is_target = pattern == target_of(projection)
        if is_target or re.match(rf"(.*\.)?({pattern})$", name):
            return pattern, value
    return None
