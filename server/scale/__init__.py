"""Many engines behind one HTTP API, on Ray Serve. What knows of Ray is `server/ray_app.py` and `remote.py`; the rest runs without it."""
