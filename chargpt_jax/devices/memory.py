"""How much memory a device has left."""

import jax
import psutil
from jax.sharding import Mesh


def free_bytes(mesh: Mesh) -> int:
    """Return the free memory of each device of a mesh that this process uses, the least of them, bytes.

    CPU devices share the memory of the machine evenly. A device that does not report its memory counts like them.
    """
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    found = []
    for device in local:
        stats = (device.memory_stats() if device.platform != "cpu" else None) or {}
        if "bytes_limit" in stats:
            found.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min(found) if found else psutil.virtual_memory().available // max(1, len(local))
