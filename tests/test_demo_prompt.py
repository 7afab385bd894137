import pytest

from dydit_core.demo.heldout import held_out_prompts
from dydit_core.demo.prompt import CONTEXT_SCALE, VOCABULARY, encode, encode_batch


def words(prompt: str) -> set[tuple[str, ...]]:
    """The rows of the context as tuples of words, newest first, padding left out."""
    rows = encode(prompt).context.view(16, 4, len(VOCABULARY))
    named = [tuple(VOCABULARY[i] for i in row.argmax(1).tolist() if i) for row in rows]
    return {row for row in named if row}


def test_shapes_and_scale() -> None:
    encoded = encode("a red house on the left, night")
    assert encoded.context.shape == (16, 128) and encoded.pooled.shape == (64,)
    assert encoded.context.unique().tolist() == [0.0, CONTEXT_SCALE]
    assert encoded.context.view(16, 4, 32).sum(-1).unique().tolist() == [CONTEXT_SCALE]


def test_words_know_their_object() -> None:
    assert words("a red house on the left, night") == {
        ("red",), ("house", "red"), ("left", "house", "red"), ("night",),
    }


@pytest.mark.parametrize("prompt", [
    "a red house on the left and a blue sailboat on the right",
    "red house, left, blue boat, right",
    "on the left a red house on the right a blue ship",
    "House RED left; Boat blue right",
])
def test_order_and_synonyms_do_not_matter(prompt: str) -> None:
    assert words(prompt) == {
        ("red",), ("house", "red"), ("left", "house", "red"),
        ("blue",), ("sailboat", "blue"), ("right", "sailboat", "blue"),
    }
    assert encode(prompt).pooled.sum() == 4


def test_unknown_words_are_named_once_and_fillers_are_not() -> None:
    assert encode("a purple dragon in the sky near a dragon with wings").unknown_words == ["dragon", "wings"]
    assert encode("a tree in the center").unknown_words == []


def test_empty_prompt_is_padding_only() -> None:
    encoded = encode("")
    assert words("") == set() and encoded.pooled.abs().sum() == 0 and encoded.unknown_words == []


def test_words_beyond_sixteen_rows_are_reported() -> None:
    prompt = "red house left, blue tree center, green boat right, pink rocket left, white castle right, yellow flower"
    assert encode(prompt).unknown_words == ["flower"]


def test_every_held_out_prompt_is_fully_understood() -> None:
    prompts = held_out_prompts(64)
    assert all(not encode(prompt).unknown_words for prompt in prompts)
    assert held_out_prompts(8) == prompts[:8]
    context, pooled = encode_batch(prompts)
    assert context.shape == (64, 16, 128) and pooled.shape == (64, 64)
