"""Parts of `gpu_session.py`."""
