"""Continuations: greedy against the full forward, batches, seeds, ends, the context's end."""

from __future__ import annotations

import numpy as np
import pytest

from bertgpt_jax.errors import UsageError
from bertgpt_jax.generation.continuation import Continuation
from bertgpt_jax.generation.decode import GptDecoder
from bertgpt_jax.generation.sampling import Sampling
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh

GREEDY, DRAWN = Sampling(temperature=0), Sampling(temperature=2.0, top_p=0.95)
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]


@pytest.fixture(scope="module")
def make(gpt):
    decoder = GptDecoder(gpt.config, 19)
    params = decoder.layout(gpt.params)
    return lambda sampling, max_new=10, **settings: Continuation(decoder, params, sampling, max_new, **settings)


def logits(tiny, ids: list[int]) -> np.ndarray:
    """Of the next token, by the full forward (padded: it is causal, and so one program serves)."""
    padded = ids + [0] * (tiny.config.max_positions - len(ids))
    return tiny.forward([padded])[0, len(ids) - 1]


def test_greedy_takes_the_best_token(make, gpt) -> None:
    found = make(GREEDY).run(PROMPTS)
    for prompt, new in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for token in new:
            assert token == logits(gpt, ids).argmax()
            ids.append(token)
        assert len(new) == 10


def test_a_row_is_the_same_in_any_batch(make) -> None:
    """And whatever the number of tokens a call, drawn tokens included."""
    together = make(DRAWN, seed=7).run(PROMPTS)
    assert len(set(map(tuple, together))) == 3
    for i, prompt in enumerate(PROMPTS):
        assert make(DRAWN, seed=7, tokens_a_call=4).run([prompt], [(i, 0)]) == [together[i]]


def test_seeds_and_samples(make) -> None:
    rows, numbers = [PROMPTS[0]] * 3, [(0, 0), (0, 1), (1, 0)]
    first = make(DRAWN, seed=1).run(rows, numbers)
    assert make(DRAWN, seed=1).run(rows, numbers) == first
    assert len(set(map(tuple, first))) == 3, "samples of one prompt differ, and so do equal prompts"
    assert make(DRAWN, seed=2).run(rows, numbers) != first


def test_a_stop_token_ends_its_row_alone(make) -> None:
    free = make(DRAWN, seed=3).run(PROMPTS)
    stop = free[0][4]
    ended = make(DRAWN, seed=3, stop_ids=(stop,)).run(PROMPTS)
    expected = [new[: new.index(stop)] if stop in new else new for new in free]
    assert ended == expected and len(ended[0]) <= 4


def test_watch_ends_rows_and_sees_every_token(make) -> None:
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def watch(row: int, tokens: list[int]) -> bool:
        seen[row] += tokens
        return row == 1 and len(seen[1]) >= 2

    found = make(GREEDY, tokens_a_call=1).run(PROMPTS, watch=watch)
    assert list(seen.values()) == found and [len(new) for new in found] == [10, 2, 10]


def test_longer_than_the_context_is_refused(make) -> None:
    assert {len(new) for new in make(GREEDY, max_new=20).run(PROMPTS)} == {20}, "the last token needs no place"
    with pytest.raises(UsageError, match=r"prompt 3 has 5 tokens, with 21 new ones more than .* context of 24"):
        make(GREEDY, max_new=21).run(PROMPTS)


def test_a_sliding_context_reads_its_last_half_again(make, gpt) -> None:
    new = make(GREEDY, max_new=50, slide=True).run(PROMPTS)[0]
    ids, begin = list(PROMPTS[0]), 0
    for token in new:
        if len(ids) - begin > 24:
            begin = len(ids) - 12
        assert token == logits(gpt, ids[begin:]).argmax()
        ids.append(token)
    assert len(new) == 50 and begin > 24, "it slid more than once"


def test_sliding_rows_are_the_same_in_any_batch(make) -> None:
    prompts = [PROMPTS[0], [5] * 23, [5] * 40]
    together = make(DRAWN, max_new=20, slide=True).run(prompts)
    for i, prompt in enumerate(prompts):
        assert make(DRAWN, max_new=20, slide=True, tokens_a_call=4).run([prompt], [(i, 0)]) == [together[i]]


def test_a_repetition_penalty_knows_the_prompt_and_what_came(make, gpt) -> None:
    found = make(Sampling(temperature=0, repetition_penalty=3.0)).run(PROMPTS)
    for prompt, new in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for token in new:
            scores = logits(gpt, ids).copy()
            scores[ids] = np.where(scores[ids] > 0, scores[ids] / 3, scores[ids] * 3)
            assert token == scores.argmax()
            ids.append(token)
    assert found != make(GREEDY).run(PROMPTS), "it changes something"


def test_on_a_mesh(tiny) -> None:
    from bertgpt_jax.models.gpt import GptConfig

    sizes = dict(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32, vocab_size=16, max_positions=32)
    model = tiny(GptConfig(**sizes))
    decoder, mesh = GptDecoder(model.config, 16), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    alone = Continuation(decoder, decoder.layout(model.params), DRAWN, 8).run(PROMPTS)
    spread = Continuation(decoder, decoder.layout(model.params, mesh), DRAWN, 8, mesh=mesh).run(PROMPTS)
    assert np.array_equal(alone, spread)
