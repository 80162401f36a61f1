"""What every notebook must have, the runner, and the command line."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from kafnb import __main__, notebooks, profiles
from kafnb.paths import home

NOTEBOOKS = sorted((home() / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request):
    return nbformat.read(request.param, 4)


def cells(notebook, kind):
    return [c for c in notebook.cells if c.cell_type == kind]


def test_names_are_on_the_programme():
    assert NOTEBOOKS and {p.stem for p in NOTEBOOKS} <= set(notebooks.PROGRAMME)


def test_valid_and_executed_in_order(notebook):
    nbformat.validate(notebook)
    counts = [c.execution_count for c in cells(notebook, "code")]
    assert counts == list(range(1, len(counts) + 1))


def test_one_parameters_cell_with_the_common_parameters(notebook):
    tagged = [c for c in cells(notebook, "code") if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    values = {}
    exec(tagged[0].source, values)
    wanted = {"profile": "quick", "seed": 0, "device": "auto", "data_root": None}
    assert {k: values.get(k, "missing") for k in wanted} == wanted


def test_parts_a_reader_expects(notebook):
    text = "\n".join(c.source for c in cells(notebook, "markdown"))
    first = notebook.cells[0].source
    assert re.match(r"# \d\d · ", first) and "**Goal.**" in first and "**Running time:**" in first
    for part in ("## Summary", "## Exercises", "## References"):
        assert part in text, part
    exercises = text.split("## Exercises")[1].split("## References")[0]
    assert 3 <= len(re.findall(r"(?m)^\d\. ", exercises)) <= 5
    assert re.search(r"arxiv\.org/abs|doi\.org", text.split("## References")[1])


def test_code_cells_are_short_and_have_checks(notebook):
    code = cells(notebook, "code")
    assert max(len(c.source.splitlines()) for c in code) <= 20
    assert sum("assert " in c.source for c in code) >= 3


def test_no_error_outputs_and_no_stray_streams(notebook):
    for cell in cells(notebook, "code"):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output


def test_ignored_outputs_are_followed_by_a_check(notebook):
    """A cell whose numbers depend on the machine is marked; somewhere after each mark stands an assertion."""
    code = cells(notebook, "code")
    marked = [i for i, c in enumerate(code) if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert all(any("assert " in c.source for c in code[i:]) for i in marked)


def test_every_saved_figure_is_there_with_its_numbers(notebook, request):
    name = Path(request.node.callspec.params["notebook"]).stem
    manifest = json.loads((home() / "figures" / "quick" / "manifest.json").read_text())["figures"]
    saved = re.findall(r"nb\.save\(\w+, \"(\w+)\"", "\n".join(c.source for c in cells(notebook, "code")))
    assert saved
    for figure in saved:
        path = home() / "figures" / "quick" / f"{name}_{figure}"
        assert path.with_suffix(".png").exists() and path.with_suffix(".csv").exists() and path.name in manifest


# --- the runner ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of two small notebooks, the first of which fails in its second cell."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    parameters = nbformat.v4.new_code_cell("profile = 'quick'\nseed = 0\ndevice = 'auto'\ndata_root = None")
    parameters.metadata.tags = ["parameters"]
    for name, source in (
        ("01_bad", "raise KeyError('not there')"),
        ("02_good", "print(profile, seed, device, data_root)"),
    ):
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        content = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)], metadata=kernel)
        nbformat.write(content, folder / f"{name}.ipynb")
    monkeypatch.setenv("KAFNB_HOME", str(tmp_path))
    return tmp_path


def test_runner_goes_on_after_a_failure_and_names_the_cell(checkout, capfd):
    assert __main__.main(["figures", "--seed", "3", "--jobs", "1"]) == 1
    out, err = capfd.readouterr()
    assert "01_bad: cell" in err and "KeyError: 'not there'" in err and "1 of 2 notebooks done" in out
    executed = nbformat.read(checkout / "runs" / "quick" / "02_good.ipynb", 4)
    assert any("quick 3 cpu None" in o.get("text", "") for c in executed.cells for o in c.get("outputs", []))
    manifest = json.loads((checkout / "figures" / "quick" / "manifest.json").read_text())
    assert list(manifest["notebooks"]) == ["02_good"]


def test_data_that_are_not_there_are_missed_before_any_notebook_runs(checkout, capfd, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    assert __main__.main(["figures", "--profile", "small", "--device", "cpu"]) == 2
    out, err = capfd.readouterr()
    assert (
        "could not be downloaded (no route to host): put cifar-10-python.tar.gz there" in err and "\n" not in err[:-1]
    )
    assert out == "" and not (checkout / "runs").exists()


def test_keep_stores_outputs_and_nothing_of_papermill(checkout):
    assert __main__.main(["figures", "--only", "2", "--keep"]) == 0
    kept = nbformat.read(checkout / "notebooks" / "02_good.ipynb", 4)
    assert "quick 0" in kept.cells[1].outputs[0]["text"] and "papermill" not in json.dumps(kept)
    assert len(kept.cells) == 2  # the injected parameters stayed in runs/


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_it_leaves_nothing_running(checkout, how):
    files = sorted((checkout / "notebooks").glob("*.ipynb"))
    source = "import os, time\nopen(f'pid-{os.getpid()}', 'w')\ntime.sleep(600)"
    for path in files:
        content = nbformat.read(path, 4)
        content.cells[1].source = source
        nbformat.write(content, path)
    command = [sys.executable, "-m", "kafnb", "figures", "--jobs", "1"]
    # a background job of a shell has Ctrl-C ignored, and hands that on
    heeds = dict(start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **heeds)
    begun = lambda: [int(p.name[4:]) for p in (checkout / "notebooks").glob("pid-*")]  # noqa: E731
    try:
        assert within(90, begun)
        os.killpg(running.pid, how) if how == signal.SIGINT else running.kill()  # a terminal sends Ctrl-C to all
        assert running.wait(20) == (130 if how == signal.SIGINT else -how)
        gone = lambda: not any(psutil.pid_exists(pid) for pid in begun())  # noqa: E731
        assert within(20, gone) and len(begun()) == 1
    finally:
        running.kill()
        for pid in begun():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    said = running.communicate(timeout=20)[1]  # ends when no process is left that holds the pipe
    assert "Traceback" not in said and ("kafnb: stopped" in said) == (how == signal.SIGINT)


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.parametrize(
    "arguments",
    [["figures", "--only", "77"], ["figures", "--profile", "paper"], ["figures", "--device", "tpu"],
     ["figures", "--data-root", "/no/such/folder"], ["figures", "--jobs", "0"], ["figures", "--profile", "small", "--keep"],
     ["figures", "--dry-run"], ["figures", "--address", "auto"], ["figures", "--data-root", "."]],
)  # fmt: skip
def test_bad_command_lines_get_one_line_and_exit_2(arguments, capsys, monkeypatch):
    monkeypatch.setattr(profiles.torch.cuda, "is_available", lambda: False)
    assert __main__.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("kafnb: ") and err.count("\n") == 1


def test_usage_errors_exit_2_too():
    done = subprocess.run(
        [sys.executable, "-m", "kafnb", "figures", "--profile", "huge"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_session_refuses_unknown_profile_and_device():
    with pytest.raises(ValueError, match="profile must be"):
        profiles.Session("x", profile="quik")
    with pytest.raises(ValueError, match="device must be"):
        profiles.resolve_device("gpu0")


def test_importing_touches_no_device_and_no_generator():
    code = "import torch; s = torch.get_rng_state(); import kafnb; assert torch.equal(s, torch.get_rng_state()); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
