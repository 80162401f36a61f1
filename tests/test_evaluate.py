"""Scores, intervals, the two label protocols."""

import functools

import numpy as np
import pytest
import torch
from scipy.stats import norm

import kafnb
from kafnb import attacks, evaluate, models


def test_wilson_by_its_formula():
    for k, n in ((0, 10), (3, 10), (10, 10), (461, 1000)):
        z, p = norm.ppf(0.975), k / n
        middle, half = (p + z * z / (2 * n)), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = evaluate.wilson(k, n)
        assert low == pytest.approx(max(0, (middle - half) / (1 + z * z / n)), abs=1e-9)
        assert high == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-9)


class Table(torch.nn.Module):
    """Answers by the first pixel: image i of ten has pixel i / 10; an attack may move it."""

    def __init__(self, answers):
        super().__init__()
        self.answers = torch.nn.Parameter(torch.tensor(answers, dtype=torch.float32))

    def forward(self, x):
        i = (x[:, 0, 0, 0] * 10).round().long()
        return torch.nn.functional.one_hot(self.answers[i].long(), 10).float() + 0 * x.sum()


def test_the_two_protocols_by_hand():
    x = (torch.arange(4) / 10).view(4, 1, 1, 1).expand(4, 1, 2, 2).clone()
    y = torch.tensor([0, 0, 0, 0])
    model = Table([0, 1, 0, 2, 0])  # right, wrong, right, wrong; the attack moves image i to i + 1
    told = []

    def move(model, x, y):
        told.append(y.tolist())
        return x + 0.1

    true = evaluate.robust_accuracy(model, (x, y), move, "true")
    assert true.correct.tolist() == [False, False, False, False] and told == [[0, 0]]  # only the right ones attacked
    told.clear()
    predicted = evaluate.robust_accuracy(model, (x, y), move, "predicted")
    # images 1 and 3 were wrong and land on the right answer: that is the inflation
    assert predicted.correct.tolist() == [False, True, False, True] and told == [[0, 0], [1, 2]]
    assert evaluate.clean_accuracy(model, (x, y)).correct.tolist() == [True, False, True, False]
    assert "predicted labels" in str(predicted) and "true labels" in str(true)


def test_on_right_images_the_protocols_are_the_same_attack(digits):
    torch.manual_seed(0)
    model = models.mlp("relu", hidden=(32,)).eval()
    kafnb.fit(model, digits, kafnb.Recipe(epochs=1, lr=(0.01, 0.1), batch_size=64))
    attack = functools.partial(attacks.pgd, eps=0.04, steps=3, restarts=2)
    clean = evaluate.clean_accuracy(model, digits, n=200).correct
    true, told = (
        evaluate.robust_accuracy(model, digits, attack, labels, n=200, batch_size=30).correct
        for labels in evaluate.LABELS
    )
    assert 20 < true.sum() < clean.sum() < 190  # not one of the cases in which it must be so
    assert np.array_equal(told & clean, true) and (told & ~clean).any()


def test_seeded_repeatable_and_no_trace(digits):
    model = models.light_cnn("relu", in_channels=1, image_size=8).train()
    attack = functools.partial(attacks.pgd, eps=0.1, steps=2)
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    a, b = (evaluate.robust_accuracy(model, digits, attack, n=50, seed=3) for _ in range(2))
    assert np.array_equal(a.correct, b.correct) and a.n == 50
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_odd_last_batch_changes_nothing(digits):
    model = models.light_cnn("relu", in_channels=1, image_size=8).eval()
    attack = functools.partial(attacks.pgd, eps=0.1, steps=3, random_start=False)
    scores = [evaluate.robust_accuracy(model, digits, attack, n=53, batch_size=b).correct for b in (53, 7, 52, 1)]
    assert all(np.array_equal(scores[0], s) for s in scores)


def test_never_above_clean(digits):
    model = models.mlp()
    attack = functools.partial(attacks.fgsm, eps=0.05)
    assert not (
        evaluate.robust_accuracy(model, digits, attack).correct & ~evaluate.clean_accuracy(model, digits).correct
    ).any()


def test_bad_input(digits):
    model = models.mlp()
    with pytest.raises(ValueError, match="labels must be"):
        evaluate.robust_accuracy(model, digits, attacks.fgsm, "guessed")
    with pytest.raises(ValueError, match="at least one"):
        evaluate.clean_accuracy(model, (torch.rand(0, 1, 8, 8), torch.zeros(0).long()))
    for attack in (lambda m, x, y: x + 9, lambda m, x, y: x * float("nan"), lambda m, x, y: x[..., :4]):
        with pytest.raises(ValueError, match="the attack must return images"):
            evaluate.robust_accuracy(model, digits, attack, n=200)


def test_several_attacks_on_survivors_only(digits):
    model = models.mlp()
    seen = []

    def flips(rows):
        def attack(model, x, y):
            seen.append(len(x))
            return torch.where((x.flatten(1).sum(1) * 10 % 3).round().long()[:, None, None, None] == rows, 1 - x, x)

        return attack

    parts = [evaluate.robust_accuracy(model, digits, flips(i), n=60) for i in (0, 1)]
    union = evaluate.robust_accuracy(model, digits, [flips(0), flips(1)], n=60)
    assert np.array_equal(union.correct, parts[0].correct & parts[1].correct)
    assert seen[2] == seen[0] and seen[3] == int(parts[0].correct.sum())


def test_an_image_whose_logits_are_nan_is_wrong():
    model = Table([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    x, y = torch.arange(10).view(10, 1, 1, 1) / 10, torch.arange(10)

    class Broken(torch.nn.Module):
        def forward(self, x):
            logits = model(x)
            return logits.masked_fill(logits.argmax(1, keepdim=True) == 0, torch.nan)

    assert evaluate.predict(Broken(), x)[0] == -1
    for labels in ("true", "predicted"):
        score = evaluate.robust_accuracy(Broken(), (x, y), lambda model, x, y: x, labels)
        assert score.correct.tolist() == [False] + [True] * 9


def test_attacks_run_without_tf32(monkeypatch):
    """On CUDA PyTorch's convolutions take TF32 unless told otherwise: ten bits where gradients are small."""
    conv = torch.backends.cudnn.conv
    before, inside = conv.fp32_precision, []
    with pytest.raises(KeyError), evaluate.exact(torch.device("cuda")):
        inside.append(conv.fp32_precision)
        raise KeyError
    with evaluate.exact(torch.device("cpu")):
        inside.append(conv.fp32_precision)
    assert inside == ["ieee", before] and conv.fp32_precision == before
    monkeypatch.setattr(evaluate, "model_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, **how: self)  # no such device here
    seen = []

    def attack(model, x, y):
        seen.append(conv.fp32_precision)
        return x

    data = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    evaluate.robust_accuracy(Watched(seen), data, attack, "predicted")
    assert set(seen) == {"ieee"} and len(seen) > 2 and conv.fp32_precision == before


class Watched(torch.nn.Module):
    """Notes with which precision it is called; says class 0."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(torch.backends.cudnn.conv.fp32_precision)
        return torch.eye(3)[:1].expand(len(x), 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_convolutions_are_exact_on_a_gpu():
    conv, x = torch.nn.Conv2d(64, 64, 3), torch.randn(8, 64, 32, 32)
    with torch.no_grad(), evaluate.exact(torch.device("cuda")):
        error = (conv.cuda()(x.cuda()).cpu().double() - conv.cpu().double()(x.double())).abs().max()
    assert error < 1e-5, error


def test_no_attack_is_no_robust_accuracy(digits):
    with pytest.raises(ValueError, match="needs an attack"):
        evaluate.robust_accuracy(models.build("mlp", "relu", digits), digits, [])


def test_generalisation_gap_by_hand():
    """A network that knows three of four training images and one of two test images, and nothing under attack."""
    x = torch.arange(4, dtype=torch.uint8)[:, None, None, None] * torch.full((1, 1, 2, 2), 85, dtype=torch.uint8)
    data = kafnb.data.Data("four", x, torch.tensor([0, 0, 1, 0]), x[[0, 3]], torch.tensor([0, 0]), ("dark", "light"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with torch.no_grad():  # light where the mean is above a half
        model[1].weight.copy_(torch.tensor([[0.0] * 4, [1.0] * 4]))
        model[1].bias.copy_(torch.tensor([2.0, 0.0]))
    invert = lambda model, x, y: 1 - x  # noqa: E731
    table = evaluate.generalisation_gap(model, data, invert, n=100)
    assert table.loc["clean", ["training", "test", "gap"]].tolist() == [75, 50, 25]
    assert table.loc["attacked", ["training", "test"]].tolist() == [0, 0]
    assert table.loc["clean", ["n_training", "n_test"]].tolist() == [4, 2]
    (three, none), (one, still) = (  # Wilson's intervals, from his formula
        [(r + z**2 / (2 * n) + s * z * (r * (1 - r) / n + z**2 / (4 * n**2)) ** 0.5) / (1 + z**2 / n) for s in (-1, 1)]
        for z, r, n in ((norm.ppf(0.975), 0.75, 4), (norm.ppf(0.975), 0.5, 2))
    )
    ends = [25 - 100 * np.hypot(0.75 - three, still - 0.5), 25 + 100 * np.hypot(none - 0.75, 0.5 - one)]
    assert table.loc["clean", ["low", "high"]].tolist() == pytest.approx(ends, rel=1e-4)
    assert table.loc["attacked", "low"] < -10 and table.loc["attacked", "high"] > 10  # nothing of four, nothing of two
    with pytest.raises(TypeError, match="data must be a Data"):
        evaluate.generalisation_gap(model, data.test(), invert, n=2)
