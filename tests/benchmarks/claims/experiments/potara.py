"""Potara: is the closed form as good as the search, and is the merge better than both ends and the controls?

The paper: 1,000 and 500 samples a client, a pre-trained ViT and Llama-3.2-3B, 600 steps.
"""

from __future__ import annotations

from client_app.scenarios.instruct import SETS
from tests.benchmarks.claims.designs import CONTROLS, Arm, Base, Claim, Experiment, Place

LAYERS = ",".join(f"layers.{layer}.self_attn.{part}_proj" for layer in range(20, 30) for part in "qv")
"""Query and value of the last ten of SmolLM2's thirty layers, so that a backward pass ends there."""
UNEQUAL = SETS["instruct-6-unequal"]
_SMALL = {"num-server-rounds": 4, "local-steps": 6}

POTARA = Experiment(
    name="potara",
    title="Potara: one merge of a federated and a local adapter, weighted in closed form",
    bases={
        "smollm2": Base(
            places={
                "same": Place("instruct-6-same", (0, 1, 3, 4), 6, "two tasks, two clients each"),
                "unrelated": Place("instruct-6-unrelated", (0, 1, 2, 3), 6, "four tasks that have nothing in common"),
                "longer": Place("instruct-6-same", (0, 1, 3, 4), 6, "two tasks, two clients each; 60 steps, not 24"),
            },
            config={**_SMALL, "batch-size": 4, "lora-r": 4, "lora-alpha": 8.0},
            rates=(1e-3, 3e-3),
            by_dial={"longer": {"num-server-rounds": 6, "local-steps": 10}},
            model={"target-modules": LAYERS, "max-length": 64, "model-dtype": "bfloat16"},
            own_model=True,
        ),
        "minilm": Base(
            places={
                "same": Place("text-6-same", (0, 1, 2, 3, 4, 5), 6, "two tasks, three clients each"),
                "family": Place("text-6-family", (0, 1, 2, 3, 4, 5), 6, "two families of three related tasks"),
                "unrelated": Place("text-6-unrelated", (0, 1, 2, 3, 4, 5), 6, "six tasks with nothing in common"),
                "unequal": Place(
                    *("text-6-unequal", (0, 1, 2, 3, 4, 5), 6, "a mixture; 16 to 256 training texts"),
                    each=tuple(
                        f"{texts} texts of {task}" for task, texts in zip(UNEQUAL.tasks, UNEQUAL.sizes, strict=True)
                    ),
                ),
                "longer": Place("text-6-same", (0, 1, 2, 3, 4, 5), 6, "as `same`; 120 steps, not 24"),
            },
            config={**_SMALL, "batch-size": 8, "lora-r": 8, "lora-alpha": 16.0},
            rates=(1e-3, 3e-3),
            by_dial={"longer": {"num-server-rounds": 8, "local-steps": 15}},
        ),
    },
    arms=(
        Arm("potara", "potara", {"potara.search-points": 5}, other={"potara.damping": 0.01}),
        Arm(  # the information of training examples, not of validation examples
            "potara-on-training",
            "potara",
            {"potara.search-points": 5, "potara.calibration": "train"},
            like="potara",
            bases=("minilm",),
        ),
        *CONTROLS,
    ),
    claims=(
        Claim("the closed form is as good as a search", "potara", ("potara/searched",), within=0.02),
        Claim("the merge beats both of its ends", "potara", ("potara/federated", "potara/local")),
        Claim(
            "the merge beats every control",
            "potara",
            ("local", "fedavg", "fedavg-tuned", "local-twice", "local-all"),
        ),
    ),
    search_dial="same",
    shrunk="24 (or 60) steps instead of 600 and 64 texts instead of 500 for each client; settings searched at one "
    "setting of the dial, on one seed. With SmolLM2 four clients instead of six, texts cut to 64 tokens, batches of 4, "
    "LoRA of rank 4 in the last ten layers, and a base in bfloat16.",
)
