"""FedMerge: do several models, merged for each client, beat one model and clusters where clients are mixtures?

The authors' code: 50 clients, five overlapping groups of 30 classes, hundreds of rounds, no local fine-tuning.
"""

from __future__ import annotations

from tests.benchmarks.claims.designs import CONTROLS, Arm, Base, Claim, Experiment, Place

_PURE, _MIXTURES = tuple(range(8)), tuple(range(8, 12))
_TWO, _FOUR, _EIGHT = ({"fedmerge.models": models} for models in (2, 4, 8))

FEDMERGE = Experiment(
    name="fedmerge",
    title="FedMerge: a merge of a few global models for each client",
    bases={
        "vit": Base(
            places={
                "mixtures": Place(
                    *(
                        "cifar100-groups",
                        (*_PURE, *_MIXTURES),
                        12,
                        "eight clients in four groups, four mixtures of two",
                    ),
                    each=(*("group",) * 8, *("mixture",) * 4),
                ),
                "groups": Place("cifar100-groups", _PURE, 12, "eight clients in four groups"),
                "everything": Place("cifar100-20", _PURE, 20, "eight clients with random shares of all classes"),
            },
            config={"num-server-rounds": 12, "local-steps": 8, "batch-size": 16, "lora-r": 8, "lora-alpha": 16.0},
            rates=(3e-3, 1e-2),
        ),
        "minilm": Base(
            places={
                "groups": Place("text-6-same", (0, 1, 2, 3, 4, 5), 6, "two tasks, three clients each"),
                "everything": Place("text-6-unrelated", (0, 1, 2, 3, 4, 5), 6, "six tasks with nothing in common"),
            },
            config={"num-server-rounds": 6, "local-steps": 4, "batch-size": 8, "lora-r": 8, "lora-alpha": 16.0},
            rates=(1e-3, 3e-3),
        ),
    },
    arms=(
        Arm("fedmerge", "fedmerge", _FOUR, other={"fedmerge.lr-w": 0.1}),
        Arm(
            "fedmerge-authors",
            "fedmerge",
            {**_FOUR, "fedmerge.variant": "trained-a", "fedmerge.init": "jitter", "fedmerge.lr-w": 0.1},
            other={"fedmerge.lr-w": 0.5},
        ),
        Arm("fedmerge-2", "fedmerge", _TWO, like="fedmerge", bases=("vit",)),  # fewer models than groups, and more
        Arm("fedmerge-8", "fedmerge", _EIGHT, like="fedmerge", bases=("vit",)),
        Arm("ifca", "ifca", {"ifca.clusters": 4}, other={"ifca.clusters": 2}),
        Arm("ifca-4", "ifca", {"ifca.clusters": 4}, bases=("vit",)),  # told how many groups there are
        Arm("fedem", "fedem", {"fedem.learners": 4}, other={"fedem.learners": 2}),
        *CONTROLS,
        Arm("fedavg-head", "fedavg-head", role="control", bases=("vit",)),
    ),
    claims=(
        Claim("several merged models beat one", "fedmerge", ("fedavg",)),
        Claim("merging beats clusters", "fedmerge", ("ifca", "fedem")),
        Claim("and as many clusters as there are groups (asked afterwards)", "fedmerge", ("ifca-4",), bases=("vit",)),
        Claim(
            "merging beats clusters for the clients that are mixtures",
            "fedmerge",
            ("ifca", "fedem"),
            clients=_MIXTURES,
            bases=("vit",),
        ),
        Claim(
            "the same for the authors' variant (a question asked afterwards)",
            "fedmerge-authors",
            ("fedavg", "ifca", "fedem"),
            clients=_MIXTURES,
            bases=("vit",),
        ),
        Claim(
            "without local fine-tuning it beats every control",
            "fedmerge",
            ("local", "fedavg-tuned", "local-twice", "local-all"),
        ),
        Claim("and FedAvg with a head fitted again", "fedmerge", ("fedavg-head",), bases=("vit",)),
    ),
    search_dial="mixtures",
    shrunk="12 clients instead of 24, 12 rounds of 8 steps instead of 60; settings searched at one setting of the "
    "dial, on one seed. MiniLM has no head to fit again.",
)
