"""The line that ends a run."""

from __future__ import annotations

from server_app.run.ending.summary import headline


def test_accuracies_or_what_the_texts_have_or_that_nobody_is_there() -> None:
    nobody = {"mean_accuracy": None, "worst_accuracy": None, "clients": {}}
    assert headline(nobody) == "no client was delivered its model"
    texts = nobody | {"clients": {"a": {"exact_match": 1.0, "perplexity": 2.0}, "b": {"perplexity": 4.0}}}
    assert headline(texts) == "mean exact match 1.000, mean perplexity 3.000"
    assert headline(texts | {"mean_accuracy": 0.75, "worst_accuracy": 0.5}) == "mean accuracy 0.750, worst 0.500"


def test_sites_that_are_left_out_are_named_first() -> None:
    summary = {"mean_accuracy": 0.75, "worst_accuracy": 0.5, "clients": {"a": {}, "b": {}}}
    assert headline(summary | {"refused": {"shop": "DataError: line 3"}, "not_delivered": ["late"]}) == (
        "2 of 4 sites; refused: shop: DataError: line 3; without their models: late (fedalloy deliver); "
        "mean accuracy 0.750, worst 0.500"
    )
