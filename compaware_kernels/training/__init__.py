"""ck.ProximalStep: the proximal operators attached to any torch optimizer."""
