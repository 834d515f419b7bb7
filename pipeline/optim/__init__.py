"""Optimizers, Muon, SAM, weight averaging and schedules. Imports distributed/, settings/ and common/."""
