"""What a live process is: read from the kernel, whoever made it, and judged.

`inspect` tells of one process, `survey` of all of this host. Nothing here needs ringfence to have started it.
"""

from ringfence.observe.inspection import Inspection, inspect
from ringfence.observe.survey import Group, survey

__all__ = ["Group", "Inspection", "inspect", "survey"]
