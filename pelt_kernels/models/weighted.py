"""A LoRA adapter computed from several others: weighted sums, TIES and DARE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..methods import LoraConfig, MethodConfig
from ..methods.lora import MAX_RANK
from .mixed_batch import MixingModel

CAT = "cat"
COMBINATIONS = ("linear", "ties", "dare_linear", "dare_ties", CAT)
SIGNS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How several matrices become one.

    Attributes:
        kind: one of `COMBINATIONS`.
        density: the share of numbers that TIES and DARE keep.
        majority_sign: of TIES; ``total`` elects the sign of the sum, ``frequency`` that of most.
        generator: of DARE's choice, on the CPU; None: torch's.
    """

    kind: str
    density: float | None
    majority_sign: str
    generator: torch.Generator | None

    def check(self, who: str) -> None:
        """Raises ValueError for a field outside its range."""
        for name, value, known in (
            ("combination_type", self.kind, COMBINATIONS),
            ("majority_sign_method", self.majority_sign, SIGNS),
        ):
            if value not in known:
                raise ValueError(
                    f"{who}: expected {name} as one of {', '.join(known)}, got {value!r:.80}"
                )
        if self.kind in ("linear", CAT):
            if self.density is not None:
                raise ValueError(f"{who}: expected no density for {self.kind}, got {self.density}")
        elif not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
            raise ValueError(
                f"{who}: expected density > 0 and <= 1, the share of numbers that {self.kind} "
                f"keeps, got {self.density!r}"
            )

    def merged(self, matrices: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
        """One matrix of several of one shape, each with its factor."""
        x = torch.stack(list(matrices))
        if self.kind.startswith("dare"):
            x = self._dropped(x)
        elif self.kind == "ties":
            x = self._trimmed(x)
        weighted = x * torch.tensor(factors, dtype=x.dtype, device=x.device)[:, None, None]
        if not self.kind.endswith("ties"):
            return weighted.sum(0)
        votes = x if self.majority_sign == "total" else x.sign()
        elected = torch.where(votes.sum(0) >= 0, 1, -1)
        agrees = x.sign() == elected
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def _dropped(self, x: Tensor) -> Tensor:
        """Random numbers as 0, the others larger, so that the expectation stays."""
        assert self.density is not None
        # On the CPU, so that every device has the same choice.
        kept = torch.rand(x.shape, generator=self.generator) < self.density
        return x * kept.to(x.device) / self.density

    def _trimmed(self, x: Tensor) -> Tensor:
        """Of each matrix the smallest numbers as 0."""
        assert self.density is not None
        flat = x.flatten(1)
        largest = flat.abs().topk(int(self.density * flat.shape[1]), dim=1).indices
        return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest)).view_as(x)


def weighted_config(
    who: str, configs: Mapping[str, MethodConfig], combination: Combination
) -> LoraConfig:
    """The config of what is computed from adapters with these: its scale is 1.

    Raises:
        ValueError: an adapter that is no plain LoRA, other modules or ranks than the first's.
    """
    first: LoraConfig | None = None
    for name, config in configs.items():
        if not isinstance(config, LoraConfig) or config.gated or config.bias != "none":
            raise ValueError(
                f"{who}: expected adapters of LoRA without gates and biases, got {name!r} of "
                f"{config.method!r}"
            )
        if config.rank_pattern or config.alpha_pattern:
            raise ValueError(
                f"{who}: expected adapters of one r and alpha, got {name!r} with rank_pattern or "
                "alpha_pattern"
            )
        first = config if first is None else first
        for field in ("targets", "exclude", "layers"):
            own, wanted = getattr(config, field), getattr(first, field)
            if own != wanted:
                raise ValueError(
                    f"{who}: expected adapters with the same {field}, got {wanted} and, of "
                    f"{name!r}, {own}"
                )
    assert first is not None
    ranks = [config.r for config in configs.values() if isinstance(config, LoraConfig)]
    if combination.kind != CAT and len(set(ranks)) > 1:
        raise ValueError(
            f"{who}: expected adapters of one r for {combination.kind}, got r = "
            f"{', '.join(map(str, ranks))}; combination_type='cat' takes them"
        )
    r = sum(ranks) if combination.kind == CAT else ranks[0]
    if r > MAX_RANK:
        raise ValueError(f"{who}: expected ranks of {MAX_RANK} together at most, got {r}")
    return replace(first, r=r, alpha=float(r), use_rslora=False)


def combined(
    adapters: Sequence[tuple[LoraConfig, Mapping[str, Tensor]]],
    weights: Sequence[float],
    combination: Combination,
) -> dict[str, Tensor]:
    """A and B of each place, by their parameters' names, from those of several adapters.

    With s the scale of an adapter and w its weight, ``cat`` stacks w s A and B, which gives the sum
    of the products. The others combine sign(w) sqrt(|w| s) A among themselves, and sqrt(|w| s) B.
    """
    scales = [c.alpha / (math.sqrt(c.r) if c.use_rslora else c.r) for c, _ in adapters]
    products = [w * s for w, s in zip(weights, scales)]
    roots = [math.sqrt(abs(p)) for p in products]
    signed = [math.copysign(root, p) for root, p in zip(roots, products)]
    found: dict[str, Tensor] = {}
    for name in adapters[0][1]:
        matrices = [values[name] for _, values in adapters]
        is_a = name.endswith(".lora_a")
        if combination.kind != CAT:
            found[name] = combination.merged(matrices, signed if is_a else roots)
        elif is_a:
            found[name] = torch.cat([p * a for p, a in zip(products, matrices)])
        else:
            found[name] = torch.cat(matrices, dim=1)
    return found


class WeightedModel(MixingModel):
    """What a `PeltModel` does about adapters that are computed from others."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        density: float | None = None,
        majority_sign_method: str = "total",
        head: str | None = None,
        seed: int | None = None,
    ) -> None:
        """Makes a new LoRA adapter of several others, as PEFT does; it is not active yet.

        With s = alpha / r of an adapter and w its weight, ``cat`` is exactly the sum of w s B A, of
        rank sum r. The others keep the rank: they combine sign(w) sqrt(abs(w) s) A among themselves
        and sqrt(abs(w) s) B. ``linear`` adds them. ``ties`` (Yadav et al. 2023) keeps the largest
        numbers of each matrix, elects a sign for each place and takes the mean of what agrees with
        it. ``dare_linear`` and ``dare_ties`` (Yu et al. 2024) keep random numbers, divided by
        density.

        Args:
            adapters: names of LoRA adapters without gates, of the same targets.
            weights: a factor for each, also negative.
            adapter_name: of the new one.
            combination_type: ``linear``, ``ties``, ``dare_linear``, ``dare_ties`` or ``cat``.
            density: the share of numbers that TIES and DARE keep, above 0, at most 1.
            majority_sign_method: of TIES; ``total`` elects the sign of the sum, ``frequency`` that
                of most.
            head: the adapter whose head the new one takes, as heads are not combined; None: the
                first of adapters.
            seed: of DARE's choice; None: torch's generator.

        Raises:
            ValueError: unknown, repeated or unlike adapters, ranks that differ where the rank is
                kept, weights that are not finite or not as many, a name that is taken. The model is
                as it was.
        """
        who = "add_weighted_adapter"
        self._check_attached(who)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        combination = Combination(combination_type, density, majority_sign_method, generator)
        combination.check(who)
        if isinstance(adapters, str) or not adapters or len(set(adapters)) < len(adapters):
            raise ValueError(
                f"{who}: expected a list of different adapters' names, got {adapters!r:.80}"
            )
        head = adapters[0] if head is None else head
        self._check_known(who, [*adapters, head])
        if len(weights) != len(adapters) or not all(math.isfinite(w) for w in weights):
            raise ValueError(
                f"{who}: expected {len(adapters)} finite weights, one for each of adapters, got "
                f"{weights!r:.80}"
            )
        configs = self.adapter_configs
        config = weighted_config(who, {name: configs[name] for name in adapters}, combination)
        self._check_new(who, adapter_name, config)
        parts = [(configs[name], self._values_of(name)) for name in adapters]
        loras = [(own, lora) for own, (lora, _) in parts if isinstance(own, LoraConfig)]
        values = combined(loras, weights, combination) | self._values_of(head)[1]
        with self._aside(who), torch.no_grad():
            self._put_in(adapter_name, config)
            for name, parameter in self.trained_parameters().items():
                parameter.copy_(values[name])
            self._keep(self._park())

    def _values_of(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What an adapter trains: LoRA's matrices, and the rest."""
        lora: dict[str, Tensor] = {}
        rest: dict[str, Tensor] = {}
        with self._activated(name):
            for key, value in self.trained_parameters().items():
                is_lora = key.endswith((".lora_a", ".lora_b"))
                (lora if is_lora else rest)[key] = value.detach().clone()
        return lora, rest
