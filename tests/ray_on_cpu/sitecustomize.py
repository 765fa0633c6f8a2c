"""Let Ray place vLLM's CPU workers, for tests: it counts each of them as a GPU of its node.

Python runs this at the start of every process that has the folder on its path, Ray's actors among them.
vLLM refuses Ray on CPUs because Ray has no name for them that a placement group could ask for; the
platform is looked at before an actor loads any plugin.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder


class CpuPlatformFinder(MetaPathFinder):
    """Finds the module as Python does, and gives the platform a name for Ray once it is loaded."""

    MODULE = "vllm.platforms.cpu"

    def find_spec(self, name, path, target=None):
        if name != self.MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_name(module):
            load(module)
            module.CpuPlatform.ray_device_key = "GPU"

        spec.loader.exec_module = load_and_name
        return spec


sys.meta_path.insert(0, CpuPlatformFinder())
