"""How many tokens of a text are read."""

from typing import Any

UNSAID = 10**9  # transformers says 10**30 where a tokenizer's files name no length


def token_limit(tokenizer: Any, text_encoder: Any) -> int | None:
    """How many tokens, the marks of beginning and end among them, a text encoder is given of a text: what the
    tokenizer's files say, and where they say nothing or more, as many as the text encoder has positions for.

    Args:
        text_encoder: None where there is none to ask.

    Raises:
        ValueError: it is no length, or there is none to be had.
    """
    said = tokenizer.model_max_length
    most = getattr(getattr(text_encoder, "config", None), "max_position_embeddings", None)
    if not isinstance(said, int | float) or isinstance(said, bool) or not said >= 3 or int(said) != said:
        raise ValueError(f"its model_max_length is {said!r}; it may be 3 or more, or left out")
    if said > (most or UNSAID):
        if most is None:
            raise ValueError("its model_max_length is not set, and the text encoder does not say how many it takes")
        return most
    return int(said)
