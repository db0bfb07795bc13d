"""No module imports itself by way of others, nor a package's `__init__` by way of its modules.

`make lint` holds the order of the rooms (import-linter). Its contract on circles looks at siblings alone.
"""

import graphlib

import grimp


def test_no_circle_of_imports():
    """Imports inside functions and under TYPE_CHECKING count too."""
    graph = grimp.build_graph("lejepa_fast", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert imports["lejepa_fast.kernels.forward"], "grimp follows the symbolic links"
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None
