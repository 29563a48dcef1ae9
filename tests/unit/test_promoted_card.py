"""Test scores in the card of a promoted student: where the Hub reads them, and where a person does."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from evaluator.card import with_scores
from evaluator.scores import score
from evaluator.systems import ALWAYS
from shared.contracts import Example, Prediction
from shared.errors import DataError

CARD = """\
---
license: apache-2.0
pipeline_tag: summarization
---

# trial

## Scores

None yet.

## Limits

- many
"""
TEST = [
    Example(id="a", question="q", summary="what is the dose of aspirin"),
    Example(id="b", question="q", summary="is asthma curable at all"),
]


def scored():
    """Of two rows the distilled student has one word for word and nothing of the other; nobody else has anything."""
    texts = {("distilled", "a"): TEST[0].summary}
    return score([Prediction(system=s, example_id=e.id, text=texts.get((s, e.id), "nothing")) for s in ALWAYS for e in TEST], TEST)


def promoted(card: str, **changes) -> str:
    return with_scores(card, scored(), **{"name": "trial", "dataset": "meqsum", "verdict": "rougeL +50.0 points", **changes})


def test_the_hub_reads_the_main_scores_of_the_distilled_student_on_the_test_rows():
    read = ModelCard(promoted(CARD)).data
    assert (read.license, read.pipeline_tag, read.model_name) == ("apache-2.0", "summarization", "trial")
    found = {result.metric_type: result.metric_value for result in read.eval_results}
    assert found.keys() == {"rouge1", "rouge2", "rougeL", "bleu", "sacrebleu", "chrf"}
    assert [found[name] for name in ("rouge1", "rouge2", "rougeL")] == [0.5, 0.5, 0.5]
    result = read.eval_results[0]
    assert (result.task_type, result.dataset_type, result.dataset_split) == ("summarization", "meqsum", "test")
    assert result.dataset_args == {"rows": 2}


def test_the_section_has_a_line_for_each_system_and_takes_the_place_of_the_one_without_scores():
    text = ModelCard(promoted(CARD)).text
    assert "None yet" not in text
    assert text.count("## Scores") == 1
    assert text.index("# trial") < text.index("## Scores") < text.index("| **distilled** | 50.0 | 50.0 | 50.0 |") < text.index("## Limits")
    for name in ALWAYS:
        assert f"| {name} |" in text or f"| **{name}** |" in text
    assert "Promoted: rougeL +50.0 points." in text
    assert text.endswith("- many\n")


def test_scores_are_written_over_with_newer_ones():
    assert promoted(promoted(CARD, verdict="older")) == promoted(CARD)


@pytest.mark.parametrize("card", ["", "# by hand\n", "---\n---\n# by hand", "# by hand\n\n## Scores\nnone"])
def test_a_card_without_metadata_or_section_gets_both(card):
    read = ModelCard(promoted(card))
    assert len(read.data.eval_results) == 6
    assert read.text.count("## Scores") == 1
    assert "| **distilled** |" in read.text
    assert ("# by hand" in read.text) == ("# by hand" in card)


@pytest.mark.parametrize("metadata", ["a: [", "- a\n- b", "just words"])
def test_metadata_that_are_no_mapping_are_refused_by_the_name_of_the_file(metadata):
    with pytest.raises(DataError, match=r"model/README\.md"):
        promoted(f"---\n{metadata}\n---\n# x\n")
