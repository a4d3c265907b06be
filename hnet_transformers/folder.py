"""Makes a saved folder complete: the code that loads it without this repository, the tokenizer, and a model card.

transformers loads code as files beside each other, so the repository's files are flattened: `hnet_kernels/linear.py`
becomes `hnet_kernels_linear.py`. So are files that a user put beside hnet_trainable.py, if the model imports them.
Import statements change, nothing else does. Packages other than torch and transformers are imported inside a `try`,
since transformers refuses a file whose other imports are not installed.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

from hnet_runtime.pages.reports import write_atomically
from hnet_runtime.runs.checkpoint import CheckpointError
from hnet_transformers.tokenization_hnet import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FIRST = "hnet_transformers.modeling_hnet"
AUTO_MAP = {
    "AutoConfig": "configuration_hnet.HNetTransformersConfig",
    "AutoModelForCausalLM": "modeling_hnet.HNetForCausalLM",
}
NEEDED = {"torch", "transformers", *sys.stdlib_module_names}
ORIGIN = "# From the repository hnet-trainable (Apache-2.0); only import statements differ from there.\n"
ITSELF = "_itself"  # the name by which a flattened file offers itself as a module


def complete(model: Any, folder: Path, with_pictures: bool = True) -> None:
    """Adds code, tokenizer and model card to a folder with weights and config. Existing files are replaced."""
    from hnet_transformers.card import write_card

    for name, text in code_files().items():
        write_atomically(folder / name, lambda scratch, text=text: scratch.write_text(text, encoding="utf-8"))
    byte_tokenizer().save_pretrained(folder)
    write_card(model, folder, with_pictures)


# --------------------------------------------------------------------------------------------------------------- code


def path_of(module: str) -> Path | None:
    """The file of one of the repository's modules; None if there is none of that name."""
    path = ROOT.joinpath(*module.split("."))
    found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return found if found.is_file() else None


@functools.cache
def is_ours(module: str) -> bool:
    """Whether a module belongs in the folder: it is a file of this repository, or one that a user put beside them.

    Raises CheckpointError for a user's module that is something else, which the folder would not have.
    """
    top = module.partition(".")[0]
    if top.startswith("hnet_") and path_of(top):
        return True
    found = None if top in NEEDED else importlib.util.find_spec(top)
    if found is None or top in importlib.metadata.packages_distributions():
        return False
    beside = ROOT / f"{top}.py"
    if beside.is_file() and beside.samefile(found.origin or ROOT):
        return True
    raise CheckpointError(
        f"{found.origin or top}: the model's code imports it, so the folder needs it; expected one file in {ROOT}, "
        "beside hnet_trainable.py"
    )


def flat_name(module: str) -> str:
    """`hnet_kernels.linear` -> `hnet_kernels_linear`; files of hnet_transformers keep their names."""
    return module.removeprefix("hnet_transformers.").replace(".", "_")


@functools.cache
def code_files() -> dict[str, str]:
    """File name -> text of all that `modeling_hnet.py` imports, directly or not, flattened.

    Raises CheckpointError for an import that cannot be flattened.
    """
    waiting, files, as_modules = [FIRST], {}, set()
    while waiting:
        module = waiting.pop()
        if module in files:
            continue
        files[module], imported, objects = flattened(module)
        as_modules |= objects
        waiting += imported
    for module in as_modules:
        files[module] = _offering_itself(files[module], flat_name(module))
    return {f"{flat_name(module)}.py": ORIGIN + files[module] for module in sorted(files)}


def _offering_itself(text: str, name: str) -> str:
    """The text with the import of itself above all others, so that two modules can import each other."""
    above = 0
    for node in ast.parse(text).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (is_docstring or (isinstance(node, ast.ImportFrom) and node.module == "__future__")):
            break
        above = node.end_lineno
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:above], f"\nfrom . import {name} as {ITSELF}\n", *lines[above:]])


class Edit(NamedTuple):
    """Text in place of an import statement."""

    node: ast.stmt
    text: str


def flattened(module: str) -> tuple[str, set[str], set[str]]:
    """A module's text with flattened imports; the modules of ours that it imports; those it imports as objects."""
    path = path_of(module)
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    in_try = {id(node) for part in ast.walk(tree) if isinstance(part, ast.Try) for node in part.body}
    edits, imported, objects = [], set(), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or id(node) in in_try:  # there: what only this place has
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        if getattr(node, "level", 0) or (any(map(is_ours, names)) and (len(names) > 1 or _is_dotted(node))):
            raise CheckpointError(
                f"{path}: line {node.lineno} ({ast.unparse(node)}) can't be exported; expected one module in a "
                "statement, by its complete name, and `from PACKAGE import MODULE` where it is in a package"
            )
        if is_ours(names[0]):
            text, of_node, objects_of_node = _relative(node)
            edits.append(Edit(node, text))
            imported |= of_node
            objects |= objects_of_node
        elif not {name.split(".")[0] for name in names} <= NEEDED:
            edits.append(Edit(node, _optional(node, ast.unparse(node))))
    lines = source.splitlines(keepends=True)
    for node, text in sorted(edits, key=lambda edit: -edit.node.lineno):
        first, last = node.lineno - 1, node.end_lineno - 1
        lines[first : last + 1] = [lines[first][: node.col_offset] + text + lines[last][node.end_col_offset :]]
    return "".join(lines), imported, objects


def _is_dotted(node: ast.Import | ast.ImportFrom) -> bool:
    """`import hnet_kernels.linear`, which has no counterpart where files are flat."""
    return isinstance(node, ast.Import) and "." in node.names[0].name and not node.names[0].asname


def _relative(node: ast.Import | ast.ImportFrom) -> tuple[str, set[str], set[str]]:
    """`from hnet_kernels import norm_triton, ssd` as imports from the files beside; see `flattened`."""
    if isinstance(node, ast.Import):
        ((module, name),) = ((alias.name, alias.asname or alias.name) for alias in node.names)
        return f"from .{flat_name(module)} import {ITSELF} as {name}", {module}, {module}
    offered = _names_of_package(node.module)
    modules = {alias.name: f"{node.module}.{alias.name}" for alias in node.names if alias.name not in offered}
    objects = {name: module for name, module in modules.items() if path_of(module)}
    rest = [alias for alias in node.names if alias.name not in objects]
    statements = [
        f"from .{flat_name(objects[alias.name])} import {ITSELF} as {alias.asname or alias.name}"
        for alias in node.names
        if alias.name in objects
    ]
    if rest:
        names = ", ".join(f"{alias.name} as {alias.asname}" if alias.asname else alias.name for alias in rest)
        statements.append(f"from .{flat_name(node.module)} import {names}")
    imported = set(objects.values()) | ({node.module} if rest else set())
    return f"\n{' ' * node.col_offset}".join(statements), imported, set(objects.values())


@functools.cache
def _names_of_package(module: str) -> set[str]:
    """What the `__init__.py` of a package imports: such a name is not the submodule that has it, too."""
    path = path_of(module)
    if path.name != "__init__.py":
        return set()
    imports = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _optional(node: ast.stmt, statement: str) -> str:
    indent = "\n" + " " * node.col_offset
    return f"try:{indent}    {statement}{indent}except ImportError:{indent}    raise"
