"""Attacks of libraries behind our call shape: strength, limits and no trace."""

import functools

import numpy as np
import pytest
import torch

import kafnb
from kafnb import attacks, evaluate, models
from kafnb.attacks import balls, library

SMALLEST = (library.cw, library.deepfool)


def needs(name):
    return pytest.importorskip(name, reason=f"needs {name}, of the extra 'attacks'")


@pytest.fixture(scope="module")
def trained(digits):
    """A small network that knows digits, and 40 test images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.mlp("swish", hidden=(32,))
    kafnb.fit(model, digits, kafnb.Recipe(epochs=15, lr=(0.01, 0.5)))
    model.zero_grad()
    return model, *digits.test(40)


def _square(model, x, y, *, eps):
    return library.square(model, x, y, eps=eps, queries=50)


def _apgd(model, x, y, *, eps):
    return library.autoattack(model, x, y, eps=eps, attacks=("apgd-ce",))


@pytest.mark.parametrize(
    "attack, package",
    [(_square, "pyautoattack"), (_apgd, "pyautoattack"), (library.cw, "foolbox"), (library.deepfool, "art")],
)
def test_no_trace_and_repeatable(trained, attack, package):
    needs(package)
    model, x, y = trained
    model.train()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    before, state, numpy_state = (
        {k: v.clone() for k, v in model.state_dict().items()},
        torch.get_rng_state(),
        np.random.get_state()[1],
    )
    runs = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(4)
            runs.append(attack(model, x[:8], y[:8], eps=0.2))
    assert torch.equal(*runs) and runs[0].shape == x[:8].shape and runs[0].dtype == x.dtype
    attack(model, x[:4], y[:4], eps=0.2)
    assert model.training and (model[1].weight.grad == 1).all()
    model[1].weight.grad = None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    if attack in SMALLEST:
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("norm, eps, parts", [("linf", 0.1, 4), ("l2", 0.6, 2), ("l1", 2.0, 2)])
def test_autoattack_against_our_own(trained, norm, eps, parts):
    """Within the ball, at least as strong as our PGD towards every class; and ours is not far behind. L-inf in full."""
    needs("pyautoattack")
    model, x, y = trained
    full = functools.partial(library.autoattack, eps=eps, norm=norm, attacks=library.AUTOATTACK[:parts])
    adv = full(model, x[:20], y[:20])
    assert balls.size(adv - x[:20], norm).max() <= eps + 1e-4 and adv.min() >= 0 and adv.max() <= 1
    theirs = (evaluate.predict(model, adv) == y[:20]).numpy()
    ours = functools.partial(attacks.pgd, eps=eps, norm=norm, steps=50, restarts=1, targeted="all", early_stop=True)
    ours = evaluate.robust_accuracy(model, (x[:20], y[:20]), ours).correct
    assert theirs.sum() <= ours.sum() + 1 and ours.sum() <= theirs.sum() + 3, (ours.sum(), theirs.sum())


def test_square_gets_stronger_with_queries(trained):
    needs("pyautoattack")
    model, x, y = trained
    left = [
        evaluate.robust_accuracy(model, (x, y), functools.partial(library.square, eps=0.15, queries=q)).rate
        for q in (5, 300)
    ]
    white = evaluate.robust_accuracy(
        model, (x, y), functools.partial(attacks.pgd, eps=0.15, steps=20, restarts=2, early_stop=True)
    ).rate
    assert white <= left[1] < left[0]


@pytest.mark.parametrize("attack, package", [(library.cw, "foolbox"), (library.deepfool, "art")])
def test_smallest_changes(trained, attack, package):
    """All found, none farther than what PGD needs by much; a finite eps keeps exactly those within it."""
    needs(package)
    model, x, y = trained
    right = evaluate.predict(model, x) == y
    far = attack(model, x, y, eps=float("inf"))
    assert torch.equal(far[~right], x[~right])
    assert (evaluate.predict(model, far)[right] != y[right]).all() and far.min() >= 0 and far.max() <= 1
    lengths = balls.size(far - x, "l2")
    eps = float(lengths[right].median())
    near = attack(model, x, y, eps=eps)
    assert torch.equal((near != x).flatten(1).any(1), right & (lengths <= eps))
    pgd = evaluate.robust_accuracy(
        model, (x, y), functools.partial(attacks.pgd, eps=eps, norm="l2", steps=50, early_stop=True)
    )
    assert pgd.correct[right.numpy()].mean() > 0.25  # within the median of the smallest changes PGD does not break all


def test_deepfool_and_cw_against_torchattacks(trained):
    torchattacks = pytest.importorskip(
        "torchattacks",
        reason="torchattacks is an oracle here, and pins old packages: pip install --no-deps torchattacks",
    )
    needs("foolbox")
    model, x, y = trained
    right = evaluate.predict(model, x) == y
    with attacks.still(model):
        theirs = balls.size(torchattacks.DeepFool(model)(x, y) - x, "l2")
    ours = balls.size(library.deepfool(model, x, y, eps=float("inf")) - x, "l2")
    assert ours[right].median() == pytest.approx(float(theirs[right].median()), rel=0.1)
    assert balls.size(library.cw(model, x, y, eps=float("inf")) - x, "l2")[right].median() <= 1.1 * ours[right].median()


def test_bad_input(trained):
    needs("pyautoattack")
    model, x, y = trained
    with pytest.raises(ValueError, match="attacks must be some of"):
        library.autoattack(model, x, y, eps=0.1, attacks=("pgd",))
    with pytest.raises(ValueError, match="at least 4 classes"):
        library.autoattack(models.mlp(num_classes=3), x, y % 3, eps=0.1)
    with pytest.raises(ValueError, match=r"take float32, got torch\.float64"):
        library.square(models.mlp().double(), x.double(), y, eps=0.1)
    for attack in SMALLEST:
        with pytest.raises(ValueError, match="eps must be"):
            attack(model, x, y, eps=-1.0)
    assert library.autoattack(model, x[:0], y[:0], eps=0.1).shape == x[:0].shape
