"""Projections, draws and steepest steps against slow references and an independent library."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from kafnb.attacks import balls


def nearest_l1(x, delta, eps):
    """The projection of one example by a root finder in float64."""
    room = np.where(delta > 0, 1 - x, x)

    def part(lam):
        return np.minimum(np.maximum(np.abs(delta) - lam, 0), room)

    lam = (
        0.0 if part(0.0).sum() <= eps else brentq(lambda v: part(v).sum() - eps, 0, np.abs(delta).max() + 1, xtol=1e-14)
    )
    return np.sign(delta) * part(lam)


def test_l1_projection_by_a_root_finder_and_by_the_authors_code():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, 3, 4, dtype=torch.float64, generator=generator).round(decimals=1)
    delta = torch.randn(200, 1, 3, 4, dtype=torch.float64, generator=generator)
    for eps in (0.05, 0.7, 2.0, 50.0):
        ours = balls.project(x, delta, eps, "l1") - x
        slow = [nearest_l1(a.flatten().numpy(), d.flatten().numpy(), eps) for a, d in zip(x, delta, strict=True)]
        assert np.allclose(ours.flatten(1), slow, atol=1e-10)
        base = pytest.importorskip("pyautoattack.autopgd_base")
        theirs = base.L1_projection(x.float(), delta.float(), eps)  # a correction of delta
        assert np.allclose(ours, (delta.float() + theirs).double(), atol=2e-5)


def test_l1_projection_is_the_nearest_point():
    """Of a small quadratic programme, solved by another method."""
    x, delta, eps = np.array([0.1, 0.9, 0.5]), np.array([-0.8, 0.7, 0.4]), 0.6
    signs = np.sign(delta)  # the solution keeps the signs, so that the norm is linear
    solved = minimize(
        lambda d: ((d - delta) ** 2).sum(), np.zeros(3), bounds=[(-0.1, 0), (0, 0.1), (0, 0.5)], tol=1e-14,
        constraints={"type": "ineq", "fun": lambda d: eps - signs @ d},
    )  # fmt: skip
    ours = balls.project(torch.tensor(x)[None], torch.tensor(delta)[None], eps, "l1")[0] - torch.tensor(x)
    assert np.allclose(ours, solved.x, atol=1e-6)


@pytest.mark.parametrize("norm", balls.NORMS)
def test_projection_stays_inside_and_leaves_inner_points(norm):
    x, delta = torch.rand(50, 2, 3, 3), torch.randn(50, 2, 3, 3)
    out = balls.project(x, delta, 0.5, norm)
    assert out.min() >= 0 and out.max() <= 1 and balls.size(out - x, norm).max() <= 0.5 + 1e-5
    inner = (out - x) * 0.9
    assert torch.allclose(balls.project(x, inner, 0.5, norm), x + inner, atol=1e-6)


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2)])
def test_steepest_step_reaches_the_dual_norm(norm, dual):
    g = torch.randn(20, 1, 4, 4, dtype=torch.float64)
    step = balls.steepest(g, norm)
    assert torch.allclose(balls.size(step, norm), torch.ones(20, dtype=torch.float64))
    gain = (g * step).flatten(1).sum(1)
    assert torch.allclose(gain, torch.linalg.vector_norm(g.flatten(1), dual, dim=1))


def test_steepest_l1_moves_the_largest_entries():
    g = torch.randn(5, 3, 20, 20)
    step = balls.steepest(g, "l1")
    moved = (step != 0).flatten(1)
    assert (moved.sum(1) == 12).all() and torch.allclose(balls.size(step, "l1"), torch.ones(5))
    smallest = torch.where(moved, g.flatten(1).abs(), torch.inf).amin(1)
    assert (smallest >= torch.where(moved, 0, g.flatten(1).abs()).amax(1)).all() and (step * g >= 0).all()


@pytest.mark.parametrize("norm, power", [("l2", 6), ("l1", 6)])
def test_draws_fill_the_ball_uniformly(norm, power):
    x = torch.full((20_000, 1, 2, 3), 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        delta = balls.random_delta(x, 0.2, norm)
    radius = balls.size(delta, norm) / 0.2
    assert radius.max() <= 1 + 1e-6
    assert float((radius < 0.9).float().mean()) == pytest.approx(0.9**power, abs=0.015)
    assert delta.flatten(1).mean(0).abs().max() < 2e-3
