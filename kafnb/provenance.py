"""Where a result came from: code, commit, versions, device."""

import ast
import functools
import hashlib
import inspect
import platform
import re
import subprocess
from pathlib import Path

import torch

from .paths import VERSION, home

PACKAGE = Path(__file__).parent
NEUTRAL = {"checks", "paths"}  # they refuse input and name files; no number depends on them


def _file(module):
    """Source file of a module by its dotted name below this package ("" is the package); None if there is none."""
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((f for f in files if f.exists()), None)


def _said(node):
    """A syntax tree in words that are the same in all versions of Python: what is empty in it is left out."""
    if isinstance(node, ast.JoinedStr):  # 3.12 may end a format with an empty string
        return f"JoinedStr({', '.join(_said(v) for v in node.values if getattr(v, 'value', v) != '')})"
    if isinstance(node, ast.AST):
        fields = (f"{name}={_said(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(_said, node))}]" if isinstance(node, list) else repr(node)


@functools.cache
def _read(module):
    """What a module says without comments, docstrings and layout, which change no result; what it imports from here."""
    file = _file(module)
    here = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    tree, imports = ast.parse(file.read_text()), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = body[1:] or [ast.Pass()]
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
            for name in (".".join([*base, alias.name]) for alias in node.names):
                imports.add(name if _file(name) else ".".join(base))
    return _said(tree), imports


@functools.cache
def code_fingerprint(*modules):
    """Ten hex digits for the code of ``modules`` and of all in this package that they import; without any, for all.

    Comments, docstrings and layout do not count: what was computed by other code has another fingerprint, and what
    has another fingerprint was computed by other code. The version of Python does not count.
    """
    found, todo = set(), list(modules)
    if not modules:
        files = sorted(p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py"))
        found = {".".join(f.parts).removesuffix("__init__").rstrip(".") for f in files}
    while todo:
        module = todo.pop()
        if module not in found and module.split(".")[-1] not in NEUTRAL:
            found.add(module)
            todo += _read(module)[1]
    digest = hashlib.sha256()
    for module in sorted(found):
        digest.update(f"{module}\0{_read(module)[0]}\0".encode())
    return digest.hexdigest()[:10]


def _held(value):
    """A value that a function holds, in words; of another function its source."""
    return inspect.getsource(value) if inspect.isfunction(value) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _own_source(thing):
    """Source of a function or class that a user registered, and what it holds; byte code where there is no source."""
    if isinstance(thing, functools.partial):
        return "\0".join([_own_source(thing.func), _held(thing.args), _held(thing.keywords)])
    held = [getattr(thing, "__defaults__", None), getattr(thing, "__kwdefaults__", None)]
    try:
        held += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
        return inspect.getsource(thing) + "\0".join(map(_held, held))
    except (OSError, TypeError, ValueError):  # ValueError: an empty cell
        functions = [thing, *vars(thing).values()] if isinstance(thing, type) else [thing]
        codes = [f.__code__ for f in functions if hasattr(f, "__code__")]
        return repr([(c.co_code, c.co_names, [v for v in c.co_consts if not inspect.iscode(v)]) for c in codes])


def code_of(roots, things):
    """``code_fingerprint`` of ``roots``, and of functions and classes in use that may be a user's own."""
    modules, own = set(roots), []
    for thing in things:
        top, _, rest = (getattr(thing, "__module__", "") or "").partition(".")
        if top == PACKAGE.name:
            modules |= {rest} - {""}
        elif top != "torch":
            own.append(_own_source(thing))
    fingerprint = code_fingerprint(*sorted(modules))
    return hashlib.sha256("\0".join([fingerprint, *sorted(own)]).encode()).hexdigest()[:10] if own else fingerprint


def provenance():
    """Code version, commit, device names and library versions, for records beside results."""

    def git(*args):
        out = subprocess.run(["git", *args], cwd=home(), capture_output=True, text=True)
        return out.stdout.strip() if out.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", "kafnb") else ""
        )
    except OSError:  # no git on this machine
        commit = ""
    return {
        "kafnb": VERSION,
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def device_name(device):
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
