"""Networks and mathematics of Paella: nothing of HTTP, queues or processes."""
