"""TAP: in its own regime, partial participation, does replacement then distillation beat FedAvg and fine-tuning?

The paper: FLAVA and ViLT, two of 30 clients in each of 200 rounds of 20 steps, batches of 128.
"""

from __future__ import annotations

from tests.benchmarks.claims.designs import Arm, Base, Claim, Experiment, Place

_STEPS = 10
_TRAINING = {"batch-size": 16, "lora-r": 8, "lora-alpha": 16.0, "local-steps": _STEPS}
_RATES = (3e-3, 1e-2)
_A_QUARTER = {"num-server-rounds": 24, "fraction-clients": 0.25, "min-clients": 2}
_ONE_SITE = (0, 2, 4, 6, 9, 11, 13, 15)
"""Of sixteen clients of ``digits-tasks``: those of one site, so with one language and the same answers. Each has four
of the five tasks."""
_NEVER = {"tap.margin": float("inf"), "tap.margins": ""}
_TAP = {"tap.distill-steps": _STEPS}

TAP = Experiment(
    name="tap",
    title="TAP: a personal adapter that takes over from the federated one, then learns from it",
    bases={
        "digits-multimodal": Base(
            places={
                "a quarter": Place("digits-multimodal", tuple(range(8)), 8, "two of eight clients in each round"),
                "all": Place("digits-multimodal", tuple(range(8)), 8, "all clients in each round, a quarter as many"),
            },
            config=_TRAINING,
            rates=_RATES,
            needs_data=False,
            by_dial={
                "a quarter": _A_QUARTER,
                "all": {"num-server-rounds": 6},
            },
        ),
        "digits-tasks": Base(
            places={"alike": Place("digits-tasks", _ONE_SITE, 16, "two of eight alike clients in each round")},
            config=_TRAINING,
            rates=_RATES,
            needs_data=False,
            by_dial={"alike": _A_QUARTER},
        ),
        "flava": Base(
            places={"a quarter": Place("multi-modal", tuple(range(8)), 8, "two of eight clients in each round")},
            config=_TRAINING,
            rates=_RATES,
            by_dial={"a quarter": _A_QUARTER},
        ),
    },
    arms=(
        Arm("tap", "tap", _TAP, other={"tap.history": "probe"}),
        Arm("fedavg+J", "tap", {**_TAP, **_NEVER, "tap.deliver": "finetuned"}, role="control"),
        Arm(
            "fedavg+2J",
            "tap",
            {**_TAP, **_NEVER, "tap.deliver": "finetuned", "tap.finetune-steps": 2 * _STEPS},
            role="control",
        ),
        Arm("fedavg", "fedavg", role="reference"),
        Arm("local", "local", role="reference"),
        Arm("local-twice", "local-twice", role="control"),
        Arm("fedavg-tuned", "fedavg-tuned", role="control"),
        Arm("local-all", "local-all", role="control", like="local"),
    ),
    claims=(
        Claim("it beats FedAvg and fine-tuning at equal steps", "tap", ("fedavg+J", "fedavg+2J")),
        Claim("it beats own training", "tap", ("local", "local-twice")),
        Claim("it beats own training on validation examples, too", "tap", ("local-all",)),
        Claim("distillation adds to replacement", "tap", ("tap/stage1",)),
    ),
    search_dial="a quarter",
    shrunk="two of eight clients instead of two of 30, 24 rounds of 10 steps instead of 200 of 20, batches of 16 "
    "instead of 128; clients have few examples and different tasks (with `digits-tasks` four of the same "
    "five), where the paper's shares are alike. Settings searched at one setting of the dial, on one seed. "
    "The steps of `fedavg+J` count those of a personal adapter that it does not deliver.",
)
