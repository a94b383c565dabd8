"""Parts of an experiment: its place, its arms, its searches, and its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
"""Run-config."""


@dataclass(frozen=True)
class Place:
    """One setting of the dial: a scenario, the clients that take part, and the number of clients that share it.

    ``about`` says in words how alike these clients are. ``groups`` says for each of them which others are like it; an
    oracle knows this. ``each`` says in words what each of them has, where that differs: they get a table by client.
    """

    scenario: str
    clients: tuple[int, ...]
    of: int
    about: str
    groups: tuple[str, ...] = ()
    each: tuple[str, ...] = ()


@dataclass(frozen=True)
class Base:
    """A base model with the places, the run-config and the two learning rates that suit it."""

    places: Mapping[str, Place]
    config: Config
    rates: tuple[float, float]
    model: Config = field(default_factory=dict)
    """Run-config that suits this model and no other: left out where the command line names another one."""
    by_dial: Mapping[str, Config] = field(default_factory=dict)
    """Run-config of single settings of the dial."""
    own_model: bool = False
    """Whether the scenarios read ``base-model``, so that the command line may name another one."""
    needs_data: bool = True
    search_seeds: tuple[int, ...] = (100,)
    """Seeds on which the settings of all its arms are chosen."""


@dataclass(frozen=True)
class Arm:
    """One line of a table: a strategy with its settings.

    ``other`` is the method's second setting, which the search tries beside the first; an arm without one tries a third
    learning rate instead. ``apart`` are groups of clients (by their place in the list) that run without each other.
    ``oracle``: relevance is known from the place's groups instead of measured. ``like``: the arm whose settings it
    takes without a search, because it trains on the examples that a search looks at, or shows what one more setting
    changes. ``bases``: those on which it runs; all if empty.
    """

    name: str
    strategy: str
    config: Config = field(default_factory=dict)
    other: Config = field(default_factory=dict)
    role: str = ""
    oracle: bool = False
    like: str = ""
    bases: tuple[str, ...] = ()
    apart: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Claim:
    """A claim: ``arm`` is better than all of ``against``, or as good within ``within`` (of the metric).

    Arms are named as in the table; ``potara/searched`` is a model that the arm's runs measured beside their own.
    ``clients``: those that it is about, by their place in the list; all if empty. ``bases``: those on which it can be
    decided; all if empty.
    """

    text: str
    arm: str
    against: tuple[str, ...]
    within: float = 0.0
    clients: tuple[int, ...] = ()
    bases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """One method's experiment.

    Args:
        name: name of the command, and of the file of results.
        title: the table's title.
        bases: base models by name; the first one is the default.
        arms: arms by name.
        claims: claims that the table answers.
        search_dial: the setting of the dial at which settings are chosen, for each base.
        shrunk: everything that is smaller than in the papers and in the design, in words.
    """

    name: str
    title: str
    bases: Mapping[str, Base]
    arms: Sequence[Arm]
    claims: Sequence[Claim]
    search_dial: str
    shrunk: str

    def arm(self, name: str) -> Arm:
        """The arm with this name.

        Raises:
            KeyError: there is no such arm.
        """
        return {arm.name: arm for arm in self.arms}[name]


CONTROLS = (
    Arm("local", "local", role="reference"),
    Arm("fedavg", "fedavg", role="reference"),
    Arm("fedavg-tuned", "fedavg-tuned", role="control"),
    Arm("local-twice", "local-twice", role="control"),
    Arm("local-all", "local-all", role="control", like="local"),
)
"""In every experiment. ``local-all`` trains on validation examples, too."""
QUIET: Config = {"evaluate-every": 1000, "evaluate-examples": 2, "on-divergence": "last"}
"""Rounds look at next to nothing: the delivered model is scored once, and that is what counts. So it has to be the last
one: whether it became worse cannot be told from two examples, and a client would be given the untrained model."""
