"""The training loop: it learns, resumes to the same bits, and leaves no trace outside the model."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
import torch

from kafnb import Recipe, attacks, fit, models, training
from kafnb.data import augment
from kafnb.methods import METHODS
from kafnb.recipe import epochs_of, optimizer_of, triangular


def weights(model):
    return torch.cat([v.flatten().double() for v in model.state_dict().values()])


def test_triangle():
    rates = [triangular(s, 100, 0.1, 0.9, 0.4) for s in (0, 20, 40, 70, 100)]
    assert rates == pytest.approx([0.1, 0.5, 0.9, 0.5, 0.1])


def test_schedule_reaches_its_top_and_ends_low(tiny):
    history = fit(models.mlp(), tiny, Recipe(epochs=10, lr=(0.001, 0.1), batch_size=50))
    assert history.lr.max() == pytest.approx(0.1, rel=0.03) and history.lr.iloc[-1] < 0.005


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(tiny, method):
    epochs = 48 if method == "interval" else 24  # its ball grows while it learns
    recipe = Recipe(method, epochs=epochs, lr=(0.003, 0.3), batch_size=32, eps=0.05, steps=2, replays=3)
    torch.manual_seed(0)  # of the network; fit draws its own
    history = fit(models.mlp("swish"), tiny, recipe)
    assert len(history) == epochs_of(recipe) == (8 if method == "free" else epochs)
    if method == "interval":  # its loss is that of a growing ball
        assert history.accuracy.iloc[-1] > history.accuracy.iloc[0] + 0.3
    else:
        assert history.loss.iloc[-1] < 0.6 * history.loss.iloc[0]


@pytest.mark.parametrize("method", ["standard", "fgsm_rs", "free"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_training_is_identical(tiny, method, optimizer):
    recipe = Recipe(
        method,
        epochs=6,
        lr=(0.001, 0.01),
        momentum=0.9,
        batch_size=64,
        eps=0.1,
        replays=2,
        optimizer=optimizer,
        augment="crop",
    )

    def fresh():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return models.light_cnn("kaf", in_channels=1, image_size=8)

    states, whole = [], fresh()
    history = fit(whole, tiny, recipe, seed=1, save=lambda s: states.append(copy.deepcopy(s)))
    torch.randn(100)  # what happens outside must not matter
    resumed = models.light_cnn("kaf", in_channels=1, image_size=8)
    again = fit(resumed, tiny, recipe, seed=1, resume=states[1])
    assert torch.equal(weights(whole), weights(resumed))
    assert np.array_equal(history[["lr", "loss", "accuracy"]], again[["lr", "loss", "accuracy"]])


def test_seeds_matter_and_generators_do_not_move(tiny):
    state, runs = torch.get_rng_state(), []
    base = models.mlp()
    torch.set_rng_state(state)
    for seed in (0, 0, 1):
        model = copy.deepcopy(base)
        fit(model, tiny, Recipe("fgsm_rs", epochs=1, batch_size=50), seed=seed)
        runs.append(weights(model))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_last_batch_odd_or_of_one(tiny):
    import dataclasses

    for n in (64, 65, 97):
        data = dataclasses.replace(tiny, x_train=tiny.x_train[:n], y_train=tiny.y_train[:n])
        history = fit(
            models.light_cnn(in_channels=1, image_size=8), data, Recipe(epochs=2, lr=(0.001, 0.01), batch_size=32)
        )
        assert np.isfinite(history.loss).all()
        assert history.lr.iloc[-1] < 0.01  # the schedule ends where the batches end


def test_penalty_is_lambda_times_squares(tiny):
    """One step of plain SGD on a zero-loss problem moves weights by 2 lambda w lr."""
    model = models.light_cnn(in_channels=1, image_size=8)
    optimizer = optimizer_of(model, Recipe(lr=(0.1, 0.1), l2=0.01))
    dense, conv = model[-1].weight, model[0].weight
    before = dense.detach().clone(), conv.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(dense, before[0] * (1 - 0.1 * 2 * 0.01)) and torch.equal(conv, before[1])


def test_fgsm_rs_draws_a_fresh_start_every_time(tiny):
    model, (x, y), seen = models.mlp(), tiny.test(8), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    recipe = Recipe("fgsm_rs", eps=0.1, step_size=0.0)  # without the step only the start is left
    for _ in range(2):
        next(iter(METHODS["fgsm_rs"](model, x, y, recipe, {})))
    draws = seen[1::2]  # of each call: the forward pass of the attack, and the one that is learned from
    assert not torch.equal(*draws)
    assert all((d - x).abs().max() <= 0.1 + 1e-6 for d in draws)


def test_perturbing_costs_no_weight_gradients(tiny):
    model, (x, y) = models.mlp("kaf"), tiny.test(8)
    for method in ("fgsm", "fgsm_rs", "pgd"):
        next(iter(METHODS[method](model, x, y, Recipe(method, eps=0.1), {})))
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_augmentation_is_a_crop_of_the_padded_image():
    x = torch.rand(200, 2, 16, 16)
    y = augment(x, "crop")
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for i in range(200):
        crops = [(t, s) for t in range(5) for s in range(5) if torch.equal(y[i], padded[i, :, t : t + 16, s : s + 16])]
        assert len(crops) == 1
    flipped = augment(torch.ones(400, 1, 16, 16) * torch.arange(16.0), "crop_flip")
    share = (flipped[:, 0, 8, 4] > flipped[:, 0, 8, 11]).float().mean()
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("train", [fit, training.range_test])
def test_a_model_that_cannot_take_the_images_is_said_at_once(tiny, train):
    recipe = Recipe(epochs=1, batch_size=50)
    with pytest.raises(ValueError, match=r"^the model fails on torch.float32 images of shape \(1, 1, 8, 8\): [^\n]+$"):
        train(models.mlp().double(), tiny, recipe)
    oblong = dataclasses.replace(tiny, x_train=tiny.x_train[..., :6], x_test=tiny.x_test[..., :6])
    with pytest.raises(ValueError, match=r"^the model fails on torch.float32 images of shape \(1, 1, 8, 6\): [^\n]+$"):
        train(models.build("mlp", "relu", oblong), oblong, recipe)
    train(models.build("light_cnn", "relu", oblong), oblong, recipe)  # which pools whatever comes
    with pytest.raises(ValueError, match=r"^the model must return logits \(N, 10\), [^\n]+, got shape \(1, 7\)$"):
        train(models.mlp(num_classes=7), tiny, recipe)
    with pytest.raises(ValueError, match=r"^the model must return logits \(N, 10\), [^\n]+, got shape \(1, 1, 8, 8\)$"):
        train(torch.nn.Conv2d(1, 1, 1), tiny, recipe)
    train(models.mlp(num_classes=11), tiny, recipe)  # one more than there are classes


def test_divergence_stops_and_keeps_the_last_good_weights(tiny):
    model = models.mlp()
    with pytest.warns(UserWarning, match=r"stopped in epoch \d+: the loss is not finite"):
        history = fit(model, tiny, Recipe(epochs=10, lr=(1e30, 1e30), batch_size=32))
    assert len(history) < 10 and np.isnan(history.loss.iloc[-1])
    assert torch.isfinite(weights(model)).all()


class Root(torch.nn.Module):
    """|x|, whose derivative at 0 is NaN; and a buffer that is infinite from the start."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor(-float("inf")))

    def forward(self, x):
        return torch.sqrt(x * x)


@pytest.mark.parametrize("dead", [True, False])
def test_weights_that_the_last_step_of_an_epoch_spoils_are_not_kept(tiny, dead):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), Root(), torch.nn.Linear(16, 10))
    if dead:  # a unit: its loss is finite, its gradient is not
        torch.nn.init.zeros_(model[1].weight[:1].detach())
        torch.nn.init.zeros_(model[1].bias[:1].detach())
    said = pytest.warns(UserWarning, match="stopped in epoch 1: a weight or buffer is not finite")
    with said if dead else contextlib.nullcontext():
        history = fit(model, tiny, Recipe(epochs=2, lr=(0.01, 0.1), batch_size=200))
    assert history.loss.isna().tolist() == ([True] if dead else [False, False])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_in_lower_precision(tiny, method):
    recipe = Recipe(method, epochs=2, batch_size=100, eps=0.05, steps=2, replays=2, precision="bfloat16")
    history = fit(models.mlp(hidden=(8,)), tiny, recipe)
    assert len(history) == epochs_of(recipe) and np.isfinite(history.loss).all()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns(tiny, precision):
    recipe = Recipe("fgsm_rs", epochs=10, lr=(0.003, 0.3), batch_size=32, eps=0.05, precision=precision)
    model = models.mlp("kaf_elu")
    history = fit(model, tiny, recipe)
    assert history.loss.iloc[-1] < 0.8 * history.loss.iloc[0] and model[1].weight.dtype == torch.float32


def test_tracking(tiny):
    history = fit(models.mlp(), tiny, Recipe("fgsm_rs", epochs=3, lr=(0, 0.3), batch_size=32, eps=0.1, track=40))
    assert ((history.pgd <= history.clean) & (history.clean <= 1)).all()


def test_range_test_of_a_recipe_that_watches_its_gradients(tiny):
    recipe = Recipe(monitor=True, batch_size=20)
    table = training.range_test(models.mlp(hidden=(8,)), tiny, recipe, low=1, high=1e38, steps=4)
    assert len(table) <= 4 and not table.loss.iloc[-1] < 100


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_a_penalty_reaches_networks_that_name_no_layers(tiny, l2):
    nets = [models.mlp(hidden=(8,)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, lam in zip(nets, (None, l2), strict=True):
        training.fit(net, tiny, Recipe(epochs=2, batch_size=20, lr=(0.1, 0.1), l2=lam))
    sizes = [sum(p.square().sum() for n, p in net.named_parameters() if "weight" in n) for net in nets]
    assert (sizes[1] < 0.99 * sizes[0]) if l2 else sizes[0] == sizes[1]


def test_range_test(tiny):
    table = training.range_test(
        models.mlp(), tiny, Recipe("fgsm", eps=0.05, batch_size=32), low=1e-3, high=100, steps=60
    )
    assert np.allclose(np.diff(np.log(table.lr)), np.log(1e5) / 59) and table.lr[0] == pytest.approx(1e-3)
    assert len(table) == 60 or table.smooth.iloc[-1] >= 4 * table.smooth.min() or np.isnan(table.smooth.iloc[-1])
    assert table.smooth.min() < table.smooth[0]


@pytest.mark.parametrize(
    "change",
    [dict(method="fsgm"), dict(optimizer="rmsprop"), dict(precision="int8"), dict(schedule="cosine"), dict(augment="mixup"),
     dict(lr=(0.1, 0.01)), dict(lr=(0.1,)), dict(lr=(0.0, float("nan"))), dict(epochs=-1), dict(eps=-1), dict(batch_size=0)],
)  # fmt: skip
def test_bad_recipes_get_one_line(change):
    with pytest.raises(ValueError) as error:
        Recipe(**change)
    assert "\n" not in str(error.value)


def test_adversarial_training_helps(digits):
    """The point of it all, on a small network: at least 20 points under PGD, true labels."""
    from kafnb import evaluate

    rates = {}
    for method in ("standard", "fgsm_rs"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = models.mlp("kaf_elu")
        fit(model, digits, Recipe(method, epochs=60, lr=(0.005, 0.5), batch_size=64, eps=0.1))
        attack = lambda m, x, y: attacks.pgd(m, x, y, eps=0.1, steps=10)  # noqa: E731
        rates[method] = evaluate.robust_accuracy(model, digits, attack).rate
    assert rates["fgsm_rs"] > rates["standard"] + 0.2, rates


@pytest.mark.parametrize("activation, last", [("relu", True), ("kaf", True), ("kwta", False)])
def test_in_channels_last_the_same_is_learned(tiny, monkeypatch, activation, last):
    trained, layouts = [], []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(training, "any_layout", lambda model: False)
        torch.manual_seed(0)
        model = models.resnet(8, activation, in_channels=1, image_size=8)  # no dropout: its masks follow the layout
        watch = model.blocks[0].conv1.register_forward_pre_hook(
            lambda m, x: layouts.append(m.weight.is_contiguous(memory_format=torch.channels_last))
        )
        fit(model, tiny, Recipe("standard", epochs=1, lr=(0.001, 0.1)))
        watch.remove()
        trained.append(model)
        assert all(p.is_contiguous() for p in model.parameters())
    half = len(layouts) // 2
    assert half > 0 and set(layouts[:half]) == {last} and set(layouts[half:]) == {False}
    for a, b in zip(*(m.parameters() for m in trained), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
