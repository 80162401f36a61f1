"""The detector and the attack that knows it, on a small network."""

import pytest
import torch

import kafnb
from kafnb import attacks, detect, probes


@pytest.fixture(scope="module")
def fooled(digits):
    """A trained network, its detector, 80 test images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kafnb.models.mlp("kaf_elu")
    kafnb.fit(model, digits, kafnb.Recipe(epochs=10, lr=(0.005, 0.5), batch_size=64))
    x, y = digits.x_train[:600].float() / 255, digits.y_train[:600]
    detector = detect.Detector(model, x, attacks.pgd(model, x, y, eps=0.1, steps=10))
    return model, detector, *digits.test(80)


def test_it_sees_the_attack_it_was_fitted_to(fooled):
    model, detector, x, y = fooled
    clean, adversarial = detector.score(x), detector.score(attacks.pgd(model, x, y, eps=0.1, steps=10))
    assert (adversarial[:, None] > clean[None]).double().mean() > 0.75  # area under the ROC curve


def test_the_joint_attack_passes_it_within_the_ball(fooled):
    model, detector, x, y = fooled
    plain = attacks.pgd(model, x, y, eps=0.1, steps=30)
    x_adv = detect.joint_attack(detector, x, y, eps=0.1, steps=60)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    threshold = detector.score(x).quantile(0.95)
    through = [((model(v).argmax(1) != y) & (detector.score(v) <= threshold)).double().mean() for v in (plain, x_adv)]
    assert through[1] > through[0] + 0.15, through


def test_score_is_the_logistic_regression(fooled):
    model, detector, x, _ = fooled
    with torch.no_grad():
        f = detect.features(model, x, detector.layers)[1].double()
    assert torch.allclose(detector.score(x), ((f - detector.mean) / detector.scale) @ detector.weight + detector.bias)


def test_features_of_a_convolutional_network(digits):
    model, x = kafnb.models.light_cnn("relu", in_channels=1, image_size=8).train(), digits.test(6)[0].requires_grad_()
    seen, layers = [], probes.activation_layers(model, x)
    hook = model[2].register_forward_hook(lambda m, i, o: seen.append(o))
    logits, f = detect.features(model, x, layers)
    hook.remove()
    assert f.shape == (6, 2 * (32 + 32 + 64 + 64) + 128) and logits.shape == (6, 10)
    assert torch.allclose(f[:, :32], seen[0].mean((2, 3)))
    assert torch.allclose(f[:, 32:64], seen[0].flatten(2).std(2, unbiased=False), atol=1e-3)
    f.sum().backward()
    assert torch.isfinite(x.grad).all() and not any(m._forward_hooks for m in model.modules())


def test_model_is_left_as_it_was(fooled):
    model, detector, x, y = fooled
    model.train().zero_grad()
    detect.joint_attack(detector, x[:4], y[:4], eps=0.05, steps=2)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()


@pytest.mark.parametrize("name", ["srelu", "maxout", "apl", "kwta"])
def test_every_activation_has_features(name):
    model, x = kafnb.models.mlp(name, hidden=(8, 6)), torch.rand(3, 1, 8, 8)
    logits, f = detect.features(model, x, probes.activation_layers(model, x))
    assert len(logits) == 3 and f.shape == (3, 14)
