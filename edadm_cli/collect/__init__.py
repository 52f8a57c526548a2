"""Full-precision trajectories, their conditioning, and the mid-block features that tell the steps apart."""
