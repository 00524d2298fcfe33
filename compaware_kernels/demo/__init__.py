"""``compaware demo``: the main job from data to report."""
