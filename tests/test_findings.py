"""Outside profile quick a check that fails is reported and counted, and the notebook goes on."""

import ast

from kafnb import findings


def execute(source):
    tree = ast.fix_missing_locations(findings.Reported().visit(ast.parse(source)))
    scope = {}
    exec(compile(tree, "cell", "exec"), scope)
    return scope


def test_a_check_that_fails_prints_its_text_and_message_and_goes_on(capsys):
    scope = execute("a = 3\nassert a < 2, f'a is {a}'\nb = 4")
    assert scope["b"] == 4 and capsys.readouterr().out == findings.MARK + "a < 2 | a is 3\n"


def test_a_check_that_holds_prints_nothing_and_its_message_is_not_computed(capsys):
    execute("assert 1 < 2, 1 / 0\nassert True")
    assert not capsys.readouterr().out


def test_nested_checks_are_reported_too(capsys):
    execute("for i in range(3):\n    if i:\n        assert i < 2")
    assert capsys.readouterr().out.count(findings.MARK) == 1


def test_switched_off_again_in_the_same_notebook(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    for on in (True, True, False):
        findings.report_instead_of_stopping(on)
        result = shell.run_cell("assert 1 > 2")
        assert (result.error_in_exec is None) == on


def test_counted_in_an_executed_notebook():
    said = {"output_type": "stream", "text": [findings.MARK + "a\n", findings.MARK + "b\n"]}
    assert findings.count({"cells": [{"outputs": [said, {"data": {}}]}, {"source": findings.MARK}]}) == 2
