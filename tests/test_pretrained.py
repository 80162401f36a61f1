"""Networks that come with the package: published from the store, found by name, whole."""

import dataclasses
import json
import re
import subprocess
import tomllib

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

import kafnb
from kafnb import Evaluation, Experiment, Recipe, pretrained, thesis
from kafnb.checks import shown
from kafnb.store import Folder

RUN = Experiment("digits", "mlp", "kaf_elu", Recipe("fgsm", epochs=2, lr=(0.003, 0.3), eps=0.1), 0, {"hidden": (16,)})
PGD = Evaluation("pgd", eps=0.1, steps=2, n=30)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """(name, folder in the store, table of its scores)."""
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path / "weights")
    table = kafnb.run(RUN, [PGD], store=tmp_path / "results")
    folder = tmp_path / "results" / RUN.name
    return pretrained.publish(folder), folder, table


def test_a_published_network_is_the_trained_one(published, tmp_path):
    name = published[0]
    assert pretrained.names() == (name,) and name == "mlp-kaf_elu-16-fgsm"
    state = torch.get_rng_state()
    model, x = kafnb.load(name), kafnb.load_data("digits").test(20)[0]
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    want = kafnb.load(RUN, store=tmp_path / "results")
    with torch.no_grad():
        assert torch.equal(model(x), want(x))


def test_a_restored_one_is_as_it_was(published, tmp_path):
    name, folder, table = published
    restored = pretrained.restore(name, tmp_path / "other")
    assert restored == tmp_path / "other" / folder.name
    again = kafnb.run(RUN, [PGD], store=tmp_path / "other", stored=True)  # neither trained nor attacked
    pd.testing.assert_frame_equal(again.drop(columns="correct"), table.drop(columns="correct"))
    assert all((a == b).all() for a, b in zip(again.correct, table.correct, strict=True))
    assert {p.name: p.read_bytes() for p in restored.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(FileExistsError, match="move it away"):
        pretrained.restore(name, tmp_path / "other")


def test_a_score_from_before_a_field_came_is_published_and_restored(published, tmp_path):
    _, folder, table = published
    for path in folder.glob("evaluation-*.csv"):
        stored, made = Folder(folder), Folder(folder).read_comment(path.name)
        del made["queries"]
        stored.write_table(path.name, stored.read_table(path.name), json.dumps(made))
    pretrained.restore(pretrained.publish(folder), tmp_path / "other")
    again = kafnb.run(RUN, [PGD], store=tmp_path / "other", stored=True)
    assert again.rate.tolist() == table.rate.tolist()


def test_killed_in_the_middle_it_is_restored_anew(published, tmp_path, monkeypatch):
    def killed(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "write_json", killed)
        pretrained.restore(published[0], tmp_path / "other")
    restored = pretrained.restore(published[0], tmp_path / "other")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=restored, check=True)
    begun = Folder(tmp_path / "begun" / restored.name)
    begun.write_checkpoint({"history": [{}]})  # a training is not written over, either
    with pytest.raises(FileExistsError, match="move it away"):
        pretrained.restore(published[0], tmp_path / "begun")


def test_a_restored_one_of_other_data_is_refused(published, tmp_path, monkeypatch):
    pretrained.restore(published[0], tmp_path / "other")
    digits = kafnb.load_data("digits")
    other = dataclasses.replace(digits, x_train=255 - digits.x_train)
    monkeypatch.setattr(kafnb.results, "load_data", lambda *args: other)
    with pytest.raises(ValueError, match="trained on other data"):
        kafnb.run(RUN, store=tmp_path / "other")


def test_without_a_record_there_is_nothing_to_restore(published, tmp_path):
    path = pretrained.WEIGHTS / f"{published[0]}.safetensors"
    with safe_open(path, "pt") as f:
        network = f.metadata()["network"]
    path.write_bytes(save(load_file(path), {"format": "pt", "network": network}))
    with pytest.raises(ValueError, match="without the record"):
        pretrained.restore(published[0], tmp_path / "other")
    assert not (tmp_path / "other").exists() and not kafnb.load(published[0]).training


def test_its_card_has_every_stored_score(published):
    name, folder, table = published
    card = (pretrained.WEIGHTS / f"{name}.md").read_text()
    for row in table.itertuples():
        found = re.search(
            rf"^\| {re.escape(row.metric)}.*?\| ([\d.]+) \| ([\d.]+) to ([\d.]+) \| (\d+) \|$", card, re.M
        )
        assert [float(v) for v in found.groups()] == [
            *(round(100 * v, 1) for v in (row.rate, row.low, row.high)),
            row.n,
        ]
    assert f'kafnb.load("{name}")' in card and "2 epochs" in card and "digits" in card
    spent = kafnb.history(RUN, store=folder.parent).seconds.sum()  # also of a training that was resumed
    assert f" in {spent:.0f} s with" in card
    stored = Folder(folder)  # a score of other weights is none of these
    (file,) = folder.glob("evaluation-pgd*.csv")
    other = file.read_text().replace(stored.digest("weights.safetensors"), "0" * 64)
    stored.write(file.name, lambda p: p.write_text(other))
    pretrained.publish(folder)
    assert "PGD" not in (pretrained.WEIGHTS / f"{name}.md").read_text()
    assert pretrained.publish(folder, epochs=True) == f"{name}-2-epochs"
    record = stored.read_json("experiment.json")
    stored.write_json("experiment.json", record | {"experiment": record["experiment"] | {"seed": 3}})
    assert pretrained.publish(folder) == f"{name}-seed-3"  # and the one of seed 0 is still there


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b.replace(b"mlp", b"mlq")])
def test_a_damaged_file_is_one_line(published, damage):
    path = pretrained.WEIGHTS / f"{published[0]}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged") as error:
        kafnb.load(published[0])
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_said(published, tmp_path):
    with pytest.raises(ValueError, match=f"did you mean {shown(published[0])}"):
        kafnb.load(published[0] + "x")
    with pytest.raises(FileNotFoundError, match="no finished experiment"):
        pretrained.publish(tmp_path / "nothing")


def test_shipped_networks_load_and_have_cards():
    assert {"light_cnn-relu-standard", "light_cnn-kwta-standard", "light_cnn-kaf-standard"} <= set(pretrained.names())
    for name in pretrained.names():
        model = kafnb.load(name)
        with torch.no_grad():
            assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        card = (pretrained.WEIGHTS / f"{name}.md").read_text()
        assert f'kafnb.load("{name}")' in card and re.search(r"^\| clean \| \d", card, re.M)
    assert sum(p.stat().st_size for p in pretrained.WEIGHTS.iterdir()) < 25e6


def test_the_long_trainings_are_what_the_notebooks_look_for(tmp_path):
    long = [name for name in pretrained.names() if name.endswith(("fgsm_rs-80-epochs", "fgsm_rs-60-epochs"))]
    assert [name.split("-")[0] for name in long] == ["resnet20"] * len(thesis.RESNET20) + ["vgg"] * 2
    for name in long:
        folder = pretrained.restore(name, tmp_path)
        run = json.loads((folder / "experiment.json").read_text())["experiment"]
        experiment = Experiment(**run | {"recipe": Recipe(**run["recipe"])})
        recipe = kafnb.PROFILES["paper"].recipe(experiment.model, activation=experiment.activation)
        assert folder.name == experiment.name and experiment.recipe == recipe
        assert len(kafnb.history(experiment, store=tmp_path)) == recipe.epochs


def test_cards_say_what_the_tables_say():
    figures = kafnb.paths.home() / "figures"
    resnets, vggs, long = (
        pd.read_csv(figures / f"{f}.csv")
        for f in (
            "small/14_resnet20_evaluation_blocks", "paper/12_vgg_evaluation_scatter",
            "paper/14_resnet20_evaluation_blocks",
        )
    )  # fmt: skip
    resnets = resnets[~resnets.case.str.contains("fifth of the rate")]  # does not come with the package
    block = resnets.case.map(lambda c: "" if "thesis" in c else "-he")
    resnets["network"] = "resnet20-" + resnets.activation + block + "-" + resnets.method
    vggs = vggs[vggs.activation.isin(("relu", "kaf"))]  # those that come along
    vggs["network"] = "vgg-" + vggs.activation + "-" + vggs.method + "-60-epochs"
    long["network"] = "resnet20-" + long.activation + "-" + long.method + "-80-epochs"
    told = 0
    for row in pd.concat([resnets, vggs, long]).query("seed == 0").itertuples():
        card = (pretrained.WEIGHTS / f"{row.network}.md").read_text()
        score = re.search(rf"^\| {re.escape(row.metric)}.*?\| ([\d.]+) \| .* \| (\d+) \|$", card, re.M)
        # attacked anew on another processor than the card says, which rounds otherwise: small gradients change sign
        assert float(score[1]) == pytest.approx(100 * row.rate, abs=0.06 if row.metric == "clean" else 1.5), row.network
        assert int(score[2]) == row.n
        told += 1
    assert told == 7 * 3 + 2 * 5 + 8 * 3


def test_git_and_the_build_take_them():
    root = kafnb.paths.home()
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "check-ignore", *map(str, pretrained.WEIGHTS.iterdir())]
    assert subprocess.run(command, cwd=root, capture_output=True).returncode == 1  # none of them is ignored
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert data == {"kafnb": [f"{pretrained.WEIGHTS.name}/*"]}
