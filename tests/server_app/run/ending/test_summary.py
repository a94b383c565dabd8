"""The line that ends a run."""

from __future__ import annotations

from server_app.run.ending.summary import headline, summary_of
from server_app.run.options import RunOptions, default_run_name


def test_accuracies_or_what_the_texts_have_or_that_nobody_is_there() -> None:
    nobody = {"mean_accuracy": None, "worst_accuracy": None, "clients": {}}
    assert headline(nobody) == "no client was delivered its model"
    assert headline(nobody | {"clients": {"a": {}, "b": {}}}) == "no client tells a score"
    assert headline(nobody | {"clients": {"a": {"loss": 1.0}, "b": {"loss": 2.0}}}) == "mean loss 1.500"
    texts = nobody | {"clients": {"a": {"exact_match": 1.0, "perplexity": 2.0}, "b": {"perplexity": 4.0}}}
    assert headline(texts) == "mean exact match 1.000, mean perplexity 3.000"
    assert headline(texts | {"mean_accuracy": 0.75, "worst_accuracy": 0.5}) == "mean accuracy 0.750, worst 0.500"


def test_a_summary_has_what_its_clients_have_and_books_time_under_its_names() -> None:
    text = {"loss": 1.0, "perplexity": 2.72, "exact_match": 0.5, "answers": 4.0, "examples": 30}
    spent, about = {"train": 2.0, "evaluation": 5.0, "statistics": 1.0}, {"base_model": "org/tiny"}
    found = summary_of(RunOptions(), {"ada": text, "ben": text}, 10.0, spent, ({}, None), about)
    assert found["means"] == {"loss": 1.0, "perplexity": 2.72, "exact_match": 0.5}
    assert not {"scenario", "mean_accuracy", "worst_accuracy", "without_accuracy"} & set(found)
    assert found["base_model"] == "org/tiny"
    assert found["seconds"] == {"total": 10.0, "training": 2.0, "evaluation": 5.0, "statistics": 1.0, "overhead": 2.0}
    assert headline(found) == "mean exact match 0.500 of 8 answers, mean perplexity 2.720"
    assert headline(found | {"absent": ["shop"]}).startswith("2 of 3 sites; absent from the start: shop; ")


def test_a_run_that_nobody_named_is_called_by_what_it_is_on() -> None:
    assert default_run_name({"strategy": "potara"}, 7) == "potara-digits-7"
    assert default_run_name({"base-model": "org/Smol-135M", "scenario": "digits"}, 7) == "fedavg-Smol-135M-7"
    assert default_run_name({"base-model": "/srv/my models/"}, 7) == "fedavg-my-models-7"


def test_sites_that_are_left_out_are_named_first() -> None:
    summary = {"mean_accuracy": 0.75, "worst_accuracy": 0.5, "clients": {"a": {}, "b": {}}}
    assert headline(summary | {"refused": {"shop": "DataError: line 3"}, "not_delivered": ["late"]}) == (
        "2 of 4 sites; refused: shop: DataError: line 3; without their models: late (fedalloy deliver); "
        "mean accuracy 0.750, worst 0.500"
    )
