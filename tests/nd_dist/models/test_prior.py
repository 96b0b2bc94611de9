from __future__ import annotations

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch

from nd_dist.config import DecoderConfig
from nd_dist.models.draws import Draws
from nd_dist.models.prior import DiffusionPrior, PriorDraws, cosine_abar
from nd_dist.models.prior_network import PriorNetwork, ScaleNorm, distance_buckets
from nd_dist.schema import TargetSpec
from tests.nd_dist.models import reference

TOKENS, WIDTH, DEPTH, HEADS, DIM_HEAD = 9, 12, 2, 2, 36


@pytest.fixture(scope="module")
def prior() -> DiffusionPrior:
    torch.manual_seed(0)
    network = PriorNetwork(TOKENS, WIDTH, DEPTH, HEADS, DIM_HEAD)
    for module in network.modules():
        if isinstance(module, ScaleNorm):
            torch.nn.init.normal_(module.scale, 1.0, 0.3)
    return DiffusionPrior(network, "c", 100, 20, 0.2)


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_the_network_equals_the_position_by_position_reference(prior: DiffusionPrior) -> None:
    weights = {name: value.double() for name, value in prior.network.state_dict().items()}
    noisy, condition, times = tokens(2), tokens(2, 2), torch.tensor([3, 87])
    found = prior.network(noisy, times, condition)
    for row in range(2):
        expected = reference.prior_output(
            noisy[row].double(), int(times[row]), condition[row].double(), weights, DEPTH, HEADS, DIM_HEAD
        )
        torch.testing.assert_close(found[row].double(), expected, rtol=2e-4, atol=2e-5)


def test_dropped_samples_see_the_null_embeddings_only(prior: DiffusionPrior) -> None:
    keep = torch.tensor([True, False])
    a = prior.network(tokens(2), torch.tensor([5, 5]), tokens(2, 2), keep, keep)
    b = prior.network(tokens(2, 3), torch.tensor([5, 5]), tokens(2, 4), keep, keep)
    assert not torch.allclose(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])


def test_relative_distances_share_the_bucket_zero_for_all_later_keys() -> None:
    buckets = distance_buckets(200, 201)
    assert buckets.tolist() == [[reference.bucket(i, j) for j in range(201)] for i in range(200)]


def test_the_noise_schedule_is_the_cosine_one_with_clipped_betas() -> None:
    abar = cosine_abar(100)
    level = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(101)]
    torch.testing.assert_close(abar[50], torch.tensor(level[51] / level[0], dtype=torch.float64), rtol=1e-9, atol=0)
    betas = 1 - abar[1:] / abar[:-1]
    assert float(betas.max()) == pytest.approx(0.999)


def test_twenty_sampling_steps_are_the_published_nineteen_calls(prior: DiffusionPrior) -> None:
    assert prior.sampling_times() == [94, 89, 84, 79, 74, 69, 64, 59, 54, 49, 44, 39, 34, 29, 24, 19, 14, 9, 4, -1]


def test_the_sampler_follows_the_published_stochastic_step(prior: DiffusionPrior) -> None:
    condition, noise = tokens(1, 5), torch.randn(19, 1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    abar = [1.0, *cosine_abar(100).tolist()]  # abar[t] is the shifted product, abar[t + 1] the plain one
    x, times = noise[0].double(), prior.sampling_times()
    for i, (t, s) in enumerate(pairwise(times)):
        x0 = prior.network(x.float(), torch.tensor([t]), condition).double()
        if s < 0:
            x = x0
            break
        epsilon = (x / math.sqrt(abar[t + 1]) - x0) / math.sqrt(1 / abar[t + 1] - 1)
        c1 = math.sqrt((1 - abar[t] / abar[s]) * (1 - abar[s]) / (1 - abar[t]))
        c2 = math.sqrt(1 - abar[s] - c1**2)
        x = math.sqrt(abar[s]) * x0 + c1 * noise[i + 1].double() + c2 * epsilon
    torch.testing.assert_close(prior.sample_with_noise(condition, noise).double(), x, rtol=1e-3, atol=1e-4)


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(prior: DiffusionPrior) -> None:
    # float64: nineteen calls enlarge the rounding of float32, which differs between batch sizes
    exact, condition = deepcopy(prior).double(), tokens(3).double()
    together = exact.sample(condition, [10, 11, 12])
    alone = exact.sample(condition[1:2], [11])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(exact.sample(condition[1:2], [12]), alone)


def test_training_draws_cover_all_times_and_drop_their_share(prior: DiffusionPrior) -> None:
    drawn = prior.draw(Draws(0, 0, torch.arange(3000)), (1, 2))
    assert sorted(set(drawn.times_B.tolist())) == list(range(100))
    for keep in (drawn.keep_condition_B, drawn.keep_target_B):
        assert abs(float(keep.float().mean()) - 0.8) < 0.03
    both = (~drawn.keep_condition_B & ~drawn.keep_target_B).float().mean()
    assert abs(float(both) - 0.04) < 0.015  # the two drops are independent


def test_the_condition_gets_a_gradient_through_the_prior(prior: DiffusionPrior) -> None:
    condition = tokens(2).requires_grad_()
    keep = torch.ones(2, dtype=torch.bool)
    predicted = prior(condition, tokens(2, 2), PriorDraws(torch.tensor([9, 60]), tokens(2, 3), keep, keep))
    predicted.square().mean().backward()
    assert condition.grad is not None
    assert float(condition.grad.abs().min(dim=1).values.max()) > 0


@pytest.mark.parametrize(("width", "dim_head", "heads"), [(768, 52, 14), (128, 52, 2), (96, 52, 1), (24, 52, 1)])
def test_heads_and_their_width_come_from_the_target(width: int, dim_head: int, heads: int) -> None:
    config = DecoderConfig(prior_depth=1, prior_dim_head=dim_head)
    prior = DiffusionPrior.from_config(config, TargetSpec("c", "semantic", (3, width)))
    assert prior.network.relative_attention_bias.weight.shape == (32, heads)
    assert prior.network(torch.zeros(1, 3, width), torch.tensor([1]), torch.zeros(1, 3, width)).shape == (1, 3, width)
