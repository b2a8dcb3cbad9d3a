"""Phrase grounding: where in a picture the words of its caption are, by the attention of a system."""

from __future__ import annotations

from jrl.grounding.attention import Grounder, ProjectedTokens, WordMaps, attend, grounder
from jrl.grounding.candidates import anchors
from jrl.grounding.entities import read_entities
from jrl.grounding.evaluate import Grounding, ground
from jrl.grounding.examples import Example, TruePhrase, scene_examples

__all__ = [
    "Example",
    "Grounder",
    "Grounding",
    "ProjectedTokens",
    "TruePhrase",
    "WordMaps",
    "anchors",
    "attend",
    "ground",
    "grounder",
    "read_entities",
    "scene_examples",
]
