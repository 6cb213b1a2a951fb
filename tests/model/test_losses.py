"""Losses: sums and counts, which do not depend on the division of a batch."""

import math

import numpy as np
import pytest
import torch
from conftest import random_model, random_tokens
from numpy.typing import NDArray

from igpt_ray.model import losses as objectives
from igpt_ray.model.image_gpt import ImageGPT


def test_nats_are_the_negative_logarithms_of_the_softmax(device: torch.device) -> None:
    """Natural logarithms, no early mean, and the probability of the right pixel."""
    model = random_model(device=device)
    x = random_tokens(model, 3)
    logits = model(x)
    nats = objectives.next_pixel(logits, x)
    assert nats.shape == x.shape
    for b, t in ((0, 0), (1, 7), (2, 15)):
        p = torch.softmax(logits[b, t].double(), 0)[x[b, t]]
        assert math.isclose(nats[b, t].item(), -math.log(p), rel_tol=1e-5)


def test_nats_are_float32_also_from_bfloat16_logits(device: torch.device) -> None:
    """The mantissa of bfloat16 has less precision than comparisons of losses need."""
    logits, x = torch.randn(2, 5, 64, device=device), torch.randint(64, (2, 5), device=device)
    nats = objectives.next_pixel(logits.bfloat16(), x)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, objectives.next_pixel(logits.bfloat16().float(), x))


def test_micro_batches_add_up_to_the_batch(device: torch.device) -> None:
    """A mean of means would depend on the division if the last micro-batch is smaller."""
    model = random_model(device=device).requires_grad_(True)
    x = random_tokens(model, 5)
    gradients = []
    for cut in ([5], [2, 2, 1]):
        model.zero_grad()
        for part in x.split(cut):
            (objectives.next_pixel(model(part), part).sum() / x.numel()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ masked pixels


def numpy_masked_loss(model: ImageGPT, x: NDArray[np.int64], keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The masked network and its objective from the published description, one image at a time: (B,) nats."""
    w = {name: value.double().cpu().numpy() for name, value in model.state_dict().items()}
    N, C = model.config.n_head, model.config.n_embd
    D = C // N

    def norm(h: NDArray[np.float64], gain: str) -> NDArray[np.float64]:
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * w[gain]

    losses = []
    for tokens, M in zip(x, keep, strict=True):
        h = w["wte.weight"][tokens] * M[:, None] + w["wpe"]
        for i in range(model.config.n_layer):
            a = norm(h, f"h.{i}.ln_1.weight")
            q, k, v = np.split(a @ w[f"h.{i}.attn.c_attn.weight"].T, 3, axis=1)
            out = []
            for n in range(N):
                head = slice(n * D, (n + 1) * D)
                scores = np.exp(q[:, head] @ k[:, head].T / np.sqrt(D))
                out.append(scores / scores.sum(1, keepdims=True) @ v[:, head])
            h = h + np.concatenate(out, axis=1) @ w[f"h.{i}.attn.c_proj.weight"].T
            m = norm(h, f"h.{i}.ln_2.weight") @ w[f"h.{i}.mlp.c_fc.weight"].T
            h = h + m / (1 + np.exp(-1.702 * m)) @ w[f"h.{i}.mlp.c_proj.weight"].T
        p = np.exp(norm(h, "ln_f.weight") @ w["wtet.weight"].T)
        nats = -np.log(p[range(len(tokens)), tokens] / p.sum(1))
        losses.append(nats[~M].mean())
    return np.array(losses)


def test_the_masked_objective_equals_a_numpy_implementation(device: torch.device) -> None:
    """Attention is not causal, and the mean is over the masked positions of each image."""
    model = random_model(std=0.15, objective="masked", device=device)
    x = random_tokens(model, 5)
    keep = objectives.sample_masks([0, 1, 2, 3, 4], 16).to(device)
    keep[0], keep[1] = False, True  # all masked, and one masked
    keep[1, 7] = False
    expected = numpy_masked_loss(model, x.cpu().numpy(), keep.cpu().numpy())
    per_image = objectives.masked_pixel(model(x, keep), x, keep)
    np.testing.assert_allclose(per_image.cpu().numpy(), expected, rtol=1e-5)
    assert objectives.generative(model, x, keep).item() == pytest.approx(expected.sum(), rel=1e-5)
    pooled = objectives.next_pixel(model(x, keep), x)[~keep].mean()
    assert abs(pooled - expected.mean()) > 1e-3  # the mean of means is another number


def test_positions_are_masked_with_their_probability_and_by_their_seed_alone() -> None:
    """The mask of an image must not depend on the rest of the batch, and so on the number of workers."""
    keep = objectives.sample_masks(list(range(400)), 1024)
    share = (~keep).float().mean().item()
    assert share == pytest.approx(0.15, abs=5 * (0.15 * 0.85 / keep.numel()) ** 0.5)
    by_position = (~keep).float().mean(0)
    assert (by_position - 0.15).abs().max() < 6 * (0.15 * 0.85 / 400) ** 0.5
    assert torch.equal(objectives.sample_masks([7, 3], 1024), keep[[7, 3]])
    assert torch.equal(
        objectives.visible_masks_of_keys(["b"], 2, 64)[0], objectives.visible_masks_of_keys(["a", "b"], 2, 64)[1]
    )
    drawn = [tuple(objectives.visible_masks_of_keys(["a"], mask, 64)[0].tolist()) for mask in range(objectives.MASKS)]
    assert len(set(drawn)) == objectives.MASKS


def test_every_image_has_a_masked_position() -> None:
    """OpenAI's mean over an empty mask is NaN; at 3x3 pixels a quarter of all masks is empty."""
    keep = objectives.sample_masks(list(range(2000)), 9)
    masked = (~keep).sum(1)
    assert masked.min() == 1
    single = (masked == 1).float().mean().item()
    expected = 9 * 0.15 * 0.85**8 + 0.85**9
    assert single == pytest.approx(expected, abs=5 * (expected * (1 - expected) / 2000) ** 0.5)


def test_masked_micro_batches_add_up_to_the_batch(device: torch.device) -> None:
    """The sum over images is divided by their number once."""
    model = random_model(std=0.15, objective="masked", device=device)
    x, keep = random_tokens(model, 5), objectives.sample_masks([0, 1, 2, 3, 4], 16).to(device)
    whole = objectives.generative(model, x, keep)
    parts = [objectives.generative(model, a, b) for a, b in zip(x.split([2, 3]), keep.split([2, 3]), strict=True)]
    torch.testing.assert_close(parts[0] + parts[1], whole)


# ------------------------------------------------------------------------------------------------ fine-tuning


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_the_joint_loss_is_generative_plus_classification(device: torch.device, objective: str) -> None:
    """The weights are 1:1, and the generative part is a mean over an image's pixels."""
    model = random_model(std=0.15, objective=objective, n_class=3, device=device)
    x, labels = random_tokens(model, 4), torch.tensor([0, 2, 1, 2], device=device)
    keep = objectives.sample_masks([0, 1, 2, 3], 16).to(device) if objective == "masked" else None
    loss = objectives.loss_parts(model, x, labels, keep)[0]
    per_image = objectives.generative(model, x, keep) / (x.numel() if keep is None else len(x))
    p = torch.softmax(model.forward_with_classifier(x, keep)[1].double(), 1)[range(4), labels]
    assert loss.shape == (4,)
    assert loss.mean().item() == pytest.approx(per_image.item() - p.log().mean().item(), rel=1e-5)


def test_the_first_joint_loss_is_the_logarithms_of_the_colours_and_the_classes(device: torch.device) -> None:
    model = ImageGPT(random_model(n_class=10).config).to(device)
    x = random_tokens(model, 2)
    loss = objectives.loss_parts(model, x, torch.tensor([3, 4], device=device))[0]
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(16) + math.log(10)))
