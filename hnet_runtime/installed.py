"""The console commands of an installed package: hnet-train, hnet-generate and so on.

A command runs the file that a checkout starts with `python train.py` or `python scripts/generate.py`, as the main
module, so that both read their flags and end in the same way.
"""

import functools
import importlib.util
import sys
import types


def run(module: str, *first: str) -> None:
    """Runs `module` as the main program, with the arguments `first` before those of this process."""
    sys.argv[1:1] = first
    spec = importlib.util.find_spec(module)
    assert spec and spec.loader and spec.origin
    program = types.ModuleType("__main__")
    program.__spec__, program.__file__ = spec, spec.origin  # processes that it starts import it by its name
    sys.modules["__main__"] = program
    exec(spec.loader.get_code(module), program.__dict__)  # type: ignore[attr-defined]


train = functools.partial(run, "train")
prepare = functools.partial(run, "fineweb", "prepare")
show = functools.partial(run, "fineweb", "show")
generate = functools.partial(run, "hnet_scripts.generate")
evaluate = functools.partial(run, "hnet_scripts.evaluate")
compare = functools.partial(run, "hnet_scripts.compare")
explore = functools.partial(run, "hnet_scripts.explore")
export = functools.partial(run, "hnet_scripts.export")
match = functools.partial(run, "hnet_scripts.match")
plot = functools.partial(run, "hnet_scripts.plot")
