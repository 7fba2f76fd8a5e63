"""How many parameters a method trains, and how many of them are left to store."""

from __future__ import annotations

from ...models import get_pelt_model
from ..problems import PROBLEMS
from .runs import Runner


def stored_parameters(runner: Runner, method: str) -> dict[str, int]:
    """``trained``, with the head of the first task; ``stored``, what is left of them after training
    (`PeltModel.get_nb_stored_parameters`); ``base``, those of the model without the method.
    """
    comparison = runner.comparison
    source = comparison.tasks[0]
    task = runner.task(source.name)
    problem = PROBLEMS[task.problem]
    base = problem.empty(comparison.model, task.labels)
    if base is None:
        base = problem.load(comparison.model, task.labels)
    of_base = sum(parameter.numel() for parameter in base.parameters())
    model = get_pelt_model(base, comparison.config(source, method).method_for(task.conditions))
    trained, _ = model.get_nb_trainable_parameters()
    return {"trained": trained, "stored": model.get_nb_stored_parameters(), "base": of_base}
