"""Sampling: a sample depends on its seed and its prompt alone, and follows the softmax."""

import numpy as np
import pytest
import torch
from conftest import random_model, random_tokens
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from igpt_ray import rng
from igpt_ray.errors import SettingError
from igpt_ray.generate import completion, sampler
from igpt_ray.model.image_gpt import ImageGPT


@pytest.fixture(scope="module")
def model(device: torch.device) -> ImageGPT:
    """Sharp enough for samples to depend on the prompt, and soft enough for them to differ."""
    return random_model(std=0.4, device=device)


@pytest.fixture(scope="module")
def given(model: ImageGPT) -> Tensor:
    return random_tokens(model, 3)[:, :6]


# ------------------------------------------------------------------------------------------------ completions


def test_the_prompt_is_unchanged_and_the_rest_is_generated(model: ImageGPT, given: Tensor) -> None:
    """Positions are not shifted, and the samples of an image are adjacent."""
    done = completion.complete(model, given, 2, list(range(6)))
    assert done.shape == (6, 16)
    assert torch.equal(done[:, :6], given.repeat_interleave(2, 0))
    assert done.min() >= 0
    assert done.max() < 16
    assert len(torch.unique(done[:, 6:], dim=0)) == 6


def test_the_same_seed_gives_the_same_sample(model: ImageGPT, given: Tensor) -> None:
    """With a global generator, a completion could not be repeated."""
    first = completion.complete(model, given, 1, [5, 6, 7])
    torch.manual_seed(123)
    np.random.seed(123)
    assert torch.equal(completion.complete(model, given, 1, [5, 6, 7]), first)
    assert not torch.equal(completion.complete(model, given, 1, [8, 9, 10]), first)


def test_a_sample_does_not_depend_on_its_batch(model: ImageGPT, given: Tensor) -> None:
    """Each sample has its own stream of random numbers."""
    seeds = [11, 12, 13, 14, 15, 16]
    together = completion.complete(model, given, 2, seeds)
    for i, seed in enumerate(seeds):
        alone = completion.complete(model, given[i // 2 : i // 2 + 1], 1, [seed])
        assert torch.equal(alone[0], together[i])
    backwards = completion.complete(model, given.flip(0), 2, seeds[::-1])
    assert torch.equal(backwards.flip(0), together)


def test_a_sample_continues_from_its_own_prefix(model: ImageGPT) -> None:
    """Random numbers belong to positions: a longer prompt does not change later ones."""
    whole = completion.complete(model, torch.empty(1, 0, dtype=torch.long, device=model.wpe.device), 1, [3])
    for rows in (1, 5, 15, 16):
        assert torch.equal(completion.complete(model, whole[:, :rows], 1, [3]), whole)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"top_k": 1}, {"temperature": 1e-6}])
def test_greedy_samples_equal_those_without_a_cache(model: ImageGPT, given: Tensor, how: dict[str, float]) -> None:
    """In the reference, every step is a full pass."""
    expected = given
    for t in range(6, 16):
        padded = torch.nn.functional.pad(expected, (0, 16 - t))
        expected = torch.cat([expected, model(padded)[:, t].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(completion.complete(model, given, 1, [0, 1, 2], **how), expected)


def test_prompt_pixels_at_any_position_are_unchanged_and_attended_to(model: ImageGPT) -> None:
    """Also prompt pixels after the first generated one. The reference has no cache."""
    x = random_tokens(model, 3)
    given = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < torch.tensor([[0.2], [0.5], [0.8]])
    given = given.to(x.device)
    expected = torch.where(given, x, 0)
    for t in range(16):
        expected[:, t] = torch.where(given[:, t], x[:, t], model(expected)[:, t].argmax(-1))
    assert torch.equal(completion.complete(model, x, 1, [0, 1, 2], temperature=0, prompt_mask=given), expected)


def test_a_number_of_rows_is_equivalent_to_a_mask(model: ImageGPT, given: Tensor) -> None:
    seeds = list(range(6))
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, :6] = True
    padded = torch.nn.functional.pad(given, (0, 10), value=3)
    masked = completion.complete(model, padded, 2, seeds, prompt_mask=mask)
    assert torch.equal(masked, completion.complete(model, given, 2, seeds))


def test_more_samples_than_slots_are_generated_in_turn(model: ImageGPT, given: Tensor) -> None:
    """The samples of an image keep their order, and none is lost."""
    n = completion.SLOTS + 3
    done = completion.complete(model, given[:2], n, list(range(2 * n)))
    assert done.shape == (2 * n, 16)
    for i in (0, n - 1, n, 2 * n - 1):
        assert torch.equal(completion.complete(model, given[i // n][None], 1, [i])[0], done[i])


def test_a_prompt_longer_than_an_image_is_an_error(model: ImageGPT) -> None:
    """Instead of an IndexError from the position embedding."""
    with pytest.raises(SettingError, match="the prompt has 17 pixels, expected at most the 16"):
        completion.complete(model, torch.zeros(1, 17, dtype=torch.long), 1, [0])


def test_a_masked_network_is_an_error() -> None:
    """It has no start vector."""
    masked = random_model(objective="masked")
    with pytest.raises(SettingError, match="which cannot generate"):
        completion.complete(masked, torch.zeros(1, 2, dtype=torch.long), 1, [0])


# ------------------------------------------------------------------------------------------------ one pixel


def counts_of(colours: Tensor, n: int) -> NDArray[np.int64]:
    """Number of times that each of n colours was sampled."""
    return torch.bincount(colours, minlength=n).cpu().numpy()


def test_frequencies_follow_the_softmax(device: torch.device) -> None:
    """The cumulative sum is not shifted by a colour, and precise enough for rare colours."""
    n = 200_000
    logits = torch.randn(16, generator=torch.Generator().manual_seed(4)).to(device) * 2
    u = rng.uniforms([77], n)[0].to(device)
    for temperature in (1.0, 0.7, 2.0):
        p = torch.softmax(logits.double() / temperature, 0).cpu().numpy()
        counts = counts_of(sampler.sample_inverse_cdf(logits.expand(n, -1), u, temperature), 16)
        assert chisquare(counts, n * p).pvalue > 1e-3
        assert chisquare(counts, n * np.roll(p, 1)).pvalue < 1e-9


def test_top_k_selects_the_k_likeliest_and_preserves_their_ratios(device: torch.device) -> None:
    """The probabilities still sum to one."""
    n = 100_000
    logits = torch.randn(16, generator=torch.Generator().manual_seed(5)).to(device)
    u = rng.uniforms([78], n)[0].to(device)
    best = logits.topk(4).indices.sort().values
    counts = counts_of(sampler.sample_inverse_cdf(logits.expand(n, -1), u, top_k=4), 16)
    assert set(np.flatnonzero(counts)) == set(best.tolist())
    p = torch.softmax(logits[best].double(), 0).cpu().numpy()
    assert chisquare(counts[best.cpu().numpy()], n * p).pvalue > 1e-3
    everything = sampler.sample_inverse_cdf(logits.expand(n, -1), u)
    for k in (0, 16, 100):
        assert torch.equal(sampler.sample_inverse_cdf(logits.expand(n, -1), u, top_k=k), everything)


def test_top_k_includes_ties_with_the_last(device: torch.device) -> None:
    """Otherwise the selection would depend on the sorting of a library."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]], device=device).expand(1000, -1)
    seen = sampler.sample_inverse_cdf(logits, rng.uniforms([79], 1000)[0].to(device), top_k=2).unique()
    assert seen.tolist() == [1, 2, 3, 4]


def test_top_p_selects_the_smallest_set_that_reaches_p(device: torch.device) -> None:
    """It includes the colour that crosses p, and none after it."""
    p = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64, device=device)
    u = rng.uniforms([80], 20_000)[0].to(device)
    for top_p, left in (
        (0.4, [1]),
        (0.5 - 1e-9, [1]),
        (0.51, [1, 3]),
        (0.79, [1, 3]),
        (0.9, [1, 2, 3]),
        (0.96, [0, 1, 2, 3]),
    ):
        counts = counts_of(sampler.sample_inverse_cdf(p.log().expand(len(u), -1), u, top_p=top_p), 4)
        assert np.flatnonzero(counts).tolist() == left
        share = p[left].cpu().numpy() / p[left].sum().item()
        assert len(left) == 1 or chisquare(counts[left], len(u) * share).pvalue > 1e-3


def test_top_p_applies_to_the_selection_of_top_k(device: torch.device) -> None:
    """As in transformers: of 0.5 and 0.3 the first has 0.625."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64, device=device).log().expand(1000, -1)
    u = rng.uniforms([81], 1000)[0].to(device)
    assert sampler.sample_inverse_cdf(logits, u, top_k=2, top_p=0.62).unique().tolist() == [1]
    assert sampler.sample_inverse_cdf(logits, u, top_k=2, top_p=0.63).unique().tolist() == [1, 3]


def test_rows_may_each_have_their_own_temperature_and_filters(device: torch.device) -> None:
    """The settings of a row do not change other rows by a bit."""
    g = torch.Generator().manual_seed(6)
    logits, u = 3 * torch.randn(60, 64, generator=g), torch.rand(60, generator=g, dtype=torch.float64)
    logits, u = logits.to(device), u.to(device)
    temperature = torch.tensor([0, 1, 0.5, 2.0, 1e-6, 1], dtype=torch.float64).repeat(10)
    top_k = torch.tensor([0, 0, 3, 100, 1]).repeat(12)
    top_p = torch.tensor([1, 0.9, 0.3, 1], dtype=torch.float64).repeat(15)
    together = sampler.sample_inverse_cdf(logits, u, temperature, top_k, top_p)
    for i in range(60):
        how = temperature[i].item(), int(top_k[i]), top_p[i].item()
        assert sampler.sample_inverse_cdf(logits[i : i + 1], u[i : i + 1], *how).item() == together[i]


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_possible_colours(device: torch.device, u: float) -> None:
    """u = 0 must not give a colour of probability zero, nor u just below 1 one after the last."""
    logits = torch.full((1, 8), -1e9, device=device)
    logits[0, 3], logits[0, 5] = 1.0, 2.0
    expected = 3 if u == 0 else 5
    for top_k in (0, 2):
        random = torch.tensor([u], dtype=torch.float64, device=device)
        assert sampler.sample_inverse_cdf(logits, random, top_k=top_k).item() == expected


def test_each_seed_has_a_stream_of_its_own() -> None:
    """Streams are not shifted copies of each other, and do not depend on the number of seeds."""
    u = rng.uniforms([0, 1, 2, 2**64], 5000)
    assert u.shape == (4, 5000)
    assert u.dtype == torch.float64
    assert torch.equal(rng.uniforms([2], 100)[0], u[2, :100])
    assert abs(np.corrcoef(u.numpy()) - np.eye(4)).max() < 0.06
    assert abs(np.corrcoef(u[1, 1:], u[2, :-1])[0, 1]) < 0.06
    assert u.min() >= 0
    assert u.max() < 1
    # Philox is a published algorithm: these numbers, and the samples of a seed, are the same on every machine.
    np.testing.assert_allclose(u[0, :3], np.random.Generator(np.random.Philox(key=0)).random(3), rtol=0)
