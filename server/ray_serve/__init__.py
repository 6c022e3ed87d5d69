"""Many engines behind one HTTP API, on Ray Serve. Only `app.py` and `engines.py` import Ray."""
