"""The command line under any arguments: it runs, or says in words what is wrong and exits with 2; never a stack trace."""

import shlex

import pytest
from effort import LONG
from hypothesis import example, given
from hypothesis import strategies as st
from test_input import cases

from kafnb import __main__, profiles

options = [
    "--profile",
    "--only",
    "--seed",
    "--device",
    "--data-root",
    "--jobs",
    "--keep",
    "--help",
    "--",
    "-x",
    "--see",
]
values = ["quick", "small", "paper", "0", "1", "-1", "2.5", "nan", "inf", "1e3", "9" * 5000, "9" * 12, "auto", "cpu", "cuda", "cuda:7",
          "tpu", "", " ", ".", "..", "/", "/etc/passwd", "../../x", "77", "01", "\0", "é", "None", "True", "$(touch x)", "; rm x"]  # fmt: skip
token = st.one_of(st.sampled_from(options), st.sampled_from(values), st.text(max_size=6))
option = st.tuples(st.sampled_from(options[:7]), st.sampled_from(values)).map(list)
lines = st.one_of(
    st.lists(token, max_size=6),
    st.lists(option, max_size=4).map(lambda pairs: ["figures", *(t for p in pairs for t in p)]),
    st.lists(token, max_size=6).map(lambda tokens: ["figures", *tokens]),
)


def test_any_command_line(home, capsys, monkeypatch, note):
    (home / "notebooks").mkdir()  # empty: what is accepted runs, and runs nothing
    monkeypatch.setattr(profiles.torch.cuda, "is_available", lambda: False)
    tried, losses = 0, []

    @cases(max_examples=6000 if LONG else 60)
    @given(lines)
    @example(["figures", "--data-root", "\0"])
    @example(["figures", "--seed", "9" * 5000])
    @example(["figures", "\x1c0"])
    def ask(arguments):
        nonlocal tried
        tried += 1
        try:
            code = __main__.main(arguments)
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = error
        _, err = capsys.readouterr()
        last = err.strip().splitlines()[-1] if err.strip() else ""
        clear = last.startswith("kafnb: ") or ": error: " in last
        ok = code == 0 or (code == 2 and clear and "Traceback" not in err)
        if not ok:
            losses.append(f"{shlex.join(arguments)[:200]}: {code!r} {last!r}")
        assert ok, losses[-1]

    try:
        ask()
    finally:
        note("any command line (fuzz)", tried, bool(losses))
    assert not list(home.glob("x")) and {p.name for p in home.iterdir()} <= {"notebooks"}


@pytest.mark.parametrize("argument", ["profile", "seed", "device", "data_root", "notebook"])
def test_notebook_parameters_get_one_line(argument, home):
    """What papermill can be told with -p."""
    bad = {
        "profile": ["", "../x", 3, None], "seed": ["one", 1.5, float("nan"), None, 2**70], "device": ["", "gpu", 3],
        "data_root": [3, 1.5], "notebook": ["../x", "", None],
    }  # fmt: skip
    for value in bad[argument]:
        with pytest.raises((ValueError, TypeError)) as error:
            session = profiles.Session(**{"notebook": "x", argument: value})
            session.data  # noqa: B018
        assert "\n" not in str(error.value)
