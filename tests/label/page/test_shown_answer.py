"""What the page gets of an answer whose prompt is more than text."""

from draftsmith.label.page.markable_spans import Cutter
from draftsmith.label.page.shown_answer import shown_answer
from draftsmith.label.schema import Answer


def test_pictures_of_a_prompt_are_named_and_not_sent() -> None:
    data = "data:image/png;base64," + "A" * 9000
    parts = [
        {"type": "image", "image": "images/1.png"},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": "How many?"},
    ]
    answer = Answer("a", ({"role": "user", "content": "How many?", "parts": parts},), "8", "m", "MIT", "s")
    [turn] = shown_answer(answer, Cutter())["messages"]
    assert turn == {"role": "user", "content": "How many?", "blocks": [], "others": ["image images/1.png", "image_url"]}
