"""Checks of notebooks outside profile quick: reported and counted, where in quick they stop the notebook.

The stored text of the notebooks speaks of profile quick. At another size a finding may turn out otherwise, and hours of
training must still end in their tables: there each ``assert`` that fails prints a line, and the notebook goes on.
"""

import ast
import sys

MARK = "does not hold here: "


class Reported(ast.NodeTransformer):
    """``assert test, message`` becomes: if not test, print the line."""

    def visit_Assert(self, node):
        says = [ast.Constant(MARK + ast.unparse(node.test))]
        says += [ast.Constant("|"), node.msg] if node.msg else []
        call = ast.Expr(ast.Call(ast.Name("print", ast.Load()), says, []))
        return ast.copy_location(ast.If(ast.UnaryOp(ast.Not(), node.test), [call], []), node)


def report_instead_of_stopping(on):
    """Switch it on or off for the cells that follow in this notebook; nothing outside a notebook."""
    ipython = sys.modules.get("IPython")
    if shell := ipython and ipython.get_ipython():
        shell.ast_transformers[:] = [t for t in shell.ast_transformers if not isinstance(t, Reported)]
        shell.ast_transformers += [Reported()] * on


def count(executed):
    """How many checks of an executed notebook (its parsed JSON) were reported."""
    outputs = [o for c in executed["cells"] for o in c.get("outputs", [])]
    return sum("".join(o.get("text", "")).count(MARK) for o in outputs)
