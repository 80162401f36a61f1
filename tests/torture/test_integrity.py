"""What is stored is checked on every reading: damage, older formats, other code, other data, hostile content."""

import dataclasses
import hashlib
import json
import random
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kafnb
from kafnb import Evaluation, Experiment, Recipe, integrity, provenance, store
from kafnb import results as results_module
from kafnb.integrity import SUMS
from kafnb.store import Folder

RECIPE = Recipe("fgsm_rs", epochs=1, lr=(0.003, 0.3), eps=0.1, batch_size=512)
MLP = Experiment("digits", "mlp", "kaf_elu", RECIPE, 0, {"hidden": (8,)})
FGSM = Evaluation("fgsm", eps=0.1, n=40)


@pytest.fixture(autouse=True)
def first_warning(monkeypatch):
    monkeypatch.setattr(store, "_told", [])
    monkeypatch.delenv("KAFNB_STALE", raising=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished folder, and its table."""
    path = tmp_path_factory.mktemp("whole")
    table = kafnb.run(MLP, [FGSM], store=path)
    return path, table


@pytest.fixture
def copy(whole, tmp_path):
    def fresh(name="results"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(whole[0], tmp_path / name)
        return tmp_path / name

    return fresh


def same(a, b):
    plain = a.drop(columns="correct").equals(b.drop(columns="correct"))
    return plain and all(np.array_equal(x, y) for x, y in zip(a.correct, b.correct, strict=True))


def said(caught):
    """The one UserWarning; pandas has some of its own."""
    (message,) = [str(w.message) for w in caught if w.category is UserWarning]
    return message


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def relist(folder, *names):
    """List what is there now, as a hostile or older file would be."""
    listed = Folder(folder)._sums()
    Folder(folder)._write_sums(listed | {n: integrity._sha256(folder / n) for n in names})


def rewrite(folder, name, change):
    path = folder / name
    path.write_text(change(path.read_text()))
    relist(folder, name)


def damage(path, kind, generator):
    content = bytearray(path.read_bytes())
    i = generator.randrange(len(content))
    if kind == "bit":
        content[i] ^= 1 << generator.randrange(8)
    elif kind == "truncated":
        del content[i:]
    elif kind == "longer":
        content += bytes(generator.randrange(256) for _ in range(1 + i % 50))
    elif kind == "garbage":
        content = bytearray(generator.randbytes(len(content)))
    path.write_bytes(content)
    return bytes(content)


KINDS = ("bit", "truncated", "longer", "garbage", "missing")


def test_damage_is_found_named_moved_aside_and_mended(whole, copy, tries, note):
    generator, n, losses = random.Random(0), tries(12, 400), []
    names = sorted(p.name for p in (whole[0] / MLP.name).iterdir())
    for i in range(n):
        results, kind, name = copy(), KINDS[i % len(KINDS)], names[i // len(KINDS) % len(names)]
        folder = results / MLP.name
        if kind == "missing":
            (folder / name).unlink()
        else:
            broken = damage(folder / name, kind, generator)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table = kafnb.run(MLP, [FGSM], store=results)
        said = " ".join(str(w.message) for w in caught)
        kept = kind == "missing" or any(p.read_bytes() == broken for p in folder.glob("*.damaged*"))
        if name == SUMS:  # a damaged list may still be one, that lists something else: then the files are named
            kept = kept or bool(list(folder.glob("*.damaged*")))
        named = name in said or (name == SUMS and (SUMS in said or "checksum" in said))
        weights = load_file(folder / "weights.safetensors")
        right = load_file(whole[0] / MLP.name / "weights.safetensors")
        equal = same(table, whole[1]) and all(torch.equal(weights[k], right[k]) for k in right)
        whole_again = all(Folder(folder).has(name) for name in names if name != SUMS)
        if not (kept and named and equal and whole_again):
            losses.append((name, kind, kept, named, equal, whole_again, said))
    note("damaged file (bit, truncated, longer, garbage, missing): found, named, kept, mended", n, len(losses))
    assert not losses, losses[0]


def test_refuse_names_it_and_touches_nothing(copy, monkeypatch, tries, note):
    generator, n, losses = random.Random(1), tries(6, 100), []
    monkeypatch.setenv("KAFNB_STALE", "refuse")
    for i in range(n):
        folder = copy() / MLP.name
        name = sorted(p.name for p in folder.iterdir())[i % 5]
        if name == SUMS:
            (folder / name).write_text("gone")
        else:
            damage(folder / name, KINDS[i % 4], generator)
        before = contents(folder)
        try:
            kafnb.run(MLP, [FGSM], store=folder.parent)
        except ValueError as error:
            if name in str(error) and "\n" not in str(error) and contents(folder) == before:
                continue
        losses.append(name)
    note("damaged file under KAFNB_STALE=refuse: named, nothing touched", n, len(losses))
    assert not losses


def test_results_of_other_code_are_never_used_silently(whole, copy, monkeypatch):
    trained, fit = [], results_module.fit
    monkeypatch.setattr(results_module, "fit", lambda *a, **k: trained.append(1) or fit(*a, **k))
    monkeypatch.setattr(results_module, "code_of", lambda *a: "0123456789")
    monkeypatch.setattr(results_module, "code_fingerprint", lambda *a: "abcdefabcd")
    results = copy()
    before = contents(results / MLP.name)
    made = json.loads(before["experiment.json"])["code"]
    with pytest.warns(UserWarning) as caught:
        assert same(kafnb.run(MLP, [FGSM], store=results), whole[1]) and not trained
    text = said(caught)  # one for all: folder, both fingerprints, what to do
    assert all(s in text for s in (MLP.name, made, "0123456789", "KAFNB_STALE=recompute"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kafnb.run(MLP, [FGSM], store=results)
        kafnb.load(MLP, store=results)
    monkeypatch.setenv("KAFNB_STALE", "refuse")
    with pytest.raises(ValueError, match=r"other code.*0123456789"):
        kafnb.load(MLP, store=results)
    assert contents(results / MLP.name) == before
    monkeypatch.setenv("KAFNB_STALE", "recompute")
    assert same(kafnb.run(MLP, [FGSM], store=results), whole[1]) and trained == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        monkeypatch.setenv("KAFNB_STALE", "refuse")  # all of it is of this code now
        kafnb.run(MLP, [FGSM], store=results)
    assert trained == [1]
    monkeypatch.setenv("KAFNB_STALE", "perhaps")
    monkeypatch.setattr(results_module, "code_of", lambda *a: "9876543210")
    with pytest.raises(ValueError, match="unknown KAFNB_STALE"):
        kafnb.run(MLP, store=results)


def test_results_without_a_fingerprint_are_of_other_code(whole, copy):
    """As the store wrote them before it knew its code."""
    folder = copy() / MLP.name
    rewrite(
        folder,
        "experiment.json",
        lambda t: json.dumps({k: v for k, v in json.loads(t).items() if k not in ("code", "format")}),
    )
    for path in folder.glob("evaluation*"):
        rewrite(folder, path.name, lambda t: "# {}\n" + t.split("\n", 1)[1])
    with pytest.warns(UserWarning, match="other code .unknown") as caught:
        assert same(kafnb.run(MLP, [FGSM], store=folder.parent), whole[1])
    assert said(caught)


def test_evaluations_belong_to_their_weights(whole, copy):
    folder = copy() / MLP.name
    with torch.no_grad():
        model = kafnb.load(MLP, store=folder.parent)
        next(model.parameters()).add_(1.0)
    Folder(folder).write_weights(model)
    with pytest.warns(UserWarning, match="is of other weights"):
        table = kafnb.run(MLP, [FGSM], store=folder.parent)
    assert (
        not same(table, whole[1])
        and table.rate[0] == kafnb.evaluate.clean_accuracy(model, kafnb.load_data("digits")).rate
    )


def test_an_evaluation_from_before_a_default_changed_is_measured_again(whole, copy):
    folder = copy() / MLP.name
    (path,) = folder.glob("evaluation-fgsm*")
    rewrite(folder, path.name, lambda t: re.sub(r'"seed": \d+', '"seed": 7', t, count=1))
    with pytest.warns(UserWarning, match="was measured with another seed: a default has changed"):
        assert not results_module.measured(MLP, [FGSM], folder.parent, None) and same(
            kafnb.run(MLP, [FGSM], store=folder.parent), whole[1]
        )
    assert results_module.measured(MLP, [FGSM], folder.parent, None)


def test_a_checkpoint_of_other_code_or_data_is_not_gone_on_from(tmp_path, monkeypatch):
    write = Folder.write_checkpoint
    longer = dataclasses.replace(MLP, recipe=dataclasses.replace(RECIPE, epochs=3))

    for changed in ("code", "data"):

        def stop(self, state, changed=changed):
            write(self, state | {changed: "0123456789"})
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Folder, "write_checkpoint", stop)
            kafnb.run(longer, store=tmp_path / changed)
        with pytest.warns(UserWarning, match=f"was written with other {changed}"):
            kafnb.run(longer, store=tmp_path / changed)
        assert len(list((tmp_path / changed).rglob("checkpoint-00001.pt.damaged"))) == 1


# --- what counts as other code -------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's source, of which fingerprints are taken."""
    shutil.copytree(provenance.PACKAGE, tmp_path / "kafnb", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "kafnb")

    def fingerprints():
        provenance._read.cache_clear(), provenance.code_fingerprint.cache_clear()
        roots = ("data", "models", "training"), ("data", "evaluations", "models"), ()
        return [provenance.code_fingerprint(*r) for r in roots]

    yield tmp_path / "kafnb", fingerprints
    provenance._read.cache_clear(), provenance.code_fingerprint.cache_clear()


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("training.py", '"""One training loop', '"""A training loop', [False] * 3),
        ("epoch.py", "# batch statistics", "# the statistics", [False] * 3),
        ("training.py", "step - 0.5", "step - 0.4", [True, False, True]),
        ("kaf/native.py", "import torch\n", "import torch\n\nNEW = 1\n", [True] * 3),
        ("attacks/balls.py", "SPARSE = 0.01", "SPARSE = 0.02", [True] * 3),
        ("attacks/library.py", "batch_size=250", "batch_size=200", [False, True, True]),
        ("figures.py", "0.6,", "0.7,", [False, False, True]),
        ("checks.py", "text[:57]", "text[:56]", [False, False, True]),
        ("store.py", "import io\n", "import io\nimport re as r\n", [False, False, True]),
    ],
)
def test_only_code_that_can_change_a_result_changes_its_fingerprint(package, file, old, new, changed):
    path, fingerprints = package
    before = fingerprints()
    source = (path / file).read_text()
    assert old in source
    (path / file).write_text(source.replace(old, new, 1))
    assert [a != b for a, b in zip(before, fingerprints(), strict=True)] == changed


SYNTAX = """
def told(x, *rest, width=None, **more):
    if (n := len(rest)) > 1 and x is not None:
        return f"{x!r:>{width}} {'a' if n else 'b'}" "c" f"{n=} {{}}"
    match more:
        case {"a": [1, *others], **left}:
            return {**left, "b": others[::2], "c": x[1:, ...]}
    return [lambda y=1.50: -y, 1e400, 0x10, b"\\x00", None, ...]
"""


def test_a_fingerprint_is_the_same_for_all_versions_of_python(package):
    path, _ = package
    (path / "syntax.py").write_text(SYNTAX)
    assert provenance.code_fingerprint("syntax") == "86f8758630"  # 3.11 to 3.14 agree


def test_a_users_own_activation_is_part_of_the_code(monkeypatch):
    class First(torch.nn.Module):
        def forward(self, x):
            return x + 0.1 * x**3

    def mine(channels):
        return First()

    monkeypatch.setitem(kafnb.ACTIVATIONS, "mine", mine)
    own = dataclasses.replace(MLP, activation="mine")
    first = results_module.weights_code(own)
    assert first == results_module.weights_code(own) != results_module.weights_code(MLP)

    class Second(torch.nn.Module):
        def forward(self, x):
            return x + 0.2 * x**3

    First = Second  # noqa: F811 (the same function makes another module now)
    assert results_module.weights_code(own) != first
    monkeypatch.setitem(kafnb.ACTIVATIONS, "kaf_16", lambda channels: kafnb.KAF(channels, dictionary_size=16))
    assert results_module.weights_code(dataclasses.replace(MLP, activation="kaf_16")) == results_module.weights_code(
        dataclasses.replace(MLP, activation="kaf_16")
    )


# --- content that somebody else wrote ------------------------------------------------------------------------------


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    folder, proof = tmp_path / "results" / MLP.name, tmp_path / "proof"
    for content in ({"model": Bomb(proof)}, {"history": []}, [1, 2], Bomb(proof)):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / "checkpoint-00001.pt")
        relist(folder, "checkpoint-00001.pt")
        with pytest.warns(UserWarning, match="checkpoint-00001.pt"):
            kafnb.run(MLP, store=tmp_path / "results")
        assert not proof.exists() and list(folder.glob("checkpoint*.damaged"))
        shutil.rmtree(folder)


def test_a_checkpoint_that_claims_to_be_ours_and_does_not_fit_is_refused_in_one_line(tmp_path):
    folder = tmp_path / MLP.name
    folder.mkdir()
    data = kafnb.load_data("digits")
    state = {"code": results_module.weights_code(MLP), "data": data.fingerprint, "model": {}, "history": 3}
    Folder(folder).write("checkpoint-00001.pt", lambda p: torch.save(state, p))
    with pytest.raises(ValueError, match="resume is not a state") as error:
        kafnb.run(MLP, store=tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_fit_in_part_leave_no_trace(whole, copy):
    folder = copy() / MLP.name
    weights = {k: v + 1 for k, v in load_file(folder / "weights.safetensors").items()}
    weights[sorted(weights)[-1]] = torch.zeros(3)
    for path in folder.glob("evaluation*"):
        path.unlink()
    Folder(folder).write("weights.safetensors", lambda p: save_file(weights, p))
    with pytest.warns(UserWarning, match="does not hold the weights of this model"):
        assert same(kafnb.run(MLP, [FGSM], store=folder.parent), whole[1])


def test_hostile_weights_tables_and_records(whole, copy, monkeypatch):
    """Listed with their right checksums, and still nonsense: recomputed, and nothing else happens."""
    table = "evaluation-clean-44136fa355.csv"
    bombs = {
        "weights.safetensors": [b"", b"\xff" * 8 + b"{}", (2**40).to_bytes(8, "little") + b"{", b"cos\nsystem\n(S'true'\ntR."],
        table: [b"", b"a,b\n1,2\n", b"image,label,correct\n0,3,7\n", b"image,label,correct\n0,x,1\n", b"image,label,correct\n0,3,1\n", b"image,label,correct\n", b"\xff\xfe\0", b"=cmd|' /C calc'!A0\n", b"# " + b"[" * 99_999],
    }  # fmt: skip
    for name, list_of in bombs.items():
        for content in list_of:
            folder = copy() / MLP.name
            (folder / name).write_bytes(content)
            relist(folder, name)
            if name.startswith("weights"):
                for path in folder.glob("evaluation*"):
                    path.unlink()
                relist(folder)
            with pytest.warns(UserWarning, match=name):
                assert same(kafnb.run(MLP, [FGSM], store=folder.parent), whole[1]), content
    for record in (b"", b"[" * 99_999, b"[]", b'{"data_fingerprint": {"$ref": 1}}', b"\xff"):
        folder = copy() / MLP.name
        (folder / "experiment.json").write_bytes(record)
        relist(folder, "experiment.json")
        with pytest.raises(ValueError, match="other data") as error:
            kafnb.run(MLP, store=folder.parent)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["checkpoint-/../../victim", "../victim", "/etc/passwd", "checkpoint-\\..\\x", ".x"])
def test_a_list_of_checksums_names_nothing_outside(tmp_path, name):
    folder, victim = tmp_path / "results" / MLP.name, tmp_path / "results" / "victim"
    (folder / "checkpoint-").mkdir(parents=True)
    victim.write_text("precious")
    (folder / SUMS).write_text(f"{hashlib.sha256(b'precious').hexdigest()}  {name}\n")
    with pytest.warns(UserWarning, match=SUMS):
        kafnb.run(MLP, store=tmp_path / "results")
    assert victim.read_text() == "precious"


def test_links_out_of_the_store_are_refused(tmp_path):
    (tmp_path / "results").mkdir(), (tmp_path / "elsewhere").mkdir()
    (tmp_path / "results" / MLP.name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link"):
        kafnb.run(MLP, store=tmp_path / "results")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_no_pickle_is_read_anywhere():
    """The one torch.load is told to read weights only; nothing else in the package can unpickle a file.

    ``engines`` unpickles what its own parent process hands to it in memory.
    """
    sources = {p: p.read_text() for p in provenance.PACKAGE.rglob("*.py")}
    loads = [line for text in sources.values() for line in text.splitlines() if "torch.load(" in line]
    assert len(loads) == 1 and "weights_only=True" in loads[0]
    assert [p.name for p, text in sources.items() if "import pickle" in text] == ["engines.py"]
    words = (
        "pickle.load(",
        "read_pickle",
        "allow_pickle",
        "joblib",
        "yaml.load",
        "shelve",
        "marshal",
        "eval(",
        "exec(",
    )
    found = [
        (p.name, w)
        for p, text in sources.items()
        for w in words
        if w in text.replace(".eval(", "").replace("_eval(", "")
    ]
    assert not found
