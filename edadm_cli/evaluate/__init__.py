"""An export's quality: against real images, its prompts, and full precision of the same seeds."""
