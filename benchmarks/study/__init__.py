"""What the programs of the two studies, `learner.py` and `emoji.py`, share."""
