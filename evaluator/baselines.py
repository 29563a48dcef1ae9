"""Trivial systems that know nothing: what a student must beat before its score means that it learned anything."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from evaluator.metrics.rouge import rouge_l, words

COMPARED = 200
"""Most train summaries that each candidate for the constant is compared with: keeps it quadratic only in small data sets."""

_SUBJECT = re.compile(r"\s*SUBJECT:[ \t]*(?P<subject>.*?)\s*(?:\n|MESSAGE:|\Z)", re.IGNORECASE | re.DOTALL)
_LABEL = re.compile(r"\s*MESSAGE:\s*", re.IGNORECASE)
_SENTENCE = re.compile(r".+?(?:[.?!]+(?=\s|\Z)|\n|\Z)", re.DOTALL)


def constant(summaries: Sequence[str], seed: int) -> str:
    """The one answer to every question that fits the train split best; "" where the split has no summaries.

    The commonest summary (by words, ignoring case and punctuation). Among equally common ones, so among all where none occurs
    twice, the most central: the highest mean ROUGE-L F1 against the others, of which at most COMPARED drawn by `seed` are looked at.
    """
    tokens = [words(summary) for summary in summaries]
    keys = [" ".join(found) for found in tokens]
    often = Counter(keys)
    commonest = max(often.values(), default=0)
    sampled = random.Random(seed).sample(range(len(summaries)), min(COMPARED, len(summaries)))
    best, best_score, seen = "", -1.0, set()
    for key, summary, found in zip(keys, summaries, tokens, strict=True):
        if often[key] < commonest or key in seen:
            continue
        seen.add(key)
        others = [tokens[i] for i in sampled if keys[i] != key]
        score = sum(rouge_l(found, other) for other in others) / max(len(others), 1)
        if score > best_score:
            best, best_score = summary, score
    return best


def first_sentence(question: str) -> str:
    """The first sentence of the message itself, without a SUBJECT line or a MESSAGE label before it."""
    return next(_sentences(question), "")


def first_question(question: str) -> str:
    """The first sentence that ends in a question mark; where there is none, the first sentence."""
    found = list(_sentences(question))
    return next((sentence for sentence in found if sentence.rstrip("!").endswith("?")), found[0] if found else "")


def subject(question: str) -> str | None:
    """The text of a message's SUBJECT line, if it has one that is not empty."""
    match = _SUBJECT.match(question)
    return " ".join(match["subject"].split()) or None if match else None


def subject_template(question: str) -> str:
    """The SUBJECT line put into a question; without such a line the first sentence."""
    topic = subject(question)
    return f"What are the treatments for {topic.rstrip('.?!')}?" if topic else first_sentence(question)


def _sentences(question: str) -> Iterator[str]:
    match = _SUBJECT.match(question)
    body = _LABEL.sub("", question[match.end() :] if match else question, count=1) or question
    for match in _SENTENCE.finditer(body):
        if sentence := " ".join(match[0].split()):
            yield sentence
