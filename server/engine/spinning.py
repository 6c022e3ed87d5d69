"""Old name of `server.engine.cpu_threads`, until nothing imports it."""

from server.engine.cpu_threads import limit_spin_count

bound_spinning = limit_spin_count
