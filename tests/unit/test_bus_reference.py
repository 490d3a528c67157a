"""docs/subjects.md says what the code does."""

from __future__ import annotations

from pathlib import Path

from shoal_bus import reference
from shoal_bus.events import Topic
from shoal_bus.verb import verbs_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "subjects.md"


def test_subjects_page_is_current() -> None:
    current = reference.reference()
    assert PAGE.read_text() == current, "run `python -m shoal_bus.reference > docs/subjects.md`"


def test_every_verb_and_topic_is_on_the_page() -> None:
    page = reference.reference()
    for module in reference.modules():
        for verb in verbs_of(module):
            assert f"### {verb.name}\n" in page
        for topic in (value for value in vars(module).values() if isinstance(value, Topic)):
            assert f"| `{topic.name}` |" in page


def test_every_verb_is_documented_and_named_once() -> None:
    names = [verb.name for module in reference.modules() for verb in verbs_of(module)]
    assert len(names) == len(set(names))
    for module in reference.modules():
        for verb in verbs_of(module):
            assert verb.behaviour.doc.endswith(".")
