"""Experiments and their store: keys, train or load, resume, damage, two processes."""

import dataclasses
import functools
import json
import multiprocessing
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import kafnb
from kafnb import Evaluation, Experiment, Recipe, evaluations, experiments, provenance, results
from kafnb.profiles import PROFILES, resolve_data
from kafnb.store import Folder, key_of

QUICK = Recipe("fgsm_rs", epochs=3, lr=(0.003, 0.3), eps=0.1)
MLP = Experiment("digits", "mlp", "kaf_elu", QUICK, 0, {"hidden": (16,)})
PGD = Evaluation("pgd", eps=0.1, steps=2, n=30)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "results"


def folder_of(store, experiment=MLP):
    return store / experiment.name


def test_key_depends_on_what_matters_only():
    assert dataclasses.replace(MLP).key == MLP.key
    assert Experiment("digits", "mlp", "kaf_elu", QUICK, 0, (("hidden", (16,)),)).key == MLP.key
    for change in (
        dict(seed=1),
        dict(activation="kaf"),
        dict(recipe=dataclasses.replace(QUICK, eps=0.2)),
        dict(options=()),
    ):
        assert dataclasses.replace(MLP, **change).key != MLP.key
    # defaults are left out, so a field added later changes no key; this one is frozen
    assert Experiment().key == "44136fa355"
    key = Experiment("folder:/a/tree").key
    assert key == Experiment("folder:/b/tree").key == Experiment("folder:tree").key != Experiment("folder:/b/other").key


def test_train_once_then_load(store, monkeypatch):
    first = kafnb.run(MLP, [PGD], store=store)
    monkeypatch.setattr(results, "fit", None)  # a second training would now be an error
    monkeypatch.setattr(evaluations, "robust_accuracy", None)
    second = kafnb.run(MLP, [PGD], store=store)
    assert first.drop(columns="correct").equals(second.drop(columns="correct"))
    assert all(np.array_equal(a, b) for a, b in zip(first.correct, second.correct, strict=True))
    assert first.metric.tolist() == ["clean", "PGD-2-1 (true labels)"] and first.n.tolist() == [360, 30]
    model = kafnb.load(MLP, store=store)
    assert not model.training
    assert kafnb.evaluate.clean_accuracy(model, kafnb.load_data("digits")).rate == first.rate[0]
    assert len(kafnb.history(MLP, store=store)) == 3


def test_stored_computes_nothing(store, monkeypatch):
    other, fgsm = dataclasses.replace(MLP, seed=1), Evaluation("fgsm", eps=0.1, n=30)
    with pytest.raises(FileNotFoundError, match="none of these experiments is in the store"):
        kafnb.run([MLP, other], [PGD], store=store, stored=True)
    kafnb.run(MLP, [PGD], store=store)
    monkeypatch.setattr(results, "fit", None)
    monkeypatch.setattr(evaluations, "robust_accuracy", None)
    table = kafnb.run([other, MLP], [fgsm, PGD], store=store, stored=True)
    assert table.metric.tolist() == ["clean", "PGD-2-1 (true labels)"] and set(table.experiment) == {MLP.key}
    trained_on, attacked_on = sorted(experiments.computed_on(MLP, [fgsm, PGD], store=store), key=lambda t: "PGD" in t)
    assert "torch 2." in trained_on and attacked_on.startswith("PGD-2-1 (true labels): cpu, ")

    monkeypatch.setenv("KAFNB_STORED", "1")
    monkeypatch.setenv("KAFNB_HOME", str(store.parent))
    session = kafnb.Session("14_resnet20_evaluation", "paper")  # needs no GPU then
    with pytest.raises(FileNotFoundError, match="none of these experiments is in the store"):
        session.load(other)
    assert len(session.run(MLP)) == 1 and len(session.computed_on) == 1 and session.load(MLP) is not None


def test_folder_is_readable_and_checks_with_standard_tools(store):
    kafnb.run(MLP, [PGD], store=store)
    names = sorted(p.name for p in folder_of(store).iterdir())
    assert [n.split("-")[0] for n in names] == [
        "SHA256SUMS", "evaluation", "evaluation", "experiment.json", "history.csv", "weights.safetensors"
    ]  # fmt: skip
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder_of(store), check=True)
    record = json.loads((folder_of(store) / "experiment.json").read_text())
    assert record["experiment"]["activation"] == "kaf_elu" and record["kafnb"] == kafnb.__version__
    assert "alpha" in "".join(load_file(folder_of(store) / "weights.safetensors"))


class Stop(Exception):
    pass


def test_interrupted_training_resumes_to_the_same_weights(store, tmp_path, monkeypatch):
    kafnb.run(MLP, store=tmp_path / "whole")
    write = Folder.write_checkpoint

    def stop_after_second(self, state):
        write(self, state)
        if len(state["history"]) == 2:
            raise Stop

    monkeypatch.setattr(Folder, "write_checkpoint", stop_after_second)
    with pytest.raises(Stop):
        kafnb.run(MLP, store=store)
    assert [p.name for p in folder_of(store).glob("checkpoint*")] == ["checkpoint-00002.pt"]
    monkeypatch.setattr(Folder, "write_checkpoint", write)
    kafnb.run(MLP, store=store)
    a, b = (load_file(s / MLP.name / "weights.safetensors") for s in (store, tmp_path / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in b) and not list(folder_of(store).glob("checkpoint*"))


def test_a_parameter_in_several_places_is_stored_and_read(store, monkeypatch):
    one = torch.nn.PReLU()
    monkeypatch.setitem(kafnb.ACTIVATIONS, "one", lambda channels: one)
    shared = dataclasses.replace(MLP, activation="one", options={"hidden": (16, 16)})
    first = kafnb.run(shared, store=store)
    slope = one.weight.detach().clone()
    torch.nn.init.zeros_(one.weight)
    monkeypatch.setattr(results, "fit", None)
    assert kafnb.run(shared, [PGD], store=store).rate[0] == first.rate[0] and torch.equal(one.weight, slope)


@pytest.mark.parametrize("sent", [False, True], ids=["computed here", "sent back"])
def test_killed_while_a_new_result_replaces_an_old_one_nothing_counts_as_whole(store, tmp_path, monkeypatch, sent):
    kafnb.run(MLP, store=store)
    old = Folder(folder_of(store)).get_all()
    monkeypatch.setattr(results, "weights_code", lambda experiment: "0123456789")
    monkeypatch.setenv("KAFNB_STALE", "recompute")
    if sent:
        kafnb.run(MLP, store=tmp_path / "cluster")
        new = Folder(folder_of(tmp_path / "cluster")).get_all()
    write = Folder.write

    def killed(self, name, how):
        if name == "history.csv":
            raise Stop
        write(self, name, how)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Folder, "write", killed)
        Folder(folder_of(store)).put_all(new) if sent else kafnb.run(MLP, store=store)
    monkeypatch.delenv("KAFNB_STALE")
    kafnb.run(MLP, store=store)
    assert Folder(folder_of(store)).read_json("experiment.json")["code"] == "0123456789"
    kept = Folder(folder_of(store)).get_all()
    assert kept.keys() == old.keys() and kept["history.csv"] != old["history.csv"]  # its seconds


@pytest.mark.parametrize("name", ["weights.safetensors", "history.csv", "experiment.json"])
def test_a_flipped_bit_is_found_moved_aside_and_computed_again(store, name):
    before = kafnb.run(MLP, store=store)
    path = folder_of(store) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="checksum"):
        after = kafnb.run(MLP, store=store)
    assert after.rate.equals(before.rate) and (folder_of(store) / f"{name}.damaged").read_bytes() == content
    assert Folder(folder_of(store)).has(name)


def test_a_result_from_other_data_is_refused(store, tmp_path):
    from PIL import Image

    def tree(folder, shade):
        for part in ("train", "test"):
            for c in range(2):
                (folder / part / str(c)).mkdir(parents=True)
                for i in range(4):
                    Image.new("RGB", (8, 8), (shade + 100 * c, i, 0)).save(folder / part / str(c) / f"{i}.png")
        return folder

    spec = [f"folder:{tree(tmp_path / where / 'tree', shade)}" for where, shade in (("a", 0), ("b", 50))]
    experiment = Experiment(spec[0], "mlp", recipe=QUICK)
    kafnb.run(experiment, store=store)
    with pytest.raises(ValueError, match="other data"):
        kafnb.run(dataclasses.replace(experiment, data=spec[1]), store=store)


def test_a_result_from_before_a_default_changed_is_refused(store, monkeypatch):
    kafnb.run(MLP, store=store)
    folder = Folder(folder_of(store))
    record = folder.read_json("experiment.json")
    record["experiment"]["recipe"]["momentum"] = 0.9  # as a version wrote it whose default was another
    folder.write_json("experiment.json", record)
    with pytest.raises(ValueError, match=r"trained with momentum 0\.9, which is 0\.0 now"):
        kafnb.run(MLP, store=store)
    del record["experiment"]["recipe"]["momentum"]  # a field that came later says nothing
    folder.write_json("experiment.json", record)
    assert len(kafnb.run(MLP, store=store)) == 1


def test_a_checkpoint_left_by_a_kill_at_the_very_end_goes(store):
    kafnb.run(MLP, store=store)
    folder = Folder(folder_of(store))
    folder.write_checkpoint({"history": [{}]})
    kafnb.load(MLP, store=store)
    assert not folder.checkpoints()


def test_a_table_says_which_radius(store):
    attacks = [Evaluation("fgsm", eps=eps, n=20) for eps in (0.05, 0.1)]
    table = kafnb.run(MLP, attacks, store=store)
    assert np.isnan(table.eps[0]) and table.eps[1:].tolist() == [0.05, 0.1]


def test_options_may_be_lists(store):
    listed = dataclasses.replace(MLP, options={"hidden": [16]})
    assert listed == MLP and listed.key == MLP.key and hash(listed) == hash(MLP)


def test_a_folder_keeps_its_name_behind_a_link(tmp_path, monkeypatch):
    """The name is part of the key: the same from the command line (an absolute path) and from a notebook."""
    (tmp_path / "real" / "train").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    for given in ("link", tmp_path / "link", "./link"):
        assert resolve_data(PROFILES["small"], given) == f"folder:{tmp_path / 'link'}"


def _train(store):
    torch.set_num_threads(1)
    return kafnb.run(MLP, store=store).rate[0], kafnb.history(MLP, store=store).seconds.tolist()


def test_two_processes_train_once(store):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_train, [store, store])
    assert first == second  # the recorded seconds differ if it was trained twice


def test_what_another_process_is_at_comes_last(store):
    theirs, ours = MLP, dataclasses.replace(MLP, seed=MLP.seed + 1)
    done = Folder(store / ours.name)
    with ThreadPoolExecutor(1) as thread:
        with Folder(store / theirs.name).lock():
            running = thread.submit(kafnb.run, [theirs, ours, theirs], store=store)
            until = time.monotonic() + 60
            while not (done.path / "SHA256SUMS").exists() or done.busy():
                assert time.monotonic() < until and not running.done()
                time.sleep(0.05)
            assert not folder_of(store).exists() and done.has("weights.safetensors")
        assert running.result().seed.tolist() == [theirs.seed, ours.seed, theirs.seed]  # in the order asked for


def test_diverged_training_is_a_result(store):
    bad = dataclasses.replace(MLP, activation="relu", recipe=Recipe(epochs=4, lr=(1e30, 1e30)))
    table = kafnb.run(bad, store=store)
    assert 0 <= table.rate[0] <= 1 and np.isnan(kafnb.history(bad, store=store).loss.iloc[-1])


def test_bad_names_are_refused_before_anything_is_written(store):
    with pytest.raises(ValueError, match="did you mean 'kaf_elu'"):
        kafnb.run(dataclasses.replace(MLP, activation="kaf_eul"), store=store)
    assert not folder_of(store).exists()
    with pytest.raises(ValueError, match="attack"):
        Evaluation("pdg")
    for wrong in (lambda: kafnb.run("mlp"), lambda: kafnb.run(MLP, "pgd", store=store)):
        with pytest.raises(TypeError, match=r"must be an (Experiment|Evaluation), got '(mlp|pgd)'"):
            wrong()
    with pytest.raises(FileNotFoundError, match="run it first"):
        kafnb.history(dataclasses.replace(MLP, seed=99), store=store)


def test_session_table_is_computed_once_for_the_same_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("KAFNB_HOME", str(tmp_path))
    nb, calls = kafnb.Session("x"), []

    def squares(n, offset=0):
        calls.append(n)
        return pd.DataFrame({"square": [i**2 + offset for i in range(n)]})

    first, again = nb.table(squares, 3), nb.table(squares, 3)
    pd.testing.assert_frame_equal(first, again)
    nb.table(squares, 3, offset=1), nb.table(squares, 4), kafnb.Session("x", seed=1).table(squares, 3)
    assert calls == [3, 3, 4, 3]


def test_a_kaf_by_its_kernels_is_stored_under_a_name_without_a_colon(store):
    experiment = dataclasses.replace(MLP, activation="unit:relu+matern32")
    rates = [kafnb.run(experiment, store=store).rate.tolist() for _ in range(2)]
    assert rates[0] == rates[1] and folder_of(store, experiment).is_dir() and ":" not in experiment.name
    with pytest.raises(ValueError, match="unknown"):
        kafnb.run(dataclasses.replace(MLP, activation="unit:mattern32"), store=store)


def test_session_table_says_what_the_function_must_return(tmp_path, monkeypatch):
    monkeypatch.setenv("KAFNB_HOME", str(tmp_path))
    with pytest.raises(TypeError, match="number must return a DataFrame, got int"):
        kafnb.Session("99_test").table(number)
    assert not list(tmp_path.rglob("table.csv"))


@pytest.mark.parametrize("wrong", [torch.zeros(5000), np.zeros(3), pd.DataFrame({"a": [1]})])
def test_arguments_of_a_table_are_all_in_its_key(wrong):
    with pytest.raises(TypeError, match=f"arguments of a table are its key.* {type(wrong).__name__}"):
        kafnb.Session("99_test").table(pd.DataFrame, wrong)


def number():
    return 3


def test_both_protocols_for_one_attack(store, monkeypatch):
    attack = dataclasses.replace(PGD, eps=0.04, restarts=2, n=360)
    both = [attack, dataclasses.replace(attack, labels="predicted")]
    alone = kafnb.run(MLP, both[:1], store=store.with_name("alone")).correct[1]
    told, measured = [], evaluations.robust_accuracy
    monkeypatch.setattr(evaluations, "robust_accuracy", lambda *a, **o: told.append(a[3]) or measured(*a, **o))
    clean, true, predicted = kafnb.run(MLP, both, store=store).correct
    assert told == ["predicted"] and np.array_equal(true, alone) and np.array_equal(predicted & clean, true)
    assert 0 < true.sum() < predicted.sum() < 360


def test_evaluations_by_every_attack_and_unchanged_keys(store):
    # frozen: what was stored before attacks were added is still found
    assert key_of(Evaluation("pgd", eps=0.1, step_size=0.025, steps=10, restarts=2, n=360)) == "17e72f847f"
    assert key_of(Evaluation()) == "44136fa355"
    takes = {a: options for a, (_, options) in evaluations.ATTACKS.items()}
    names = [Evaluation(a).name for a in takes]
    names += [Evaluation(a, loss="margin").name for a in takes if "loss" in takes[a]]
    names += [Evaluation(a, targeted="all").name for a in takes if "targeted" in takes[a]]
    assert (
        len(set(names)) == len(names) > len(takes) and Evaluation("square", queries=7).name == "Square-7 (true labels)"
    )
    measured = [
        Evaluation(a, eps=0.1, steps=2, n=20)
        for a in ("fgsm", "pgd", "neighbours", "double", "kaf_tails", "kaf_annealed")
    ]
    table = kafnb.run(MLP, measured, store=store)
    assert (table.rate.iloc[1:] <= table.correct[0][:20].mean()).all() and len(table) == 7
    with pytest.raises(ValueError, match="did you mean 'square'"):
        Evaluation("sqare")
    for said in (dict(loss="dlr"), dict(targeted="all")):  # it would bear the name of an attack that it is not
        with pytest.raises(ValueError, match=f"the attack 'fgsm' takes no {next(iter(said))}: leave it out"):
            Evaluation("fgsm", **said)


@pytest.mark.parametrize("change", [dict(data="cifar"), dict(activation="relo"), dict(model="resnet21")])
def test_unknown_names_are_found_before_anything_is_trained(store, change):
    with pytest.raises(ValueError, match=r"^(unknown|resnet)"):
        kafnb.run([MLP, dataclasses.replace(MLP, **change)], store=store.with_name("empty"))
    assert not store.with_name("empty").exists()


def test_what_another_process_is_at_is_not_waited_for(store):
    folder_of(store).mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, Folder(folder_of(store)).lock():  # as in training
        read = pool.submit(experiments.run, MLP, [PGD], store=store, stored=True)
        with pytest.raises(FileNotFoundError, match="none of these experiments"):
            read.result(timeout=30)
    experiments.run(MLP, [PGD], store=store)
    with ThreadPoolExecutor(1) as pool:
        with Folder(folder_of(store)).lock():  # another reader, for a moment
            read = pool.submit(experiments.run, MLP, [PGD], store=store, stored=True)
            time.sleep(0.5)
        assert len(read.result(timeout=60)) == 2


def test_an_attack_towards_the_truth_is_no_evaluation():
    with pytest.raises(ValueError, match="targeted must be False or 'all'"):
        Evaluation("pgd", targeted=True)


def test_a_table_keeps_its_words(tmp_path):
    folder, table = Folder(tmp_path / "a"), pd.DataFrame({"word": ["None", "NA", "a#b"], "n": [1.0, np.nan, 3.0]})
    for name, comment in (("plain.csv", ""), ("commented.csv", "{}")):
        folder.write_table(name, table, comment)
        pd.testing.assert_frame_equal(folder.read_table(name), table, check_dtype=False)


@pytest.mark.parametrize("how", [dict(threads=-1), dict(workers=0), dict(device="meta"), dict(device="mps")])
def test_where_to_run_is_checked_first(store, how):
    with pytest.raises(ValueError, match=r"must be (>= 1|'cpu', 'cuda')"):
        kafnb.run(MLP, store=store, engine="processes", **how)
    assert not store.exists() or not list(store.iterdir())


def test_a_function_that_holds_another_number_is_other_code():
    def make(boundary):
        return lambda channels: kafnb.KAF(channels, boundary=boundary)

    ways = (make, lambda b: functools.partial(kafnb.KAF, boundary=b))
    for way in ways:
        one, same, other = (provenance.code_of(("data",), [way(b)]) for b in (2.0, 2.0, 6.0))
        assert one == same != other


def test_numbers_of_other_kinds_are_kept_as_plain_ones():
    recipe = Recipe(eps=torch.tensor(0.5), peak=np.float32(0.25), monitor=np.True_, kwta_start=Fraction(1, 2))
    plain = Recipe(eps=0.5, peak=0.25, monitor=True, kwta_start=0.5)
    assert key_of(recipe) == key_of(plain) and recipe == plain
    evaluation = Evaluation("pgd", eps=Fraction(1, 2), early_stop=np.True_)
    assert key_of(evaluation) == key_of(Evaluation("pgd", eps=0.5, early_stop=True))


def test_one_image_is_nothing_to_train_on(tiny):
    one = dataclasses.replace(tiny, x_train=tiny.x_train[:1], y_train=tiny.y_train[:1])
    with pytest.raises(ValueError, match="nothing to train on"):
        kafnb.fit(kafnb.models.build("mlp", "relu", one), one, Recipe("standard", epochs=1))
