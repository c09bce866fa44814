"""Step rejection fine-tuning: label the steps of agent trajectories, weight them, pack them."""

__version__ = "0.1.0"
