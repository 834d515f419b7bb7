"""Optimizers and what surrounds a step: Muon, SAM, moving averages, schedules. It imports distributed, settings and common."""
