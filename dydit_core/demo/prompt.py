"""The demo model's language: 31 words, no text encoder, no download.

A prompt becomes two tensors. `context` has one row per word, and each row also carries the words said just before
it about the same object ("left" knows that it speaks of a red house), so binding does not depend on word order.
`pooled` is a checklist: which time, ground and extras, and which kind and colour at which place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .scenes import COLORS, EXTRAS, GROUNDS, KINDS, PLACES, TIMES

PAD = "<pad>"
VOCABULARY: tuple[str, ...] = (PAD, *TIMES, *GROUNDS, *COLORS, *KINDS, *PLACES, *EXTRAS)
CONTEXT_TOKENS = 16
CONTEXT_DIM = 128
POOLED_DIM = 64
WINDOW = CONTEXT_DIM // len(VOCABULARY)
# One-hot rows would be small beside the other inputs; 4 was used in training, so it is part of the model.
CONTEXT_SCALE = 4.0

SYNONYMS: dict[str, str] = {
    "noon": "day", "daytime": "day", "daylight": "day", "sunny": "day", "morning": "day",
    "dusk": "sunset", "dawn": "sunset", "sunrise": "sunset", "evening": "sunset",
    "midnight": "night", "nighttime": "night", "dark": "night",
    "stormy": "storm", "rain": "storm", "rainy": "storm", "grey": "storm", "gray": "storm",
    "meadows": "meadow", "hill": "meadow", "hills": "meadow", "grass": "meadow", "field": "meadow",
    "dune": "desert", "dunes": "desert", "sand": "desert", "beach": "desert",
    "snowy": "snow", "winter": "snow", "ice": "snow",
    "ocean": "sea", "water": "sea", "lake": "sea", "waves": "sea",
    "home": "house", "hut": "house", "cottage": "house", "houses": "house",
    "palace": "castle", "fortress": "castle", "castles": "castle",
    "oak": "tree", "trees": "tree", "forest": "tree",
    "boat": "sailboat", "ship": "sailboat", "sailboats": "sailboat", "yacht": "sailboat",
    "balloons": "balloon", "spaceship": "rocket", "rockets": "rocket", "starship": "rocket",
    "flowers": "flower", "blossom": "flower", "beacon": "lighthouse", "lighthouses": "lighthouse",
    "crimson": "red", "scarlet": "red", "golden": "yellow", "gold": "yellow", "violet": "purple", "lilac": "purple",
    "rose": "pink", "magenta": "pink",
    "centre": "center", "middle": "center", "centered": "center",
    "cloud": "clouds", "cloudy": "clouds", "star": "stars", "starry": "stars",
}
# Words that carry no picture; they are neither used nor reported.
FILLERS = frozenset(
    "a an the of on in at with and is are by to its it there side near over under hot air time sky scene picture "
    "painting image photo some from into very".split()
)
_ROLE: dict[str, str] = {
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(KINDS, "kind"),
    **dict.fromkeys(PLACES, "place"),
}
_ROLE_ORDER = ("color", "kind", "place")


class EncodedPrompt(NamedTuple):
    """`context` [16, 128], `pooled` [64], and the words of the prompt that the model does not know."""

    context: Tensor
    pooled: Tensor
    unknown_words: list[str]


@dataclass
class _Reading:
    """What was understood so far: objects as {role: word}, and words about the whole scene."""

    objects: list[dict[str, str]] = field(default_factory=list)
    setting: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def encode(prompt: str) -> EncodedPrompt:
    """Encode a prompt; an empty one is the unconditional input for guidance."""
    reading = _read(prompt)
    rows: list[list[str]] = [[word] for word in reading.setting]
    for thing in reading.objects:
        said = [thing[role] for role in _ROLE_ORDER if role in thing]
        rows += [said[: count + 1][::-1] for count in range(len(said))]
    context = torch.zeros(CONTEXT_TOKENS, WINDOW, len(VOCABULARY))
    for row in range(CONTEXT_TOKENS):
        words = rows[row] if row < len(rows) else []
        for slot in range(WINDOW):
            context[row, slot, VOCABULARY.index(words[slot]) if slot < len(words) else 0] = CONTEXT_SCALE
    overflow = [row[0] for row in rows[CONTEXT_TOKENS:]]
    return EncodedPrompt(context.flatten(1), _checklist(reading), reading.unknown + overflow)


def encode_batch(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """`context` [prompts, 16, 128] and `pooled` [prompts, 64]."""
    encoded = [encode(prompt) for prompt in prompts]
    return torch.stack([item.context for item in encoded]), torch.stack([item.pooled for item in encoded])


def _read(prompt: str) -> _Reading:
    reading = _Reading()
    current: dict[str, str] = {}
    for word in re.findall(r"[^\W\d_]+|\d+|[,;.]", prompt.lower()):
        if word in {",", ";", ".", "and", "with"}:
            current = _close(reading, current)
            continue
        word = SYNONYMS.get(word, word)
        role = _ROLE.get(word)
        if role:
            if role in current:
                current = _close(reading, current)
            current[role] = word
        elif word in VOCABULARY:
            reading.setting += [word] if word not in reading.setting else []
        elif word not in FILLERS and word not in reading.unknown:
            reading.unknown.append(word)
    _close(reading, current)
    return reading


def _close(reading: _Reading, current: dict[str, str]) -> dict[str, str]:
    """Finish an object; words without a kind ("red house, left") belong to the object before."""
    if current:
        before = reading.objects[-1] if reading.objects else None
        if "kind" not in current and before is not None and not before.keys() & current.keys():
            before.update(current)
        else:
            reading.objects.append(current)
    return {}


def _checklist(reading: _Reading) -> Tensor:
    """[64]: 12 for the setting, then kinds and colours for each of the three places; the last 4 stay 0."""
    pooled = torch.zeros(POOLED_DIM)
    setting = (*TIMES, *GROUNDS, *EXTRAS)
    for word in reading.setting:
        pooled[setting.index(word)] = 1.0
    attributes = (*KINDS, *COLORS)
    for thing in reading.objects:
        if "place" not in thing:
            continue
        start = len(setting) + len(attributes) * PLACES.index(thing["place"])
        for role in ("kind", "color"):
            if role in thing:
                pooled[start + attributes.index(thing[role])] = 1.0
    return pooled
